"""Write faults: how long they take, when and where they come, and what becomes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from lab.analysis.faults import df_faults_by_method
from lab.analysis.stages import STAGES, df_fault_stages
from lab.figures.figure import figure
from lab.figures.style import (
    OTHER_COLOURS,
    axes_or_new,
    legend,
    legend_beside,
    log_axis,
    log_scale,
    panels,
    plain,
    share_axis,
    step_up,
    styled_cases,
)
from lab.instruments.faultlog import latency_ns
from lab.runs.cases import case_label
from lab.runs.sets import RunSet
from lab.stats import quantile

_HANDLER = "from fault message read to page released, µs (handler's side)"
_NOT_THE_GUEST = "The way of a fault to the handler and back is not in it."
_RESOLVERS = ("snapshot-thread", "fault-thread", "sweep", "not-paused")
_COLOUR_OF = dict(zip(_RESOLVERS, OTHER_COLOURS, strict=False))
"""Colours of who resolved a fault, the same in every figure."""


def fault_tables(run_set: RunSet) -> list[pd.DataFrame]:
    """The fault log of each run of a set."""
    return [run.df_faults() for run in run_set]


@figure(
    title="Write-fault latency, one line per boot",
    caption="Share of the write faults that were served within a time, from the log of the patched "
    "QEMU: reading the kernel's message until the return of the call that releases the page.",
    limits=_NOT_THE_GUEST,
    table=df_faults_by_method,
    needs=("faults",),
)
def plot_fault_latency(faults: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Distribution of fault latency: share of faults resolved within x, x logarithmic.

    :param faults: `lab.analysis.faults.df_faults_by_method`, or one run's `df_faults()`.  One line
        per run, so that the spread between boots shows; faults that another thread released are
        left out.
    """
    ax = axes_or_new(ax)
    for style, of_case in styled_cases(_latencies(faults)):
        label: str | None = style.label
        for _, boot in of_case.groupby("run", sort=False):
            label = None if step_up(ax, boot["latency_us"], label, style.line, 1.2) else label
    log_scale(ax.xaxis)
    ax.set_xlabel(_HANDLER)
    share_axis(ax, "faults")
    legend(ax, loc="lower right")
    return ax


@figure(
    title="Write-fault latency",
    caption="How many write faults took how long, by the handler's clock, with the quantiles that "
    "half and 99 of 100 do not exceed.",
    limits=_NOT_THE_GUEST,
    table=df_faults_by_method,
    needs=("faults",),
)
def plot_fault_histogram(
    faults: pd.DataFrame, *, bins_per_decade: int = 20, ax: Axes | None = None
) -> Axes:
    """Histogram of fault latency with logarithmic bins, p50 and p99 marked.

    :param faults: as for `plot_fault_latency`; all rows are drawn as one population.
    """
    ax = axes_or_new(ax)
    values = _latencies(faults)["latency_us"].dropna().to_numpy(dtype=np.float64)
    values = values[values > 0]
    if len(values) > 0:
        low, high = np.floor(np.log10(values.min())), np.ceil(np.log10(values.max()) + 1e-9)
        edges = np.logspace(low, high, round((high - low) * bins_per_decade) + 1)
        ax.hist(values, bins=edges.tolist(), color=OTHER_COLOURS[1])
        for q, style in ((0.5, "-"), (0.99, "--")):
            at = quantile(values, q)
            label = f"p{q * 100:g} = {at:.3g} µs"
            ax.axvline(at, color=OTHER_COLOURS[0], linestyle=style, label=label)
        ax.legend()
    log_scale(ax.xaxis)
    ax.set_xlabel(_HANDLER)
    ax.set_ylabel("faults")
    return ax


def _latencies(faults: pd.DataFrame) -> pd.DataFrame:
    if "latency_us" in faults:
        return faults if "run" in faults else faults.assign(run="")
    latency = latency_ns(faults["read_ns"], faults["released_ns"]).astype("Float64") / 1e3
    case = faults.attrs.get("case", {})
    return pd.DataFrame({"run": "", **case, "latency_us": latency.astype(float)})


