"""What the kernel asks for the steps of a snapshot by themselves, without a VM."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from lab.analysis.floor import df_floor_medians
from lab.analysis.stages import df_floor_steps
from lab.figures.figure import figure
from lab.figures.style import OTHER_COLOURS, axes_or_new, log_axis, row_labels
from lab.runs.sets import RunSet

_CAPTION = "A point is the median over rounds, the bar its interval."
_LIMITS = "Each step was timed by itself, in a process of its own."


def _faults(run_set: RunSet) -> pd.DataFrame:
    medians = df_floor_medians(run_set)
    return medians[medians["stage"] == "fault"]


def _bulk(run_set: RunSet) -> pd.DataFrame:
    medians = df_floor_medians(run_set)
    return medians[medians["stage"].isin(["call", "write"])]


@figure(
    title="What one call of each step costs",
    caption=_CAPTION,
    limits=_LIMITS,
    table=df_floor_steps,
    needs=("floor",),
)
def plot_floor(medians: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What each step of a snapshot costs by itself: a point at the median over rounds, a bar over
    its interval, µs on a log scale.

    :param medians: rows of `lab.analysis.floor.df_floor_medians`, drawn in their order; of a set
        those of the steps that engines go by.
    """
    return _steps(medians, "µs", 1.0, ax)


@figure(
    title="One write fault: how long the writer waits",
    caption=_CAPTION,
    limits=_LIMITS,
    table=_faults,
    needs=("floor",),
    problem=lambda one: None if len(_faults(one)) else f"{one.name} has not timed write faults",
)
def plot_floor_faults(medians: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What a write fault costs by who serves it, drawn as `plot_floor` does."""
    return _steps(medians, "µs", 1.0, ax)


@figure(
    title="Steps in bulk",
    caption=_CAPTION,
    limits=_LIMITS,
    table=_bulk,
    needs=("floor",),
    problem=lambda one: None if len(_bulk(one)) else f"{one.name} has not timed steps in bulk",
)
def plot_floor_bulk(medians: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What each step costs per GiB, drawn as `plot_floor` does; steps of no size are left out."""
    sized = medians.dropna(subset=["ms_per_gib"])
    # Per GiB, a step's interval grows by the same factor as its median.
    return _steps(sized, "ms per GiB", sized["ms_per_gib"] / sized["median_us"], ax)


def _steps(
    medians: pd.DataFrame, unit: str, factor: float | pd.Series[float], ax: Axes | None
) -> Axes:
    ax = axes_or_new(ax, (7.2, 1.1 + 0.22 * len(medians)))
    middle, low, high = (medians[name] * factor for name in ("median_us", "low_us", "high_us"))
    kinds = list(dict.fromkeys(medians["benchmark"]))
    for row, benchmark in enumerate(medians["benchmark"]):
        shade = OTHER_COLOURS[kinds.index(benchmark) % len(OTHER_COLOURS)]
        ax.plot([low.iloc[row], high.iloc[row]], [row] * 2, color=shade, linewidth=2, alpha=0.6)
        ax.plot([middle.iloc[row]], [row], "o", color=shade, markersize=4.5)
    places = medians["ram_kind"].fillna(medians["target"]).fillna("")
    names = [f"{step}, {place}" for step, place in zip(medians["label"], places, strict=True)]
    row_labels(ax, names, fontsize=7.5)
    log_axis(ax.xaxis, pd.concat([low, high]))
    ax.set_xlabel(unit)
    return ax
