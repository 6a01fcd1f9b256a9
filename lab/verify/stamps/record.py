"""Many cases, drawn at random, and the record of what came of them."""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from lab import __version__
from lab.errors import UsageError
from lab.host.files import write_atomically
from lab.host.info import HostInfo
from lab.records import Schema, encode
from lab.scenario.machine import DiskKind
from lab.scenario.methods import METHODS
from lab.verify.stamps.guest import Case
from lab.verify.stamps.stamps import Report, prove_case

INSTANTS_PER_CASE = 12
"""As many as one boot has."""

DISKS: tuple[DiskKind, ...] = ("virtio", "virtio", "scsi", "ide")
"""What is drawn from: virtio is what most VMs have."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cases that were drawn from one seed, and the host.

    `instants` and the like are sums over `cases`.  `seed` is that of the first; each names its own,
    from which it was drawn.
    """

    schema: str
    created_utc: str
    lab: str
    seed: int
    instants: int
    one_instant: int
    in_flight: int
    landed: int
    host: dict[str, Any]
    cases: tuple[Report, ...]


SCHEMA = Schema(
    family="lab.stamps", version=1, kind=Record, remedy="name a file that `lab stamps` wrote"
)


def draw_case(seed: int, methods: Iterable[str] = tuple(METHODS)) -> Case:
    """Return the case of a seed; the same for ever, as long as the methods are the same."""
    rng = random.Random(seed)
    disk = rng.choice(DISKS)
    cached = rng.random() < 0.2
    method = rng.choice(list(methods))
    disks = rng.choice((1, 1, 2, 3, 4))
    iothread = disk != "ide" and rng.random() < 0.5
    return Case(
        method=method,
        disks=disks,
        disk=disk,
        iothread=iothread and METHODS[method].runs_on("patched"),
        cache=rng.choice(("writeback", "none")),
        image_format=rng.choice(("raw", "qcow2")),
        cached=cached,
        sync_every=rng.choice((1, 4, 16)) if cached else rng.choice((0, 0, 1, 8)),
    )


async def prove_many(
    *,
    instants: int,
    seed: int,
    folder: Path,
    out: Path | None,
    methods: Iterable[str] = tuple(METHODS),
    minutes: float | None = None,
    clock: Callable[[], float],
    progress: Callable[[str], None] | None = None,
) -> Record:
    """Prove drawn cases until there are so many instants; the record is written after each case.

    :param folder: for disks and images; nothing is left in it.
    :param out: the record.  When it is there already, with the same seed, its cases count and the
        next ones are added.
    :param minutes: no case is begun after so long.
    :param clock: seconds, to tell how long that is.
    :raise UsageError: the file in `out` is of another seed.
    """
    cases: list[Report] = []
    if out is not None and out.exists():
        before = SCHEMA.read(out)
        if before.seed != seed:
            raise UsageError(f"{out} is of seed {before.seed}", f"use --seed {before.seed}")
        cases = list(before.cases)
    end_s = None if minutes is None else clock() + 60 * minutes
    while (left := instants - sum(one.instants for one in cases)) > 0:
        if end_s is not None and clock() > end_s:
            break
        number = cases[-1].seed + 1 if cases else seed

        def say(message: str) -> None:
            if progress is not None:
                total = sum(one.instants for one in cases)
                progress(f"{total} of {instants} instants done; {message}")

        cases.append(
            await prove_case(
                draw_case(number, methods),
                instants=min(INSTANTS_PER_CASE, left),
                seed=number,
                folder=folder,
                progress=say,
            )
        )
        if out is not None:
            write_atomically(out, encode(_record(seed, cases)))
    return _record(seed, cases)


def tally(cases: Iterable[Report]) -> list[tuple[str, int, int]]:
    """Return for each value of each parameter how many instants there were, and how many were one.

    The rows are `what`, instants, those of one instant.
    """
    total: Counter[str] = Counter()
    good: Counter[str] = Counter()
    for one in cases:
        case = one.case
        for name in (
            f"method {case.method}",
            f"{case.disks} {'disk' if case.disks == 1 else 'disks'}",
            f"{case.disk}{', iothread' if case.iothread else ''}",
            f"cache {case.cache}",
            f"{case.image_format} images",
            "through the guest's page cache" if case.cached else "past the guest's page cache",
        ):
            total[name] += one.instants
            good[name] += one.one_instant
    return [(name, total[name], good[name]) for name in sorted(total)]


def _record(seed: int, cases: list[Report]) -> Record:
    return Record(
        schema=str(SCHEMA),
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        lab=__version__,
        seed=seed,
        instants=sum(one.instants for one in cases),
        one_instant=sum(one.one_instant for one in cases),
        in_flight=sum(one.in_flight for one in cases),
        landed=sum(one.landed for one in cases),
        host=msgspec.to_builtins(HostInfo.collect()),
        cases=tuple(cases),
    )
