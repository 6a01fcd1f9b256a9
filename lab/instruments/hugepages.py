"""Put the memory of a running guest into huge pages again, and what that takes.

A snapshot that protects memory by pages of 4 KiB splits the huge pages that held it, and they stay
split: the kernel's own daemon looks at a few MiB in ten seconds.  Where nobody rebuilds them, a
guest works with small pages from its first snapshot on.  Notebook `07-kvm` shows what that costs.

The kernel does it at once when it is asked to (`MADV_COLLAPSE`, since Linux 6.1), also for another
process.  It copies each piece of 2 MiB into a huge page of its own; a write to the piece waits for
that meanwhile.  A piece of which nothing is mapped stays like that; one that was only read, as
upstream's engine reads all RAM, is filled, and the process grows by it.
"""

import asyncio
import errno
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from lab.column import Metric
from lab.errors import HostError
from lab.host.memory import may_advise_others, process_madvise, process_residency
from lab.instruments.instrument import Found, Instrument, Moment, Step, Taken, Watched
from lab.units import NS_PER_MS, NS_PER_S

METRICS = (
    Metric(
        "rebuild_ms",
        "float64",
        "ms",
        "how long it took to put guest RAM into huge pages again, guest running; null unless "
        "asked for, like the next three",
        title="THP rebuild ms",
    ),
    Metric(
        "rebuilt_mib",
        "float64",
        "MiB",
        "huge pages mapped in QEMU, after that against before",
        title="THP rebuilt MiB",
    ),
    Metric(
        "rate_before_rebuild",
        "float64",
        "1",
        "rate in the second before it, after all else was recorded, as a share of the baseline",
        title="rate before rebuild %",
        scale=100.0,
    ),
    Metric(
        "rate_after_rebuild",
        "float64",
        "1",
        "rate in the second after it, likewise",
        title="rate after rebuild %",
        scale=100.0,
    ),
)


_HUGE_BYTES = 2 << 20
_MIB = 1 << 20
_MADV_COLLAPSE = 25
# One call cannot be cancelled: short ones, so that Stop is prompt.
_CALL_BYTES = 64 * _MIB
# The kernel did not get hold of a page, or of a huge one: some pieces remain as they were.
_PIECES_LEFT = (errno.EAGAIN, errno.EBUSY, errno.ENOMEM)
# Pages that nobody may put together: another size, locked, or none.
_NOT_THESE = (errno.EINVAL,)

RATE_WINDOW_NS = NS_PER_S
"""How long the guest's rate is looked at, before and after."""

SAMPLE_MARGIN_S = 0.1
"""Waited in addition, so that the windows of the rate lie within the samples."""

SUMMARY = tuple(metric.name for metric in METRICS)


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """What became of a guest's huge pages, from `start_ns` to `end_ns` of CLOCK_MONOTONIC.

    Bytes are of the whole QEMU process, as the kernel counts what it maps as huge.
    """

    start_ns: int
    end_ns: int
    before_bytes: int
    after_bytes: int


def require_rebuild() -> None:
    """See to it that this process may have the kernel rebuild the huge pages of another one.

    :raise HostError: it may not: even for a child that takes CAP_SYS_NICE, see process_madvise(2).
    """
    if not may_advise_others():
        raise _why_not(errno.EPERM)


async def rebuild_huge_pages(vm: Watched) -> Rebuilt:
    """Have the kernel put all RAM of a guest into huge pages; the guest runs on.

    :raise HostError: the kernel cannot, this process may not, or the guest's memory is none that
        is put into huge pages, as with `thp=False`.
    """
    blocks = [block for block in await vm.ram_blocks() if block.total_bytes >= _HUGE_BYTES]
    before = await asyncio.to_thread(process_residency, vm.pid)
    descriptor = os.pidfd_open(vm.pid)
    try:
        start_ns = time.monotonic_ns()
        refused = 0
        pieces = [
            (address, min(_CALL_BYTES, block.host_address + block.total_bytes - address))
            for block in blocks
            for address in range(
                block.host_address, block.host_address + block.total_bytes, _CALL_BYTES
            )
        ]
        for address, length in pieces:
            code = await asyncio.to_thread(
                process_madvise, descriptor, address, length, _MADV_COLLAPSE
            )
            refused += code in _NOT_THESE
            if code not in (0, *_PIECES_LEFT, *_NOT_THESE):
                raise _why_not(code)
        end_ns = time.monotonic_ns()
    finally:
        os.close(descriptor)
    if refused == len(pieces):
        raise HostError(
            "the kernel puts none of the guest's memory into huge pages",
            "use thp=None or thp=True and RAM that is not hugetlb, on Linux 6.1 or later",
        )
    after = await asyncio.to_thread(process_residency, vm.pid)
    return Rebuilt(
        start_ns=start_ns,
        end_ns=end_ns,
        before_bytes=before.anon_huge + before.shmem_huge,
        after_bytes=after.anon_huge + after.shmem_huge,
    )


def _why_not(code: int) -> HostError:
    needed = "run as root, or with CAP_SYS_NICE"
    remedy = needed if code == errno.EPERM else "use Linux 6.1 or later"
    return HostError(f"huge pages cannot be rebuilt: {os.strerror(code)}", remedy)


def rebuild_summary(
    rebuilt: Rebuilt | None, progress: pd.DataFrame, baseline_ops_per_s: float | None
) -> dict[str, float | None]:
    """Fields rebuild_ms, rebuilt_mib, rate_before_rebuild and rate_after_rebuild of the summary
    line; null without a rebuild, and where the rate before the snapshot is not known.

    :param progress: columns t_ns and ops, from `RATE_WINDOW_NS` before the rebuild to as long
        after.
    """

    def rate(from_ns: int) -> float | None:
        if not baseline_ops_per_s:
            return None
        ends = [from_ns, from_ns + RATE_WINDOW_NS]
        ops = np.interp(ends, progress["t_ns"].to_numpy(), progress["ops"].to_numpy())
        return float((ops[1] - ops[0]) / RATE_WINDOW_NS * NS_PER_S / baseline_ops_per_s)

    if rebuilt is None:
        return dict.fromkeys(SUMMARY)
    return {
        "rebuild_ms": (rebuilt.end_ns - rebuilt.start_ns) / NS_PER_MS,
        "rebuilt_mib": (rebuilt.after_bytes - rebuilt.before_bytes) / _MIB,
        "rate_before_rebuild": rate(rebuilt.start_ns - RATE_WINDOW_NS),
        "rate_after_rebuild": rate(rebuilt.end_ns),
    }


class HugePagesInstrument(Instrument):
    """The rebuild of what the snapshot split, and what it is worth: the last that is done."""

    title: ClassVar = "huge pages"
    switch: ClassVar = "rebuild_huge_pages"
    metrics: ClassVar = METRICS

    rebuilt: Rebuilt

    @classmethod
    def require(cls) -> None:
        require_rebuild()

    def steps(self) -> Mapping[Moment, Step]:
        return {Moment.LAST: self._rebuild}

    async def _rebuild(self) -> None:
        window_s = RATE_WINDOW_NS / NS_PER_S + SAMPLE_MARGIN_S
        await asyncio.sleep(window_s)
        self.rebuilt = await rebuild_huge_pages(self.vm)
        await asyncio.sleep(window_s)

    def found(self, taken: Taken) -> Found:
        baseline = taken.baseline_ops_per_s
        return Found(figures=rebuild_summary(self.rebuilt, taken.progress, baseline))
