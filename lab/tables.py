"""Tidy tables and the figures computed from them: pure functions, no I/O.

`COLUMNS` is the data dictionary of the stored tables and `SUMMARY_FIELDS` that of the summary
line; data/README.md says the same for people, and a test holds the two together.

Progress is a list of samples (t, operations completed until t), about one a millisecond.  Between
two samples the count is taken to grow evenly; everything below is exact under that reading, with
no binning of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from lab.stats import quantile

if TYPE_CHECKING:
    from lab.run import Run

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000

BASELINE_NS = 1 * NS_PER_S
MINIMUM_WINDOW_NS = 50 * NS_PER_MS
BACK_WINDOW_NS = 200 * NS_PER_MS
BACK_SHARE = 0.95
# Less of a baseline than this is one scheduling accident, not a rate.
SHORTEST_BASELINE_NS = 200 * NS_PER_MS


class Column(NamedTuple):
    """Unit and meaning of one column."""

    unit: str
    doc: str


COLUMNS: dict[str, dict[str, Column]] = {
    "faults": {
        "seq": Column("1", "order in which the handler read the faults, from 0"),
        "gpa": Column(
            "B", "guest-physical address of the page; NA when the block is not mapped for the guest"
        ),
        "offset": Column("B", "offset of the page in its RAM block"),
        "block": Column("", "name of the RAM block"),
        "tid": Column("", "host thread that faulted; 0 when the kernel did not say"),
        "vcpu": Column("", "index of the vCPU that faulted; NA when the thread is not a vCPU"),
        "read_ns": Column("ns", "CLOCK_MONOTONIC when the handler read the fault message"),
        "taken_ns": Column(
            "ns", "CLOCK_MONOTONIC when the snapshot thread took the fault up; 0 when it did not"
        ),
        "saved_ns": Column(
            "ns",
            "CLOCK_MONOTONIC when the page was in the stream or copied aside; 0 when it was "
            "saved before",
        ),
        "released_ns": Column(
            "ns",
            "CLOCK_MONOTONIC when the unprotect call returned; 0 when another thread released "
            "the page",
        ),
        "latency_ns": Column(
            "ns", "released_ns - read_ns; NA when another thread released the page"
        ),
        "pages": Column("pages", "pages released together with this one"),
        "resolver": Column(
            "",
            "who saved the page: the sweep before the fault, the snapshot thread, the fault "
            "thread; or nobody, because the VM was yet to be paused (`not-paused`)",
        ),
        "queue_depth": Column(
            "1",
            "what waited for the snapshot thread when this one was read: faults, or with the "
            "engine `copy` pages that were copied aside",
        ),
    },
    "progress": {
        "t_ns": Column("ns", "CLOCK_MONOTONIC of the sample: middle of the read"),
        "ops": Column(
            "1", "operations completed since the guest's writers started, summed over its threads"
        ),
        "read_ns": Column("ns", "how long the read of the guest's page took"),
    },
    "write_latency": {
        "window": Column(
            "", "`before`: from a second before the request; `during`: request until completion"
        ),
        "low_ns": Column("ns", "shortest duration of an operation that is counted here"),
        "high_ns": Column("ns", "duration from which on it is counted in the next bucket"),
        "ops": Column("1", "operations that took so long, summed over the guest's writers"),
    },
    "slow_writes": {
        "thread": Column("", "index of the writer, which is that of its vCPU modulo the vCPUs"),
        "op": Column("1", "which of the writer's operations it was, from 1"),
        "offset": Column("B", "offset of its page in the guest's main RAM block"),
        "start_ns": Column("ns", "when it began, by the guest's clock, which has its own zero"),
        "latency_ns": Column("ns", "how long it took, by the same clock"),
    },
    "threads": {
        "window": Column(
            "",
            "`before`: from a second before the request; `during`: request until completion, of an "
            "ordinary migration until the guest runs on",
        ),
        "thread": Column(
            "",
            "`vCPU` and its index, `main loop`, `snapshot thread`, `fault thread`, QEMU's own name "
            "of any other; `ended`: all threads that ended, after the last look at each",
        ),
        "tid": Column("", "the host's id of the thread; NA for `ended`"),
        "cpu_ns": Column("ns", "CPU time"),
        "wait_ns": Column("ns", "how long it could have run and waited for a CPU; NA for `ended`"),
        "window_ns": Column("ns", "length of the window"),
    },
    "host_memory": {
        "reading": Column(
            "", "`before`: before the baseline; `after`: after progress was recorded to its end"
        ),
        "t_ns": Column("ns", "CLOCK_MONOTONIC at its beginning"),
        "resident_bytes": Column("B", "memory that is mapped in the QEMU process"),
        "huge_bytes": Column(
            "B", "how much of it is transparent huge pages that are mapped as such"
        ),
        "thp_split_pmd": Column(
            "1", "how often the mapping of a huge page was split, on the host since it booted"
        ),
        "thp_split_page": Column("1", "how often a huge page itself was split, likewise"),
        "page_cache_bytes": Column("B", "the host's page cache, with tmpfs and shared memory"),
        "dirty_bytes": Column("B", "what of it has yet to be written"),
    },
    "phases": {
        "phase": Column("", "name of the phase, by the engine"),
        "start_ns": Column("ns", "CLOCK_MONOTONIC at its start"),
        "end_ns": Column("ns", "CLOCK_MONOTONIC at its end"),
        "duration_ns": Column("ns", "end_ns - start_ns"),
    },
    "floor": {
        "block": Column("1", "place of the block in its run, from 0; a block is one process"),
        "benchmark": Column("", "what was measured: arm, unprotect, fault, copy, scan or write"),
        "variant": Column("", "in which way"),
        "stage": Column("", "which step of it was timed"),
        "ram_kind": Column("", "kind of memory; NA for a file"),
        "target": Column(
            "", "where a file was written: `image-dir` or `tmpfs` (/dev/shm); NA for memory"
        ),
        "pages": Column("pages", "4 KiB pages that the step handled"),
        "busy_threads": Column("1", "threads that computed meanwhile in the same process"),
        "sample": Column("1", "place of the sample among those of its block and stage, from 0"),
        "value_ns": Column(
            "ns", "how long the step took; negative where the first of two instants came later"
        ),
    },
}

SUMMARY_FIELDS: dict[str, Column] = {
    "method": Column("", "how the snapshot was taken"),
    "engine": Column("", "snapshot engine inside QEMU; null for ordinary migration"),
    "accel": Column("", "accelerator that ran the guest"),
    "guest": Column("", "what ran in it: linux, or micro, the microguest"),
    "outcome": Column(
        "",
        "ok, failed (the snapshot was not taken) or undecided (taken, but the figures or the "
        "check are not trusted)",
    ),
    "ram_mib": Column("MiB", "guest RAM"),
    "wss_mib": Column("MiB", "working set the guest writes to"),
    "vcpus": Column("1", "virtual CPUs"),
    "workload": Column("", "what the guest runs"),
    "rate_ops_per_s": Column(
        "1/s", "operations that the guest was to do in a second; 0: as many as it could"
    ),
    "disk": Column("", "scratch disk that the guest uses: none, ide, virtio or scsi"),
    "disk_cache": Column("", "its cache mode in QEMU; null without a disk, like the next two"),
    "disk_aio": Column("", "who does its I/O: QEMU's threads, or the kernel (native)"),
    "disk_iothread": Column("", "whether a thread of its own serves it"),
    "net": Column("", "whether the guest exchanges packets over a virtio network card"),
    "vnc": Column("", "whether the guest draws on a screen that is served by VNC"),
    "balloon": Column("", "whether the guest has a virtio balloon"),
    "storage_mib_per_s": Column(
        "MiB/s", "the image was written no faster than this; 0: as fast as the disk went"
    ),
    "setup_ms": Column("ms", "request until the VM is stopped, guest running: preparation"),
    "pause_ms": Column("ms", "VM stopped: QEMU's STOP event until its RESUME event"),
    "duration_ms": Column("ms", "request until QEMU reports the migration completed"),
    "image_bytes": Column("B", "size of the image file"),
    "baseline_ops_per_s": Column(
        "1/s", "guest operations a second in the second before the request"
    ),
    "lost_work_ms": Column(
        "ms", "work the guest did not do between request and back, in time at its baseline rate"
    ),
    "min_rate_50ms": Column(
        "1", "lowest rate over any 50 ms between request and completion, as a share of the baseline"
    ),
    "faults": Column(
        "1", "write faults on protected pages that the handler read; null where nothing logs them"
    ),
    "fault_p50_us": Column(
        "us", "median of latency_ns over the faults that their reader saw released"
    ),
    "fault_p99_us": Column("us", "99 % quantile of the same"),
    "fault_max_us": Column("us", "largest of the same"),
    "known_faults_logged": Column(
        "1",
        "write faults in the log that the lab itself made, to compare with the `known_faults` of "
        "the scenario; null when none were asked for",
    ),
    "pages_copied": Column(
        "1", "pages that the fault thread copied aside; null where QEMU does not count them"
    ),
    "buffer_max_bytes": Column("B", "the most that was in the copy buffer; null likewise"),
    "buffer_waits": Column(
        "1", "how often faults had to wait because the copy buffer was full; null likewise"
    ),
    "stalls": Column(
        "1",
        "guest operations between request and completion that took longer than 4 us by the "
        "guest's clock; null unless the guest timed them",
    ),
    "stall_sum_ms": Column("ms", "all of these together, summed over the guest's writers"),
    "stall_p50_us": Column("us", "median of them"),
    "stall_p99_us": Column("us", "99 % quantile of the same"),
    "stall_p999_us": Column("us", "99.9 % quantile of the same"),
    "stall_max_us": Column("us", "longest of the same"),
    "qemu_cpu_ms": Column(
        "ms",
        "CPU time of QEMU's threads other than vCPUs, in the window `during` of the threads; null "
        "when nobody looked at them",
    ),
    "vcpu_wait_ms": Column(
        "ms",
        "how long vCPUs could have run and waited for a CPU of the host meanwhile, summed over "
        "vCPUs; null likewise",
    ),
    "rss_growth_mib": Column(
        "MiB",
        "memory mapped in the QEMU process, after against before; null when nobody read it, like "
        "the next three",
    ),
    "thp_lost_mib": Column("MiB", "transparent huge pages mapped in it, before against after"),
    "thp_splits": Column(
        "1", "mappings of huge pages that were split between the readings, on the whole host"
    ),
    "page_cache_growth_mib": Column(
        "MiB", "the host's page cache with tmpfs and shared memory, after against before"
    ),
    "rebuild_ms": Column(
        "ms",
        "how long it took to put guest RAM into huge pages again, guest running; null unless asked "
        "for, like the next three",
    ),
    "rebuilt_mib": Column("MiB", "huge pages mapped in QEMU, after that against before"),
    "rate_before_rebuild": Column(
        "1", "rate in the second before it, after all else was recorded, as a share of the baseline"
    ),
    "rate_after_rebuild": Column("1", "rate in the second after it, likewise"),
    "verified": Column(
        "",
        "byte equality of every RAM block with the pause instant, in an untimed snapshot of "
        "the same boot; null when not asked for",
    ),
    "max_gap_ms": Column(
        "ms",
        "longest time between request and back without a completed operation, as the samples "
        "prove it",
    ),
    "recovery_ms": Column("ms", "completion until back"),
    "back_capped": Column(
        "",
        "true when the old rate was not seen again before the recording ended: lost_work_ms "
        "and recovery_ms are then lower bounds",
    ),
    "reason": Column("", "why the outcome is not ok; null when it is"),
}

DEVICES = ("disk", "disk_cache", "disk_aio", "disk_iothread", "net", "vnc", "balloon")
DIMENSIONS = ("method", "engine", "accel", "ram_mib", "wss_mib", "vcpus", "workload")
METRICS = (
    "setup_ms",
    "pause_ms",
    "duration_ms",
    "image_bytes",
    "baseline_ops_per_s",
    "lost_work_ms",
    "min_rate_50ms",
    "max_gap_ms",
    "recovery_ms",
    "faults",
    "fault_p50_us",
    "fault_p99_us",
    "fault_max_us",
    "known_faults_logged",
    "pages_copied",
    "buffer_max_bytes",
    "buffer_waits",
    "stalls",
    "stall_sum_ms",
    "stall_p50_us",
    "stall_p99_us",
    "stall_p999_us",
    "stall_max_us",
    "qemu_cpu_ms",
    "vcpu_wait_ms",
    "rss_growth_mib",
    "thp_lost_mib",
    "thp_splits",
    "page_cache_growth_mib",
    "rebuild_ms",
    "rebuilt_mib",
    "rate_before_rebuild",
    "rate_after_rebuild",
)

Ns = npt.NDArray[np.int64]


def _progress(df: pd.DataFrame) -> tuple[Ns, Ns]:
    return df["t_ns"].to_numpy(dtype=np.int64), df["ops"].to_numpy(dtype=np.int64)


class _Count:
    """Operations as a piecewise linear function of time, relative to an origin so that float64
    stays exact to the ns.
    """

    def __init__(self, t_ns: Ns, ops: Ns) -> None:
        if len(t_ns) != len(ops) or len(t_ns) < 2:
            raise ValueError("progress needs at least two samples")
        if np.any(np.diff(t_ns) <= 0) or np.any(np.diff(ops) < 0):
            raise ValueError("progress must have rising times and must not count down")
        self.origin = int(t_ns[0])
        self.base = int(ops[0])
        self.t = (t_ns - self.origin).astype(np.float64)
        self.ops = (ops - self.base).astype(np.float64)
        self.last = int(t_ns[-1])

    def at(self, t_ns: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.interp(np.asarray(t_ns, dtype=np.int64) - self.origin, self.t, self.ops)

    def window_candidates(self, first_ns: int, last_ns: int, width_ns: int) -> Ns:
        """Starts t in [first, last] at which ops(t + width) - ops(t) changes slope, with both
        ends.
        """
        samples = self.t.astype(np.int64) + self.origin
        starts = np.concatenate([samples, samples - width_ns])
        starts = starts[(starts > first_ns) & (starts < last_ns)]
        return np.unique(np.concatenate([[first_ns], starts, [last_ns]]).astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class Slowdown:
    """What a snapshot cost the guest, as its progress shows it.  None where the recording
    cannot say.
    """

    baseline_ops_per_s: float | None = None
    lost_work_ms: float | None = None
    min_rate_50ms: float | None = None
    max_gap_ms: float | None = None
    recovery_ms: float | None = None
    back_ns: int | None = None
    back_capped: bool | None = None


def baseline_rate(t_ns: Ns, ops: Ns, request_ns: int) -> float | None:
    """Operations a second in the second before the request (or in what was recorded of it, 200
    ms at least).
    """
    start = max(int(t_ns[0]), request_ns - BASELINE_NS)
    if request_ns - start < SHORTEST_BASELINE_NS or request_ns > int(t_ns[-1]):
        return None
    count = _Count(t_ns, ops)
    done = float(count.at(request_ns) - count.at(start))
    return done / (request_ns - start) * NS_PER_S if done > 0 else None


def find_back(t_ns: Ns, ops: Ns, end_ns: int, baseline_ops_per_s: float) -> tuple[int, bool]:
    """The first instant at or after `end_ns` from which 200 ms run at 95 % of the baseline or more.

    Returns the instant and whether it is capped: when no such instant is recorded, the last
    sample stands in.
    """
    count = _Count(t_ns, ops)
    last_start = count.last - BACK_WINDOW_NS
    if last_start < end_ns:
        return max(count.last, end_ns), True
    needed = BACK_SHARE * baseline_ops_per_s * BACK_WINDOW_NS / NS_PER_S
    starts = count.window_candidates(end_ns, last_start, BACK_WINDOW_NS)
    done = count.at(starts + BACK_WINDOW_NS) - count.at(starts)
    enough = np.flatnonzero(done >= needed)
    if len(enough) == 0:
        return count.last, True
    first = int(enough[0])
    if first == 0:
        return int(starts[0]), False
    # The window's count is linear between two candidates: solve for the crossing.
    below, above = done[first - 1], done[first]
    share = (needed - below) / (above - below)
    return int(np.ceil(starts[first - 1] + share * (starts[first] - starts[first - 1]))), False


def lowest_rate(
    t_ns: Ns, ops: Ns, start_ns: int, end_ns: int, width_ns: int = MINIMUM_WINDOW_NS
) -> float | None:
    """Operations a second in the slowest window of `width_ns` that lies between start and end.

    When start and end are closer together than the window, the one window that begins at start.
    None when the recording ends before it.
    """
    count = _Count(t_ns, ops)
    last_start = max(start_ns, end_ns - width_ns)
    if last_start + width_ns > count.last or start_ns < count.origin:
        return None
    starts = count.window_candidates(start_ns, last_start, width_ns)
    done = count.at(starts + width_ns) - count.at(starts)
    return float(done.min()) / width_ns * NS_PER_S


def longest_gap_ns(t_ns: Ns, ops: Ns, start_ns: int, end_ns: int) -> int:
    """Longest span in [start, end] over which the samples prove that no operation was completed.

    A lower bound: the true gap is longer by less than two sampling periods.  Zero when every
    sample advanced.
    """
    begins = np.concatenate([[True], np.diff(ops) > 0])
    first = np.flatnonzero(begins)
    last = np.concatenate([first[1:] - 1, [len(ops) - 1]])
    spans = np.minimum(t_ns[last], end_ns) - np.maximum(t_ns[first], start_ns)
    return max(0, int(spans.max()))


def slowdown(progress: pd.DataFrame, *, request_ns: int, end_ns: int) -> Slowdown:
    """What the snapshot between `request_ns` and `end_ns` cost the guest.

    baseline: `baseline_rate`.  back: `find_back`.  lost work: the integral over [request, back]
    of 1 - rate/baseline, in ms; negative when the guest ran faster than before.  Lowest rate:
    `lowest_rate` between request and end, as a share of the baseline.  Longest gap:
    `longest_gap_ns` between request and back.  recovery: end until back.

    Not measured: single slow operations (a sample is 1 ms, `max_gap_ms` sees stalls of all
    threads from about 2 ms on), and anything the guest's own clock would say.

    Fields are None where the recording is too short to say.
    """
    t_ns, ops = _progress(progress)
    if len(t_ns) < 2:
        return Slowdown()
    baseline = baseline_rate(t_ns, ops, request_ns)
    if baseline is None or end_ns > int(t_ns[-1]):
        return Slowdown(baseline_ops_per_s=baseline)
    back_ns, capped = find_back(t_ns, ops, end_ns, baseline)
    count = _Count(t_ns, ops)
    done = float(count.at(back_ns) - count.at(request_ns))
    lowest = lowest_rate(t_ns, ops, request_ns, end_ns)
    return Slowdown(
        baseline_ops_per_s=baseline,
        lost_work_ms=(back_ns - request_ns) / NS_PER_MS - done / baseline * 1e3,
        min_rate_50ms=None if lowest is None else lowest / baseline,
        max_gap_ms=longest_gap_ns(t_ns, ops, request_ns, back_ns) / NS_PER_MS,
        recovery_ms=(back_ns - end_ns) / NS_PER_MS,
        back_ns=back_ns,
        back_capped=capped,
    )


def with_marks(
    table: pd.DataFrame,
    *,
    method: str,
    request_ns: int | None,
    stop_ns: int | None,
    resume_ns: int | None,
    end_ns: int | None,
) -> pd.DataFrame:
    """`table` with the snapshot it is of in its `attrs`: `method` and the instants in ns.

    The columns stay what is stored; figures of one snapshot's table read the rest from there.
    """
    marked = table.copy(deep=False)
    marked.attrs = {
        "method": method,
        "request_ns": request_ns,
        "stop_ns": stop_ns,
        "resume_ns": resume_ns,
        "end_ns": end_ns,
    }
    return marked


def df_rate(
    progress: pd.DataFrame, *, request_ns: int, baseline_ops_per_s: float, bin_ms: float = 5
) -> pd.DataFrame:
    """Guest speed against time.

    Columns: ms (middle of the bin, since the request), ops_per_s, share (of the baseline).  Bins
    are aligned to the request and only whole bins are returned.  A sample is about 1 ms: bins
    under 2 ms show the sampler, not the guest.
    """
    t_ns, ops = _progress(progress)
    count = _Count(t_ns, ops)
    width = round(bin_ms * NS_PER_MS)
    first = -((request_ns - int(t_ns[0])) // width)
    last = (int(t_ns[-1]) - request_ns) // width
    edges = request_ns + np.arange(first, last + 1, dtype=np.int64) * width
    done = np.diff(count.at(edges))
    rate = done / width * NS_PER_S
    middle = (edges[:-1] + width / 2 - request_ns) / NS_PER_MS
    return pd.DataFrame({"ms": middle, "ops_per_s": rate, "share": rate / baseline_ops_per_s})


def fault_latency_ns(faults: pd.DataFrame) -> Ns:
    """Handler's-side latency of every fault whose reader saw it released: message read until
    unprotected.

    What the guest waits is longer: delivery of the fault before the message is read and the wake-
    up after it are not in it.  Faults on pages that another thread was about to release
    (released_ns 0) are left out, not counted as 0.
    """
    read = faults["read_ns"].to_numpy(dtype=np.int64)
    released = faults["released_ns"].to_numpy(dtype=np.int64)
    seen = released > 0
    latency: Ns = released[seen] - read[seen]
    return latency


def fault_summary(faults: pd.DataFrame | None) -> dict[str, float | int | None]:
    """Fields faults, fault_p50_us, fault_p99_us, fault_max_us of the summary line; null
    without a fault log.
    """
    names = ("fault_p50_us", "fault_p99_us", "fault_max_us")
    result: dict[str, float | int | None] = {"faults": None}
    for name in names:
        result[name] = None
    if faults is None:
        return result
    result["faults"] = len(faults)
    latency = fault_latency_ns(faults)
    if len(latency) > 0:
        for name, q in zip(names, (0.5, 0.99, 1.0), strict=True):
            result[name] = quantile(latency, q) / 1e3
    return result


def df_runs(runs: Iterable[Run]) -> pd.DataFrame:
    """One row a run.

    Columns: run, case, round, order, warmup, then the summary line (`SUMMARY_FIELDS`), then what
    the run set varied, as far as it is not in the summary line.  Rows in the order they were
    measured.
    """
    runs = list(runs)
    rows = [
        {
            "run": run.name,
            "case": run.case,
            "round": run.record.round,
            "order": run.record.order,
            "warmup": run.record.warmup,
        }
        | {field: run.summary.get(field) for field in SUMMARY_FIELDS}
        | {"method": run.record.method, "outcome": run.record.outcome, "reason": run.record.reason}
        | run.dimensions
        for run in runs
    ]
    columns = ["run", "case", "round", "order", "warmup", *SUMMARY_FIELDS]
    columns += dict.fromkeys(n for run in runs for n in run.varied if n not in SUMMARY_FIELDS)
    frame = pd.DataFrame(rows, columns=columns)
    for metric in METRICS:
        frame[metric] = pd.to_numeric(frame[metric])
    return frame.sort_values("order", kind="stable", ignore_index=True)


def df_faults_by_method(runs: Iterable[Run]) -> pd.DataFrame:
    """Faults of several runs below each other.

    Columns: run, method (the case, in a set that varied more), latency_us (handler's side, NA when
    another thread released the page), ms (read, since the request), resolver and queue_depth.  Runs
    without a fault log are left out: their faults are unknown, not zero.
    """
    parts = []
    for run in runs:
        if not run.has("faults"):
            continue
        faults = run.df_faults()
        latency = (faults["released_ns"] - faults["read_ns"]) / 1e3
        parts.append(
            pd.DataFrame(
                {
                    "run": run.name,
                    "method": run.case,
                    "latency_us": latency.where(faults["released_ns"] > 0),
                    "ms": (faults["read_ns"] - (run.record.marks.request_ns or 0)) / NS_PER_MS,
                    "resolver": faults["resolver"].astype(str),
                    "queue_depth": faults["queue_depth"],
                }
            )
        )
    if not parts:
        names = ["run", "method", "latency_us", "ms", "resolver", "queue_depth"]
        return pd.DataFrame(columns=names)
    return pd.concat(parts, ignore_index=True)


def df_phases_by_method(runs: Iterable[Run]) -> pd.DataFrame:
    """Phases of several runs below each other.  Columns: run, method, phase, start_ms (since
    the request), duration_ms.
    """
    parts = []
    for run in runs:
        if not run.has("phases"):
            continue
        phases = run.df_phases()
        parts.append(
            pd.DataFrame(
                {
                    "run": run.name,
                    "method": run.case,
                    "phase": phases["phase"].astype(str),
                    "start_ms": (phases["start_ns"] - (run.record.marks.request_ns or 0))
                    / NS_PER_MS,
                    "duration_ms": phases["duration_ns"] / NS_PER_MS,
                }
            )
        )
    if not parts:
        return pd.DataFrame(columns=["run", "method", "phase", "start_ms", "duration_ms"])
    return pd.concat(parts, ignore_index=True)


def df_write_latency_by_method(runs: Iterable[Run]) -> pd.DataFrame:
    """How long the guest's operations took, of several runs below each other.

    Columns: run, method (or case), window_s (how long that window was) and those of the table
    `write_latency`.  Runs whose guest did not time its operations are left out.
    """
    parts = []
    for run in runs:
        if not run.has("write_latency"):
            continue
        marks = run.record.marks
        during_s = ((marks.end_ns or 0) - (marks.request_ns or 0)) / NS_PER_S
        table = run.df("write_latency")
        table["window"] = table["window"].astype(str)
        seconds = {"before": BASELINE_NS / NS_PER_S, "during": during_s}
        table.insert(0, "window_s", table["window"].map(seconds))
        table.insert(0, "method", run.case)
        table.insert(0, "run", run.name)
        parts.append(table)
    columns = ["run", "method", "window_s", *COLUMNS["write_latency"]]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def df_waits_by_method(runs: Iterable[Run]) -> pd.DataFrame:
    """What the guest waited for a page beside what the handler took, fault by fault, of several
    runs below each other.

    Columns: run, method (or case), handler_us (the fault's latency; NaN when another thread
    released the page) and wait_us (of the operation that faulted).  Runs without both a fault log
    and slow writes are left out, and so is a fault for which the guest noted no operation.
    """
    parts = []
    for run in runs:
        if not (run.has("faults") and run.has("slow_writes")):
            continue
        waits = match_faults(run.df("faults"), run.df("slow_writes"))
        us = waits[["latency_ns", "wait_ns"]].astype("Float64").astype(float) / NS_PER_US
        named = us.rename(columns={"latency_ns": "handler_us", "wait_ns": "wait_us"})
        parts.append(named.assign(run=run.name, method=run.case))
    columns = ["run", "method", "handler_us", "wait_us"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def match_faults(faults: pd.DataFrame, slow: pd.DataFrame) -> pd.DataFrame:
    """Return the faults for which the guest noted a slow operation on the same page, with `op`,
    `thread` and `wait_ns` of that.

    A page may have had several.  The guest's clock and the host's differ by a constant, but for a
    permille; the median over all pairs is near it, because most pages have one pair, and of several
    operations that one is taken which is nearest in time.

    :param faults: columns of the table `faults`.
    :param slow: columns of the table `slow_writes`.
    """
    noted = slow.rename(columns={"latency_ns": "wait_ns"})[
        ["thread", "op", "offset", "start_ns", "wait_ns"]
    ]
    named = faults[faults["vcpu"].notna()]
    pairs = named.astype({"offset": "int64"}).merge(noted, on="offset")
    apart = pairs["read_ns"] - pairs["start_ns"]
    nearest = (apart - apart.median()).abs().sort_values(kind="stable").index
    return pairs.loc[nearest].drop_duplicates("seq").sort_values("seq", ignore_index=True)


def varying(frames: Sequence[Mapping[str, Any]], names: Sequence[str] = DIMENSIONS) -> list[str]:
    """The dimensions that differ between rows: what a comparison has to name."""
    return [name for name in names if len({str(row.get(name)) for row in frames}) > 1]
