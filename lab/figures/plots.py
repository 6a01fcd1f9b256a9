"""Figures: `plot_*(data, *, ax=None) -> Axes`.  They draw what they are given and compute nothing
of their own.

Colours are Okabe and Ito's, which stay apart for colour-blind readers and in grey; a method keeps
its colour and marker in every figure.  Cases of one method, of a set that varied more, are told
apart by dashes and strength, which follow the order of what was varied (`case_styles`).  `stamp`
writes under a figure what a reader must know to judge it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lab.runs.cases import by_case, case_columns, case_label, python_value
from lab.runs.run import Run, held_back_text
from lab.runs.sets import RunSet
from lab.scenario.dimensions import DIMENSIONS, recorded_dimension
from lab.scenario.methods import METHODS
from lab.stats import quantile

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


def marker(method: str) -> str:
    """The marker of a method, the same in every figure."""
    return MARKERS[_slot(method) % len(MARKERS)]


Dashes = tuple[float, tuple[float, ...]]
"""A line style of matplotlib: where its pattern begins, and lengths of ink and of gaps."""

_WEAKEST = 0.35


def dashes(method: str, step: int = 0) -> Dashes:
    """How a line of a method is drawn: solid at first, with longer gaps from step to step.  Where
    another method has the same colour, a dot is in each of the gaps, so that the two differ.
    """
    gap = 1.2 * (step + (method in _BROKEN))
    ink = 6.0 / (1 + 0.5 * step)
    if method in _BROKEN:
        return (0.0, (ink, gap, 1.0, gap))
    return (0.0, (ink, gap) if step else ())


@dataclass(frozen=True, kw_only=True)
class CaseStyle:
    """How a case looks in a figure: colour and marker are its method's."""

    label: str
    colour: str
    marker: str
    dashes: Dashes
    strength: float = 1.0

    @property
    def line(self) -> dict[str, Any]:
        """Keywords of matplotlib for a line."""
        return {"color": self.colour, "linestyle": self.dashes, "alpha": 0.85 * self.strength}

    @property
    def points(self) -> dict[str, Any]:
        """Keywords of matplotlib for points that no line joins."""
        plain = {"linestyle": "none", "marker": self.marker}
        return {"color": self.colour, "alpha": 0.75 * self.strength} | plain


def case_styles(cases: Sequence[Mapping[str, Any]], *, with_dashes: bool = True) -> list[CaseStyle]:
    """A style for each of the cases that one figure shows; no two are the same.

    Of what varies among the cases of a method, the parameter of most values gives the dashes, and
    the others together the strength, each in the order of its values.

    :param with_dashes: use strength alone, where dashes mean something else.
    """
    names = dict.fromkeys(name for case in cases for name in case if name != "method")
    values = {name: _in_order(name, [case.get(name) for case in cases]) for name in names}
    ranked = sorted(names, key=lambda name: -len(values[name])) if with_dashes else []
    dashed, rest = ranked[:1], [name for name in names if name not in ranked[:1]]
    strong = sorted({tuple(values[name].index(case.get(name)) for name in rest) for case in cases})
    styles = []
    for case in cases:
        method = str(case.get("method", "faults"))
        step = sum(values[name].index(case.get(name)) for name in dashed)
        place = strong.index(tuple(values[name].index(case.get(name)) for name in rest))
        styles.append(
            CaseStyle(
                label=case_label(case),
                colour=colour(method),
                marker=marker(method),
                dashes=dashes(method, step),
                strength=1.0 - (1.0 - _WEAKEST) * place / max(1, len(strong) - 1),
            )
        )
    return styles


def _in_order(name: str, values: Sequence[Any]) -> list[Any]:
    return sorted(dict.fromkeys(values), key=DIMENSIONS[name].place)


def _styled_cases(
    frame: pd.DataFrame, *, with_dashes: bool = True
) -> list[tuple[CaseStyle, pd.DataFrame]]:
    """The cases in a table, each with its style and its rows."""
    cases = by_case(frame)
    styles = case_styles([case for case, _ in cases], with_dashes=with_dashes)
    return [(style, part) for style, (_, part) in zip(styles, cases, strict=True)]


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


