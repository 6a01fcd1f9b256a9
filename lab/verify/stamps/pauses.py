"""What freezing its disks adds to the pause of a VM.

Snapshots of a guest that writes to all its disks (`stamps.c`) are taken in pairs, one with its
disks frozen and one of its memory alone, in an order that is drawn.  What the pause of the first
has more than that of the second is what the disks cost.  In that are the switch to the overlays,
and what the disks have to do when the VM stops, which both have.

Not in it: what the guest feels afterwards, when its first writes to an overlay copy what is around
them, and the flush of the frozen disks, which QEMU does while the guest runs.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from lab import __version__
from lab.errors import SnapshotError
from lab.host.info import HostInfo
from lab.host.workdir import private_folder
from lab.records import Schema
from lab.session import VM
from lab.snapshot.sidecar import sidecar_path
from lab.stats import Interval, median, quantile_interval
from lab.units import NS_PER_MS
from lab.verify.stamps.guest import Case
from lab.verify.stamps.stamps import stamping

SWITCH = "switch-disks"
"""The phase in which QEMU puts the overlays on top."""


class Pair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two snapshots of one guest, one right after the other.

    `number` counts the pairs of a guest from 1; at the n-th the chain of each disk is n layers
    long.  `frozen_first` is their order.  `with_ms` and `without_ms` are the pauses with the disks
    frozen and without, from QEMU's STOP event to its RESUME event; `switch_ms` is the phase of the
    former in which the overlays are put on top.
    """

    disks: int
    number: int
    frozen_first: bool
    with_ms: float
    without_ms: float
    switch_ms: float


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pairs of one measurement, the guest without its number of disks, the build, and the host."""

    schema: str
    created_utc: str
    lab: str
    qemu: str
    seed: int
    case: Case
    host: dict[str, Any]
    pairs: tuple[Pair, ...]


SCHEMA = Schema(
    family="lab.disk-pauses",
    version=1,
    kind=Record,
    remedy="name a file that `lab disk pause` wrote",
)


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """What so many disks add to the pause.

    `added_ms` is the median over pairs of the pause with less the pause without, `interval` the
    confidence interval of that (`lab.stats.quantile_interval`); the others are medians.
    """

    disks: int
    n: int
    with_ms: float
    without_ms: float
    switch_ms: float
    added_ms: float
    interval: Interval


def added(pairs: Sequence[Pair]) -> list[Added]:
    """What the disks add, by their number."""
    found = []
    for count in sorted({pair.disks for pair in pairs}):
        those = [pair for pair in pairs if pair.disks == count]
        more = [pair.with_ms - pair.without_ms for pair in those]
        found.append(
            Added(
                disks=count,
                n=len(those),
                with_ms=median([pair.with_ms for pair in those]),
                without_ms=median([pair.without_ms for pair in those]),
                switch_ms=median([pair.switch_ms for pair in those]),
                added_ms=median(more),
                interval=quantile_interval(more),
            )
        )
    return found


async def measure_pauses(
    case: Case,
    counts: Sequence[int],
    *,
    pairs: int,
    seed: int,
    folder: Path,
    progress: Callable[[str], None] | None = None,
) -> Record:
    """Measure what freezing so many disks adds to the pause; each number has a guest of its own.

    :param case: the guest; its number of disks does not count.
    :param counts: numbers of disks.
    :param pairs: how many pairs of snapshots for each.
    :param seed: of the order of each pair.
    :param folder: for disks and images; nothing is left in it.
    :param progress: called with one line before each pair.
    :raise UsageError: no such guest.
    :raise LabError: the guest does not boot, or a snapshot cannot be taken.
    """
    rng = random.Random(seed)
    done: list[Pair] = []
    cases = [dataclasses.replace(case, disks=count) for count in counts]
    qemu = ""
    with private_folder("pauses-", folder) as work:
        for one in cases:
            async with stamping(one, work) as guest:
                binary = guest.vm.binary
                qemu = f"{binary.version} {binary.variant} ({binary.build_id})"
                for number in range(1, pairs + 1):
                    if progress is not None:
                        progress(f"disks: {one.disks}, pair {number}/{pairs}")
                    done.append(await _pair(guest.vm, one, work / "a.snap", number, rng))
    return Record(
        schema=str(SCHEMA),
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        lab=__version__,
        qemu=qemu,
        seed=seed,
        case=case,
        host=msgspec.to_builtins(HostInfo.collect()),
        pairs=tuple(done),
    )


async def _pair(vm: VM, case: Case, image: Path, number: int, rng: random.Random) -> Pair:
    order = [True, False]
    rng.shuffle(order)
    pause_ms: dict[bool, float] = {}
    switch_ms = 0.0
    for is_frozen in order:
        try:
            taken = await vm.snapshot(
                image,
                case.method,
                fault_log=False,
                progress=False,
                disks=is_frozen,
                checksums=False,
            )
        finally:
            image.unlink(missing_ok=True)
            sidecar_path(image).unlink(missing_ok=True)
        if taken.pause_ms is None:
            raise SnapshotError("the VM was not running before the snapshot")
        pause_ms[is_frozen] = taken.pause_ms
        if is_frozen:
            phases = taken.df_phases()
            switch_ns = phases.loc[phases["phase"] == SWITCH, "duration_ns"].sum()
            switch_ms = float(switch_ns) / NS_PER_MS
    return Pair(
        disks=case.disks,
        number=number,
        frozen_first=order[0],
        with_ms=pause_ms[True],
        without_ms=pause_ms[False],
        switch_ms=switch_ms,
    )
