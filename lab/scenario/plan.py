"""A plan: a base scenario, what is varied, and the order of its runs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from lab.errors import UsageError
from lab.scenario.dimensions import case_name, replace_dimensions
from lab.scenario.guests import GUEST_LIMITS
from lab.scenario.instruments import Instruments
from lab.scenario.machine import GuestKind, Machine
from lab.scenario.methods import Variant
from lab.scenario.scenario import Scenario
from lab.scenario.storage import Storage
from lab.scenario.workload import Workload

# Shown before the first run has been timed: boot, settle, baseline, snapshot, tail at 1 GiB.
TYPICAL_RUN_S = 11.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """What samples are taken of, and what it is called."""

    name: str
    scenario: Scenario


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure: every method with every combination of the values in `vary`.

    `vary` names parameters of `Machine`, `Workload`, `Storage` and `Instruments` as tables do, with
    the values to measure instead of the one given here.  `seed` fixes the order of cases inside the
    rounds.  `warmups` rounds come first and are marked: they are recorded but
    never counted.  `verify` adds an untimed snapshot to every boot, restores it and compares every
    byte of RAM.
    """

    methods: tuple[str, ...]
    machine: Machine = field(default_factory=Machine)
    workload: Workload = field(default_factory=Workload)
    storage: Storage = field(default_factory=Storage)
    instruments: Instruments = field(default_factory=Instruments)
    repeats: int = 5
    warmups: int = 0
    seed: int = 1
    verify: bool = False
    vary: dict[str, tuple[int | str | bool | None, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.methods:
            raise UsageError("no method to measure", "give --method")
        if len(set(self.methods)) != len(self.methods):
            raise UsageError("a method is named twice", "use --repeats for more boots of a method")
        if self.repeats < 1 or self.warmups < 0:
            raise UsageError(
                "fewer than one repeat, or a negative number of warm-ups",
                "give --repeats 1 or more",
            )
        for name, values in self.vary.items():
            if not values or len(set(values)) != len(values):
                raise UsageError(
                    f"{name} is varied over {len(values)} values, some of them twice"
                    if values
                    else f"{name} is varied over no value",
                    "name each value once",
                )
        if any(case.scenario.machine.accel == "auto" for case in self.cases()):
            raise UsageError(
                "what is measured runs under the one accelerator or the other, not under auto",
                "name tcg or kvm",
            )

    def cases(self) -> list[Case]:
        """Every case, methods outermost.  Raises UsageError when one cannot be measured."""
        found = []
        for name in self.methods:
            # Sorted, because JSON does not keep an order of keys.
            names = sorted(self.vary)
            for combination in itertools.product(*(self.vary[key] for key in names)):
                values = dict(zip(names, combination, strict=True))
                machine, workload, storage, instruments = replace_dimensions(
                    self.machine, self.workload, self.storage, self.instruments, values
                )
                scenario = Scenario(
                    machine=machine,
                    workload=workload,
                    method=name,
                    storage=storage,
                    instruments=instruments,
                )
                found.append(Case(name=case_name(name, values), scenario=scenario))
        return found

    @property
    def variants(self) -> list[Variant]:
        """QEMU binaries that the plan needs."""
        return sorted({case.scenario.variant for case in self.cases()})

    @property
    def guests(self) -> list[GuestKind]:
        """Guests that the plan boots."""
        return sorted({case.scenario.machine.guest for case in self.cases()})


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One run to come: its place in the campaign, its round and its case."""

    order: int
    round: int
    case: Case
    warmup: bool


def slots(plan: Plan) -> list[Slot]:
    """Every run of a plan in the order of measurement: the same plan gives the same order.

    Rounds count from 0; warm-up rounds come first and count from -warmups.
    """
    rng = random.Random(plan.seed)
    planned: list[Slot] = []
    for round_ in range(-plan.warmups, plan.repeats):
        cases = plan.cases()
        rng.shuffle(cases)
        for case in cases:
            planned.append(Slot(order=len(planned), round=round_, case=case, warmup=round_ < 0))
    return planned


def estimate_text(remaining_s: float) -> str:
    """Seconds as people say them."""
    if remaining_s < 90:
        return f"{remaining_s:.0f} s"
    return f"{remaining_s / 60:.0f} min"


def describe(plan: Plan) -> Sequence[str]:
    """The plan as lines for `--dry-run`."""
    machine, workload = plan.machine, plan.workload
    planned = slots(plan)
    usual = asdict(Instruments())
    left_out = [
        name for name, on in asdict(plan.instruments).items() if usual[name] and on is False
    ]
    # What is varied is named as that, below, and has no one value.
    same = {
        "ram_mib": f"{machine.ram_mib} MiB RAM",
        "vcpus": f"{machine.vcpus} vCPU",
        "accel": machine.accel,
        "guest": "" if machine.guest == Machine.guest else GUEST_LIMITS[machine.guest].title,
    }
    work = {"workload": workload.kind, "wss_mib": f"{workload.wss_mib} MiB"}
    paced = 0 if "rate_ops_per_s" in plan.vary else workload.rate_ops_per_s
    rate = 0 if "storage_mib_per_s" in plan.vary else plan.storage.storage_mib_per_s
    head = "; ".join(
        part
        for part in [
            f"{len(planned)} runs: {plan.repeats} x {len(plan.cases())} "
            + ("cases" if plan.vary else "methods")
            + (f" after {plan.warmups} warm-up rounds" if plan.warmups else ""),
            ", ".join(text for name, text in same.items() if text and name not in plan.vary),
            " ".join(text for name, text in work.items() if name not in plan.vary),
            *([f"{paced} operations/s"] if paced else []),
            *([f"image at {rate} MiB/s"] if rate else []),
            *(f"not {name}" for name in left_out if name not in plan.vary),
            *(f"{key} varied" for key in sorted(plan.vary)),
            f"about {estimate_text(TYPICAL_RUN_S * len(planned))}",
        ]
        if part
    )
    return [
        head,
        *(
            f"{s.order:03d}  round {s.round}  {s.case.name}{'  (warm-up)' if s.warmup else ''}"
            for s in planned
        ),
    ]
