"""Random guests and snapshots of them, each from one number.

A seed gives a `Trial`: a machine, its workload, and a few snapshots to take of it one after
another in one QEMU, by different methods.  Each parameter is drawn by a generator of its own, so
that a parameter that is added to the lab does not change what a seed gives for the others.  What
is drawn may not go together, or not be possible on this host; `_reconcile` then takes the nearest
that is.

What makes a trial simpler stands in `SIMPLER`: a trial that fails is simplified as long as it does
(`lab.shrink`), and the seed with the names of what was simplified gives it again.

What is drawn for a machine stands in `MACHINE`, by field.  A new field of `Machine` is drawn once
it is listed there, and `_reconcile` knows what it does not go together with.
"""

import random
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lab.errors import UsageError
from lab.scenario import (
    DEFAULT_CHUNK_KIB,
    MAPPED_RAM,
    METHODS,
    PAGE_KIB,
    RAM_RESERVE_MIB,
    Accel,
    DiskAio,
    DiskCache,
    GuestKind,
    Machine,
    Method,
    RamKind,
    Variant,
    Workload,
    WorkloadKind,
    method,
)

_T = TypeVar("_T")

# Small, because every byte is copied, restored and compared; what is in them is varied enough.
RAM_MIB = (128, 192, 256)
MAX_RAM_MIB = max(RAM_MIB)

MACHINE: Mapping[str, Sequence[Any]] = {
    "ram_mib": RAM_MIB,
    "vcpus": (1, 2, 3, 4),
    "ram_kind": typing.get_args(RamKind),
    "thp": (None, True, False),
    "disk": ("none", "ide", "virtio", "virtio"),
    "disk_cache": typing.get_args(DiskCache),
    "disk_aio": typing.get_args(DiskAio),
    "disk_iothread": (False, True),
    "net": (False, True),
    "vnc": (False, True),
    "balloon": (False, True),
}

WORKLOAD: Mapping[str, Sequence[Any]] = {
    # Those that there were first; the later ones are LATER_KINDS.
    "kind": ("idle", "sequential", "random", "scattered"),
    "wss_mib": (4, 16, 32, 64),
    "threads": (1, 2, 4),
    "time_writes": (False, False, True),
}

LATER_KINDS: tuple[WorkloadKind | None, ...] = (
    *(None,) * 4,
    *("zipf", "hotcold", "readmostly", "allocate"),
)
"""What replaces the kind that was drawn, in half of the trials: a longer list of kinds would have
changed what every seed gives."""

MICRO: Mapping[str, Sequence[Any]] = {"page_kib": PAGE_KIB, "rate_ops_per_s": (0, 0, 5000)}
"""What is drawn for the microguest besides."""

# Sizes of the engine `copy`, which only the patched QEMU has.
FAULT_AROUND_PAGES = (0, 0, 1, 16, 64, 256)
"""How many pages a fault takes along; 0 lets the engine choose."""
CHUNK_KIB = (256, 2048, 2048, 8192)
BUFFER_MIB = (4, 8, 32)
"""No less: a chunk and what a fault takes, which with huge pages is 2 MiB each, have to fit."""

# The unpatched QEMU is the peer, not what is tried out here.
VARIANTS: tuple[Variant, ...] = ("patched",) * 7 + ("unpatched",)
COPY_WEIGHT = 3
"""How often the engine `copy` is drawn for once another: it has most to go wrong."""
SHOTS = (1, 2, 3, 4)
CHANNELS = (1, 2, 4)
BALLOON_MIB = (0, 8, 32)
"""How much the balloon takes while the rest of RAM is being saved, of a machine that has one."""
RESET = (False,) * 9 + (True,)
"""Whether the machine is reset, and the guest taken while it boots."""

SIMPLER: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = {
    "devices": (
        {"disk": "none", "net": False, "vnc": False, "balloon": False},
        {},
        {"balloon_mib": 0},
    ),
    "reset": ({}, {}, {"reset": False}),
    "vcpus": ({"vcpus": 1}, {"threads": 1}, {}),
    "workload": ({}, {"kind": "random", "time_writes": False, "rate_ops_per_s": 0}, {}),
    "page-size": ({}, {"page_kib": PAGE_KIB[0]}, {}),
    "ram-kind": ({"ram_kind": "anon"}, {}, {}),
    "thp": ({"thp": False}, {}, {}),
    "size": ({"ram_mib": RAM_MIB[0]}, {"wss_mib": 16}, {}),
    "engine-sizes": ({}, {}, {"buffer_mib": max(BUFFER_MIB)}),
    "fault-log": ({}, {}, {"log_faults": False}),
    "channels": ({}, {}, {"channels": 1}),
}
"""What replaces what was drawn for the machine, the workload, and each snapshot."""

# The guest refuses a working set that leaves it less; more than a `Scenario` asks for, because
# every vCPU and every page of the working set takes some for itself.
_GUEST_RESERVE_MIB = RAM_RESERVE_MIB["linux"] + 16

