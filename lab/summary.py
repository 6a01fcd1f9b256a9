"""Run sets condensed for reading: one row per case, comparisons of two sets, both as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lab.columns import METRICS, SHORT, SUMMARY_FIELDS, Metric
from lab.errors import RunError
from lab.run import Run, RunSet
from lab.scenario import (
    DIMENSIONS,
    Instruments,
    Machine,
    Storage,
    Workload,
    dimensions,
    recorded_dimension,
    to_json,
)
from lab.stats import Comparison, check_stability, compare, median, quantile_interval
from lab.tables import Slowdown, by_case, case_columns, case_label, df_runs, varying

# A guest whose rate takes longer to come back after completion is not slow to recover: either the
# baseline was measured in a fast second, or the host was busy.  Lost work counts that time.
LONG_RECOVERY_MS = 2000


def in_shown_units(runs: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Return the runs with these of their columns in the units of the metrics' titles."""
    return runs.assign(**{name: runs[name] * METRICS[name].scale for name in metrics})


def df_methods(runs: RunSet | Sequence[Run]) -> pd.DataFrame:
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


def _with_range(metric: Metric, middle: float, low: float, high: float) -> str:
    text = metric.shown(middle)
    if text == "-" or low == high:
        return text
    return f"{text} [{metric.shown(low)} - {metric.shown(high)}]"


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


def text_table(table: pd.DataFrame) -> str:
    """A table of text as aligned lines, the first column to the left."""
    cells = [[str(name) for name in table.columns]]
    cells += [[str(value) for value in row] for row in table.itertuples(index=False)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(table.columns))]
    lines = []
    for row in cells:
        first, *rest = (
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def warnings_of(run_set: RunSet) -> list[str]:
    """Reasons to distrust a set, one sentence each: few boots, wide spread, drift, lower
    bounds, long recoveries, failures, warnings.
    """
    found = []
    frame = df_runs(run_set)
    counted = frame[(frame["outcome"] == "ok") & ~frame["warmup"]]
    for case, part in by_case(counted):
        name = case_label(case)
        for metric in ("pause_ms", "duration_ms", "lost_work_ms"):
            values = part[metric].dropna().tolist()
            found += [
                f"{name}, {METRICS[metric].title}: {reason}"
                for reason in (check_stability(values) if values else [])
                if not reason.startswith("only") or metric == "duration_ms"
            ]
        capped = part["back_capped"] == True  # noqa: E712 - the column holds null too
        if capped.any():
            found.append(
                f"{name}: in {capped.sum()} of {len(part)} boots the old rate was not seen again; "
                f"lost work is a lower bound there"
            )
        late = ~capped & (part["recovery_ms"] > LONG_RECOVERY_MS)
        if late.any():
            found.append(
                f"{name}: in {late.sum()} of {len(part)} boots the old rate took over "
                f"{LONG_RECOVERY_MS / 1000:g} s from completion to come back; if the baseline had "
                f"drifted, lost work is too large there"
            )
    for run in run_set:
        if not run.ok:
            found.append(f"{run.name} is {run.record.outcome}: {run.record.reason}")
        found += [f"{run.name}: {warning}" for warning in run.record.warnings]
    return found


@dataclass(frozen=True)
class Side:
    """One side of a comparison: runs that count, of one case, and what they were measured on."""

    name: str
    runs: list[Run]

    @property
    def dimensions(self) -> dict[str, Any]:
        """Parameters, build and host."""
        first = self.runs[0]
        # A run of an older version of the lab does not name what did not exist then.
        scenario = first.record.scenario
        machine: dict[str, Any] = to_json(Machine()) | scenario.get("machine", {})
        return (
            machine
            | {
                name: recorded_dimension(scenario, name)
                for part in (Workload(), Storage(), Instruments())
                for name in dimensions(part)
            }
            | {name: first.summary.get(name) for name in ("method", "engine", "accel")}
            | {
                "build": first.build,
                "kernel": first.record.host.get("kernel"),
                "cpu_model": first.record.host.get("cpu_model"),
                "image_filesystem": first.record.host.get("image_filesystem"),
            }
        )


def sides(
    a: RunSet, b: RunSet, method_a: str | None, method_b: str | None
) -> list[tuple[Side, Side]]:
    """Pairs to compare: the methods (or cases) both sets have, or the two that are named.

    :raise RunError: when there is no such pair.
    """
    for one in (a, b):
        if one.kind == "floor":
            raise RunError(
                f"{one.name} is a floor, and compare is for snapshots",
                "see both with `lab report`, or lab.floor.summary.df_floor_medians",
            )
    if method_a or method_b:
        pairs = [(method_a or str(method_b), method_b or str(method_a))]
    else:
        pairs = [(name, name) for name in a.cases if name in b.cases]
    if not pairs:
        raise RunError(
            f"{a.name} and {b.name} have no method in common", "name one on each side: SET:METHOD"
        )
    result = []
    for left, right in pairs:
        found = []
        for run_set, name in ((a, left), (b, right)):
            runs = run_set.measured(name)
            if not runs:
                have = "; ".join(run_set.cases) or "none"
                raise RunError(
                    f"{run_set.name} has no run of {name} that counts (it has: {have})",
                    "name another method",
                )
            found.append(Side(f"{run_set.name}:{name}", runs))
        result.append((found[0], found[1]))
    return result


def compare_sides(
    a: Side, b: Side, metrics: Iterable[str] = METRICS
) -> Mapping[str, Comparison | None]:
    """B against A for every metric; None where either has no value."""
    result: dict[str, Comparison | None] = {}
    left, right = df_runs(a.runs), df_runs(b.runs)
    for metric in metrics:
        x, y = left[metric].dropna().tolist(), right[metric].dropna().tolist()
        result[metric] = compare(x, y) if x and y else None
    return result


def comparison_text(a: Side, b: Side) -> str:
    """A comparison as text: what differs, then per metric its delta, ratio, interval and p."""
    different = varying([a.dimensions, b.dimensions], tuple(a.dimensions))
    lines = [f"A = {a.name} (n={len(a.runs)})", f"B = {b.name} (n={len(b.runs)})"]
    lines += [f"  {name}: {a.dimensions[name]} -> {b.dimensions[name]}" for name in different]
    rows = []
    caveats = set()
    for name, result in compare_sides(a, b).items():
        if result is None:
            continue
        metric, ratio, interval = METRICS[name], result.ratio, result.interval
        rows.append(
            {
                "": metric.title,
                "A": metric.shown(result.median_a),
                "B": metric.shown(result.median_b),
                "delta": metric.shown(result.delta),
                "B/A": "-" if ratio is None else f"{ratio:.3g}",
                "interval": f"{interval.low:.3g} - {interval.high:.3g}" if interval else "-",
                "covers": f"{interval.coverage:.0%}" if interval else "-",
                "p": f"{result.p:.2g}",
            }
        )
        if result.caveat:
            caveats.add(result.caveat)
    lines.append(text_table(pd.DataFrame(rows)) if rows else "no metric that both have")
    lines += [f"caveat: {caveat}" for caveat in sorted(caveats)]
    return "\n".join(lines)


def definitions() -> pd.DataFrame:
    """What each number of the summary line is.  Columns: field, unit, meaning."""
    return pd.DataFrame(
        [{"field": name, "unit": c.unit, "meaning": c.doc} for name, c in SUMMARY_FIELDS.items()]
    )