def stamp_text(
    run_set: RunSet,
    cases: Sequence[str] | None = None,
    *,
    drawn: Sequence[Run] | None = None,
) -> str:
    """What a reader must know: boots, accelerator, machine, host, builds, date.

    :param cases: of these only; by default of all.
    :param drawn: the runs that the figure shows, where it does not show every boot of its cases.
    """
    if drawn is not None:
        cases = [run.case for run in drawn]
    runs = [r for r in run_set.measured() if cases is None or r.case in cases]
    if not runs:
        return f"{run_set.name}: no run that counts"

    def boots_of(some: Sequence[Run]) -> str:
        counts = sorted(set(Counter(r.case for r in some).values()))
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    shown, boots = boots_of(runs if drawn is None else drawn), boots_of(runs)
    if shown != boots:
        boots = f"{shown} of {boots}"

    def all_of(field: str) -> str:
        return "/".join(sorted({str(r.summary.get(field)) for r in runs}))

    def limit(field: str, unit: str) -> list[str]:
        found = {recorded_dimension(r.record.scenario, field) for r in runs}
        texts = map(DIMENSIONS[field].shown, _in_order(field, list(found)))
        return [f"{'/'.join(texts)} {unit}"] if any(found) else []

    def workload(run: Run) -> str:
        # An idle guest has no working set.
        mib = run.summary.get("wss_mib")
        return f"{run.summary.get('workload')}" + ("" if mib is None else f" {mib} MiB")

    guests = {recorded_dimension(r.record.scenario, "guest") for r in runs}
    micro = " microguest" if guests == {"micro"} else ""
    builds = sorted({r.build for r in runs})
    host = run_set.record.host
    parts = [
        f"n={boots} boots per {'case' if run_set.varied else 'method'}",
        f"{all_of('accel')}{micro}, {all_of('vcpus')} vCPU, {all_of('ram_mib')} MiB RAM",
        ", ".join(sorted({workload(run) for run in runs})),
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


def plot_fault_latency(faults: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Distribution of fault latency: share of faults resolved within x, x logarithmic.

    :param faults: `lab.analysis.faults.df_faults_by_method`, or one run's `df_faults()`.  One line
        per run, so that the spread between boots shows; faults that another thread released are
    left out.
    """
    ax = _axes(ax)
    data = _latencies(faults)
    for style, of_case in _styled_cases(data):
        label: str | None = style.label
        for _, boot in of_case.groupby("run", sort=False):
            label = None if _step_up(ax, boot["latency_us"], label, style.line, 1.2) else label
    _log_us(ax)
    ax.set_ylim(0, 1.01)
    ax.set_ylabel("share of faults")
    ax.set_title("Write-fault latency, one line per boot")
    if any(ax.get_legend_handles_labels()[1]):
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
            ax.axvline(at, color=COLOURS[1], linestyle=style, label=f"p{q * 100:g} = {at:.3g} µs")
        ax.legend()
    _log_us(ax)
    ax.set_ylabel("faults")
    ax.set_title("Write-fault latency")
    return ax


def _step_up(
    ax: Axes, values: pd.Series[float], label: str | None, line: Mapping[str, Any], width: float
) -> bool:
    """Draw what share of the values is at most x; return whether there are any."""
    known = np.sort(values.dropna().to_numpy(dtype=np.float64))
    share = np.arange(1, len(known) + 1) / max(1, len(known))
    if len(known):
        ax.step(known, share, where="post", label=label, linewidth=width, **line)
    return len(known) > 0


def _latencies(faults: pd.DataFrame) -> pd.DataFrame:
    if "latency_us" in faults:
        return faults if "run" in faults else faults.assign(run="")
    released = faults["released_ns"] > 0
    latency = ((faults["released_ns"] - faults["read_ns"]) / 1e3).where(released)
    case = faults.attrs.get("case", {})
    return pd.DataFrame({"run": "", **case, "latency_us": latency})


def _log_us(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.set_xlabel("from fault message read to page released, µs (handler's side)")


def plot_rates(
    rates: Mapping[str, pd.DataFrame],
    *,
    pauses_ms: Mapping[str, tuple[float, float]] | None = None,
    styles: Mapping[str, CaseStyle] | None = None,
    thick: Collection[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Guest speed against time around the snapshot, one line per run.

    `lab.plot_slowdown` draws this from progress tables.

    :param rates: label -> `lab.analysis.slowdown.df_rate`.
    :param pauses_ms: label -> start and end of the pause since the request; drawn as a mark on top.
    :param styles: label -> how its case looks; by default the label is taken for a method.
    :param thick: labels of lines to draw thicker than the others.
    """
    ax = _axes(ax)
    for row, (label, rate) in enumerate(rates.items()):
        style = (styles or {}).get(label) or case_styles([{"method": label}])[0]
        line = style.line | {"label": label, "linewidth": 1.1}
        if thick:
            line["linewidth"] = 2.0 if label in thick else 0.6
        ax.plot(rate["ms"], 100 * rate["share"], **line)
        if pauses_ms and label in pauses_ms:
            # Above the axes, where no line runs, and with a tick: a pause of 1 ms is thinner than
            # a pixel.
            height = 1.015 + 0.022 * row
            drawn: dict[str, Any] = {
                "transform": ax.get_xaxis_transform(),
                "clip_on": False,
                "color": style.colour,
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


def plot_rate_rows(
    rates: Mapping[str, pd.DataFrame],
    *,
    pauses_ms: Mapping[str, tuple[float, float]],
    lost_ms: Mapping[str, float],
    back_ms: Mapping[str, float],
    styles: Mapping[str, CaseStyle],
    until_ms: float,
) -> list[Axes]:
    """Guest speed against time around the snapshot, a row per run below each other.

    What the guest lost is filled, the pause is a dark band, and the lost work stands at the right.

    :param rates: label -> `lab.analysis.slowdown.df_rate`.
    :param pauses_ms: label -> start and end of the pause since the request.
    :param lost_ms: label -> lost work (`lab.analysis.slowdown.slowdown`).
    :param back_ms: label -> when the old rate was back: until then work counts as lost.
    :param styles: label -> how its case looks.
    :param until_ms: how far the axis goes, since the request.
    """
    size = (7.6, 1.1 + 0.72 * max(len(rates), 1))
    first_ms = -0.08 * until_ms - 20
    with styled():
        shape: dict[str, Any] = {"sharex": True, "sharey": True, "squeeze": False}
        axes: list[Axes] = plt.subplots(max(len(rates), 1), 1, figsize=size, **shape)[1][:, 0]
    for ax, (label, rate) in zip(axes, rates.items(), strict=False):
        style = styles[label]
        ms, percent = rate["ms"].to_numpy(), 100 * rate["share"].to_numpy()
        ax.plot(ms, percent, **(style.line | {"label": label, "linewidth": 1.0}))
        lost = (ms >= 0) & (ms <= back_ms.get(label, until_ms)) & (percent < 100)
        ax.fill_between(ms, percent, 100, where=lost, color=style.colour, alpha=0.2, linewidth=0)
        if label in pauses_ms:
            start, end = pauses_ms[label]
            # A pause of 2 ms would be thinner than a pixel.
            end = max(end, start + 0.003 * (until_ms - first_ms))
            ax.axvspan(start, end, color="#333333", linewidth=0, zorder=3)
        beside: dict[str, Any] = {"transform": ax.transAxes, "fontsize": 8, "va": "center"}
        ax.text(1.015, 0.68, label, color=style.colour, **beside)
        if label in lost_ms:
            ax.text(1.015, 0.28, f"lost {lost_ms[label]:,.0f} ms", color="#555555", **beside)
        ax.axhline(100, color="#999999", linewidth=0.8, zorder=0)
        ax.set_ylim(0, 135)
        ax.set_yticks([0, 50, 100])
    axes[0].set_xlim(first_ms, until_ms)
    axes[0].set_title("Guest speed around the snapshot (dark: VM paused, filled: work lost)")
    axes[len(axes) // 2].set_ylabel("guest speed, % of before")
    axes[-1].set_xlabel("since the request, ms")
    return list(axes)


def plot_phases(phases: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What the pause consists of: one stacked bar per run.

    :param phases: `lab.analysis.phases.df_phases_by_method`, or one snapshot's `df_phases()`.
        Drawn are the phases between stop and resume; set-up and sweep, during which the guest runs,
    are left out.
    """
    ax = _axes(ax)
    if "duration_ms" not in phases:
        name = case_label(phases.attrs.get("case", {})) or "snapshot"
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
    """How long every phase took, those included in which the guest runs: one point per boot, a bar
    at the median, log scale.

    :param phases: `lab.analysis.phases.df_phases_by_method`.  Phases in the order in which they
        begin.
    """
    ax = _axes(ax)
    names = phases.groupby("phase", observed=True)["start_ms"].median().sort_values().index.tolist()
    cases = _styled_cases(phases)
    for place, (style, part) in enumerate(cases):
        # Cases beside each other within a phase's row.
        shift = (place - (len(cases) - 1) / 2) * 0.8 / max(1, len(cases))
        label: str | None = style.label
        for row, name in enumerate(names):
            values = part.loc[part["phase"] == name, "duration_ms"].to_numpy(dtype=np.float64)
            if len(values):
                _points(ax, values, row + shift, style, label, half=0.35 / len(cases))
                label = None
    ax.set_yticks(range(len(names)), names)
    if names:
        ax.set_ylim(len(names) - 0.5, -0.5)
        _log_x(ax, phases["duration_ms"])
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("ms")
    ax.set_title("How long each phase takes")
    if len(cases) > 1:
        _legend(ax)
    return ax


def _points(
    ax: Axes,
    values: np.ndarray[Any, Any],
    row: float,
    style: CaseStyle,
    label: str | None,
    half: float,
) -> None:
    spread = np.linspace(-half / 2, half / 2, len(values)) if len(values) > 1 else np.zeros(1)
    ax.plot(values, row + spread, markersize=4, label=label, **style.points)
    ax.plot([np.median(values)] * 2, [row - half, row + half], color=style.colour, linewidth=2)


def plot_fault_stages(stages: pd.DataFrame, *, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Distribution of how long faults spend in each stage, one panel per stage, one line per boot.

    :param stages: `lab.analysis.stages.df_fault_stages`.
    """
    seen = set(stages["stage"])
    names = [name for name in ("queued", "saved", "released") if name in seen] or ["no fault"]
    if axes is None:
        with styled():
            size = (3 * len(names) + 0.5, 3)
            axes = np.atleast_1d(plt.subplots(1, len(names), figsize=size, sharey=True)[1]).tolist()
    drawn = list(axes)
    cases = _styled_cases(stages)
    for ax, name in zip(drawn, names, strict=True):
        for style, part in cases:
            label: str | None = style.label
            for _, boot in part[part["stage"] == name].groupby("run", sort=False):
                label = None if _step_up(ax, boot["us"], label, style.line, 1.1) else label
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(_plain))
        ax.set_title(name)
        ax.set_xlabel("µs")
    if cases:
        # The same in every panel, so it is said once.
        _legend(drawn[-1], below=drawn[0], loc="lower right", fontsize=7)
    drawn[0].set_ylabel("share of faults")
    drawn[0].set_ylim(0, 1.01)
    return drawn


def _panels(count: int) -> list[Axes]:
    """So many axes beside each other, in a figure of their own."""
    with styled():
        size = (2.6 * count + 2.0, 2.9)
        axes: list[Axes] = np.atleast_1d(plt.subplots(1, count, figsize=size)[1]).tolist()
    return axes


def _legend_beside(drawn: Sequence[Axes]) -> None:
    """The legend of a row of panels to the right of them, where it hides no point."""
    where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    drawn[-1].legend(*drawn[0].get_legend_handles_labels(), fontsize=7, **where)


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
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:
    """What a parameter changes: one panel per metric, one point per boot, a bar at each median.

    Medians are joined by a line where the parameter is a number, for each method and each
    combination of what else was varied; nothing lies between two kinds of a thing.

    :param runs: `lab.runs.cases.df_runs` of a set that varied `x`; warm-ups and runs that are not
        ok are left out.
    :param metrics: column -> title of its panel, with the unit.  Log scale; values of zero or less
        have no place on it and are left out, and the title says how many.
    """
    data = runs[(runs["outcome"] == "ok") & ~runs["warmup"]]
    drawn = _panels(len(metrics)) if axes is None else list(axes)
    dimension = DIMENSIONS[x]
    values = _in_order(x, [python_value(value) for value in data[x].unique()])
    numbers = [k for k, value in enumerate(values) if dimension.is_number(value)]
    groups = by_case(data, [name for name in case_columns(runs) if name != x])
    lines = len(numbers) > 1
    styles = case_styles([case for case, _ in groups], with_dashes=lines)
    for ax, (metric, title) in zip(drawn, metrics.items(), strict=True):
        hidden = int((data[metric] <= 0).sum())
        for k, (style, (_, group)) in enumerate(zip(styles, groups, strict=True)):
            part = group[group[metric] > 0]
            at = np.asarray([values.index(python_value(value)) for value in part[x]], dtype=float)
            # Groups beside each other, so that they do not hide each other.
            shift = 0.12 * (k - (len(groups) - 1) / 2)
            heights = part[metric].to_numpy(dtype=np.float64)
            middle = {place: float(np.median(heights[at == place])) for place in set(at)}
            look: dict[str, Any] = {"marker": "_", "markersize": 9, "markeredgewidth": 2}
            look |= style.line | {"linewidth": 1.4}
            # What stands for the group in the legend is what tells it from the others.
            named: dict[str, Any] = {"label": style.label}
            ax.plot(at + shift, heights, markersize=4, **style.points, **({} if lines else named))
            for places, how in (
                ([place for place in sorted(middle) if place in numbers], named if lines else {}),
                (
                    [place for place in sorted(middle) if place not in numbers],
                    {"linestyle": "none"},
                ),
            ):
                if places:
                    where = [place + shift for place in places]
                    ax.plot(where, [middle[place] for place in places], **look | how)
        _log_y(ax, data.loc[data[metric] > 0, metric])
        names = [dimension.shown(value) for value in values]
        is_long = any(len(name) > 5 for name in names)
        slant: dict[str, Any] = {"rotation": 30, "ha": "right"} if is_long else {}
        ax.set_xticks(range(len(values)), names, **slant)
        ax.set_xlabel(dimension.heading)
        ax.set_title(f"{title} ({hidden} not shown)" if hidden else title, fontsize=9)
        ax.tick_params(labelsize=8)
    if len(groups) > 1:
        _legend_beside(drawn)
    return drawn


def plot_against(
    runs: pd.DataFrame,
    x: str,
    metrics: Mapping[str, str],
    *,
    x_title: str | None = None,
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:
    """What depends on a number, both on log scales: one panel per metric, one point per boot, a
    line through the medians of cases, method by method.

    :param runs: `lab.runs.cases.df_runs`; warm-ups and runs that are not ok are left out, and so is
        what is not positive, of which the title says how much.
    :param x: a column that is a number, varied or measured.
    :param metrics: column -> title of its panel, with the unit.
    """
    data = runs[(runs["outcome"] == "ok") & ~runs["warmup"]]
    drawn = _panels(len(metrics)) if axes is None else list(axes)
    methods = _in_order("method", data["method"].tolist())
    for ax, (metric, title) in zip(drawn, metrics.items(), strict=True):
        positive = data[(data[metric] > 0) & (data[x] > 0)]
        hidden = int(data[metric].notna().sum()) - len(positive)
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
        if len(positive):
            _log_x(ax, positive[x])
        _log_y(ax, positive[metric])
        ax.set_xlabel(x_title or x, fontsize=9)
        ax.set_title(f"{title} ({hidden} not shown)" if hidden else title, fontsize=9)
        ax.tick_params(labelsize=8)
    if len(methods) > 1:
        _legend_beside(drawn)
    return drawn


def plot_overhead(overhead: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What each instrument changes: the ratio with / without, its interval as a line, and as a grey
    band what boots without it differ by anyway.  Ratios that are not known are left out.

    :param overhead: `lab.analysis.instruments.df_overhead`.
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
    """How many samples of progress are further than x from the one before: a line per boot, a
    colour per sampling interval, both scales logarithmic.

    :param gaps: `lab.analysis.instruments.df_sample_gaps`.
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
    ax.set_title("How far apart the samples are, one line per boot")
    if intervals:
        ax.legend()
    return ax


def plot_cost(runs: pd.DataFrame, *, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Pause, duration, lost work and image size by case: one point per boot, a bar at the median,
    log scale.

    :param runs: `lab.runs.cases.df_runs`; warm-ups and runs that are not ok are left out.  Lost
        work of zero or less (the guest ran faster than before) has no place on a log scale: it is
    drawn
        hollow at the lower edge.
    """
    data = runs[(runs["outcome"] == "ok") & ~runs["warmup"]].copy()
    data["image_mib"] = data["image_bytes"] / 2**20
    cases = _styled_cases(data)
    if axes is None:
        with styled():
            rows = max(3.2, 1 + 0.32 * len(cases))
            longest = max((len(style.label) for style, _ in cases), default=0)
            width = 9 + 0.08 * max(0, longest - _LONG_NAME)
            axes = plt.subplots(1, len(COST_COLUMNS), figsize=(width, rows), sharey=True)[1]
    drawn = list(axes)
    for ax, (column, title) in zip(drawn, COST_COLUMNS.items(), strict=True):
        # The row tells cases of one method apart, so that all of them have its full strength.
        for row, (style, part) in enumerate(cases):
            values = part[column].dropna().to_numpy(dtype=np.float64)
            positive = values[values > 0]
            # Points of one method are spread so that equal values do not hide each other.
            offset = (
                np.linspace(-0.18, 0.18, len(positive))
                if len(positive) > 1
                else np.zeros(len(positive))
            )
            shade, shape = style.colour, style.marker
            ax.plot(positive, row + offset, shape, color=shade, markersize=5, alpha=0.75)
            if len(positive):
                ax.plot(
                    [np.median(positive)] * 2, [row - 0.32, row + 0.32], color=shade, linewidth=2
                )
            if len(positive) < len(values):
                ax.plot(
                    [0.01] * (len(values) - len(positive)),
                    [row] * (len(values) - len(positive)),
                    shape,
                    color=shade,
                    fillstyle="none",
                    transform=ax.get_yaxis_transform(),
                )
        _log_x(ax, data[column])
        ax.set_title(title)
        ax.set_yticks(range(len(cases)), [style.label for style, _ in cases])
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

    :param medians: rows of `lab.analysis.floor.df_floor_medians`, drawn in their order.
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
    ax.set_xlabel("ms per GiB" if per_gib else "µs")
    return ax


def plot_faults_over_time(faults: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Latency of every fault against when it was read, one colour per who resolved it.

    :param faults: `lab.analysis.faults.df_faults_by_method` of one run, or of several that are to
        be laid over each other; or one snapshot's `df_faults()`.
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
    ax.set_ylabel("latency, µs")
    ax.set_title("Each fault: when it came and how long it took")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(markerscale=6, loc="upper right")
    return ax


def plot_faults_by_depth(faults: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Latency of faults against what waited for the snapshot thread when they were read: median,
    and the band from the 10 % to the 90 % quantile, by case.

    :param faults: `lab.analysis.faults.df_faults_by_method` with `queue_depth`.  Depths are
        gathered in bins that double in width; the numbers of faults in them differ by orders of
    magnitude.
    """
    ax = _axes(ax)
    data = faults.dropna(subset=["latency_us"])
    for style, part in _styled_cases(data):
        # 0 by itself, then 1, 2-3, 4-7, ...
        depth = part["queue_depth"].to_numpy(dtype=np.int64)
        part = part.assign(
            bin=np.where(depth > 0, 2.0 ** np.floor(np.log2(np.maximum(depth, 1))), 0)
        )
        by_bin = part.groupby("bin")["latency_us"]
        quantiles = {q: by_bin.quantile(q, interpolation="lower") for q in (0.1, 0.5, 0.9)}
        x = quantiles[0.5].index.to_numpy()
        band: dict[str, Any] = {"color": style.colour, "alpha": 0.2, "linewidth": 0}
        ax.fill_between(x, quantiles[0.1], quantiles[0.9], **band)
        shape: dict[str, Any] = {"marker": style.marker, "markersize": 4, "label": style.label}
        ax.plot(x, quantiles[0.5], **style.line, **shape)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(_plain))
    ax.yaxis.set_minor_formatter(FuncFormatter(_plain))
    ax.set_xlabel("faults, or pages copied aside, that waited for the snapshot thread")
    ax.set_ylabel("latency, µs")
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

    :param stalls: `lab.analysis.waits.df_write_latency_by_method`: one line per boot while the
        snapshot ran, and a thin grey one for the second before.  Operations per second, so that
    windows of
        different length compare.
    """
    ax = _axes(ax)
    before: dict[str, Any] = {"color": "#999999", "alpha": 0.8, "linewidth": 0.7, "zorder": 1}
    labelled = set()
    for style, of_case in _styled_cases(stalls):
        for (_, window), part in of_case.groupby(["run", "window"], sort=False):
            ordered = part.sort_values("low_ns")
            longer = ordered["ops"].iloc[::-1].cumsum().iloc[::-1] / ordered["window_s"]
            during = window == "during"
            label = style.label if during else "before"
            line = style.line | {"linewidth": 1.1, "zorder": 2} if during else before
            name = None if label in labelled else label
            labelled.add(label)
            ax.step(ordered["low_ns"] / 1e3, longer, where="post", label=name, **line)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.set_xlabel("duration of an operation, µs (the guest's clock)")
    ax.set_ylabel("operations per second that took longer")
    ax.set_title("What the guest's own operations took")
    if labelled:
        _legend(ax, loc="lower left")
    return ax


def plot_waits(waits: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of faults over within x: solid by the guest's clock, dotted the handler's part of it.

    :param waits: `lab.analysis.waits.df_waits_by_method`; all boots of a case are one line.
    """
    ax = _axes(ax)
    for style, part in _styled_cases(waits, with_dashes=False):
        for column, dash, label in (("wait_us", "-", style.label), ("handler_us", ":", None)):
            _step_up(ax, part[column], label, style.line | {"linestyle": dash}, 1.5)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.set_xlabel("µs: the guest's write, by its clock (solid); the handler's part (dotted)")
    ax.set_ylim(0, 1.01)
    ax.set_ylabel("share of faults")
    ax.set_title("What the guest waits for a page")
    if len(waits):
        _legend(ax, loc="lower right")
    return ax


def plot_lost_work(runs: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Lost work against duration, one point per boot, both logarithmic; the line is where a guest
    would be that stood still for all of the snapshot.

    :param runs: `lab.runs.cases.df_runs`; warm-ups, runs that are not ok and lost work of zero or
        less, which has no place here, are left out.
    """
    ax = _axes(ax)
    data = runs[(runs["outcome"] == "ok") & ~runs["warmup"] & (runs["lost_work_ms"] > 0)]
    for style, part in _styled_cases(data, with_dashes=False):
        shape = style.points | {"markersize": 5, "label": style.label}
        ax.plot(part["duration_ms"], part["lost_work_ms"], **shape)
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
