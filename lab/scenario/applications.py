"""What `lab applications` measures: what a snapshot costs those who ask a server in the guest for
work, by method, in rounds of random order.
"""

import random
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lab.scenario.machine import DEBIAN, Machine
from lab.scenario.methods import METHODS, Variant
from lab.scenario.require import require, require_choice, require_int

Application = Literal[
    "redis-set",
    "redis-set-half",
    "redis-get",
    "redis-set-aof",
    "pgbench",
    "sqlite",
    "compile",
    "fio",
]
Server = Literal["redis", "postgresql", "shell"]

PORTS: Mapping[Server, int] = types.MappingProxyType(
    {"shell": 22, "redis": 6379, "postgresql": 5432}
)
"""Where the servers listen in the guest."""

CLIENTS: Mapping[Server, int] = types.MappingProxyType({"redis": 50, "postgresql": 4, "shell": 1})
"""How many usually ask."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """An application.

    :param title: what asks for what, for people.
    :param server: who is asked; `shell` works by itself, and says when it has done a step.
    """

    title: str
    server: Server


APPLICATIONS: Mapping[Application, Served] = types.MappingProxyType(
    {
        "redis-set": Served(title="Redis, SET, as fast as it can", server="redis"),
        "redis-set-half": Served(
            title="Redis, SET, at half the rate that it can do", server="redis"
        ),
        "redis-get": Served(title="Redis, GET, as fast as it can", server="redis"),
        "redis-set-aof": Served(
            title="Redis, SET with a log of writes (appendonly, everysec)", server="redis"
        ),
        "pgbench": Served(
            title="PostgreSQL, pgbench's TPC-B-like transactions, as fast as it can",
            server="postgresql",
        ),
        "sqlite": Served(
            title="SQLite, transactions of one update with a write-ahead log, each synced",
            server="shell",
        ),
        "compile": Served(title="gcc, one C file after the other", server="shell"),
        "fio": Served(
            title="fio, random writes of 4 KiB, each synced, past the guest's page cache",
            server="shell",
        ),
    }
)

NONE = "none"
BGSAVE = "redis-bgsave"
SNAPSHOT_SAVE = "snapshot-save"
LIBVIRT = "libvirt-external"

OTHER_METHODS: Mapping[str, str] = types.MappingProxyType(
    {
        NONE: "no snapshot: what the rest is compared with",
        BGSAVE: "Redis' own BGSAVE: a fork writes the data set to the guest's disk",
        SNAPSHOT_SAVE: "QEMU's internal snapshot, into the qcow2 layer, the VM stopped meanwhile",
    }
)
"""What a user would do without a method of the lab's, and no snapshot at all."""

SAME_AS: Mapping[str, str] = types.MappingProxyType({LIBVIRT: "migrate-to-file"})
"""Methods that are steps of another one: `virsh snapshot-create-as --live` with memory migrates
the running VM into a file, puts overlays on its disks while it stands still at the end, and lets it
go on, which is what the lab does for `migrate-to-file`.  It is not measured twice."""

DEFAULT_METHODS = (
    "live",
    "background",
    "migrate-to-file",
    "stop-and-copy",
    BGSAVE,
    SNAPSHOT_SAVE,
    NONE,
)
FORWARD = tuple(f"0:{port}" for port in PORTS.values())

#: Shown before the first sample has been timed.
TYPICAL_SAMPLE_S = 25.0