_PAGE_KIB = 4
_DENSE_GROUP_PAGES = 64


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What this host can do of what may be drawn."""

    ram_kinds: frozenset[str] = frozenset(typing.get_args(RamKind))
    thp: bool = True
    """Transparent huge pages for anonymous memory."""
    shmem_thp: bool = True
    """And for shared memory."""
    direct_io: bool = True
    """Where images are written."""
    disk_direct_io: bool = True
    """And where the scratch disks are."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to draw from: all of it by default.

    Raises `UsageError` for names that there are not.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    ram_kinds: tuple[str, ...] = typing.get_args(RamKind)
    guest: GuestKind = "linux"
    """Not drawn, like the next: a guest under KVM is not everywhere, and another one is another
    test."""
    accel: Accel = "tcg"
    only_shot: int = 0
    """Of a guest's snapshots take the one of this number, from 1, and no other; 0 takes all."""
    simplify: tuple[str, ...] = ()
    """Names out of `SIMPLER`."""

    def __post_init__(self) -> None:
        for name in self.simplify:
            if name not in SIMPLER:
                raise UsageError(
                    f"nothing to simplify is called {name!r}", f"choose from: {', '.join(SIMPLER)}"
                )
        if self.only_shot < 0:
            raise UsageError(f"a snapshot of number {self.only_shot}", "count from 1")
        if self.guest not in typing.get_args(GuestKind) or self.accel not in ("tcg", "kvm"):
            raise UsageError(
                f"a guest {self.guest!r} under {self.accel!r}",
                "choose linux or micro, and tcg or kvm",
            )
        for name in self.methods:
            method(name)
        for kind in self.ram_kinds:
            if kind not in typing.get_args(RamKind):
                raise UsageError(
                    f"unknown ram_kind {kind!r}",
                    f"choose from: {', '.join(typing.get_args(RamKind))}",
                )
        if not self.methods or not self.ram_kinds:
            raise UsageError("nothing to draw from", "name a method and a ram_kind, or leave both")


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One snapshot of a guest.

    `buffer_mib` is the copy buffer's size, `log_faults` whether QEMU logs them, and `channels` how
    many threads restore the image.  `balloon_mib` is what the balloon is told to take as soon as
    the guest goes on, and `reset` whether the guest is reset first, and so taken while it boots.
    """

    method: str
    buffer_mib: int
    log_faults: bool
    channels: int
    balloon_mib: int
    reset: bool


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One guest and the snapshots to take of it, in order."""

    seed: int
    machine: Machine
    workload: Workload
    variant: Variant
    shots: tuple[Shot, ...]


