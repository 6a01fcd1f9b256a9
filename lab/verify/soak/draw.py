"""Random guests and snapshots of them, each from one number.

A seed gives a `Trial`: a machine, its workload, and a few snapshots to take of it one after
another in one QEMU, by different methods.  Each parameter is drawn by a generator of its own, so
that a parameter that is added to the lab does not change what a seed gives for the others.  What
is drawn may not go together, or not be possible on this host; `_reconcile` then takes the nearest
that is.

What makes a trial simpler stands in `SIMPLER`: a trial that fails is simplified as long as it does
(`lab.verify.soak.shrink`), and the seed with the names of what was simplified gives it again.

What is drawn for a machine stands in `MACHINE`, by field.  A new field of `Machine` is drawn once
it is listed there, and `_reconcile` knows what it does not go together with.  What is never drawn,
and why, stands in `NEVER_DRAWN`.
"""

import itertools
import random
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lab.errors import UsageError
from lab.scenario.engines import DEFAULT_CHUNK_KIB, Sizes
from lab.scenario.guests import GUEST_LIMITS, LabGuest
from lab.scenario.machine import (
    GUEST_DEVICES,
    RAM_RESERVE_MIB,
    THREADED_DISKS,
    Accel,
    Chipset,
    DiskAio,
    DiskCache,
    Machine,
    RamKind,
)
from lab.scenario.methods import METHODS, Method, Variant, method
from lab.scenario.workload import PAGE_KIB, Workload, WorkloadKind

_T = TypeVar("_T")

VERSION = 4
"""Of what a seed gives.  It rises whenever some seed gives another trial than before, so that a
record or a command of an earlier version is not taken for what it can no longer repeat."""

GuestChoice = Literal[LabGuest, "any"]
RunState = Literal["running", "paused", "prelaunch"]

# Small, because every byte is copied, restored and compared; what is in them is varied enough.
RAM_MIB = (128, 192, 256)
MAX_RAM_MIB = max(RAM_MIB)
LARGE_RAM_MIB = 3840
"""Now and then so much, of which a part is above the first 4 GiB of addresses on either chipset.
It takes seconds to compare, although nearly nothing of it was ever written."""
LARGE = (False,) * 29 + (True,)
LARGE_RAM_KINDS = ("anon", "memfd", "file")
"""Private mappings of files are read into memory in full, and huge pages are reserved in full."""

GUESTS: tuple[tuple[LabGuest, Accel], ...] = (
    *(("linux", "tcg"),) * 2,
    ("linux", "kvm"),
    ("micro", "tcg"),
    *(("micro", "kvm"),) * 2,
)
"""What runs in a guest, and under what, when both are drawn."""

CHIPSETS: tuple[Chipset, ...] = ("pc", "pc", "q35")

