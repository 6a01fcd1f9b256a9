"""The guest's speed, seen from outside: a counter in its memory, read a thousand times a second.

The workload bumps a 64-bit word for each operation it completes.  The sampler reads that word out
of QEMU's memory with `process_vm_readv`: the guest does not exit, print or even know, and the
method is the same for every way to take a snapshot, also while the VM is stopped.

What it costs: the reads themselves, whose duration is recorded with every sample (`read_ns`), and
a thread that wakes once a millisecond.  What it can not show: anything shorter than the distance
of two samples, and why an operation took long.
"""

import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from lab.errors import GuestError, HostError
from lab.guests.protocol import PROGRESS_OPS, PROGRESS_OPS_STRIDE
from lab.host.memory import RemoteWindow
from lab.runs import columns
from lab.vm.vm import RunningVM

log = logging.getLogger(__name__)

INTERVAL_NS = 1_000_000
COLUMNS = tuple(columns.COLUMNS["progress"])
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
        """Take one sample, so that what can not work fails here, and start the thread.

        :raise HostError: when this process may not read the memory of that one.
        :raise GuestError: when there is nothing at the address.
        """
        try:
            self._window.read()
        except OSError as error:
            raise GuestError(f"the progress page can not be read: {error.strerror}") from error
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
async def sampling(vm: RunningVM, interval_us: int = 1000) -> AsyncIterator[ProgressSampler]:
    """Sample the guest's progress every `interval_us` while the context lasts.

    :raise HostError: when this process may not read QEMU's memory.
    """
    address = await vm.host_address(vm.ready.progress_gpa)
    with ProgressSampler(
        vm.pid, address, threads=vm.ready.threads, interval_ns=interval_us * 1000
    ) as sampler:
        yield sampler
