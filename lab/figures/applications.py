"""What those who ask a server in the guest see of a snapshot."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lab.analysis.applications import df_application_throughput, df_requests
from lab.figures.figure import figure
from lab.figures.style import (
    axes_or_new,
    colour,
    legend_beside,
    log_axis,
    log_scale,
    marker,
    panels,
    row_labels,
)
from lab.runs.sets import RunSet
from lab.stats import median

# As many points as an eye tells apart in a row; the slowest are always among them.
_MOST_POINTS = 4000
_LONGEST = 3.0
"""A method that takes more than so many times as long as the middle one is cut short in figures."""
_HIGHEST_PERCENT = 200.0


def _by_method(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(str(name), part) for name, part in table.groupby("method", sort=False)]


def _rows(table: pd.DataFrame) -> list[Axes]:
    count = max(1, table["method"].nunique())
    return panels(count, size=(7.2, 0.6 + 0.85 * count), rows=True)


def _shown_until_ms(table: pd.DataFrame) -> float:
    """Where the axis ends: one method that takes many times as long would hide the others."""
    ends = table.groupby("method", sort=False)["end_ms"].max()
    return min(float(ends.max()), _LONGEST * median(ends.to_numpy())) + 600


def _named(ax: Axes, method: str, end_ms: float, until_ms: float) -> None:
    beyond = f", which goes on until {end_ms / 1000:.3g} s" if end_ms > until_ms else ""
    ax.set_title(method + beyond, fontsize=9, pad=2)
    ax.tick_params(labelsize=7)
    ax.axvline(0, color="#555555", linewidth=0.6)
    ax.axvline(end_ms, color="#555555", linewidth=0.8, linestyle=":")


def _in_order(table: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    place = {name: k for k, name in enumerate(methods)}
    return table.sort_values("method", key=lambda column: column.map(place), kind="stable")


@figure(
    title="Requests done around the snapshot (dark: VM paused)",
    caption="One round per method, the one of median duration: requests that were done in each "
    "10 ms, against the second before; a dotted line is where the method ended.",
    limits="It does not show how long single requests took, nor how rounds differ; bins with more "
    "than twice the rate of before are cut off.",
    table=lambda run_set: _in_order(df_application_throughput(run_set), run_set.methods),
    needs=("throughput",),
    one_boot=True,
    panels=True,
)
def plot_application_throughput(table: pd.DataFrame) -> list[Axes]:
    """Throughput against time, a row per method.

    :param table: rows of `lab.analysis.applications.df_application_throughput`, of one round per
        method.
    """
    axes = _rows(table)
    until_ms = _shown_until_ms(table)
    for ax, (method, part) in zip(axes, _by_method(table), strict=True):
        ax.plot(part["ms"], 100 * part["share"], color=colour(method), linewidth=0.8)
        first = part.iloc[0]
        if not np.isnan(first["stop_ms"]) and not np.isnan(first["resume_ms"]):
            # A pause of 2 ms would be thinner than a pixel.
            shown = max(first["resume_ms"], first["stop_ms"] + 0.003 * until_ms)
            ax.axvspan(first["stop_ms"], shown, color="#333333", linewidth=0, zorder=3)
        ax.set_ylim(0, _HIGHEST_PERCENT)
        _named(ax, method, float(first["end_ms"]), until_ms)
    axes[0].set_xlim(-500, until_ms)
    axes[len(axes) // 2].set_ylabel("% of the rate before")
    axes[-1].set_xlabel("ms since the request for the snapshot")
    return axes


@figure(
    title="Each request: when it was due, and how long it took",
    caption="One round per method, the one of median duration. A point is a request; of many alike "
    "only some are drawn, of the slowest all. Points high above the others with a gap behind them "
    "are a stop: each connection had asked, and waits for all of it.",
    limits="The scale is logarithmic; what is refused, not answered or took no time, as steps that "
    "are told together, is not drawn.",
    table=lambda run_set: _in_order(df_requests(run_set), run_set.methods),
    needs=("requests",),
    one_boot=True,
    panels=True,
)
def plot_requests(table: pd.DataFrame) -> list[Axes]:
    """Latency of each request against when it was due, a row per method.

    :param table: rows of `lab.analysis.applications.df_requests`, of one round per method.
    """
    axes = _rows(table)
    until_ms = _shown_until_ms(table)
    for ax, (method, part) in zip(axes, _by_method(table), strict=True):
        slow = part.sort_values("latency_ms", ascending=False, kind="stable")
        ordered = pd.concat([slow.head(_MOST_POINTS // 2), slow.iloc[_MOST_POINTS // 2 :: 7]])
        shown = ordered[ordered["ok"]].head(_MOST_POINTS)
        ax.plot(shown["ms"], shown["latency_ms"], ".", color=colour(method), markersize=1.5)
        log_scale(ax.yaxis)
        lasting = table.loc[table["latency_ms"] > 0, "latency_ms"]
        ax.set_ylim(0.7 * lasting.min(), 1.5 * lasting.max())
        _named(ax, method, float(part["end_ms"].iloc[0]), until_ms)
    axes[0].set_xlim(-500, until_ms)
    axes[len(axes) // 2].set_ylabel("latency, ms")
    axes[-1].set_xlabel("due, ms since the request for the snapshot")
    return axes


@figure(
    title="How many requests took longer than that",
    caption="Requests that were outstanding at an instant from the snapshot's request until half a "
    "second after its end. A line is all rounds of a method together.",
    limits="Requests of one round depend on each other: the lines describe, and the intervals over "
    "rounds are in the table. A longer snapshot has more requests that it does not hold up.",
    table=lambda run_set: _in_order(df_requests(run_set), run_set.methods),
    needs=("requests",),
)
def plot_request_latency(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The complementary distribution of latencies during the snapshot, by method, on log axes.

    :param table: rows of `lab.analysis.applications.df_requests`.
    """
    ax = axes_or_new(ax, (7.2, 4.2))
    for method, part in _by_method(table[table["during"] & (table["ok"] | table["censored"])]):
        latency = np.sort(part["latency_ms"].to_numpy(dtype=np.float64))
        share = 1 - np.arange(len(latency)) / len(latency)
        ax.step(latency, share, where="post", color=colour(method), label=method)
    log_scale(ax.xaxis)
    ax.set_yscale("log")
    ax.set_xlabel("latency, ms")
    ax.set_ylabel("share of requests that took so long or longer")
    legend_beside(ax)
    return ax


