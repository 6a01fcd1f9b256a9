"""Figures: `plot_*(data, *, ax=None) -> Axes`.  They draw what they are given and compute nothing
of their own.

Colours are Okabe and Ito's, which stay apart for colour-blind readers and in grey; a method keeps
its colour and marker in every figure.  `stamp` writes under a figure what a reader must know to
judge it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lab.run import held_back_text
from lab.scenario import METHODS, UNLIMITED_BY_ZERO, recorded_dimension
from lab.stats import quantile

if TYPE_CHECKING:
    from lab.run import RunSet

STYLE = Path(__file__).with_name("lab.mplstyle")

# Okabe and Ito, without black and yellow (too strong and too weak as a line on white)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
# One more than colours, so that a method beyond the last colour differs by its marker.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

# A legend of more or longer names than this has no room inside the axes.
_MANY_NAMES = 9
_LONG_NAME = 44

COST_COLUMNS = {
    "pause_ms": "pause, ms",
    "duration_ms": "duration, ms",
    "lost_work_ms": "lost work, ms",
    "image_mib": "image, MiB",
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Figures made inside have the lab's style; the process's own is as before afterwards."""
    # Loads the backend: a notebook's sets itself up then, and the context would take that back.
    plt.draw_if_interactive()  # type: ignore[no-untyped-call]  # matplotlib does not type it
    with plt.style.context(STYLE):
        yield


def use_style() -> None:
    """Apply the lab's style to this process's figures."""
    plt.style.use(STYLE)


def _slot(method: str) -> int:
    names = list(METHODS)
    # A method of an older recording that the lab no longer knows still gets a stable place.
    return names.index(method) if method in names else len(names) + sum(map(ord, method))


# There are more methods than colours: one that differs from another by the file's format alone
# shares its colour, and is drawn broken.
_COLOUR_OF = {
    "live": 0,
    "live-rfc": 1,
    "live-inline": 2,
    "live-mapped": 5,
    "live-direct": 5,
    "live-inline-mapped": 2,
    "background": 3,
    "migrate-to-file": 4,
    "stop-and-copy": 6,
}
_BROKEN = ("live-direct", "live-inline-mapped")


def colour(method: str) -> str:
    """The colour of a method, the same in every figure."""
    return COLOURS[_COLOUR_OF.get(method, _slot(method)) % len(COLOURS)]


def case_colours(names: Iterable[str]) -> Mapping[str, str]:
    """A colour for each of the names that one figure shows: a method's own, and where there are
    cases of what a set varied, of which two may be of one method, one colour after the other.
    """
    shown = list(dict.fromkeys(names))
    if any(", " in name for name in shown):
        return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(shown)}
    return {name: colour(name) for name in shown}


def line_style(method: str) -> str:
    """How a method's line is drawn: solid, or broken where another has the same colour."""
    return "--" if method in _BROKEN else "-"


def marker(method: str) -> str:
    """The marker of a method, the same in every figure."""
    return MARKERS[_slot(method) % len(MARKERS)]


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    with styled():
        return plt.subplots()[1]


def _legend(ax: Axes, *, below: Axes | None = None, **where: Any) -> None:
    """A legend where it is wanted, or, of many or long names, below the axes (or those named, the
    leftmost of a row) in a figure that is made higher for it: inside it would hide the curves.
    """
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) <= _MANY_NAMES and max(map(len, labels), default=0) <= _LONG_NAME:
        ax.legend(**where)
        return
    # So far below that the axis keeps its numbers and its name.
    (below or ax).legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.0, 0.0),
        borderaxespad=6.5,
        fontsize=6,
    )
    figure = ax.get_figure()
    if isinstance(figure, Figure):
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.6 + 0.125 * len(labels))


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"


def _in_order(methods: Iterable[str]) -> list[str]:
    return sorted(set(methods), key=lambda m: (_slot(m), m))


