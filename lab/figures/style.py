"""How figures look: colours, markers and dashes of methods and cases, axes, legends.

Colours of methods are Okabe and Ito's, which stay apart for colour-blind readers and in grey; a
method keeps its colour and marker in every figure.  Cases of one method, of a set that varied more,
are told apart by dashes and strength, which follow the order of what was varied (`case_styles`).
What is no method, such as phases and instruments, has colours of its own (`OTHER_COLOURS`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lab.runs.cases import by_case, case_label
from lab.scenario.applications import BGSAVE, NONE, SNAPSHOT_SAVE
from lab.scenario.dimensions import DIMENSIONS
from lab.scenario.methods import METHODS

STYLE = Path(__file__).with_name("lab.mplstyle")

# Okabe and Ito, without black and yellow (too strong and too weak as a line on white)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
# Paul Tol's muted ones, for what is no method: no colour of a method is among them.
OTHER_COLOURS = ("#332288", "#88CCEE", "#117733", "#DDCC77", "#CC6677", "#44AA99", "#882255")
GREY = "#999999"
# What an application is compared with beside the methods
_WAYS = {NONE: GREY, BGSAVE: OTHER_COLOURS[6], SNAPSHOT_SAVE: OTHER_COLOURS[0]}
# One more than colours, so that a method beyond the last colour differs by its marker.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

# A legend of more or longer names than this has no room inside the axes.
_MANY_NAMES = 9
_LONG_NAME = 44


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Figures made inside have the lab's style; the process's own is as before afterwards."""
    # Loads the backend: a notebook's sets itself up then, and the context would take that back.
    plt.draw_if_interactive()  # type: ignore[no-untyped-call]  # matplotlib does not type it
    with plt.style.context(STYLE):
        yield


def _slot(method: str) -> int:
    names = [*METHODS, *_WAYS]
    # A method of an older recording that the lab no longer knows still gets a stable place.
    return names.index(method) if method in names else len(names) + sum(map(ord, method))


def colour(method: str) -> str:
    """The colour of a method, or of another way to save a state, the same in every figure."""
    if method in _WAYS:
        return _WAYS[method]
    hue = METHODS[method].hue if method in METHODS else _slot(method)
    return COLOURS[hue % len(COLOURS)]


def marker(method: str) -> str:
    """The marker of a method, or of another way to save a state, the same in every figure."""
    return MARKERS[_slot(method) % len(MARKERS)]


Dashes = tuple[float, tuple[float, ...]]
"""A line style of matplotlib: where its pattern begins, and lengths of ink and of gaps."""

_WEAKEST = 0.35


def dashes(method: str, step: int = 0) -> Dashes:
    """How a line of a method is drawn: solid at first, with longer gaps from step to step.  Where
    another method has the same colour, a dot is in each of the gaps, so that the two differ.
    """
    broken = method in METHODS and METHODS[method].broken
    gap = 1.2 * (step + broken)
    ink = 6.0 / (1 + 0.5 * step)
    if broken:
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
    values = {name: in_order(name, [case.get(name) for case in cases]) for name in names}
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


def in_order(name: str, values: Sequence[Any]) -> list[Any]:
    return sorted(dict.fromkeys(values), key=DIMENSIONS[name].place)


def styled_cases(
    frame: pd.DataFrame, *, with_dashes: bool = True
) -> list[tuple[CaseStyle, pd.DataFrame]]:
    """The cases in a table, each with its style and its rows."""
    cases = by_case(frame)
    styles = case_styles([case for case, _ in cases], with_dashes=with_dashes)
    return [(style, part) for style, (_, part) in zip(styles, cases, strict=True)]


