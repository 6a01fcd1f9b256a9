"""What the instruments cost: the same snapshot with and without each, from one interleaved set.

A set for this varied parameters of `Instruments`, or had the guest time its operations.  Each
instrument is judged over all its boots, whatever else was on: with every combination in the set,
the others are on as often with it as without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lab.analysis.slowdown import BASELINE_NS
from lab.errors import RunError
from lab.instruments.faultlog import FaultLogInstrument
from lab.instruments.hostmemory import HostMemoryInstrument
from lab.instruments.instrument import Instrument
from lab.instruments.progress import ProgressInstrument
from lab.instruments.threads import ThreadsInstrument
from lab.instruments.writelatency import WriteLatencyInstrument
from lab.runs.cases import df_runs
from lab.runs.columns import METRICS
from lab.runs.run import Run
from lab.runs.sets import RunSet, load_set
from lab.scenario.dimensions import recorded_dimension
from lab.stats import compare, median
from lab.units import NS_PER_MS

JUDGED: Sequence[type[Instrument]] = (
    FaultLogInstrument,
    ThreadsInstrument,
    HostMemoryInstrument,
    ProgressInstrument,
    WriteLatencyInstrument,
)
"""Those that are there while a snapshot is taken, and can be left out.

Without one is where its switch is False, or where it is the largest number that the set has:
samples cannot be left out, only be made rare, because cost is computed from them.
"""

COST = ("baseline_ops_per_s", "pause_ms", "duration_ms", "lost_work_ms", "qemu_cpu_ms", "faults")
"""What an instrument might change."""


RECORDED = Path(__file__).resolve().parents[2] / "data" / "instruments"
"""The set of the checkout that varied each instrument."""


def recorded_overhead() -> RunSet | None:
    """The recorded set that varied the instruments; None where the checkout's data are not there.

    :raise RunError: it is there and cannot be read.
    """
    return load_set(RECORDED) if (RECORDED / "set.json").exists() else None


def varied_instruments(run_set: RunSet) -> list[type[Instrument]]:
    """The instruments that a set was measured with and without."""
    return [one for one in JUDGED if one.switch in run_set.varied]


def df_overhead(run_set: RunSet, metrics: Sequence[str] = COST) -> pd.DataFrame:
    """The effect of each instrument that a set varied, on each metric: one row for each.

    Columns: `instrument`; `method`; `metric`; `n_without` and `n_with` (boots); `without` and
    `with`, medians over boots; `ratio` with / without, `low` and `high` its interval at 95 %
    (`lab.stats.ratio_interval`; None where a value is not positive) and `p` of the permutation
    test; `noise`: half the spread from the lowest to the highest quarter of the boots without it,
    as a share of their median.  Rows of what the instrument itself finds are left out.

    :raise RunError: the set varied no instrument.
    """
    instruments = varied_instruments(run_set)
    if not instruments:
        raise RunError(
            f"{run_set.name} was measured with the same instruments throughout",
            "measure one with `--vary log-faults=yes,no`",
        )
    runs = run_set.measured()
    rows = []
    for one in instruments:
        for method in dict.fromkeys(run.record.method for run in runs):
            of_method = [run for run in runs if run.record.method == method]
            off, on = _split(of_method, one)
            for metric in metrics:
                if metric in (found.name for found in one.metrics):
                    continue
                row = _row(off, on, metric)
                if row is not None:
                    rows.append(
                        {"instrument": one.title, "method": method, "metric": metric, **row}
                    )
    return pd.DataFrame(rows, columns=_COLUMNS)


_COLUMNS = (
    *("instrument", "method", "metric", "n_without", "n_with", "without", "with"),
    *("ratio", "low", "high", "p", "noise"),
)


def _split(runs: Sequence[Run], one: type[Instrument]) -> tuple[list[Run], list[Run]]:
    values = [recorded_dimension(run.record.scenario, one.switch) for run in runs]
    without = False if False in values else max(values)
    pairs = list(zip(runs, values, strict=True))
    return (
        [run for run, value in pairs if value == without],
        [run for run, value in pairs if value != without],
    )


def _row(off: Sequence[Run], on: Sequence[Run], metric: str) -> Mapping[str, Any] | None:
    a = df_runs(off)[metric].dropna().tolist() if off else []
    b = df_runs(on)[metric].dropna().tolist() if on else []
    if not a or not b:
        return None
    found = compare(a, b)
    middle = median(a)
    quarter, three = pd.Series(a).quantile([0.25, 0.75])
    return {
        "n_without": len(a),
        "n_with": len(b),
        "without": found.median_a,
        "with": found.median_b,
        "ratio": found.ratio,
        "low": None if found.interval is None else found.interval.low,
        "high": None if found.interval is None else found.interval.high,
        "p": found.p,
        "noise": (three - quarter) / 2 / abs(middle) if middle else None,
    }


def df_overhead_readable(overhead: pd.DataFrame) -> pd.DataFrame:
    """`df_overhead` as text for display, and whether the change is less than the noise."""
    rows = []
    for row in overhead.to_dict("records"):
        metric = str(row["metric"])
        known = not pd.isna(row["ratio"])
        change = abs(row["ratio"] - 1) if known else None
        rows.append(
            {
                "instrument": row["instrument"],
                "method": row["method"],
                "of": METRICS[metric].title,
                "n": f"{row['n_without']} / {row['n_with']}",
                "without": METRICS[metric].shown(row["without"]),
                "with": METRICS[metric].shown(row["with"]),
                "with / without": (
                    f"{row['ratio']:.3f} [{row['low']:.3f} - {row['high']:.3f}]" if known else "-"
                ),
                "p": f"{row['p']:.2g}",
                "noise": "-" if pd.isna(row["noise"]) else f"{100 * row['noise']:.1f} %",
                "less than the noise": (
                    "-" if change is None else "yes" if change <= row["noise"] else "no"
                ),
            }
        )
    return pd.DataFrame(rows)


def df_overhead_shown(run_set: RunSet) -> pd.DataFrame:
    """What each instrument changes, for display; empty where the set varied none.

    Index: instrument, and what it may change.
    """
    if not varied_instruments(run_set):
        return pd.DataFrame()
    readable = df_overhead_readable(df_overhead(run_set))
    return readable.drop(columns="method").set_index(["instrument", "of"])


def sampling_cost(run_set: RunSet) -> pd.DataFrame:
    """What reading the guest's progress took in the runs of a set themselves.

    Columns: the case, `n` (boots), `read_us` (median of one read, median over boots),
    `share` (of one CPU, in %).  The sampling thread's own work beside the read is not in it.
    """
    rows = []
    for case in run_set.cases:
        reads, shares = [], []
        for run in run_set.measured(case):
            if not run.has("progress"):
                continue
            progress = run.df_progress()
            if len(progress) < 2:
                continue
            reads.append(progress["read_ns"].median() / 1e3)
            span_ns = progress["t_ns"].iloc[-1] - progress["t_ns"].iloc[0]
            shares.append(100 * progress["read_ns"].sum() / span_ns)
        if reads:
            rows.append(
                {
                    **run_set.measured(case)[0].case_values,
                    "n": len(reads),
                    "read_us": median(reads),
                    "share": median(shares),
                }
            )
    return pd.DataFrame(rows, columns=[*run_set.case_columns, "n", "read_us", "share"])


def df_sample_gaps(run_set: RunSet) -> pd.DataFrame:
    """How far apart the samples of progress are: one row for each two in succession, of the second
    before the request, in which no snapshot holds anything up.

    Columns: `run`; `interval_us`, what was asked for; `gap_ms`, between the middles of the reads.
    """
    parts = []
    for run in run_set.measured():
        if not run.has("progress"):
            continue
        t_ns = run.df_progress()["t_ns"]
        request_ns = run.record.marks.request_ns
        if request_ns is not None:
            t_ns = t_ns[(t_ns >= request_ns - BASELINE_NS) & (t_ns < request_ns)]
        parts.append(
            pd.DataFrame(
                {
                    "run": run.name,
                    "interval_us": recorded_dimension(run.record.scenario, "sample_interval_us"),
                    "gap_ms": t_ns.diff().dropna() / NS_PER_MS,
                }
            )
        )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=_GAP_COLUMNS)


_GAP_COLUMNS = ["run", "interval_us", "gap_ms"]