def _worst(run_set: RunSet) -> pd.DataFrame:
    rows = [(run.record.method, run.summary["request_worst_ms"]) for run in run_set.measured()]
    table = pd.DataFrame(rows, columns=["method", "request_worst_ms"]).dropna()
    return _in_order(table, run_set.methods)


@figure(
    title="The slowest request, round by round",
    caption="A point is the slowest request of a round between the snapshot's request and half a "
    "second after its end, a line the median over rounds.",
    limits="The slowest of many requests is an extreme: it says what somebody felt, not what most "
    "did.",
    table=_worst,
    needs=("requests",),
)
def plot_worst_request(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The worst latency of each round, by method, on a log axis.

    :param table: columns `method` and `request_worst_ms`, a row per round.
    """
    methods = list(dict.fromkeys(table["method"]))
    ax = axes_or_new(ax, (7.2, 1.0 + 0.35 * len(methods)))
    for row, method in enumerate(methods):
        values = table.loc[table["method"] == method, "request_worst_ms"]
        shade = colour(method)
        ax.plot(values, [row] * len(values), marker(method), color=shade, alpha=0.6, markersize=5)
        middle = median(values.to_numpy())
        ax.plot([middle, middle], [row - 0.3, row + 0.3], color=shade, linewidth=2)
    row_labels(ax, methods)
    log_axis(ax.xaxis, table["request_worst_ms"])
    ax.set_xlabel("slowest request, ms")
    return ax