def axes_or_new(ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
    """The axes that were given, or those of a figure of their own."""
    return plt.subplots(figsize=size)[1] if ax is None else ax


def panels(
    count: int, *, size: tuple[float, float], rows: bool = False, share: bool = True
) -> list[Axes]:
    """So many axes of one figure: beside each other with one y axis, or below each other with one
    x axis.

    :param share: False: each has its own.
    """
    shape: dict[str, Any] = {"nrows": count, "sharex": share}
    if not rows:
        shape = {"ncols": count, "sharey": share}
    return list(plt.subplots(figsize=size, squeeze=False, **shape)[1].flat)


def blank(sentence: str, ax: Axes | None = None) -> Axes:
    """Axes with nothing in them but why there is nothing."""
    ax = axes_or_new(ax, (7.2, 1.6))
    middle: dict[str, Any] = {"ha": "center", "va": "center", "color": "#555555", "wrap": True}
    ax.text(0.5, 0.5, sentence, transform=ax.transAxes, **middle)
    ax.set_axis_off()
    return ax


def title_over(ax: Axes, title: str) -> None:
    """A title over all the axes of a figure."""
    whole = ax.get_figure()
    if whole is not None:
        whole.suptitle(title, x=0.01, ha="left", fontsize=11)


def axis_title(name: str) -> str:
    """The title of a parameter, with its unit as people write it."""
    return DIMENSIONS[name].heading.replace(", us", ", µs")


def legend(ax: Axes, *, below: Axes | None = None, **where: Any) -> None:
    """A legend where it is wanted, or, of many or long names, below the axes (or those named, the
    leftmost of a row) in a figure that is made higher for it: inside it would hide the curves.
    """
    handles, labels = ax.get_legend_handles_labels()
    if not labels:
        return
    if len(labels) <= _MANY_NAMES and max(map(len, labels)) <= _LONG_NAME:
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


def legend_beside(ax: Axes, names: Axes | None = None, **how: Any) -> None:
    """The legend to the right of the axes, where it hides no point.

    :param names: the axes whose names it shows; the same by default.
    """
    handles, labels = (names or ax).get_legend_handles_labels()
    if labels:
        ax.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0), **how)


def plain(value: float, _position: int) -> str:
    """A number of an axis, as people write it: no powers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def log_scale(axis: Axis) -> None:
    """A log scale with plain numbers."""
    ax = axis.axes
    (ax.set_xscale if axis is ax.xaxis else ax.set_yscale)("log")
    axis.set_major_formatter(FuncFormatter(plain))


def log_axis(axis: Axis, values: pd.Series[float]) -> None:
    """A log scale around the values, with a margin, and with two labels at least also where it
    spans less than a decade.
    """
    log_scale(axis)
    axis.set_minor_formatter(NullFormatter())
    positive = values[values > 0]
    low, high = (positive.min() / 1.4, positive.max() * 1.4) if len(positive) else (1.0, 10.0)
    axis.set_view_interval(low, high, ignore=True)
    axis.set_tick_params(labelsize=8)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        locator = LogLocator(subs=steps)
        if sum(low <= tick <= high for tick in locator.tick_values(low, high)) >= 3:
            axis.set_major_locator(locator)
            return
    axis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))


def step_up(
    ax: Axes, values: pd.Series[float], label: str | None, line: Mapping[str, Any], width: float
) -> bool:
    """Draw what share of the values is at most x; return whether there are any."""
    known = np.sort(values.dropna().to_numpy(dtype=np.float64))
    share = np.arange(1, len(known) + 1) / max(1, len(known))
    if len(known):
        ax.step(known, share, where="post", label=label, linewidth=width, **line)
    return len(known) > 0


def share_axis(ax: Axes, of: str) -> None:
    """The axis of what `step_up` draws."""
    ax.set_ylim(0, 1.01)
    ax.set_ylabel(f"share of {of}")


def points(
    ax: Axes,
    values: np.ndarray[Any, Any],
    row: float,
    style: CaseStyle,
    label: str | None,
    half: float,
) -> None:
    """A point per boot in a row, spread so that equal ones show, and a bar at their median."""
    spread = np.linspace(-half / 2, half / 2, len(values)) if len(values) > 1 else np.zeros(1)
    ax.plot(values, row + spread, markersize=4, label=label, **style.points)
    ax.plot([np.median(values)] * 2, [row - half, row + half], color=style.colour, linewidth=2)


def row_labels(ax: Axes, names: Sequence[str], **how: Any) -> None:
    """A row for each name, from the top."""
    ax.set_yticks(range(len(names)), names, **how)
    if names:
        ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
