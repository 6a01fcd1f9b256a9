"""What the guest waits for, by its own clock."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from lab.analysis.waits import df_waits_by_method, df_write_latency_by_method
from lab.figures.figure import figure
from lab.figures.style import (
    GREY,
    axes_or_new,
    legend,
    log_scale,
    share_axis,
    step_up,
    styled_cases,
)

_SHORTEST_US = 1.0
"""Operations of the guest below this were held up by nothing."""


@figure(
    title="What the guest's own operations took",
    caption="By the guest's own clock, which stops with the VM: no pause is in it. Every operation "
    "between request and completion, whatever held it up; the thin grey lines are the second "
    "before.",
    limits="Operations of less than a microsecond were held up by nothing and are not shown.",
    table=df_write_latency_by_method,
    needs=("write_latency",),
)
def plot_stalls(stalls: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """How many of the guest's operations took longer than x, by the guest's own clock.

    :param stalls: `lab.analysis.waits.df_write_latency_by_method`: one line per boot while the
        snapshot ran, and a thin grey one for the second before.  Operations per second, so that
        windows of different length compare; those of less than 1 µs are left out.
    """
    ax = axes_or_new(ax)
    before: dict[str, Any] = {"color": GREY, "alpha": 0.8, "linewidth": 0.7, "zorder": 1}
    labelled = set()
    for style, of_case in styled_cases(stalls[stalls["low_ns"] >= 1e3 * _SHORTEST_US]):
        for (_, window), part in of_case.groupby(["run", "window"], sort=False):
            ordered = part.sort_values("low_ns")
            longer = ordered["ops"].iloc[::-1].cumsum().iloc[::-1] / ordered["window_s"]
            during = window == "during"
            label = style.label if during else "before"
            line = style.line | {"linewidth": 1.1, "zorder": 2} if during else before
            name = None if label in labelled else label
            labelled.add(label)
            ax.step(ordered["low_ns"] / 1e3, longer, where="post", label=name, **line)
    for axis in (ax.xaxis, ax.yaxis):
        log_scale(axis)
    ax.set_xlabel("duration of an operation, µs (the guest's clock)")
    ax.set_ylabel("operations per second that took longer")
    legend(ax, loc="upper right")
    return ax


@figure(
    title="What the guest waits for a page (dotted: the handler's part)",
    caption="Each write fault of the log beside the guest's own operation on that page, by the "
    "guest's clock: between the two curves of a case is the way to the handler and back. Where the "
    "handler's part is the longer one, the guest went on before the call that released the page "
    "had returned.",
    limits="Operations are matched by page and time; a fault for which the guest noted none is "
    "left out.",
    table=df_waits_by_method,
    needs=("slow_writes", "faults"),
)
def plot_waits(waits: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of faults over within x: solid by the guest's clock, dotted the handler's part of it.

    :param waits: `lab.analysis.waits.df_waits_by_method`; all boots of a case are one line.
    """
    ax = axes_or_new(ax)
    for style, part in styled_cases(waits, with_dashes=False):
        for column, dash, label in (("wait_us", "-", style.label), ("handler_us", ":", None)):
            step_up(ax, part[column], label, style.line | {"linestyle": dash}, 1.5)
    log_scale(ax.xaxis)
    ax.set_xlabel("µs: the guest's write, by its clock (solid); the handler's part (dotted)")
    share_axis(ax, "faults")
    legend(ax, loc="lower right")
    return ax
