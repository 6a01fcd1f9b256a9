"""What a snapshot cost the guest, from samples of its progress: pure functions, no I/O.

Progress is a list of samples (t, operations completed until t), about one per millisecond.  Between
two samples the count is taken to grow evenly; everything below is exact under that reading, with
no binning of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from lab.runs.columns import METRICS
from lab.units import NS_PER_MS, NS_PER_S, Ns

BASELINE_NS = 1 * NS_PER_S
MINIMUM_WINDOW_NS = 50 * NS_PER_MS
BACK_WINDOW_NS = 200 * NS_PER_MS
BACK_SHARE = 0.95
# Less of a baseline than this is one scheduling accident, not a rate.
SHORTEST_BASELINE_NS = 200 * NS_PER_MS


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


def df_slowdown(cost: Slowdown) -> pd.DataFrame:
    """What one snapshot cost the guest, for display.  Index: the number with its unit; column:
    value.
    """
    rows = {
        metric.title: metric.shown(getattr(cost, metric.name))
        for metric in METRICS.values()
        if hasattr(cost, metric.name)
    }
    return pd.DataFrame({"this snapshot": rows})
