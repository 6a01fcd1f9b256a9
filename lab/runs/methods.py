"""One row per case of a run set: medians with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from lab.column import Metric
from lab.runs.cases import by_case, case_columns, df_runs
from lab.runs.columns import METRICS, SHORT
from lab.runs.run import Run
from lab.scenario.dimensions import DIMENSIONS
from lab.stats import median, quantile_interval


def in_shown_units(runs: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Return the runs with these of their columns in the units of the metrics' titles."""
    return runs.assign(**{name: runs[name] * METRICS[name].scale for name in metrics})


def df_methods(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per case, over its runs that count, in the order of the dimensions.

    Columns: the case (`method`, and what the set varied), n (boots), failed (runs that are failed
    or undecided), and for every metric the median over boots as `metric`, and
    `metric_low`, `metric_high`: the order-statistic interval of the median, asked for at 95 %.
    With fewer than six boots it is the lowest and highest boot, which covers less (n = 5: 94 %,
    n = 3: 75 %).
    """
    frame = df_runs(runs)
    frame = frame[~frame["warmup"]]
    rows = []
    for case, part in by_case(frame):
        ok = part[part["outcome"] == "ok"]
        row: dict[str, Any] = case | {"n": len(ok), "failed": len(part) - len(ok)}
        for metric in METRICS:
            values = ok[metric].dropna().to_numpy(dtype=float)
            if len(values):
                interval = quantile_interval(values)
                row |= {metric: median(values)}
                row |= {f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        rows.append(row)
    columns = [*case_columns(frame), "n", "failed"]
    columns += [m + part for m in METRICS for part in ("", "_low", "_high")]
    table = pd.DataFrame(rows, columns=columns)
    return table.astype(dict.fromkeys(columns[columns.index("failed") + 1 :], float))


def df_readable(methods: pd.DataFrame, metrics: Sequence[str] = SHORT) -> pd.DataFrame:
    """`df_methods` as text for display: `median [low - high]`, units in the headings."""
    table = {
        name: methods[name].map(DIMENSIONS[name].shown).astype(object)
        for name in case_columns(methods)
    }
    table["n"] = methods["n"]
    if methods["failed"].any():
        table["failed"] = methods["failed"]
    for metric in metrics:
        table[METRICS[metric].title] = pd.Series(
            [
                _with_range(METRICS[metric], *values)
                for values in zip(
                    methods[metric],
                    methods[f"{metric}_low"],
                    methods[f"{metric}_high"],
                    strict=True,
                )
            ],
            index=methods.index,
            dtype=object,
        )
    return pd.DataFrame(table)


def df_shown(runs: Iterable[Run], metrics: Sequence[str] = SHORT) -> pd.DataFrame:
    """A row per case, for display: its median over boots with its interval, for each of `metrics`
    (`df_readable`).  Index: the case.
    """
    methods = df_methods(runs)
    return df_readable(methods, metrics).set_index(case_columns(methods))


def _with_range(metric: Metric, middle: float, low: float, high: float) -> str:
    text = metric.shown(middle)
    if text == "-" or low == high:
        return text
    return f"{text} [{metric.shown(low)} - {metric.shown(high)}]"
