"""What a parameter changes: one panel per metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lab.errors import UsageError
from lab.figures.cost import counted
from lab.figures.figure import figure
from lab.figures.style import (
    axis_title,
    blank,
    case_styles,
    colour,
    dashes,
    in_order,
    legend_beside,
    log_axis,
    marker,
    panels,
    title_over,
)
from lab.runs.cases import by_case, case_columns, df_runs, python_value
from lab.runs.columns import METRICS
from lab.runs.methods import in_shown_units
from lab.scenario.dimensions import DIMENSIONS

_LIMITS = (
    "Log scales: values of zero or less have no place and are left out; the title says how many."
)


@figure(
    title="What a parameter changes",
    caption="A point is one boot, the bar the median of a case; a thin line joins medians where "
    "the parameter is a number.",
    limits=_LIMITS,
    table=df_runs,
    panels=True,
)
def plot_varied(runs: pd.DataFrame, x: str, metrics: Sequence[str]) -> list[Axes]:
    """What the parameter `x`, which the set varied, changes: one panel per metric, one point per
    boot, a bar at each median, for each method and each combination of what else was varied.

    Medians are joined where the parameter is a number; nothing lies between two kinds of a thing.

    :param runs: `lab.runs.cases.df_runs`; warm-ups and runs that are not ok are left out.
    :param metrics: names of `lab.runs.columns.METRICS`.  Log scale; values of zero or less have no
        place on it and are left out, and the title says how many.
    :raise UsageError: there is no such parameter or metric.
    """
    _require(metrics, x)
    if x not in case_columns(runs):
        varied = ", ".join(name for name in case_columns(runs) if name != "method") or "nothing"
        return [blank(f"{x} was not varied here (varied: {varied})")]
    data = in_shown_units(counted(runs), metrics)
    if empty := _nothing(data, metrics):
        return empty
    drawn = _panels(len(metrics))
    dimension = DIMENSIONS[x]
    values = in_order(x, [python_value(value) for value in data[x].unique()])
    numbers = [k for k, value in enumerate(values) if dimension.is_number(value)]
    groups = by_case(data, [name for name in case_columns(runs) if name != x])
    lines = len(numbers) > 1
    styles = case_styles([case for case, _ in groups], with_dashes=lines)
    for ax, metric in zip(drawn, metrics, strict=True):
        for k, (style, (_, group)) in enumerate(zip(styles, groups, strict=True)):
            part = group[group[metric] > 0]
            at = np.asarray([values.index(python_value(value)) for value in part[x]], dtype=float)
            # Groups beside each other, so that they do not hide each other.
            shift = 0.12 * (k - (len(groups) - 1) / 2)
            heights = part[metric].to_numpy(dtype=np.float64)
            middle = {place: float(np.median(heights[at == place])) for place in set(at)}
            look: dict[str, Any] = {"marker": "_", "markersize": 9, "markeredgewidth": 2}
            look |= style.line | {"linewidth": 0.8}
            # What stands for the group in the legend is what tells it from the others.
            named: dict[str, Any] = {"label": style.label}
            ax.plot(at + shift, heights, markersize=4, **style.points, **({} if lines else named))
            for is_number, how in ((True, named if lines else {}), (False, {"linestyle": "none"})):
                places = sorted(place for place in middle if (place in numbers) is is_number)
                if places:
                    where = [place + shift for place in places]
                    ax.plot(where, [middle[place] for place in places], **look | how)
        names = [dimension.shown(value) for value in values]
        is_long = any(len(name) > 5 for name in names)
        slant: dict[str, Any] = {"rotation": 30, "ha": "right"} if is_long else {}
        ax.set_xticks(range(len(values)), names, **slant)
        _finish(ax, data, metric, axis_title(x))
    title_over(drawn[0], f"Depending on: {dimension.title}")
    if len(groups) > 1:
        legend_beside(drawn[-1], drawn[0], fontsize=7)
    return drawn


@figure(
    title="What depends on a number",
    caption="A point is one boot; the line joins the medians of cases, method by method.",
    limits=_LIMITS,
    table=df_runs,
    panels=True,
)
def plot_against(
    runs: pd.DataFrame, x: str, metrics: Sequence[str], *, x_title: str | None = None
) -> list[Axes]:
    """What depends on a number, both on log scales: one panel per metric, one point per boot, a
    line through the medians of cases, method by method.

    :param runs: `lab.runs.cases.df_runs`; warm-ups and runs that are not ok are left out, and so is
        what is not positive, of which the title says how much.
    :param x: a column that is a number, varied or measured, in the unit that it is stored in.
    :param metrics: names of `lab.runs.columns.METRICS`.
    :param x_title: what the x axis is called; by default the parameter's title and unit.
    :raise UsageError: there is no such parameter or metric.
    """
    _require(metrics, x)
    data = counted(in_shown_units(runs, [name for name in metrics if name != x]))
    if empty := _nothing(data, metrics):
        return empty
    drawn = _panels(len(metrics))
    heading = x_title or (axis_title(x) if x in DIMENSIONS else METRICS[x].title)
    title_over(drawn[0], f"Depending on: {heading}")
    methods = in_order("method", data["method"].tolist())
    for ax, metric in zip(drawn, metrics, strict=True):
        positive = data[(data[metric] > 0) & (data[x] > 0)]
        for method in methods:
            part = positive[positive["method"] == method]
            shade = colour(method)
            points: dict[str, Any] = {"color": shade, "markersize": 4, "alpha": 0.6}
            ax.plot(part[x].to_numpy(), part[metric].to_numpy(), marker(method), **points)
            middle = sorted(
                (float(of_case[x].median()), float(of_case[metric].median()))
                for _, of_case in by_case(part)
            )
            line = {"linewidth": 1.4, "linestyle": dashes(method), "label": method}
            ax.plot(*zip(*middle, strict=True), color=shade, **line)
        log_axis(ax.xaxis, positive[x])
        _finish(ax, data[data[x] > 0], metric, heading)
    if len(methods) > 1:
        legend_beside(drawn[-1], drawn[0], fontsize=7)
    return drawn


def _require(metrics: Sequence[str], x: str) -> None:
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or x not in {**DIMENSIONS, **METRICS}:
        raise UsageError(
            f"there is no {', '.join(unknown) or x} to draw",
            "name parameters of lab.DIMENSIONS and metrics of lab.METRICS",
        )


def _nothing(data: pd.DataFrame, metrics: Sequence[str]) -> list[Axes]:
    """Empty axes that say so, where no run has any of the metrics."""
    if data[list(metrics)].notna().any(axis=None):
        return []
    return [blank(f"no run has {', '.join(METRICS[name].title for name in metrics)}")]


def _panels(count: int) -> list[Axes]:
    return panels(count, size=(2.6 * count + 2.0, 2.9), share=False)


def _finish(ax: Axes, data: pd.DataFrame, metric: str, x_title: str) -> None:
    """Scale and title of a panel; the title says how many values have no place."""
    hidden = int((data[metric] <= 0).sum())
    log_axis(ax.yaxis, data.loc[data[metric] > 0, metric])
    title = METRICS[metric].title
    ax.set_title(f"{title} ({hidden} not shown)" if hidden else title, fontsize=9)
    ax.set_xlabel(x_title, fontsize=9)
    ax.tick_params(labelsize=8)
