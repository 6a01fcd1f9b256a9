"""What a snapshot costs, boot by boot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lab.figures.figure import figure
from lab.figures.style import (
    GREY,
    axes_or_new,
    axis_title,
    legend_beside,
    log_axis,
    panels,
    row_labels,
    styled_cases,
)
from lab.runs.cases import by_case, df_runs
from lab.scenario.dimensions import DIMENSIONS

_PANELS = {
    "pause_ms": "pause, ms",
    "duration_ms": "duration, ms",
    "lost_work_ms": "lost work, ms",
    "image_mib": "image, MiB",
}
_SAME = 1.05
"""Images whose sizes differ by no more than this factor need no panel."""


def counted(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `lab.runs.cases.df_runs` that count: no warm-ups, none that failed."""
    return runs[(runs["outcome"] == "ok") & ~runs["warmup"].astype(bool)]


@figure(
    title="What a snapshot costs",
    caption="A point is one boot, the bar their median; hollow at the left edge: the guest lost "
    "nothing.",
    limits="Image sizes are left out where all are the same.",
    table=df_runs,
    panels=True,
)
def plot_cost(runs: pd.DataFrame) -> list[Axes]:
    """Pause, duration, lost work and image size by case: one point per boot, a bar at the median,
    log scale.

    :param runs: `lab.runs.cases.df_runs`; warm-ups and runs that are not ok are left out.  Lost
        work of zero or less (the guest ran faster than before) has no place on a log scale: it is
        drawn hollow at the lower edge.
    """
    data = counted(runs).copy()
    data["image_mib"] = data["image_bytes"] / 2**20
    cases = styled_cases(data)
    titles = dict(_PANELS)
    if data["image_mib"].max() <= _SAME * data["image_mib"].min():
        del titles["image_mib"]
    drawn = panels(len(titles), size=(9, max(3.2, 1 + 0.32 * len(cases))))
    for ax, (column, title) in zip(drawn, titles.items(), strict=True):
        # The row tells cases of one method apart, so that all of them have its full strength.
        for row, (style, part) in enumerate(cases):
            values = part[column].dropna().to_numpy(dtype=np.float64)
            positive = values[values > 0]
            look: dict[str, Any] = {"color": style.colour, "marker": style.marker}
            look |= {"linestyle": "none", "markersize": 5}
            # Points of one method are spread so that equal values do not hide each other.
            spread = np.linspace(-0.18, 0.18, len(positive)) if len(positive) > 1 else 0.0
            ax.plot(positive, np.full(len(positive), row) + spread, alpha=0.75, **look)
            if len(positive):
                middle = [np.median(positive)] * 2
                ax.plot(middle, [row - 0.32, row + 0.32], color=style.colour, linewidth=2)
            if hidden := len(values) - len(positive):
                edge: dict[str, Any] = {"transform": ax.get_yaxis_transform()}
                ax.plot([0.01] * hidden, [row] * hidden, fillstyle="none", **look, **edge)
        log_axis(ax.xaxis, data[column])
        ax.set_title(title, fontsize=10)
        row_labels(ax, [""] * len(cases))
    _case_labels(drawn[0], [case for case, _ in by_case(data)])
    return drawn


def _case_labels(ax: Axes, cases: Sequence[Mapping[str, Any]]) -> None:
    """What case each row is: its method, and left of that a column per parameter that was varied,
    which takes less room than the names in each row.
    """
    methods = [str(case.get("method", "")) for case in cases]
    row_labels(ax, methods)
    left = 14.0 + 6.5 * max(map(len, methods), default=0)
    for name in [name for name in (cases[0] if cases else ()) if name != "method"]:
        shown = [DIMENSIONS[name].shown(case[name]) for case in cases]
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "ha": "right"}
        beside |= {"xycoords": ("axes fraction", "data"), "fontsize": 8}
        for row, text in enumerate(shown):
            faint = GREY if text == "no" else "#222222"
            ax.annotate(text, (0, row), xytext=(-left, 0), color=faint, **beside)
        slanted = beside | {"va": "bottom", "ha": "left", "rotation": 30}
        head = axis_title(name)
        ax.annotate(head, (0, -0.6), xytext=(-left - 12, 0), **slanted)
        left += 12.0 + 5.5 * max(map(len, shown))


@figure(
    title="Lost work against duration",
    caption="A point is one boot; on the line the guest would have stood still for all of the "
    "snapshot.",
    limits="Boots that lost nothing have no place here.",
    table=df_runs,
    needs=("lost_work_ms",),
)
def plot_lost_work(runs: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Lost work against duration, one point per boot, both logarithmic; the line is where a guest
    would be that stood still for all of the snapshot.

    :param runs: `lab.runs.cases.df_runs`; warm-ups, runs that are not ok and lost work of zero or
        less, which has no place here, are left out.
    """
    ax = axes_or_new(ax)
    data = counted(runs)
    data = data[data["lost_work_ms"] > 0]
    for style, part in styled_cases(data, with_dashes=False):
        shape = style.points | {"markersize": 5, "label": style.label}
        ax.plot(part["duration_ms"], part["lost_work_ms"], **shape)
    log_axis(ax.xaxis, data["duration_ms"])
    log_axis(ax.yaxis, data["lost_work_ms"])
    if len(data):
        ends = [data["duration_ms"].min() / 1.3, data["duration_ms"].max() * 1.3]
        ax.plot(ends, ends, color=GREY, linewidth=0.8, zorder=0)
        legend_beside(ax)
    ax.set_xlabel("duration, ms")
    ax.set_ylabel("lost work, ms")
    return ax