def stamp_text(run_set: RunSet, cases: Sequence[str] | None = None) -> str:
    """What a reader must know: boots, accelerator, machine, host, builds, date; of these cases
    only, where they are named.
    """
    runs = [r for r in run_set.measured() if cases is None or r.case in cases]
    if not runs:
        return f"{run_set.name}: no run that counts"
    counts = sorted(set(Counter(r.case for r in runs).values()))
    boots = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    def all_of(field: str) -> str:
        return "/".join(sorted({str(r.summary.get(field)) for r in runs}))

    def limit(field: str, unit: str) -> list[str]:
        found = sorted({recorded_dimension(r.record.scenario, field) for r in runs})
        texts = "/".join(str(value) if value else "unlimited" for value in found)
        return [f"{texts} {unit}"] if any(found) else []

    guests = {recorded_dimension(r.record.scenario, "guest") for r in runs}
    micro = " microguest" if guests == {"micro"} else ""
    builds = sorted({r.build for r in runs})
    host = run_set.record.host
    parts = [
        f"n={boots} boots a {'case' if run_set.varied else 'method'}",
        f"{all_of('accel')}{micro}, {all_of('vcpus')} vCPU, {all_of('ram_mib')} MiB RAM",
        f"{all_of('workload')} {all_of('wss_mib')} MiB",
        *limit("rate_ops_per_s", "operations/s"),
        *(f"image at {text}" for text in limit("storage_mib_per_s", "MiB/s")),
        str(host.get("cpu_model") or host.get("cpu") or "unknown CPU"),
        f"Linux {host.get('kernel') or host.get('kernel_release') or 'unknown'}",
        "QEMU " + ", ".join(builds),
        *held_back_text(runs),
        f"set {run_set.name}, {run_set.record.created_utc[:10]}",
    ]
    return " | ".join(parts)


def stamp(ax: Axes, text: str) -> Axes:
    """Write `text` small under the figure of `ax`."""
    figure = ax.get_figure()
    if figure is not None:
        figure.supxlabel(_wrap(text), fontsize=6.5, color="#555555", x=0.01, ha="left")
    return ax


def _wrap(text: str, width: int = 120) -> str:
    lines, line = [], ""
    for part in text.split(" | "):
        if line and len(line) + len(part) + 3 > width:
            lines.append(line)
            line = part
        else:
            line = f"{line} | {part}" if line else part
    return "\n".join([*lines, line])


def plot_fault_latency(faults: pd.DataFrame, *, by: str = "method", ax: Axes | None = None) -> Axes:
    """Distribution of fault latency: share of faults resolved within x, x logarithmic.

    :param faults: `lab.tables.df_faults_by_method`, or one run's `df_faults()`.  One line per run,
        so that the spread between boots shows; faults that another thread released are left out.
    """
    ax = _axes(ax)
    data = _latencies(faults)
    if by not in data:
        data = data.assign(**{by: faults.attrs.get("method", "faults")})
    labelled = set()
    colours = case_colours(data[by].astype(str))
    for keys, part in data.groupby([by, "run"], observed=True, sort=False):
        name = str(keys[0])
        values = np.sort(part["latency_us"].dropna().to_numpy(dtype=np.float64))
        if len(values) == 0:
            continue
        share = np.arange(1, len(values) + 1) / len(values)
        label = None if name in labelled else name
        labelled.add(name)
        style: dict[str, Any] = {"color": colours[name], "linestyle": line_style(name)}
        ax.step(values, share, where="post", label=label, alpha=0.8, linewidth=1.2, **style)
    _log_us(ax)
    ax.set_ylim(0, 1.01)
    ax.set_ylabel("share of faults")
    ax.set_title("Write-fault latency, one line a boot")
    if labelled and labelled != {"faults"}:
        _legend(ax, loc="lower right")
    return ax


def plot_fault_histogram(
    faults: pd.DataFrame, *, bins_per_decade: int = 20, ax: Axes | None = None
) -> Axes:
    """Histogram of fault latency with logarithmic bins, p50 and p99 marked.

    :param faults: as for `plot_fault_latency`; all rows are drawn as one population.
    """
    ax = _axes(ax)
    values = _latencies(faults)["latency_us"].dropna().to_numpy(dtype=np.float64)
    values = values[values > 0]
    if len(values) > 0:
        low, high = np.floor(np.log10(values.min())), np.ceil(np.log10(values.max()) + 1e-9)
        edges = np.logspace(low, high, round((high - low) * bins_per_decade) + 1)
        ax.hist(values, bins=edges.tolist(), color=COLOURS[0])
        for q, style in ((0.5, "-"), (0.99, "--")):
            at = quantile(values, q)
            ax.axvline(at, color=COLOURS[1], linestyle=style, label=f"p{q * 100:g} = {at:.3g} us")
        ax.legend()
    _log_us(ax)
    ax.set_ylabel("faults")
    ax.set_title("Write-fault latency")
    return ax