MACHINE: Mapping[str, Sequence[Any]] = {
    "ram_mib": RAM_MIB,
    "vcpus": (1, 2, 3, 4),
    "ram_kind": typing.get_args(RamKind),
    "thp": (None, True, False),
    "chipset": CHIPSETS,
    "disk": ("none", "ide", "virtio", "virtio", "scsi", "scsi"),
    "disk_cache": typing.get_args(DiskCache),
    "disk_aio": typing.get_args(DiskAio),
    "disk_iothread": (False, True),
    "net": (False, True),
    "vnc": (False, True),
    "balloon": (False, True),
    "balloon_reporting": (False, True),
    "flash": (False, False, True),
    "undriven": (False, False, True),
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
SHOTS = (1, 2, 3, 4, 4)
CHANNELS = (1, 2, 4)
BALLOON_MIB = (0, 8, 32)
"""How much the balloon takes while the rest of RAM is being saved, of a machine that has one."""
RESET = (False,) * 9 + (True,)
"""Whether the machine is reset, and the guest taken while it boots."""
RUN_STATES: tuple[RunState, ...] = (*("running",) * 10, "paused", "prelaunch")
"""What state the guest is taken in.  `prelaunch` is that of one that was stopped and reset."""
RESTORED = (False, False, False, True)
"""Whether the guest is first replaced by what the snapshot before restores."""
CHAIN = (False,) * 7 + (True,)
"""Whether it is before each of its snapshots: one generation after the other."""
KEEP = (False, False, True)
"""Whether images stay on the disk, and guests that were replaced go on running, to the end."""
KSM = (False,) * 7 + (True,)
"""Whether the kernel merges equal pages meanwhile, as fast as it can."""
PRESSURE = (False,) * 7 + (True,)
"""Whether QEMU may have less memory than it uses, so that the kernel swaps some of it out."""

NEVER_DRAWN: Mapping[str, str] = types.MappingProxyType(
    {
        "devices that other processes serve (vhost-user, vDPA, nvme://, shared RAM files)": (
            "they write to memory past QEMU, so that a live snapshot of them is refused"
        ),
        "a q35 with its own AHCI disk": "the guest's kernel has no driver for it",
        "RAM above 4 GiB with the microguest, or with private files or huge pages": (
            "the former has no use for it, the latter allocate all of it"
        ),
        "the microguest going on from an image of while it booted": (
            "it measures its timer then, and refuses to run where time is missing"
        ),
        "huge pages of 1 GiB": "few hosts can reserve one",
        "PCI passthrough (VFIO), a TPM, USB, sound, a second disk": (
            "the lab's QEMU is built without them"
        ),
        "the run states io-error, debug, watchdog, guest-panicked, suspended and the like": (
            "each takes an arrangement of its own, which the tests make"
        ),
        "hotplug of devices, CPUs or memory": "QEMU refuses it during a snapshot",
        "a disk for images that is slow, full or does not answer": "the tests of failures have it",
        "a guest other than the lab's": "its memory could not be checked against a replay",
        "flash, a reset, or an I/O thread with the unpatched QEMU": (
            "known faults of it, which the patches repair"
        ),
    }
)
"""What no seed gives, and why."""

SIMPLER: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = {
    "ksm": ({}, {}, {}),
    "pressure": ({}, {}, {}),
    "keep": ({}, {}, {}),
    "generations": ({}, {}, {"restored": False}),
    "run-state": ({}, {}, {"state": "running"}),
    "devices": (
        {
            "disk": "none",
            "net": False,
            "vnc": False,
            "balloon": False,
            "balloon_reporting": False,
            "flash": False,
            "undriven": False,
        },
        {},
        {"balloon_mib": 0},
    ),
    "chipset": ({"chipset": "pc"}, {}, {}),
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
"""What replaces what was drawn for the machine, the workload, and each snapshot; those that replace
nothing are of the trial as a whole.  What keeps something else from being drawn comes before it."""

# The guest refuses a working set that leaves it less; more than a `Scenario` asks for, because
# every vCPU and every page of the working set takes some for itself.
_GUEST_RESERVE_MIB = RAM_RESERVE_MIB["linux"] + 16

_PAGE_KIB = 4


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What this host can do of what may be drawn."""

    ram_kinds: frozenset[str] = frozenset(typing.get_args(RamKind))
    thp_kinds: frozenset[str] = frozenset({"anon", "memfd", "file"})
    """In which kinds of RAM transparent huge pages can arise."""
    direct_io: bool = True
    """Where images are written."""
    disk_direct_io: bool = True
    """And where the scratch disks are."""
    large_ram: bool = True
    """Memory for two guests of `LARGE_RAM_MIB`."""
    flash: bool = True
    """Firmware to put there."""
    ksm: bool = True
    """Permission to have it merge pages."""
    pressure: bool = True
    """Swap, and permission to limit QEMU's memory."""
    kvm_guests: frozenset[str] = frozenset(typing.get_args(LabGuest))
    """Which guests run under KVM."""
    lacking: Mapping[str, str] = field(default_factory=dict)
    """What is not offered, and why not."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to draw from: all of it by default.

    Raises `UsageError` for names that there are not.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    ram_kinds: tuple[str, ...] = typing.get_args(RamKind)
    guest: GuestChoice = "linux"
    """Drawn only when it is "any": a guest under KVM is not everywhere, and another one is another
    test."""
    accel: Accel = "tcg"
    """Drawn only when it is "auto", which goes with any guest."""
    states: tuple[RunState, ...] = RUN_STATES
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
        accels = typing.get_args(Accel) if self.guest == "any" else ("tcg", "kvm")
        if self.guest not in typing.get_args(GuestChoice) or self.accel not in accels:
            raise UsageError(
                f"a guest {self.guest!r} under {self.accel!r}",
                "choose linux or micro, and tcg or kvm; or any, and tcg, kvm or auto",
            )
        for state in self.states:
            if state not in typing.get_args(RunState):
                raise UsageError(
                    f"unknown run state {state!r}",
                    f"choose from: {', '.join(typing.get_args(RunState))}",
                )
        for name in self.methods:
            method(name)
        for kind in self.ram_kinds:
            if kind not in typing.get_args(RamKind):
                raise UsageError(
                    f"unknown ram_kind {kind!r}",
                    f"choose from: {', '.join(typing.get_args(RamKind))}",
                )
        if not self.methods or not self.ram_kinds or not self.states:
            raise UsageError(
                "nothing to draw from", "name a method, a ram_kind and a run state, or leave them"
            )


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One snapshot of a guest.

    `buffer_mib` is the copy buffer's size, `log_faults` whether QEMU logs them, and `channels` how
    many threads restore the image.  `balloon_mib` is what the balloon is told to take as soon as
    the guest goes on, and `reset` whether the guest is reset first, and so taken while it boots.
    `state` is the run state that it is taken in, and `restored` whether the guest is first replaced
    by what the snapshot before restores.
    """

    method: str
    buffer_mib: int
    log_faults: bool
    channels: int
    balloon_mib: int
    reset: bool
    state: RunState
    restored: bool


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One guest and the snapshots to take of it, in order.

    With `keep` all images stay on the disk to the end, and a guest that was replaced by a restored
    one runs on beside it.  With `ksm` the kernel merges equal pages meanwhile, with `pressure` it
    gives QEMU less memory than that uses.
    """

    seed: int
    machine: Machine
    workload: Workload
    variant: Variant
    shots: tuple[Shot, ...]
    keep: bool
    ksm: bool
    pressure: bool


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
    if draft.draw("large", LARGE):
        machine["ram_mib"] = LARGE_RAM_MIB
    machine["guest"], machine["accel"] = _draw_guest(draft, choice, offer)
    workload = draft.draw_all(WORKLOAD)
    workload["kind"] = draft.draw("kind 2", LATER_KINDS) or workload["kind"]
    workload["seed"] = draft.draw("workload seed", range(1, 1 << 32))
    if machine["guest"] == "micro":
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
            "state": draft.draw(f"state {index}", choice.states),
            "restored": draft.draw("chain", CHAIN) or draft.draw(f"restored {index}", RESTORED),
        }
        for index in range(draft.draw("shots", SHOTS))
    ]
    whole = {
        "keep": draft.draw("keep", KEEP),
        "ksm": draft.draw("ksm", KSM) and offer.ksm,
        "pressure": draft.draw("pressure", PRESSURE) and offer.pressure,
    }
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
    whole |= dict.fromkeys(whole.keys() & set(choice.simplify), False)
    _reconcile(machine, workload, variant, sizes, shots, offer)
    return Trial(
        seed=seed,
        machine=Machine(**machine),
        workload=Workload(**workload),
        variant=variant,
        shots=tuple(Shot(**shot) for shot in shots),
        **whole,
    )


def _draw_guest(draft: _Draft, choice: Choice, offer: Offer) -> tuple[LabGuest, Accel]:
    if choice.guest != "any":
        return choice.guest, choice.accel
    pairs = [(guest, accel) for guest, accel in GUESTS if choice.accel in ("auto", accel)]
    if choice.accel == "kvm":
        # Of a host that has none for it, the boot says why not.
        pairs = [pair for pair in pairs if pair[0] in offer.kvm_guests] or pairs
    guest, accel = draft.draw("guest", pairs)
    return guest, accel if choice.accel != "auto" or guest in offer.kvm_guests else "tcg"


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
    if machine["ram_mib"] == LARGE_RAM_MIB and not _can_be_large(machine, offer):
        machine["ram_mib"] = MAX_RAM_MIB
    huge = machine["ram_kind"] == "hugetlb"
    # The unpatched QEMU does not align what is shared.
    kinds = offer.thp_kinds & ({"anon"} if variant == "unpatched" else offer.thp_kinds)
    if machine["thp"] and machine["ram_kind"] not in kinds:
        machine["thp"] = None
    _reconcile_guest(machine, workload)
    _reconcile_devices(machine, offer)
    # The guest takes memory for the working set when idle, too.
    room_mib = machine["ram_mib"] - _GUEST_RESERVE_MIB
    workload["wss_mib"] = min(workload["wss_mib"], room_mib)
    if workload["kind"] == "idle":
        workload["time_writes"] = False
    if variant == "unpatched":
        # Known faults of upstream's, which the series repairs: a disk's interrupt may be lost when
        # its I/O thread is stopped, and what firmware has QEMU write to ROMs is in the image.
        machine["disk_iothread"] = machine["flash"] = False
        # Under TCG, pages of video RAM are missing from an ordinary migration.
        machine["vnc"] = machine["vnc"] and machine["accel"] != "tcg"
        for shot in shots:
            shot["reset"] = False
        sizes = {"fault_around_pages": 0, "chunk_kib": DEFAULT_CHUNK_KIB}
    else:
        most = sizes["chunk_kib"] // _PAGE_KIB
        sizes["fault_around_pages"] = min(sizes["fault_around_pages"], most)
    machine |= sizes
    needed_kib = Sizes(**sizes).buffer_needed_kib(huge=huge)
    needed_mib = next(mib for mib in (*BUFFER_MIB, 64) if mib << 10 >= needed_kib)
    spare_mib = room_mib - workload["wss_mib"] if machine["balloon"] else 0
    shots[0]["restored"] = False
    for before, shot in itertools.pairwise(shots):
        if machine["guest"] == "micro" and before["reset"]:
            shot["restored"] = False
    for shot in shots:
        _reconcile_shot(shot, needed_mib, spare_mib, offer)
        if shot["state"] == "prelaunch" and variant == "unpatched":
            shot["state"] = "running"


def _can_be_large(machine: Mapping[str, Any], offer: Offer) -> bool:
    fits = machine["guest"] == "linux" and machine["ram_kind"] in LARGE_RAM_KINDS
    return fits and offer.large_ram


def _reconcile_guest(machine: dict[str, Any], workload: dict[str, Any]) -> None:
    limits = GUEST_LIMITS[machine["guest"]]
    for device in set(GUEST_DEVICES) - limits.drivers:
        machine[device] = "none" if device == "disk" else False
    if limits.vcpu_per_writer:
        workload["threads"] = min(workload["threads"], machine["vcpus"])
    if workload["kind"] in limits.lacks:
        workload["kind"] = "random"
    if workload["kind"] == "idle":
        workload["rate_ops_per_s"] = 0


def _reconcile_devices(machine: dict[str, Any], offer: Offer) -> None:
    if machine["disk"] == "ide":
        machine["chipset"] = "pc"
    machine["balloon_reporting"] = machine["balloon_reporting"] and machine["balloon"]
    machine["flash"] = machine["flash"] and offer.flash
    if machine["disk"] == "none":
        machine |= {"disk_cache": "writeback", "disk_aio": "threads", "disk_iothread": False}
    if not offer.disk_direct_io:
        machine["disk_cache"] = "writeback"
    if machine["disk_cache"] != "none":
        machine["disk_aio"] = "threads"
    if machine["disk"] not in THREADED_DISKS:
        machine["disk_iothread"] = False


def _reconcile_shot(shot: dict[str, Any], needed_mib: int, spare_mib: int, offer: Offer) -> None:
    if METHODS[shot["method"]].direct_io and not offer.direct_io:
        shot["method"] = "live-mapped"
    how: Method = METHODS[shot["method"]]
    shot["buffer_mib"] = max(shot["buffer_mib"], needed_mib)
    if not how.has_places:
        shot["channels"] = 1
    shot["balloon_mib"] = min(shot["balloon_mib"], spare_mib)
    shot["log_faults"] = shot["log_faults"] and how.mechanism == "background"
    if shot["state"] != "running":
        # Both happen to a guest that runs.
        shot |= {"reset": False, "balloon_mib": 0}
