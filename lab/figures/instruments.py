"""What measuring changes, and how finely it samples."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lab.analysis.instruments import df_overhead, df_sample_gaps, varied_instruments
from lab.figures.figure import figure
from lab.figures.style import GREY, OTHER_COLOURS, axes_or_new, legend, log_scale, row_labels
from lab.runs.sets import RunSet


def _none_varied(run_set: RunSet) -> str | None:
    if varied_instruments(run_set):
        return None
    return f"{run_set.name} was measured with the same instruments throughout"


@figure(
    title="What each instrument changes (band: noise of boots)",
    caption="A point is the ratio of medians, with the instrument over without, the line its "
    "interval. The band is half the distance of the quartiles of boots without it.",
    limits="An effect that is smaller than the noise is not shown to be absent.",
    table=df_overhead,
    problem=_none_varied,
)
def plot_overhead(overhead: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What each instrument changes: the ratio with / without, its interval as a line, and as a grey
    band what boots without it differ by anyway.  Ratios that are not known are left out.

    :param overhead: `lab.analysis.instruments.df_overhead`.
    """
    known = overhead[overhead["ratio"].notna()]
    ax = axes_or_new(ax, (6.5, 1 + 0.26 * max(4, len(known))))
    instruments = list(dict.fromkeys(known["instrument"]))
    labels: list[str] = []
    for row, one in enumerate(known.to_dict("records")):
        shade = OTHER_COLOURS[instruments.index(one["instrument"]) % len(OTHER_COLOURS)]
        ax.barh(row, 2 * one["noise"], left=1 - one["noise"], height=0.8, color="#e4e4e4", zorder=0)
        ax.plot([one["low"], one["high"]], [row, row], color=shade, linewidth=1.6)
        ax.plot([one["ratio"]], [row], "o", color=shade, markersize=5)
        labels.append(f"{one['instrument']}: {one['metric']}")
    ax.axvline(1, color=GREY, linewidth=0.8)
    row_labels(ax, labels, fontsize=8)
    ax.set_xlabel("with / without")
    return ax


@figure(
    title="How far apart the samples are, one line per boot",
    caption="Share of the samples of the second before the request that came as late as that, or "
    "later.",
    limits="What the host did while no sample came is not known.",
    table=df_sample_gaps,
    needs=("progress",),
)
def plot_sample_gaps(gaps: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """How many samples of progress are further than x from the one before: a line per boot, a
    colour per sampling interval, both scales logarithmic.

    :param gaps: `lab.analysis.instruments.df_sample_gaps`.
    """
    ax = axes_or_new(ax)
    intervals = sorted(gaps["interval_us"].unique().tolist())
    for interval_us, shade in zip(intervals, itertools.cycle(OTHER_COLOURS), strict=False):
        label: str | None = f"every {interval_us / 1e3:g} ms"
        for _, boot in gaps[gaps["interval_us"] == interval_us].groupby("run", sort=False):
            values = np.sort(boot["gap_ms"].to_numpy(dtype=np.float64))
            share = 1 - np.arange(len(values)) / len(values)
            style: dict[str, Any] = {"color": shade, "alpha": 0.6, "linewidth": 0.9}
            ax.step(values, share, where="pre", label=label, **style)
            label = None
    for axis in (ax.xaxis, ax.yaxis):
        log_scale(axis)
    ax.set_xlabel("since the sample before, ms")
    ax.set_ylabel("share of samples that are as late, or later")
    legend(ax)
    return ax
