"""The guest's speed, seen from outside: a counter in its memory, read a thousand times a second.

The workload bumps a 64-bit word for each operation it completes.  The sampler reads that word out
of QEMU's memory with `process_vm_readv`: the guest does not exit, print or even know, and the
method is the same for every way to take a snapshot, also while the VM is stopped.

What it costs: the reads themselves, whose duration is recorded with every sample (`read_ns`), and
a thread that wakes once a millisecond.  What it cannot show: anything shorter than the distance
of two samples, and why an operation took long.
"""

import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from lab.column import Column
from lab.errors import GuestError, HostError
from lab.guests.protocol import PROGRESS_OPS, PROGRESS_OPS_STRIDE
from lab.host.memory import RemoteWindow
from lab.instruments.instrument import Found, Instrument, Moment, Step, Taken, Watched
from lab.units import NS_PER_MS

log = logging.getLogger(__name__)

INTERVAL_NS = 1_000_000

GAP_NS = 10 * NS_PER_MS
"""A sampler that slept longer than this has not seen a shorter stall inside it."""

TABLE = (
    Column("t_ns", "int64", "ns", "CLOCK_MONOTONIC of the sample: middle of the read"),
    Column(
        "ops",
        "int64",
        "1",
        "operations completed since the guest's writers started, summed over its threads",
    ),
    Column("read_ns", "int64", "ns", "how long the read of the guest's page took"),
)
COLUMNS = tuple(column.name for column in TABLE)

_CHUNK_ROWS = 1 << 14
_WORD = 8

Rows = npt.NDArray[np.int64]


class ProgressSampler:
    """Sample a progress page until the context is left.

    The deadlines are absolute, so that a late sample does not shift those after it; deadlines that
    have passed are left out, not made up for.  Sampling ends by itself when the process is gone.

    :param pid: the QEMU process.
    :param page_address: address of the progress page in it.
    :param threads: how many of the page's counters count.
    :param interval_ns: distance of the deadlines.
    """

    def __init__(
        self, pid: int, page_address: int, *, threads: int = 1, interval_ns: int = INTERVAL_NS
    ) -> None:
        length = _WORD * (PROGRESS_OPS_STRIDE * (threads - 1) + 1)
        self._window = RemoteWindow(pid, page_address + _WORD * PROGRESS_OPS, length)
        self._counters = memoryview(self._window.buffer).cast("Q")
        self._interval_ns = interval_ns
        self._stop = threading.Event()
        self._full: list[Rows] = []
        self._open = np.empty((_CHUNK_ROWS, len(COLUMNS)), np.int64)
        self._used = 0
        # Taken when a chunk is closed and when the table is read, not for each sample.
        self._lock = threading.Lock()
        # A daemon: a restarted notebook kernel does not wait for it.
        self._thread = threading.Thread(target=self._run, name="progress sampler", daemon=True)

    def __enter__(self) -> Self:
        """Take one sample, so that what cannot work fails here, and start the thread.

        :raise HostError: when this process may not read the memory of that one.
        :raise GuestError: when there is nothing at the address.
        """
        try:
            self._window.read()
        except OSError as error:
            raise GuestError(f"the progress page cannot be read: {error.strerror}") from error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def samples(self) -> int:
        """How many samples there are."""
        with self._lock:
            return len(self._full) * _CHUNK_ROWS + self._used

    def df(self) -> pd.DataFrame:
        """Return the samples so far, oldest first; may be called while sampling.

        Columns: `t_ns` CLOCK_MONOTONIC in the middle of the read, ns; `ops` operations completed
        since the guest's writers started, summed over its threads; `read_ns` how long the read
        took, ns.  All int64.  The counters of several threads are read one after the other within
        `read_ns`, not at one instant.
        """
        with self._lock:
            rows = np.concatenate([*self._full, self._open[: self._used]])
        return pd.DataFrame({name: rows[:, i] for i, name in enumerate(COLUMNS)})

    def _run(self) -> None:
        deadline_ns = time.monotonic_ns()
        try:
            while not self._stop.is_set():
                self._sample()
                now_ns = time.monotonic_ns()
                behind = max(0, now_ns - deadline_ns) // self._interval_ns
                deadline_ns += (behind + 1) * self._interval_ns
                # Not `Event.wait`: its lock makes it wake later than a plain sleep does.
                time.sleep(max(0, deadline_ns - time.monotonic_ns()) / 1e9)
        except (OSError, HostError) as error:
            log.info("progress sampling ended: %s", error)

    def _sample(self) -> None:
        before_ns = time.monotonic_ns()
        self._window.read()
        after_ns = time.monotonic_ns()
        row = self._open[self._used]
        row[0] = (before_ns + after_ns) // 2
        row[1] = sum(self._counters[::PROGRESS_OPS_STRIDE])
        row[2] = after_ns - before_ns
        if self._used + 1 < _CHUNK_ROWS:
            self._used += 1
            return
        with self._lock:
            self._full.append(self._open)
            self._open = np.empty((_CHUNK_ROWS, len(COLUMNS)), np.int64)
            self._used = 0