@dataclass(frozen=True, kw_only=True)
class ApplicationsPlan:
    """What to measure: rounds, each of which holds every method once.

    A round boots the lab's Debian once for each QEMU that its methods need.  Which QEMU comes
    first, and the order of its methods, are drawn from `seed`.

    `keys` and `value_bytes` are Redis' data set, which every load writes to or reads; `scale` is
    pgbench's, 100,000 accounts each.  `clients` 0 is what the application is usually measured with:
    50 for Redis, 4 for pgbench, 1 for what works by itself.
    """

    application: Application = field(
        default="redis-set", metadata={"help": f"one of {', '.join(APPLICATIONS)}"}
    )
    methods: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "repeatable; a method of `lab measure` "
            f"({', '.join(METHODS)}), or one of {', '.join(OTHER_METHODS)} (default: "
            f"{', '.join(DEFAULT_METHODS)}, as far as the application has them)",
            "flag": "method",
        },
    )
    rounds: int = field(default=5, metadata={"help": "rounds: samples of each method"})
    ram_mib: int = field(default=1024, metadata={"help": "guest RAM in MiB"})
    vcpus: int = field(default=2, metadata={"help": "number of vCPUs"})
    clients: int = field(default=0, metadata={"help": "connections; 0: as usual"})
    keys: int = field(default=250_000, metadata={"help": "keys of Redis"})
    value_bytes: int = field(default=100, metadata={"help": "size of each of its values"})
    scale: int = field(default=2, metadata={"help": "pgbench's scale"})
    seed: int = field(default=1, metadata={"help": "order of methods, and what loads draw"})

    def __post_init__(self) -> None:
        require_choice("application", self.application, Application)
        is_redis = self.served.server == "redis"
        if not self.methods:
            chosen = tuple(name for name in DEFAULT_METHODS if is_redis or name != BGSAVE)
            object.__setattr__(self, "methods", chosen)
        for name in self.methods:
            require(
                name not in SAME_AS,
                f"{name} is not measured by itself, as it takes the steps of "
                f"{SAME_AS.get(name, '')}",
                f"name {SAME_AS.get(name, '')}",
            )
            require(
                name in METHODS or name in OTHER_METHODS,
                f"unknown method {name!r}",
                f"choose from: {', '.join((*METHODS, *OTHER_METHODS))}",
            )
        require(
            len(set(self.methods)) == len(self.methods), "a method is named twice", "name it once"
        )
        require(
            is_redis or BGSAVE not in self.methods,
            f"{BGSAVE} is of Redis, and {self.application} is not",
            "leave it out",
        )
        require_int("rounds", self.rounds, 1, 10_000)
        require_int("clients", self.clients, 0, 1000)
        require_int("keys", self.keys, 1, 100_000_000)
        require_int("value_bytes", self.value_bytes, 1, 1 << 20)
        require_int("scale", self.scale, 1, 10_000)
        require_int("seed", self.seed, 0, (1 << 32) - 1)
        _ = self.machine  # raises for what cannot work

    @property
    def served(self) -> Served:
        """The application."""
        return APPLICATIONS[self.application]

    @property
    def connections(self) -> int:
        """How many connections ask."""
        return self.clients or CLIENTS[self.served.server]

    @property
    def machine(self) -> Machine:
        """The VM, with a port of this host for each server."""
        return Machine(
            image=(DEBIAN,), ram_mib=self.ram_mib, vcpus=self.vcpus, accel="tcg", forward=FORWARD
        )

    @property
    def variants(self) -> list[Variant]:
        """The QEMUs that are needed."""
        return sorted({variant_of(name) for name in self.methods})


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One sample to take.

    :param order: its place among all samples, from 0.
    """

    order: int
    round: int
    method: str


def variant_of(name: str) -> Variant:
    """Return the QEMU that a method is measured on: the patched one wherever that can do it."""
    return "unpatched" if name in METHODS and METHODS[name].binary == "unpatched" else "patched"


def turns(plan: ApplicationsPlan) -> list[Turn]:
    """Every sample in the order of measurement: the same plan gives the same order."""
    found: list[Turn] = []
    for round_ in range(plan.rounds):
        draw = random.Random(f"{plan.seed}/{round_}")
        variants = plan.variants
        draw.shuffle(variants)
        for variant in variants:
            names = [name for name in plan.methods if variant_of(name) == variant]
            draw.shuffle(names)
            for name in names:
                found.append(Turn(order=len(found), round=round_, method=name))
    return found


def describe(plan: ApplicationsPlan) -> Iterable[str]:
    """The plan as lines for `--dry-run`."""
    yield (
        f"{plan.served.title}: {plan.connections} connections, {plan.vcpus} vCPUs, "
        f"{plan.ram_mib} MiB; {plan.rounds} rounds, {plan.rounds * len(plan.variants)} boots; "
        f"seed {plan.seed}"
    )
    for turn in turns(plan):
        yield f"round {turn.round}: {turn.method}, {variant_of(turn.method)} QEMU"