def _latencies(faults: pd.DataFrame) -> pd.DataFrame:
    if "latency_us" in faults:
        return faults if "run" in faults else faults.assign(run="")
    released = faults["released_ns"] > 0
    latency = ((faults["released_ns"] - faults["read_ns"]) / 1e3).where(released)
    return pd.DataFrame({"run": "", "latency_us": latency})


def _log_us(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.set_xlabel("from fault message read to page released, us (handler's side)")


def plot_rates(
    rates: Mapping[str, pd.DataFrame],
    *,
    pauses_ms: Mapping[str, tuple[float, float]] | None = None,
    methods: Mapping[str, str] | None = None,
    colours: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Guest speed against time around the snapshot, one line a run.

    `lab.plot_slowdown` draws this from progress tables.

    :param rates: label -> `lab.tables.df_rate`.
    :param pauses_ms: label -> start and end of the pause since the request; drawn as a mark on top.
    :param methods: label -> method, for the colour; the label itself by default.
    :param colours: label -> colour, where it is not to be the method's.
    """
    ax = _axes(ax)
    for row, (label, rate) in enumerate(rates.items()):
        method = (methods or {}).get(label, label)
        shade = (colours or {}).get(label) or colour(method)
        style = line_style(method)
        ax.plot(rate["ms"], 100 * rate["share"], style, color=shade, label=label, linewidth=1.1)
        if pauses_ms and label in pauses_ms:
            # Above the axes, where no line runs, and with a tick: a pause of 1 ms is thinner than
            # a pixel.
            height = 1.015 + 0.022 * row
            drawn: dict[str, Any] = {
                "transform": ax.get_xaxis_transform(),
                "clip_on": False,
                "color": shade,
            }
            start, end = pauses_ms[label]
            ax.plot([start, end], [height] * 2, linewidth=3, solid_capstyle="butt", **drawn)
            ax.plot([start], [height], marker="|", markersize=5, **drawn)
    ax.axvline(0, color="#999999", linewidth=0.8, zorder=0)
    ax.axhline(100, color="#999999", linewidth=0.8, zorder=0)
    ax.set_ylim(0, 130)
    ax.set_xlabel("since the request, ms")
    ax.set_ylabel("guest speed, % of before")
    ax.set_title("Guest speed around the snapshot (bars: VM paused)", pad=8 + 6 * len(rates))
    _legend(ax, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def plot_phases(phases: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What the pause consists of: one stacked bar a run.

    :param phases: `lab.tables.df_phases_by_method`, or one snapshot's `df_phases()`.  Drawn are the
        phases between stop and resume; set-up and sweep, during which the guest runs, are left out.
    """
    ax = _axes(ax)
    if "duration_ms" not in phases:
        name = phases.attrs.get("method", "snapshot")
        phases = phases.assign(run=name, duration_ms=phases["duration_ns"] / 1e6)
    running = {"populate", "setup", "arm-ahead", "sweep", "complete", "release", "hold"}
    inside = phases[~phases["phase"].isin(running)]
    names = list(dict.fromkeys(inside["phase"]))
    runs = list(dict.fromkeys(inside["run"]))
    left = np.zeros(len(runs))
    for k, name in enumerate(names):
        part = inside[inside["phase"] == name].groupby("run", observed=True)["duration_ms"].sum()
        width = part.reindex(runs).fillna(0).to_numpy(dtype=np.float64)
        ax.barh(runs, width, left=left, color=COLOURS[k % len(COLOURS)], label=name)
        left = left + width
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("ms")
    ax.set_title("What the pause consists of")
    if names:
        ax.legend(ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8)
    return ax


def plot_phase_times(phases: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """How long every phase took, those included in which the guest runs: one point a boot, a bar at
    the median, log scale.

    :param phases: `lab.tables.df_phases_by_method`.  Phases in the order in which they begin.
    """
    ax = _axes(ax)
    names = phases.groupby("phase", observed=True)["start_ms"].median().sort_values().index.tolist()
    methods = _in_order(phases["method"])
    for place, method in enumerate(methods):
        # Methods beside each other within a phase's row.
        shift = (place - (len(methods) - 1) / 2) * 0.8 / max(1, len(methods))
        label: str | None = method
        for row, name in enumerate(names):
            chosen = (phases["method"] == method) & (phases["phase"] == name)
            values = phases.loc[chosen, "duration_ms"].to_numpy(dtype=np.float64)
            if len(values):
                _points(ax, values, row + shift, method, label, half=0.35 / len(methods))
                label = None
    ax.set_yticks(range(len(names)), names)
    if names:
        ax.set_ylim(len(names) - 0.5, -0.5)
        _log_x(ax, phases["duration_ms"])
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("ms")
    ax.set_title("How long each phase takes")
    if len(methods) > 1:
        _legend(ax)
    return ax


def _points(
    ax: Axes, values: np.ndarray[Any, Any], row: float, method: str, label: str | None, half: float
) -> None:
    shade = colour(method)
    spread = np.linspace(-half / 2, half / 2, len(values)) if len(values) > 1 else np.zeros(1)
    shape: dict[str, Any] = {"color": shade, "markersize": 4, "alpha": 0.75, "label": label}
    ax.plot(values, row + spread, marker(method), **shape)
    ax.plot([np.median(values)] * 2, [row - half, row + half], color=shade, linewidth=2)


def plot_fault_stages(stages: pd.DataFrame, *, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Distribution of how long faults spend in each stage, one panel a stage, one line a boot.

    :param stages: `lab.anatomy.df_fault_stages`.
    """
    seen = set(stages["stage"])
    names = [name for name in ("queued", "saved", "released") if name in seen] or ["no fault"]
    if axes is None:
        with styled():
            size = (3 * len(names) + 0.5, 3)
            axes = np.atleast_1d(plt.subplots(1, len(names), figsize=size, sharey=True)[1]).tolist()
    drawn = list(axes)
    methods = _in_order(stages["method"])
    for ax, name in zip(drawn, names, strict=True):
        of_stage = stages[stages["stage"] == name]
        labelled = set()
        for method in methods:
            for _, boot in of_stage[of_stage["method"] == method].groupby("run", sort=False):
                values = np.sort(boot["us"].to_numpy(dtype=np.float64))
                share = np.arange(1, len(values) + 1) / len(values)
                label = None if method in labelled else method
                labelled.add(method)
                line: dict[str, Any] = {
                    "color": colour(method),
                    "linestyle": line_style(method),
                    "alpha": 0.8,
                    "linewidth": 1.1,
                    "label": label,
                }
                ax.step(values, share, where="post", **line)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(_plain))
        ax.set_title(name)
        ax.set_xlabel("us")
    if methods:
        # The same in every panel, so it is said once.
        _legend(drawn[-1], below=drawn[0], loc="lower right", fontsize=7)
    drawn[0].set_ylabel("share of faults")
    drawn[0].set_ylim(0, 1.01)
    return drawn


def _panels(count: int) -> list[Axes]:
    """So many axes beside each other, in a figure of their own."""
    with styled():
        size = (2.6 * count + 0.5, 2.9)
        axes: list[Axes] = np.atleast_1d(plt.subplots(1, count, figsize=size)[1]).tolist()
    return axes


def _log_y(ax: Axes, values: pd.Series[float]) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(_plain))
    ax.yaxis.set_minor_formatter(NullFormatter())
    if len(values):
        low, high = values.min() / 1.4, values.max() * 1.4
        ax.set_ylim(low, high)
        steps = (1, 2, 3, 5) if high / low < 30 else (1,)
        ax.yaxis.set_major_locator(LogLocator(subs=steps))


def plot_varied(
    runs: pd.DataFrame,
    x: str,
    metrics: Mapping[str, str],
    *,
    by: str = "method",
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:
    """What a parameter changes: one panel a metric, one point a boot, a line through the medians.

    :param runs: `lab.tables.df_runs` of a set that varied `x`; warm-ups and runs that are not ok
        are left out.
    :param metrics: column -> title of its panel, with the unit.  Log scale; values of zero or less
        have no place on it and are left out, and the title says how many.
    :param by: column whose values get a line each.
    """
    data = runs[(runs["outcome"] == "ok") & ~runs["warmup"]]
    drawn = _panels(len(metrics)) if axes is None else list(axes)
    values = data[x].unique().tolist()
    values = values if data[x].dtype == object else sorted(values)
    if x in UNLIMITED_BY_ZERO:
        values.sort(key=lambda value: (value == 0, value))
    groups = _in_order(data[by]) if by == "method" else sorted(data[by].unique(), key=str)
    for ax, (metric, title) in zip(drawn, metrics.items(), strict=True):
        hidden = int((data[metric] <= 0).sum())
        positive = data[data[metric] > 0]
        for k, group in enumerate(groups):
            shade = colour(group) if by == "method" else COLOURS[k % len(COLOURS)]
            shape = marker(group) if by == "method" else MARKERS[k % len(MARKERS)]
            part = positive[positive[by] == group]
            at = part[x].map(values.index).to_numpy(dtype=np.float64)
            # Groups beside each other, so that they do not hide each other.
            shift = 0.12 * (k - (len(groups) - 1) / 2)
            points: dict[str, Any] = {"color": shade, "markersize": 4, "alpha": 0.6}
            ax.plot(at + shift, part[metric].to_numpy(dtype=np.float64), shape, **points)
            middle = part.groupby(x)[metric].median()
            places = sorted(values.index(value) for value in middle.index)
            heights = [middle[values[place]] for place in places]
            where = np.asarray(places) + shift
            ax.plot(where, heights, color=shade, linewidth=1.4, label=str(group))
        _log_y(ax, positive[metric])
        names = [_value_name(x, value) for value in values]
        is_long = any(len(name) > 5 for name in names)
        slant: dict[str, Any] = {"rotation": 30, "ha": "right"} if is_long else {}
        ax.set_xticks(range(len(values)), names, **slant)
        ax.set_xlabel(x)
        ax.set_title(f"{title} ({hidden} not shown)" if hidden else title, fontsize=9)
        ax.tick_params(labelsize=8)
    if len(groups) > 1:
        drawn[0].legend(fontsize=7)
    return drawn


def _value_name(parameter: str, value: object) -> str:
    return "unlimited" if parameter in UNLIMITED_BY_ZERO and value == 0 else str(value)


def plot_against(
    runs: pd.DataFrame,
    x: str,
    metrics: Mapping[str, str],
    *,
    x_title: str | None = None,
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:
    """What depends on a number, both on log scales: one panel a metric, one point a boot, a line
    through the medians of cases, method by method.

    :param runs: `lab.tables.df_runs`; warm-ups and runs that are not ok are left out, and so is
        what is not positive, of which the title says how much.
    :param x: a column that is a number, varied or measured.
    :param metrics: column -> title of its panel, with the unit.
    """
    data = runs[(runs["outcome"] == "ok") & ~runs["warmup"]]
    drawn = _panels(len(metrics)) if axes is None else list(axes)
    methods = _in_order(data["method"])
    for ax, (metric, title) in zip(drawn, metrics.items(), strict=True):
        positive = data[(data[metric] > 0) & (data[x] > 0)]
        hidden = int(data[metric].notna().sum()) - len(positive)
        for method in methods:
            part = positive[positive["method"] == method]
            shade = colour(method)
            points: dict[str, Any] = {"color": shade, "markersize": 4, "alpha": 0.6}
            ax.plot(part[x].to_numpy(), part[metric].to_numpy(), marker(method), **points)
            middle = part.groupby("case")[[x, metric]].median().sort_values(x)
            ax.plot(middle[x], middle[metric], color=shade, linewidth=1.4, label=method)
        if len(positive):
            _log_x(ax, positive[x])
        _log_y(ax, positive[metric])
        ax.set_xlabel(x_title or x, fontsize=9)
        ax.set_title(f"{title} ({hidden} not shown)" if hidden else title, fontsize=9)
        ax.tick_params(labelsize=8)
    if len(methods) > 1:
        drawn[0].legend(fontsize=7)
    return drawn


def plot_overhead(overhead: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What each instrument changes: the ratio with / without, its interval as a line, and as a grey
    band what boots without it differ by anyway.  Ratios that are not known are left out.

    :param overhead: `lab.overhead.df_overhead`.
    """
    known = overhead[overhead["ratio"].notna()]
    if ax is None:
        with styled():
            ax = plt.subplots(figsize=(6.5, 1 + 0.26 * max(4, len(known))))[1]
    instruments = list(dict.fromkeys(known["instrument"]))
    labels: list[str] = []
    for row, one in enumerate(known.to_dict("records")):
        shade = COLOURS[instruments.index(one["instrument"]) % len(COLOURS)]
        ax.barh(row, 2 * one["noise"], left=1 - one["noise"], height=0.8, color="#e4e4e4", zorder=0)
        ax.plot([one["low"], one["high"]], [row, row], color=shade, linewidth=1.6)
        ax.plot([one["ratio"]], [row], "o", color=shade, markersize=5)
        labels.append(f"{one['instrument']}: {one['metric']}")
    ax.axvline(1, color="#999999", linewidth=0.8)
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("with / without")
    ax.set_title("What each instrument changes (band: noise of boots)")
    return ax


def plot_sample_gaps(gaps: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """How many samples of progress are further than x from the one before: a line a boot, a colour
    a sampling interval, both scales logarithmic.

    :param gaps: `lab.overhead.df_sample_gaps`.
    """
    ax = _axes(ax)
    intervals = sorted(gaps["interval_us"].unique().tolist())
    for k, interval_us in enumerate(intervals):
        label: str | None = f"every {interval_us / 1e3:g} ms"
        for _, boot in gaps[gaps["interval_us"] == interval_us].groupby("run", sort=False):
            values = np.sort(boot["gap_ms"].to_numpy(dtype=np.float64))
            share = 1 - np.arange(len(values)) / len(values)
            style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "alpha": 0.6}
            ax.step(values, share, where="pre", linewidth=0.9, label=label, **style)
            label = None
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(_plain))
    ax.set_xlabel("since the sample before, ms")
    ax.set_ylabel("share of samples that are as late, or later")
    ax.set_title("How far apart the samples are, one line a boot")
    if intervals:
        ax.legend()
    return ax


def plot_cost(runs: pd.DataFrame, *, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Pause, duration, lost work and image size by method (or case): one point a boot, a bar at the
    median, log scale.

    :param runs: `lab.tables.df_runs`; warm-ups and runs that are not ok are left out.  Lost work of
        zero or less (the guest ran faster than before) has no place on a log scale: it is drawn
        hollow at the lower edge.
    """
    data = runs[(runs["outcome"] == "ok") & ~runs["warmup"]].copy()
    data["image_mib"] = data["image_bytes"] / 2**20
    if axes is None:
        with styled():
            rows = max(3.2, 1 + 0.32 * data["case"].nunique())
            longest = max(map(len, data["case"]), default=0)
            width = 9 + 0.08 * max(0, longest - _LONG_NAME)
            axes = plt.subplots(1, len(COST_COLUMNS), figsize=(width, rows), sharey=True)[1]
    drawn = list(axes)
    # The method gives colour and marker, the case a row.
    method_of = dict(zip(data["case"], data["method"], strict=True))
    cases = sorted(method_of, key=lambda case: (_slot(method_of[case]), case))
    for ax, (column, title) in zip(drawn, COST_COLUMNS.items(), strict=True):
        for row, case in enumerate(cases):
            method = method_of[case]
            values = data.loc[data["case"] == case, column].dropna().to_numpy(dtype=np.float64)
            positive = values[values > 0]
            # Points of one method are spread so that equal values do not hide each other.
            offset = (
                np.linspace(-0.18, 0.18, len(positive))
                if len(positive) > 1
                else np.zeros(len(positive))
            )
            shade = colour(method)
            ax.plot(positive, row + offset, marker(method), color=shade, markersize=5, alpha=0.75)
            if len(positive):
                ax.plot(
                    [np.median(positive)] * 2, [row - 0.32, row + 0.32], color=shade, linewidth=2
                )
            if len(positive) < len(values):
                ax.plot(
                    [0.01] * (len(values) - len(positive)),
                    [row] * (len(values) - len(positive)),
                    marker(method),
                    color=shade,
                    fillstyle="none",
                    transform=ax.get_yaxis_transform(),
                )
        _log_x(ax, data[column])
        ax.set_title(title)
        ax.set_yticks(range(len(cases)), cases)
        ax.grid(visible=False, axis="y")
    if cases:
        drawn[0].set_ylim(len(cases) - 0.5, -0.5)
    return drawn


def _log_x(ax: Axes, values: pd.Series) -> None:
    """A log scale with a margin and with labels also where it spans less than a decade."""
    ax.set_xscale("log")
    positive = values[values > 0]
    low, high = (positive.min() / 1.4, positive.max() * 1.4) if len(positive) else (1, 10)
    ax.set_xlim(low, high)
    ax.tick_params(axis="x", labelsize=8)
    decades = np.log10(high / low)
    steps = (1, 2, 3, 4, 6, 8) if decades < 0.7 else (1, 2, 5) if decades < 1.4 else (1,)
    ax.xaxis.set_major_locator(LogLocator(subs=steps))
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.xaxis.set_minor_formatter(NullFormatter())


def plot_floor(medians: pd.DataFrame, *, per_gib: bool = False, ax: Axes | None = None) -> Axes:
    """What each step of a snapshot costs by itself: a point at the median over rounds, a bar over
    its interval, log scale.

    :param medians: rows of `lab.floor.summary.df_floor_medians`, drawn in their order.
    :param per_gib: ms a GiB instead of us a step; rows of no size are left out.
    """
    data = medians.dropna(subset=["ms_per_gib"]) if per_gib else medians
    if ax is None:
        with styled():
            ax = plt.subplots(figsize=(7.2, 1.1 + 0.22 * len(data)))[1]
    # Per GiB, a step's interval grows by the same factor as its median.
    factor = data["ms_per_gib"] / data["median_us"] if per_gib else 1.0
    middle, low, high = (data[name] * factor for name in ("median_us", "low_us", "high_us"))
    kinds = list(dict.fromkeys(data["benchmark"]))
    for row, benchmark in enumerate(data["benchmark"]):
        shade = COLOURS[kinds.index(benchmark) % len(COLOURS)]
        ax.plot([low.iloc[row], high.iloc[row]], [row] * 2, color=shade, linewidth=2, alpha=0.6)
        ax.plot([middle.iloc[row]], [row], "o", color=shade, markersize=4.5)
    places = data["ram_kind"].fillna(data["target"]).fillna("")
    names = [f"{step}, {place}" for step, place in zip(data["label"], places, strict=True)]
    ax.set_yticks(range(len(names)), names, fontsize=7.5)
    ax.set_ylim(len(names) - 0.5, -0.5)
    _log_x(ax, pd.concat([low, high]))
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("ms a GiB" if per_gib else "us")
    return ax


def plot_faults_over_time(faults: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Latency of every fault against when it was read, one colour per who resolved it.

    :param faults: `lab.tables.df_faults_by_method` of one run, or of several that are to be laid
        over each other; or one snapshot's `df_faults()`.
    """
    ax = _axes(ax)
    since = "request"
    if "latency_us" not in faults:
        origin = faults.attrs.get("request_ns")
        if origin is None:
            since, origin = "first fault", faults["read_ns"].min()
        timed = {"ms": (faults["read_ns"] - origin) / 1e6, "resolver": faults["resolver"]}
        faults = _latencies(faults).assign(**timed)
    for k, (resolver, part) in enumerate(faults.groupby("resolver", observed=True)):
        seen = part.dropna(subset=["latency_us"])
        if len(seen) == 0:
            continue
        ax.plot(
            seen["ms"],
            seen["latency_us"],
            ".",
            color=COLOURS[k % len(COLOURS)],
            markersize=1.5,
            label=resolver,
        )
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(_plain))
    ax.set_xlabel(f"since the {since}, ms")
    ax.set_ylabel("latency, us")
    ax.set_title("Each fault: when it came and how long it took")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(markerscale=6, loc="upper right")
    return ax


def plot_faults_by_depth(faults: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Latency of faults against what waited for the snapshot thread when they were read: median,
    and the band from the 10 % to the 90 % quantile, by method.

    :param faults: `lab.tables.df_faults_by_method` with `queue_depth`.  Depths are gathered in bins
        that double in width; the numbers of faults in them differ by orders of magnitude.
    """
    ax = _axes(ax)
    data = faults.dropna(subset=["latency_us"])
    for method in _in_order(data["method"]):
        part = data[data["method"] == method]
        # 0 by itself, then 1, 2-3, 4-7, ...
        depth = part["queue_depth"].to_numpy(dtype=np.int64)
        part = part.assign(
            bin=np.where(depth > 0, 2.0 ** np.floor(np.log2(np.maximum(depth, 1))), 0)
        )
        by_bin = part.groupby("bin")["latency_us"]
        quantiles = {q: by_bin.quantile(q, interpolation="lower") for q in (0.1, 0.5, 0.9)}
        shade = colour(method)
        x = quantiles[0.5].index.to_numpy()
        ax.fill_between(x, quantiles[0.1], quantiles[0.9], color=shade, alpha=0.2, linewidth=0)
        ax.plot(x, quantiles[0.5], marker(method) + "-", color=shade, markersize=4, label=method)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(_plain))
    ax.yaxis.set_minor_formatter(FuncFormatter(_plain))
    ax.set_xlabel("faults, or pages copied aside, that waited for the snapshot thread")
    ax.set_ylabel("latency, us")
    ax.set_title("Fault latency against the queue (median, 10 to 90 %)")
    if len(data):
        ax.legend()
    return ax


def plot_page_map(faults: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Which pages were saved because of a fault, when, and by whom.

    :param faults: one snapshot's `df_faults()`.  A point is a fault at its page's guest-physical
        address; an engine that takes neighbours along saves as many pages around it.  The sweep's
        own pages are not in the log: it saves what no point shows.
    """
    ax = _axes(ax)
    seen = faults.dropna(subset=["gpa"])
    origin, since = faults.attrs.get("request_ns"), "request"
    if origin is None:
        origin, since = faults["read_ns"].min(), "first fault"
    for k, (resolver, part) in enumerate(seen.groupby("resolver", observed=True)):
        at_ms = (part["read_ns"] - origin) / 1e6
        address_mib = part["gpa"].astype(np.int64) / 2**20
        shade = COLOURS[k % len(COLOURS)]
        style: dict[str, Any] = {"color": shade, "markersize": 1.5, "label": str(resolver)}
        ax.plot(at_ms, address_mib, ".", **style)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(markerscale=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    ax.set_xlabel(f"since the {since}, ms")
    ax.set_ylabel("guest-physical address, MiB")
    ax.set_title("Where and when the guest met a protected page")
    return ax


def plot_stalls(stalls: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """How many of the guest's operations took longer than x, by the guest's own clock.

    :param stalls: `lab.tables.df_write_latency_by_method`: one line a boot while the snapshot ran,
        and a dashed one for the second before.  Operations a second, so that windows of different
        length compare.
    """
    ax = _axes(ax)
    labelled = set()
    colours = case_colours(stalls["method"].astype(str))
    for keys, part in stalls.groupby(["method", "run", "window"], sort=False):
        method, window = str(keys[0]), str(keys[2])
        ordered = part.sort_values("low_ns")
        longer = ordered["ops"].iloc[::-1].cumsum().iloc[::-1] / ordered["window_s"]
        during = window == "during"
        label = method if during else "before"
        style: dict[str, Any] = {"color": colours[method] if during else "#999999", "alpha": 0.8}
        style |= {"linestyle": "-" if during else "--", "linewidth": 1.1 if during else 0.7}
        style |= {"label": None if label in labelled else label, "zorder": 2 if during else 1}
        labelled.add(label)
        ax.step(ordered["low_ns"] / 1e3, longer, where="post", **style)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.set_xlabel("duration of an operation, us (the guest's clock)")
    ax.set_ylabel("operations a second that took longer")
    ax.set_title("What the guest's own operations took")
    if labelled:
        _legend(ax, loc="lower left")
    return ax


def plot_waits(waits: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of faults over within x: solid by the guest's clock, dotted the handler's part of it.

    :param waits: `lab.tables.df_waits_by_method`; all boots of a method are one line.
    """
    ax = _axes(ax)
    colours = case_colours(waits["method"].astype(str))
    for name, part in waits.groupby("method", sort=False):
        method = str(name)
        for column, style in (("wait_us", "-"), ("handler_us", ":")):
            values = np.sort(part[column].dropna().to_numpy(dtype=np.float64))
            if len(values) == 0:
                continue
            share = np.arange(1, len(values) + 1) / len(values)
            label = method if column == "wait_us" else None
            ax.step(values, share, style, where="post", color=colours[method], label=label)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.set_xlabel("us: the guest's write, by its clock (solid); the handler's part (dotted)")
    ax.set_ylim(0, 1.01)
    ax.set_ylabel("share of faults")
    ax.set_title("What the guest waits for a page")
    if len(waits):
        _legend(ax, loc="lower right")
    return ax


def plot_lost_work(runs: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Lost work against duration, one point a boot, both logarithmic; the line is where a guest
    would be that stood still for all of the snapshot.

    :param runs: `lab.tables.df_runs`; warm-ups, runs that are not ok and lost work of zero or less,
        which has no place here, are left out.
    """
    ax = _axes(ax)
    data = runs[(runs["outcome"] == "ok") & ~runs["warmup"] & (runs["lost_work_ms"] > 0)]
    method_of = dict(zip(data["case"], data["method"], strict=True))
    for case in sorted(method_of, key=lambda case: (_slot(method_of[case]), case)):
        part = data[data["case"] == case]
        style = {"color": colour(method_of[case]), "markersize": 5, "alpha": 0.75, "label": case}
        ax.plot(part["duration_ms"], part["lost_work_ms"], marker(method_of[case]), **style)
    if len(data):
        ends = [data["duration_ms"].min() / 1.3, data["duration_ms"].max() * 1.3]
        ax.plot(ends, ends, color="#999999", linewidth=0.8, zorder=0)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(_plain))
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("duration, ms")
    ax.set_ylabel("lost work, ms")
    ax.set_title("What was lost, and how long it took")
    return ax