@contextlib.asynccontextmanager
async def sampling(vm: Watched, interval_us: int = 1000) -> AsyncIterator[ProgressSampler]:
    """Sample the guest's progress every `interval_us` while the context lasts.

    :raise HostError: when this process may not read QEMU's memory.
    """
    address = await vm.host_address(vm.ready.progress_gpa)
    with ProgressSampler(
        vm.pid, address, threads=vm.ready.threads, interval_ns=interval_us * 1000
    ) as sampler:
        yield sampler


def sampler_warnings(
    progress: pd.DataFrame, request_ns: int, end_ns: int, gap_ns: int = GAP_NS
) -> list[str]:
    """What the sampler did not see: where two samples are more than `gap_ns` apart."""
    inside = progress[(progress["t_ns"] >= request_ns) & (progress["t_ns"] <= end_ns)]
    gaps = np.diff(inside["t_ns"].to_numpy())
    slept = int((gaps > gap_ns).sum())
    if not slept:
        return []
    longest_ms = gaps.max() / NS_PER_MS
    limit_ms = gap_ns / NS_PER_MS
    return [
        f"the progress sampler slept {slept} times over {limit_ms:g} ms, "
        f"{longest_ms:.0f} ms at most"
    ]


class ProgressInstrument(Instrument):
    """The guest's speed.  It always looks, because cost is computed from it."""

    title: ClassVar = "samples"
    switch: ClassVar = "sample_interval_us"
    tables: ClassVar = {"progress": TABLE}

    sampler: ProgressSampler
    table: pd.DataFrame
    """The samples until the old rate was back."""

    @contextlib.asynccontextmanager
    async def attached(self) -> AsyncIterator[None]:
        interval_us = self.scenario.instruments.sample_interval_us
        async with sampling(self.vm, interval_us) as self.sampler:
            yield

    def steps(self) -> Mapping[Moment, Step]:
        return {Moment.BACK: self._keep}

    def _keep(self) -> None:
        self.table = self.sampler.df()

    def since(self, first_ns: int) -> pd.DataFrame:
        """Return the table from a first instant on, and leave out what is before it."""
        self.table = self.table[self.table["t_ns"] >= first_ns].reset_index(drop=True)
        return self.table

    def found(self, taken: Taken) -> Found:
        marks = taken.marks
        gap_ns = max(GAP_NS, 3000 * self.scenario.instruments.sample_interval_us)
        last_ns = marks.back_ns or marks.end_ns
        assert marks.request_ns is not None
        assert last_ns is not None
        return Found(
            tables={"progress": self.table},
            warnings=sampler_warnings(self.table, marks.request_ns, last_ns, gap_ns),
        )