class _Draft:
    """What was drawn, by name, from a generator for each name."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def draw(self, name: str, values: Sequence[_T]) -> _T:
        # Of text Python makes the same state everywhere and for ever.
        return random.Random(f"{self.seed}/{name}").choice(values)

    def draw_all(self, values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        return {name: self.draw(name, choices) for name, choices in values.items()}


def draw(seed: int, choice: Choice | None = None, offer: Offer | None = None) -> Trial:
    """Return the trial that `seed` gives: the same one for the same arguments."""
    choice, offer = choice or Choice(), offer or Offer()
    draft = _Draft(seed)
    machine = draft.draw_all({**MACHINE, "ram_kind": choice.ram_kinds})
    machine |= {"guest": choice.guest, "accel": choice.accel}
    workload = draft.draw_all(WORKLOAD)
    workload["kind"] = draft.draw("kind 2", LATER_KINDS) or workload["kind"]
    workload["seed"] = draft.draw("workload seed", range(1, 1 << 32))
    if choice.guest == "micro":
        workload |= draft.draw_all(MICRO)
    variants = [
        variant
        for variant in VARIANTS
        if any(METHODS[name].runs_on(variant) for name in choice.methods)
    ]
    variant = draft.draw("variant", variants)
    possible = [
        name
        for name in choice.methods
        if METHODS[name].runs_on(variant)
        for _ in range(COPY_WEIGHT if METHODS[name].engine == "copy" else 1)
    ]
    sizes = {
        "fault_around_pages": draft.draw("fault around", FAULT_AROUND_PAGES),
        "chunk_kib": draft.draw("chunk", CHUNK_KIB),
    }
    shots: list[dict[str, Any]] = [
        {
            "method": draft.draw(f"method {index}", possible),
            "buffer_mib": draft.draw(f"buffer {index}", BUFFER_MIB),
            "log_faults": draft.draw(f"log {index}", (False, True)),
            "channels": draft.draw(f"channels {index}", CHANNELS),
            "balloon_mib": draft.draw(f"balloon {index}", BALLOON_MIB),
            "reset": draft.draw(f"reset {index}", RESET),
        }
        for index in range(draft.draw("shots", SHOTS))
    ]
    if choice.only_shot:
        if choice.only_shot > len(shots):
            raise UsageError(
                f"seed {seed} gives {len(shots)} snapshots, and not one of number "
                f"{choice.only_shot}",
                "name a seed and a snapshot that a soak has reported",
            )
        shots = [shots[choice.only_shot - 1]]
    for name in choice.simplify:
        _simplify(name, machine, workload, sizes, shots)
    _reconcile(machine, workload, variant, sizes, shots, offer)
    return Trial(
        seed=seed,
        machine=Machine(**machine),
        workload=Workload(**workload),
        variant=variant,
        shots=tuple(Shot(**shot) for shot in shots),
    )


def _simplify(
    name: str,
    machine: dict[str, Any],
    workload: dict[str, Any],
    sizes: dict[str, int],
    shots: list[dict[str, Any]],
) -> None:
    """Replace what was drawn by what is simpler, in place, where it was drawn at all."""
    for_machine, for_workload, for_shots = SIMPLER[name]
    machine |= for_machine
    workload |= {field: value for field, value in for_workload.items() if field in workload}
    for shot in shots:
        shot |= for_shots
    if name == "engine-sizes":
        sizes |= {"fault_around_pages": 0, "chunk_kib": DEFAULT_CHUNK_KIB}


def _reconcile(
    machine: dict[str, Any],
    workload: dict[str, Any],
    variant: Variant,
    sizes: dict[str, int],
    shots: list[dict[str, Any]],
    offer: Offer,
) -> None:
    """Turn what was drawn into what goes together here, in place."""
    if machine["ram_kind"] not in offer.ram_kinds:
        machine["ram_kind"] = "memfd"
    huge = machine["ram_kind"] == "hugetlb"
    thp = offer.thp if machine["ram_kind"] == "anon" else offer.shmem_thp and not huge
    if machine["thp"] and not thp:
        machine["thp"] = None
    if machine["guest"] == "micro":
        _reconcile_micro(machine, workload)
    _reconcile_disk(machine, offer)
    # The guest takes memory for the working set when idle, too.
    room_mib = machine["ram_mib"] - _GUEST_RESERVE_MIB
    workload["wss_mib"] = min(workload["wss_mib"], room_mib)
    if workload["kind"] == "idle":
        workload["time_writes"] = False
    if variant == "unpatched":
        # Known faults of upstream's, which the series repairs: a disk's interrupt may be lost when
        # its I/O thread is stopped, and what firmware has QEMU write to ROMs is in the image.
        machine["disk_iothread"] = False
        for shot in shots:
            shot["reset"] = False
        sizes = {"fault_around_pages": 0, "chunk_kib": DEFAULT_CHUNK_KIB}
    else:
        most = sizes["chunk_kib"] // _PAGE_KIB
        sizes["fault_around_pages"] = min(sizes["fault_around_pages"], most)
    machine |= sizes
    needed_mib = _buffer_needed_mib(huge=huge, **sizes)
    spare_mib = room_mib - workload["wss_mib"] if machine["balloon"] else 0
    for shot in shots:
        _reconcile_shot(shot, needed_mib, spare_mib, offer)


def _reconcile_micro(machine: dict[str, Any], workload: dict[str, Any]) -> None:
    machine |= {"disk": "none", "net": False, "vnc": False, "balloon": False}
    workload["threads"] = min(workload["threads"], machine["vcpus"])
    if workload["kind"] == "allocate":
        workload["kind"] = "random"
    if workload["kind"] == "idle":
        workload["rate_ops_per_s"] = 0


def _reconcile_disk(machine: dict[str, Any], offer: Offer) -> None:
    if machine["disk"] == "none":
        machine |= {"disk_cache": "writeback", "disk_aio": "threads", "disk_iothread": False}
    if not offer.disk_direct_io:
        machine["disk_cache"] = "writeback"
    if machine["disk_cache"] != "none":
        machine["disk_aio"] = "threads"
    if machine["disk"] != "virtio":
        machine["disk_iothread"] = False


def _buffer_needed_mib(*, huge: bool, fault_around_pages: int, chunk_kib: int) -> int:
    group_kib = max(fault_around_pages, _DENSE_GROUP_PAGES) * _PAGE_KIB
    if huge:
        chunk_kib, group_kib = max(chunk_kib, 2048), max(group_kib, 2048)
    return next(mib for mib in (*BUFFER_MIB, 64) if mib << 10 >= chunk_kib + group_kib)


def _reconcile_shot(shot: dict[str, Any], needed_mib: int, spare_mib: int, offer: Offer) -> None:
    if METHODS[shot["method"]].direct_io and not offer.direct_io:
        shot["method"] = "live-mapped"
    how: Method = METHODS[shot["method"]]
    shot["buffer_mib"] = max(shot["buffer_mib"], needed_mib)
    if MAPPED_RAM not in how.capabilities:
        shot["channels"] = 1
    shot["balloon_mib"] = min(shot["balloon_mib"], spare_mib)
    shot["log_faults"] = shot["log_faults"] and how.mechanism == "background"
