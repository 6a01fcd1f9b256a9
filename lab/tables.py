"""Tidy tables and the figures computed from them: pure functions, no I/O.

What stored tables and the summary line hold is in `lab.columns`.  A table of several runs has at
its front, after `run` where a row is of one run, what *case* its rows are of: a column `method`,
and one for each parameter that the run set varied.

Progress is a list of samples (t, operations completed until t), about one a millisecond.  Between
two samples the count is taken to grow evenly; everything below is exact under that reading, with
no binning of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lab.columns import COLUMNS, METRICS, SUMMARY_FIELDS
from lab.scenario import DIMENSIONS
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
    case: Mapping[str, Any],
    request_ns: int | None,
    stop_ns: int | None,
    resume_ns: int | None,
    end_ns: int | None,
) -> pd.DataFrame:
    """`table` with the snapshot it is of in its `attrs`: `case`, which is its method and its values
    of what a run set varied, and the instants in ns.

    The columns stay what is stored; figures of one snapshot's table read the rest from there.
    """
    marked = table.copy(deep=False)
    marked.attrs = {
        "case": dict(case),
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


def case_columns(frame: pd.DataFrame) -> list[str]:
    """The columns that say what case a row of a table is of."""
    names = (str(name) for name in frame.columns if name != "run")
    return list(takewhile(DIMENSIONS.__contains__, names))


def by_case(
    frame: pd.DataFrame, columns: Sequence[str] | None = None
) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """The cases in a table and their rows, in the order of the dimensions: methods first.

    :param columns: tell only these apart; by default `case_columns` of the table.
    """
    names = case_columns(frame) if columns is None else list(columns)
    if not names or frame.empty:
        return [({}, frame)] if len(frame) else []
    grouped = frame.groupby(names, sort=False, dropna=False, observed=True)
    found = [(dict(zip(names, map(python_value, key), strict=True)), part) for key, part in grouped]
    return sorted(found, key=lambda one: case_place(one[0]))


def python_value(value: Any) -> Any:
    """A value of a column as what it was before: pandas has its own of None and of numbers."""
    if pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def case_place(case: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """A key that sorts cases by their dimensions, as they are in the case."""
    return [DIMENSIONS[name].place(value) for name, value in case.items()]


def case_label(case: Mapping[str, Any]) -> str:
    """What a legend calls a case: its method, and what was varied by name."""
    named = {name: DIMENSIONS[name].shown(value) for name, value in case.items()}
    method = [named.pop("method")] if "method" in named else []
    return ", ".join([*method, *(f"{name}={value}" for name, value in named.items())])


def _case_of(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(["method", *(name for run in runs for name in run.varied)]))


def df_runs(runs: Iterable[Run]) -> pd.DataFrame:
    """One row a run.

    Columns: run, its case, round, order, warmup, and the rest of the summary line
    (`lab.columns.SUMMARY_FIELDS`).  Rows in the order they were measured.
    """
    runs = list(runs)
    rows = [
        {
            "run": run.name,
            "round": run.record.round,
            "order": run.record.order,
            "warmup": run.record.warmup,
        }
        | {field: run.summary.get(field) for field in SUMMARY_FIELDS}
        | {"outcome": run.record.outcome, "reason": run.record.reason}
        | run.case_values
        for run in runs
    ]
    columns = dict.fromkeys(["run", *_case_of(runs), "round", "order", "warmup", *SUMMARY_FIELDS])
    frame = pd.DataFrame(rows, columns=list(columns))
    for metric in METRICS:
        frame[metric] = pd.to_numeric(frame[metric])
    return frame.sort_values("order", kind="stable", ignore_index=True)


def df_faults_by_method(runs: Iterable[Run]) -> pd.DataFrame:
    """Faults of several runs below each other.

    Columns: run, its case, latency_us (handler's side, NA when another thread released the page),
    ms (read, since the request), resolver and queue_depth.  Runs without a fault log are left out:
    their faults are unknown, not zero.
    """
    parts = []
    for run in (runs := list(runs)):
        if not run.has("faults"):
            continue
        faults = run.df_faults()
        latency = (faults["released_ns"] - faults["read_ns"]) / 1e3
        parts.append(
            pd.DataFrame(
                {
                    "run": run.name,
                    **run.case_values,
                    "latency_us": latency.where(faults["released_ns"] > 0),
                    "ms": (faults["read_ns"] - (run.record.marks.request_ns or 0)) / NS_PER_MS,
                    "resolver": faults["resolver"].astype(str),
                    "queue_depth": faults["queue_depth"],
                }
            )
        )
    if not parts:
        names = ["run", *_case_of(runs), "latency_us", "ms", "resolver", "queue_depth"]
        return pd.DataFrame(columns=names)
    return pd.concat(parts, ignore_index=True)


def df_phases_by_method(runs: Iterable[Run]) -> pd.DataFrame:
    """Phases of several runs below each other.  Columns: run, its case, phase, start_ms (since
    the request), duration_ms.
    """
    parts = []
    for run in (runs := list(runs)):
        if not run.has("phases"):
            continue
        phases = run.df_phases()
        parts.append(
            pd.DataFrame(
                {
                    "run": run.name,
                    **run.case_values,
                    "phase": phases["phase"].astype(str),
                    "start_ms": (phases["start_ns"] - (run.record.marks.request_ns or 0))
                    / NS_PER_MS,
                    "duration_ms": phases["duration_ns"] / NS_PER_MS,
                }
            )
        )
    if not parts:
        return pd.DataFrame(columns=["run", *_case_of(runs), "phase", "start_ms", "duration_ms"])
    return pd.concat(parts, ignore_index=True)


def df_write_latency_by_method(runs: Iterable[Run]) -> pd.DataFrame:
    """How long the guest's operations took, of several runs below each other.

    Columns: run, its case, window_s (how long that window was) and those of the table
    `write_latency`.  Runs whose guest did not time its operations are left out.
    """
    parts = []
    for run in (runs := list(runs)):
        if not run.has("write_latency"):
            continue
        marks = run.record.marks
        during_s = ((marks.end_ns or 0) - (marks.request_ns or 0)) / NS_PER_S
        table = run.df("write_latency")
        table["window"] = table["window"].astype(str)
        seconds = {"before": BASELINE_NS / NS_PER_S, "during": during_s}
        named = table.assign(run=run.name, window_s=table["window"].map(seconds), **run.case_values)
        parts.append(named)
    columns = ["run", *_case_of(runs), "window_s", *COLUMNS["write_latency"]]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def df_waits_by_method(runs: Iterable[Run]) -> pd.DataFrame:
    """What the guest waited for a page beside what the handler took, fault by fault, of several
    runs below each other.

    Columns: run, its case, handler_us (the fault's latency; NaN when another thread
    released the page) and wait_us (of the operation that faulted).  Runs without both a fault log
    and slow writes are left out, and so is a fault for which the guest noted no operation.
    """
    parts = []
    for run in (runs := list(runs)):
        if not (run.has("faults") and run.has("slow_writes")):
            continue
        waits = match_faults(run.df("faults"), run.df("slow_writes"))
        us = waits[["latency_ns", "wait_ns"]].astype("Float64").astype(float) / NS_PER_US
        named = us.rename(columns={"latency_ns": "handler_us", "wait_ns": "wait_us"})
        parts.append(named.assign(run=run.name, **run.case_values))
    columns = ["run", *_case_of(runs), "handler_us", "wait_us"]
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


def varying(frames: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Those of `names` that differ between rows: what a comparison has to name."""
    return [name for name in names if len({str(row.get(name)) for row in frames}) > 1]
