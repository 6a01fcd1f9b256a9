"""The standard figures: from snapshots, runs and run sets to axes, for notebooks and the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from lab.analysis.faults import df_faults_by_method
from lab.analysis.floor import df_floor_medians
from lab.analysis.instruments import df_overhead, df_sample_gaps
from lab.analysis.phases import df_phases_by_method
from lab.analysis.slowdown import df_rate, slowdown
from lab.analysis.stages import df_fault_stages
from lab.analysis.waits import df_waits_by_method, df_write_latency_by_method
from lab.errors import RunError, UsageError
from lab.figures import plots
from lab.runs.cases import case_label, df_runs
from lab.runs.columns import METRICS
from lab.runs.methods import in_shown_units
from lab.runs.run import Run, held_back_text
from lab.runs.sets import RunSet
from lab.units import NS_PER_MS

SLOWDOWN_BIN_MS = 10.0
"""Width of the bins in which the guest's speed around a snapshot is drawn by default."""


def typical_run(run_set: RunSet, case: str) -> Run:
    """The run of a method (or case) whose duration is the (lower) median: the one to show when only
    one can be shown.

    :raise RunError: when no run of it counts.
    """
    runs = run_set.measured(case)
    if not runs:
        raise RunError(f"{run_set.name} has no run of {case} that counts", "choose another")
    ordered = sorted(runs, key=lambda run: float(run.summary.get("duration_ms") or 0))
    return ordered[(len(ordered) - 1) // 2]


def plot_slowdown(
    *progress: pd.DataFrame,
    labels: Sequence[str] | None = None,
    bin_ms: float = 5,
    thick: Collection[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Guest speed around snapshots, as a share of the rate before each; a line per table.

    :param progress: what `df_progress()` of a `Snapshot` or of a recorded `Run` returns; which
        snapshot a table is of, and when, is in its `attrs`.
    :param bin_ms: width of the bins; under 2 ms they show the sampler, not the guest.
    :param labels: what each table is called in the legend; its case by default.
    :param thick: labels of lines to draw thicker than the others.
    :raise UsageError: a table does not say what it is of, or has too little before the request to
        know the rate by.
    """
    drawn = _rates(progress, labels, bin_ms)
    return plots.plot_rates(
        drawn.rates, pauses_ms=drawn.pauses_ms, styles=drawn.styles, thick=thick, ax=ax
    )


@dataclass(frozen=True)
class _Rates:
    """Guest speed around some snapshots, as `lab.figures.plots` draws it: all by label."""

    rates: Mapping[str, pd.DataFrame]
    pauses_ms: Mapping[str, tuple[float, float]]
    styles: Mapping[str, plots.CaseStyle]


def _rates(progress: Sequence[pd.DataFrame], labels: Sequence[str] | None, bin_ms: float) -> _Rates:
    rates: dict[str, pd.DataFrame] = {}
    pauses: dict[str, tuple[float, float]] = {}
    cases: dict[str, Mapping[str, Any]] = {}
    for table in progress:
        case, request = table.attrs.get("case"), table.attrs.get("request_ns")
        if case is None or request is None:
            raise UsageError(
                "this progress table does not say which snapshot it is of",
                "pass what df_progress() of a Snapshot or a Run returned",
            )
        baseline = slowdown(table, request_ns=request, end_ns=request).baseline_ops_per_s
        if baseline is None:
            raise UsageError(
                f"the progress before the {case_label(case)} snapshot is too short to know "
                "the rate by",
                "sample for a second before it (before_s=1)",
            )
        same = list(cases.values()).count(case)
        name = case_label(case) + (f" ({same + 1})" if same else "")
        label = labels[len(cases)] if labels else name
        cases[label] = case
        rates[label] = df_rate(
            table, request_ns=request, baseline_ops_per_s=baseline, bin_ms=bin_ms
        )
        stop, resume = table.attrs.get("stop_ns"), table.attrs.get("resume_ns")
        if stop is not None and resume is not None:
            start_ms, end_ms = ((at - request) / NS_PER_MS for at in (stop, resume))
            pauses[label] = (start_ms, end_ms)
    styles = dict(zip(cases, plots.case_styles(list(cases.values())), strict=True))
    return _Rates(rates, pauses, styles)


def _has_rate(run: Run) -> bool:
    return run.has("progress") and run.summary.get("baseline_ops_per_s") is not None


def slowdown_figure(
    run_set: RunSet,
    methods: Sequence[str] | None = None,
    *,
    bin_ms: float = SLOWDOWN_BIN_MS,
) -> list[Axes]:
    """Guest speed around the snapshot, the typical run of each case: a row per case."""
    runs = [typical_run(run_set, case) for case in methods or run_set.cases]
    runs = [run for run in runs if _has_rate(run)]
    drawn = _rates([run.df_progress() for run in runs], None, bin_ms)
    longest = max((float(run.summary.get("duration_ms") or 0) for run in runs), default=0.0)
    lost = {
        label: float(run.summary["lost_work_ms"])
        for label, run in zip(drawn.rates, runs, strict=True)
        if run.summary.get("lost_work_ms") is not None
    }
    back = {
        label: (run.record.marks.back_ns - run.record.marks.request_ns) / NS_PER_MS
        for label, run in zip(drawn.rates, runs, strict=True)
        if run.record.marks.back_ns is not None and run.record.marks.request_ns is not None
    }
    axes = plots.plot_rate_rows(
        drawn.rates,
        pauses_ms=drawn.pauses_ms,
        lost_ms=lost,
        back_ms=back,
        styles=drawn.styles,
        until_ms=1.25 * longest + 100,
    )
    plots.stamp(axes[-1], plots.stamp_text(run_set, drawn=runs))
    return axes


def slowdown_boots_figure(
    run_set: RunSet, case: str, *, bin_ms: float = 2, ax: Axes | None = None
) -> Axes:
    """Guest speed around the snapshot in every boot of a method or case, close up; the boot of
    median duration is thick.
    """
    runs = [run for run in run_set.measured(case) if _has_rate(run)]
    boots = [run.df_progress() for run in runs]
    thick = [typical_run(run_set, case).name]
    ax = plot_slowdown(*boots, labels=[run.name for run in runs], bin_ms=bin_ms, thick=thick, ax=ax)
    longest = max((float(run.summary.get("duration_ms") or 0) for run in runs), default=0.0)
    ax.set_xlim(-0.05 * longest - 10, 1.1 * longest + 40)
    name = case_label(typical_run(run_set, case).case_values)
    ax.set_title(f"{name}: every boot (bars: VM paused)", pad=8 + 6 * len(runs))
    return plots.stamp(ax, plots.stamp_text(run_set, [case]))


def lost_work_figure(run_set: RunSet, *, ax: Axes | None = None) -> Axes:
    """Lost work against duration, a point per boot, and where they are equal."""
    ax = plots.plot_lost_work(df_runs(run_set), ax=ax)
    return plots.stamp(ax, plots.stamp_text(run_set))


def cost_figure(run_set: RunSet) -> list[Axes]:
    """Pause, duration, lost work and image size by case, a point per boot."""
    axes = plots.plot_cost(df_runs(run_set))
    plots.stamp(axes[0], plots.stamp_text(run_set))
    return axes


def faults_figure(run_set: RunSet, *, ax: Axes | None = None) -> Axes:
    """Distribution of fault latency, a line per boot, for the methods that log faults."""
    runs = [run for run in run_set.measured() if run.has("faults")]
    ax = plots.plot_fault_latency(df_faults_by_method(runs), ax=ax)
    methods = list(dict.fromkeys(run.case for run in runs))
    return plots.stamp(ax, plots.stamp_text(run_set, methods))


def phases_figure(run_set: RunSet, *, ax: Axes | None = None) -> Axes:
    """What the pause consists of, a bar per boot, for the methods whose engine says."""
    runs = [run for run in run_set.measured() if run.has("phases")]
    ax = plots.plot_phases(df_phases_by_method(runs), ax=ax)
    methods = list(dict.fromkeys(run.case for run in runs))
    return plots.stamp(ax, plots.stamp_text(run_set, methods))


def phase_times_figure(run_set: RunSet, *, ax: Axes | None = None) -> Axes:
    """How long every phase took, a point per boot, for the methods whose engine says."""
    runs = [run for run in run_set.measured() if run.has("phases")]
    ax = plots.plot_phase_times(df_phases_by_method(runs), ax=ax)
    return plots.stamp(ax, plots.stamp_text(run_set, [run.case for run in runs]))


def stages_figure(run_set: RunSet) -> list[Axes]:
    """What becomes of a fault, stage by stage, for the methods that log faults."""
    runs = [run for run in run_set.measured() if run.has("faults")]
    axes = plots.plot_fault_stages(df_fault_stages(runs))
    plots.stamp(axes[0], plots.stamp_text(run_set, [run.case for run in runs]))
    return axes


def varied_figure(run_set: RunSet, x: str, metrics: Sequence[str]) -> list[Axes]:
    """What the parameter `x`, which the set varied, changes, for each method and each combination
    of what else was varied.

    :raise RunError: when the set did not vary `x`.
    """
    if x not in run_set.varied:
        varied = ", ".join(run_set.varied) or "nothing"
        raise RunError(f"{run_set.name} did not vary {x} (it varied: {varied})", "name another")
    titles = {metric: METRICS[metric].title for metric in metrics}
    runs = in_shown_units(df_runs(run_set), metrics)
    axes = plots.plot_varied(runs, x, titles)
    plots.stamp(axes[0], plots.stamp_text(run_set))
    return axes


def against_figure(
    run_set: RunSet, x: str, metrics: Sequence[str], *, x_title: str | None = None
) -> list[Axes]:
    """What depends on the number `x`, a column of `lab.runs.cases.df_runs`; a line per method."""
    titles = {metric: METRICS[metric].title for metric in metrics}
    runs = in_shown_units(df_runs(run_set), [m for m in metrics if m != x])
    axes = plots.plot_against(runs, x, titles, x_title=x_title)
    plots.stamp(axes[0], plots.stamp_text(run_set))
    return axes


def overhead_figure(run_set: RunSet, *, ax: Axes | None = None) -> Axes:
    """What each instrument changes, as a ratio with its interval, beside the noise of boots."""
    ax = plots.plot_overhead(df_overhead(run_set), ax=ax)
    return plots.stamp(ax, plots.stamp_text(run_set))


def sample_gaps_figure(run_set: RunSet, *, ax: Axes | None = None) -> Axes:
    """How far apart the samples of progress are before the request, by sampling interval."""
    ax = plots.plot_sample_gaps(df_sample_gaps(run_set), ax=ax)
    return plots.stamp(ax, plots.stamp_text(run_set))


def stalls_figure(run_set: RunSet, *, ax: Axes | None = None) -> Axes:
    """What the guest's own operations took, for the runs whose guest timed them."""
    runs = [run for run in run_set.measured() if run.has("write_latency")]
    ax = plots.plot_stalls(df_write_latency_by_method(runs), ax=ax)
    return plots.stamp(ax, plots.stamp_text(run_set, [run.case for run in runs]))


def waits_figure(
    run_set: RunSet, cases: Sequence[str] | None = None, *, ax: Axes | None = None
) -> Axes:
    """What the guest waited for a page and the handler's part of it, for the runs whose guest
    noted its slow writes.

    :param cases: draw only these; all by default.
    """
    shown = run_set.cases if cases is None else cases
    runs = [run for run in run_set.measured() if _has_waits(run) and run.case in shown]
    ax = plots.plot_waits(df_waits_by_method(runs), ax=ax)
    return plots.stamp(ax, plots.stamp_text(run_set, list(dict.fromkeys(r.case for r in runs))))


def _has_waits(run: Run) -> bool:
    return run.has("slow_writes") and run.has("faults")


def depth_figure(run_set: RunSet, *, ax: Axes | None = None) -> Axes:
    """Fault latency against what waited for the snapshot thread, for the methods that log faults.

    One case's boots are drawn as one.
    """
    runs = [run for run in run_set.measured() if run.has("faults")]
    ax = plots.plot_faults_by_depth(df_faults_by_method(runs), ax=ax)
    return plots.stamp(ax, plots.stamp_text(run_set, [run.case for run in runs]))


def floor_figures(run_set: RunSet) -> list[Axes]:
    """What a floor set has data for: one write fault by who serves it, and the steps in bulk."""
    medians = df_floor_medians(run_set)
    faults = medians[medians["stage"] == "fault"]
    bulk = medians[medians["stage"].isin(["call", "write"])]
    drawn = []
    with plots.styled():
        if len(faults):
            drawn.append(plots.plot_floor(faults))
            drawn[-1].set_title("One write fault: how long the writer waits")
        if len(bulk):
            drawn.append(plots.plot_floor(bulk, per_gib=True))
            drawn[-1].set_title("Steps in bulk")
    return [plots.stamp(ax, floor_stamp_text(run_set)) for ax in drawn]


def floor_stamp_text(run_set: RunSet) -> str:
    """What a reader must know of a floor set: rounds, host, date."""
    host = run_set.record.host
    parts = [
        f"n={len(run_set.measured())} rounds",
        f"{host.get('cpu_count', '?')} CPUs, {host.get('cpu_model', 'unknown')}",
        f"Linux {host.get('kernel', 'unknown')}",
        f"files on {host.get('image_filesystem', 'unknown')}",
        *held_back_text(run_set.measured(), "rounds"),
        f"set {run_set.name}, {run_set.record.created_utc[:10]}",
    ]
    return " | ".join(parts)


def available(run_set: RunSet) -> Mapping[str, bool]:
    """Which of the standard figures a set has data for."""
    runs = run_set.measured()
    return {
        "cost": bool(runs),
        "slowdown": any(_has_rate(typical_run(run_set, case)) for case in run_set.cases),
        "faults": any(run.has("faults") for run in runs),
        "phases": any(run.has("phases") for run in runs),
        "stalls": any(run.has("write_latency") for run in runs),
        "waits": any(_has_waits(run) for run in runs),
    }


def close_all() -> None:
    """Forget every open figure: a long-lived process would keep them all."""
    plt.close("all")
