"""How much CPU time QEMU's threads got, and how long they waited for a CPU.

The kernel counts both for each thread, in ns (/proc/PID/task/TID/schedstat).  They are read at the
beginning and at the end of what is measured, and what lies between is the difference of two
readings.  The CPU time of the whole process, which includes threads that have ended, is read with
them.

A thread takes its counts along when it ends, and the threads that take a snapshot end with it.  So
all threads are looked at every 10 ms meanwhile.  What a thread used after the last look at it is
known from the process's total only: together for all threads that ended, as one row `ended`, so
that the rows of a window add up to the CPU time of the process.  How long such a thread waited
after the last look is lost.

QEMU names its threads when it is asked to, as the lab does.  Its RCU thread may begin earlier than
that is known, and then has the name of the process.

Known bias: the kernel adds to a running thread's CPU time at least once a tick (4 ms with 250 Hz),
not continuously; a thread that runs at the instant of a reading has up to a tick less than it
used.  Waiting counts when it is over.  Time that a hypervisor below this host took away is in
the CPU time where the host does not know of it.

What it costs: a short read a thread every 10 ms, in a thread of this process.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import pandas as pd

from lab.column import Column, Metric
from lab.instruments.instrument import WINDOWS, Found, Instrument, Moment, Step, Taken, Watched

log = logging.getLogger(__name__)

TABLE = (
    Column(
        "window",
        "text",
        "",
        "`before`: from a second before the request; `during`: request until completion, "
        "of an ordinary migration until the guest runs on",
    ),
    Column(
        "thread",
        "text",
        "",
        "`vCPU` and its index, `main loop`, `snapshot thread`, `fault thread`, QEMU's "
        "own name of any other; `ended`: all threads that ended, after the last look at "
        "each",
    ),
    Column("tid", "int64", "", "the host's id of the thread; NA for `ended`"),
    Column("cpu_ns", "int64", "ns", "CPU time"),
    Column(
        "wait_ns",
        "int64",
        "ns",
        "how long it could have run and waited for a CPU; NA for `ended`",
    ),
    Column("window_ns", "int64", "ns", "length of the window"),
)
COLUMNS = tuple(column.name for column in TABLE)

METRICS = (
    Metric(
        "qemu_cpu_ms",
        "float64",
        "ms",
        "CPU time of QEMU's threads other than vCPUs, in the window `during` of the threads; "
        "null when nobody looked at them",
        title="QEMU CPU ms",
    ),
    Metric(
        "vcpu_wait_ms",
        "float64",
        "ms",
        "how long vCPUs could have run and waited for a CPU of the host meanwhile, summed over "
        "vCPUs; null likewise",
        title="vCPU wait ms",
    ),
)


INTERVAL_NS = 10_000_000

ENDED = "ended"
"""What the rows are called that no single thread is known for."""

_ROLES = {"mig/snapshot": "snapshot thread", "snapshot-fault": "fault thread"}
_VCPU = "vCPU "

# A thread begins with the name of the one that made it, and is renamed soon after.
_LOOKS_FOR_NAME = 3
# A tick that falls between the first and the last read of a reading makes it inconsistent.
_TRIES = 5


@dataclass(frozen=True)
class Spent:
    """What a thread has used since it began, as last seen."""

    cpu_ns: int
    wait_ns: int
    ended: bool


@dataclass(frozen=True)
class Reading:
    """The counts at one time, `t_ns` of CLOCK_MONOTONIC; `total_ns` is that of the process with
    the threads that have ended.
    """

    t_ns: int
    total_ns: int
    threads: Mapping[int, Spent]


def parse_schedstat(text: str) -> tuple[int, int] | None:
    """Return CPU time and waiting time in ns; None where the kernel does not count them.

    Such a kernel says 0 for everything, also how often a thread was put on a CPU.
    """
    cpu_ns, wait_ns, times = (int(word) for word in text.split())
    return (cpu_ns, wait_ns) if times else None


def process_cpu_ns(pid: int) -> int:
    """Return the CPU time of all threads that process `pid` has and had.

    :raise OSError: when the process is gone.
    """
    # How Linux encodes the clock of a process: clock_getcpuclockid(3), which Python does not have.
    return time.clock_gettime_ns((~pid << 3) | 2)


class _Thread:
    """One thread, and what was last seen of it."""

    def __init__(self, folder: Path) -> None:
        self._comm = folder / "comm"
        self._schedstat = os.open(folder / "schedstat", os.O_RDONLY | os.O_CLOEXEC)
        self._looks = 0
        self.name = ""
        self.cpu_ns = 0
        self.wait_ns = 0
        self.ended = False

    def look(self) -> None:
        if self.ended:
            return
        try:
            if self._looks < _LOOKS_FOR_NAME:
                self.name = self._comm.read_text().strip()
                self._looks += 1
            found = parse_schedstat(os.pread(self._schedstat, 128, 0).decode())
        except (FileNotFoundError, ProcessLookupError):
            self.ended = True
            self.close()
            return
        # A thread that has not been on a CPU yet has used nothing.
        self.cpu_ns, self.wait_ns = found or (0, 0)

    def close(self) -> None:
        if self._schedstat >= 0:
            os.close(self._schedstat)
            self._schedstat = -1


class ThreadTimes:
    """The times of a process's threads, looked at until the context is left.

    Where the kernel does not count them, `is_counted` is False and there is no table.

    :param pid: the QEMU process.
    :param vcpus: index of the vCPU for each thread that runs one.
    :param interval_ns: how often threads are looked at.
    :param proc: where procfs is.
    """

    def __init__(
        self,
        pid: int,
        vcpus: Mapping[int, int] | None = None,
        *,
        interval_ns: int = INTERVAL_NS,
        proc: Path = Path("/proc"),
    ) -> None:
        self._pid = pid
        self._vcpus = dict(vcpus or {})
        self._tasks = proc / str(pid) / "task"
        self._interval_ns = interval_ns
        self._threads: dict[int, _Thread] = {}
        self._looks = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        # A daemon: a restarted notebook kernel does not wait for it.
        self._looker = threading.Thread(target=self._run, name="thread times", daemon=True)
        self.readings: list[Reading] = []
        self.is_counted = False

    def __enter__(self) -> Self:
        """See whether the kernel counts, and start to look."""
        with contextlib.suppress(OSError):
            main = (self._tasks / str(self._pid) / "schedstat").read_text()
            self.is_counted = parse_schedstat(main) is not None
        if self.is_counted:
            self._looker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self.is_counted:
            self._looker.join()
        for thread in self._threads.values():
            thread.close()

    @property
    def looks(self) -> int:
        """How often the threads have been looked at."""
        return self._looks

    def read(self) -> None:
        """Append a reading; nothing where the kernel does not count or the process is gone."""
        if not self.is_counted:
            return
        with self._lock, contextlib.suppress(OSError):
            for _ in range(_TRIES):
                total_ns = process_cpu_ns(self._pid)
                t_ns = time.monotonic_ns()
                self._look()
                if process_cpu_ns(self._pid) == total_ns:
                    break
            threads = {
                tid: Spent(thread.cpu_ns, thread.wait_ns, thread.ended)
                for tid, thread in self._threads.items()
            }
            self.readings.append(Reading(t_ns, total_ns, threads))

    def df(self, windows: Sequence[str] = WINDOWS) -> pd.DataFrame | None:
        """Return what was used between the readings, one window between each two; None where the
        kernel does not count, or a reading is missing because the process was gone.

        Columns: `window` its name; `thread` vCPU and its index, `main loop`, `snapshot thread`,
        `fault thread`, QEMU's own name of any other one, or `ended`; `tid` the host's id of it,
        <NA> for `ended`; `cpu_ns` CPU time; `wait_ns` how long it was runnable and waited, <NA> for
        `ended`; `window_ns` length of the window.

        :param windows: a name for each window, oldest first.
        """
        if len(self.readings) != len(windows) + 1:
            return None
        rows: list[tuple[str, str, int | None, int, int | None, int]] = []
        for window, first, last in zip(windows, self.readings, self.readings[1:], strict=False):
            window_ns = last.t_ns - first.t_ns
            unseen_ns = last.total_ns - first.total_ns
            has_ended = False
            for tid, now in last.threads.items():
                before = first.threads.get(tid, Spent(0, 0, False))
                if before.ended:
                    continue
                cpu_ns, wait_ns = now.cpu_ns - before.cpu_ns, now.wait_ns - before.wait_ns
                rows.append((window, self._role(tid), tid, cpu_ns, wait_ns, window_ns))
                unseen_ns -= cpu_ns
                has_ended |= now.ended
            if unseen_ns or has_ended:
                rows.append((window, ENDED, None, unseen_ns, None, window_ns))
        df = pd.DataFrame(rows, columns=list(COLUMNS))
        return df.astype(
            {"tid": "Int64", "cpu_ns": "int64", "wait_ns": "Int64", "window_ns": "int64"}
        )

    def _role(self, tid: int) -> str:
        if tid in self._vcpus:
            return f"{_VCPU}{self._vcpus[tid]}"
        if tid == self._pid:
            return "main loop"
        name = self._threads[tid].name
        return _ROLES.get(name, name)

    def _run(self) -> None:
        deadline_ns = time.monotonic_ns()
        try:
            while not self._stop.is_set():
                with self._lock:
                    self._look()
                    self._looks += 1
                now_ns = time.monotonic_ns()
                behind = max(0, now_ns - deadline_ns) // self._interval_ns
                deadline_ns += (behind + 1) * self._interval_ns
                self._stop.wait(max(0, deadline_ns - time.monotonic_ns()) / 1e9)
        except OSError as error:
            log.info("looking at threads ended: %s", error)

    def _look(self) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for folder in self._tasks.iterdir():
                tid = int(folder.name)
                if tid not in self._threads:
                    # One that ends just now is in the total all the same.
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                        self._threads[tid] = _Thread(folder)
        for thread in self._threads.values():
            thread.look()


def thread_summary(threads: pd.DataFrame | None) -> dict[str, float | None]:
    """Fields qemu_cpu_ms and vcpu_wait_ms of the summary line, from the window `during`; null
    without the table.
    """
    if threads is None:
        return {"qemu_cpu_ms": None, "vcpu_wait_ms": None}
    during = threads[threads["window"] == "during"]
    vcpus = during["thread"].str.startswith(_VCPU)
    return {
        "qemu_cpu_ms": float(during.loc[~vcpus, "cpu_ns"].sum() / 1e6),
        "vcpu_wait_ms": float(during.loc[vcpus, "wait_ns"].sum() / 1e6),
    }


@contextlib.asynccontextmanager
async def timing_threads(vm: Watched) -> AsyncIterator[ThreadTimes]:
    """Look at the times of QEMU's threads while the context lasts."""
    with ThreadTimes(vm.pid, await vm.vcpu_threads()) as times:
        yield times


class ThreadsInstrument(Instrument):
    """The times of QEMU's threads, from a second before the request until the guest runs on.

    Threads are read after the guest's durations, and after an ordinary migration only when the
    guest goes on, so as not to make the pause longer.
    """

    title: ClassVar = "times of threads"
    switch: ClassVar = "time_threads"
    tables: ClassVar = {"threads": TABLE}
    metrics: ClassVar = METRICS

    times: ThreadTimes

    @contextlib.asynccontextmanager
    async def attached(self) -> AsyncIterator[None]:
        async with timing_threads(self.vm) as self.times:
            yield

    def steps(self) -> Mapping[Moment, Step]:
        return dict.fromkeys((Moment.BASELINE, Moment.REQUEST, Moment.RUNNING), self.times.read)

    def found(self, taken: Taken) -> Found:
        table = self.times.df()
        if table is None:
            unknown = "the times of QEMU's threads are unknown: the kernel does not count them"
            return Found(warnings=[unknown])
        return Found(tables={"threads": table}, figures=thread_summary(table))