@figure(
    title="Each fault: when it came and how long it took",
    caption="A point is a fault, its colour who resolved it; of each case the boot of median "
    "duration.",
    limits="Faults whose page another thread released meanwhile have no latency and no point.",
    table=fault_tables,
    needs=("faults",),
    one_boot=True,
    panels=True,
)
def plot_faults_over_time(faults: pd.DataFrame, *more: pd.DataFrame) -> list[Axes]:
    """Latency of every fault against when it was read, one colour per who resolved it; a row per
    snapshot below each other.

    :param faults: what `df_faults()` of a `Snapshot` or of a recorded `Run` returns.
    """
    axes = _over_time(
        [table.assign(us=_latencies(table)["latency_us"]) for table in (faults, *more)]
    )
    for ax in axes:
        log_scale(ax.yaxis)
    axes[len(axes) // 2].set_ylabel("latency, µs")
    return axes


@figure(
    title="Where and when the guest met a protected page",
    caption="A point is a fault at its page's address, its colour who resolved it; of each case "
    "the boot of median duration.",
    limits="What no point shows was saved by the sweep, or had nothing in it.",
    table=fault_tables,
    needs=("faults",),
    one_boot=True,
    panels=True,
)
def plot_page_map(faults: pd.DataFrame, *more: pd.DataFrame) -> list[Axes]:
    """Which pages were saved because of a fault, when, and by whom; a row per snapshot.

    :param faults: what `df_faults()` of a `Snapshot` or of a recorded `Run` returns.  A point is a
        fault at its page's guest-physical address; an engine that takes neighbours along saves as
        many pages around it.  The sweep's own pages are not in the log.
    """
    tables = [table.dropna(subset=["gpa"]) for table in (faults, *more)]
    axes = _over_time([table.assign(us=table["gpa"].astype(np.int64) / 2**20) for table in tables])
    axes[len(axes) // 2].set_ylabel("guest-physical address, MiB")
    return axes


def _over_time(tables: list[pd.DataFrame]) -> list[Axes]:
    """A row per table: a point at each fault's `us` when it was read, by who resolved it."""
    axes = panels(len(tables), size=(7.6, 1.2 + 1.7 * len(tables)), rows=True, share=False)
    for ax, table in zip(axes, tables, strict=True):
        origin, since = table.attrs.get("request_ns"), "request"
        if origin is None:
            origin, since = table["read_ns"].min(), "first fault"
        for resolver, part in table.groupby(table["resolver"].astype(str)):
            seen = part.dropna(subset=["us"])
            at_ms = (seen["read_ns"] - origin) / 1e6
            shade = _COLOUR_OF.get(str(resolver), OTHER_COLOURS[-1])
            look: dict[str, Any] = {"color": shade, "markersize": 1.5, "label": str(resolver)}
            if len(seen):
                ax.plot(at_ms, seen["us"], ".", **look)
        ax.set_xlabel(f"since the {since}, ms")
        name = case_label(table.attrs.get("case", {}))
        legend_beside(ax, markerscale=6, title=name.replace(", ", "\n"), alignment="left")
    for ax in axes[:-1]:
        ax.set_xlabel("")
    return axes


@figure(
    title="Fault latency against the queue (median, 10 to 90 %)",
    caption="Faults are gathered by what waited for the snapshot thread when they came, in bins "
    "that double in width; one case's boots are drawn as one.",
    limits="The numbers of faults in the bins differ by orders of magnitude.",
    table=df_faults_by_method,
    needs=("faults",),
)
def plot_faults_by_depth(faults: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Latency of faults against what waited for the snapshot thread when they were read: median,
    and the band from the 10 % to the 90 % quantile, by case.

    :param faults: `lab.analysis.faults.df_faults_by_method` with `queue_depth`.  Depths are
        gathered in bins that double in width; the numbers of faults in them differ by orders of
        magnitude.
    """
    ax = axes_or_new(ax)
    data = faults.dropna(subset=["latency_us"])
    bands: list[pd.Series[float]] = []
    for style, part in styled_cases(data):
        # 0 by itself, then 1, 2-3, 4-7, ...
        depth = part["queue_depth"].to_numpy(dtype=np.int64)
        bins = np.where(depth > 0, 2.0 ** np.floor(np.log2(np.maximum(depth, 1))), 0)
        by_bin = part.assign(bin=bins).groupby("bin")["latency_us"]
        low, middle, high = (by_bin.quantile(q, interpolation="lower") for q in (0.1, 0.5, 0.9))
        x = middle.index.to_numpy()
        bands += [low, high]
        ax.fill_between(x, low, high, color=style.colour, alpha=0.2, linewidth=0)
        shape: dict[str, Any] = {"marker": style.marker, "markersize": 4, "label": style.label}
        ax.plot(x, middle, **style.line, **shape)
    ax.set_xscale("symlog", linthresh=1)
    ax.xaxis.set_major_formatter(FuncFormatter(plain))
    ax.set_xlim(left=0)
    log_axis(ax.yaxis, pd.concat(bands) if bands else pd.Series(dtype=float))
    ax.set_xlabel("faults, or pages copied aside, that waited for the snapshot thread")
    ax.set_ylabel("latency, µs")
    legend(ax)
    return ax


@figure(
    title="What becomes of a write fault, stage by stage",
    caption="A line is one boot; stages as far as the engine has them: "
    + "; ".join(f"{stage}: {meaning}" for stage, meaning in STAGES.items())
    + ".",
    limits="Faults on pages that another thread had saved are left out.",
    table=df_fault_stages,
    needs=("faults",),
    panels=True,
)
def plot_fault_stages(stages: pd.DataFrame) -> list[Axes]:
    """Distribution of how long faults spend in each stage, one panel per stage, one line per boot.

    :param stages: `lab.analysis.stages.df_fault_stages`.
    """
    seen = set(stages["stage"])
    names = [name for name in STAGES if name in seen] or ["no fault"]
    drawn = panels(len(names), size=(3 * len(names) + 0.5, 3))
    cases = styled_cases(stages)
    for ax, name in zip(drawn, names, strict=True):
        for style, part in cases:
            label: str | None = style.label
            for _, boot in part[part["stage"] == name].groupby("run", sort=False):
                label = None if step_up(ax, boot["us"], label, style.line, 1.1) else label
        log_scale(ax.xaxis)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("µs")
    # The same in every panel, so it is said once.
    legend(drawn[-1], below=drawn[0], loc="lower right", fontsize=7)
    share_axis(drawn[0], "faults")
    return drawn
