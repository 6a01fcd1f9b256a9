"""Comparisons of two run sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lab.display import text_table
from lab.errors import RunError
from lab.runs.cases import df_runs, varying
from lab.runs.columns import METRICS
from lab.runs.run import Run
from lab.runs.sets import RunSet
from lab.scenario.dimensions import dimensions, recorded_dimension
from lab.scenario.document import to_json
from lab.scenario.instruments import Instruments
from lab.scenario.machine import Machine
from lab.scenario.storage import Storage
from lab.scenario.workload import Workload
from lab.stats import Comparison, compare

DIFFERENT_HOSTS = "measured on different hosts: a difference may be theirs"


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
                "host": first.host,
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
                "see both with `lab report`, or lab.analysis.floor.df_floor_medians",
            )
        if one.kind == "applications":
            raise RunError(
                f"{one.name} holds requests to an application, and compare is for snapshots",
                "use lab.analysis.applications.df_applications",
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
    caveats = {DIFFERENT_HOSTS} if "host" in different else set()
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


def compared_text(run_set: RunSet, to: str | None = None) -> str:
    """Each case of a set compared with one, in paragraphs: medians, their ratio, its interval.

    :param to: the case that the others are compared with; by default the first of a live method.
    """
    cases = run_set.cases
    live = (case for case in cases if case.startswith("live"))
    first = to or next(live, cases[0] if cases else "")
    found = [sides(run_set, run_set, case, first)[0] for case in cases if case != first]
    return "\n\n".join(comparison_text(left, right) for left, right in found)
