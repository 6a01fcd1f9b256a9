"""What a figure is: a function that draws tables, and beside it what it needs and what it says.

`figure` makes one of a function `plot_x(table, ..., ax=None)`.  It draws a run set as well as a
table: of a set it takes the runs that have what the figure `needs`, and writes caption and stamp
below.  Where no run has that, it draws empty axes that say so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.errors import LabError, UsageError
from lab.figures.stamp import stamp_text, write_under
from lab.figures.style import blank, styled, title_over
from lab.runs.columns import COLUMNS, METRICS
from lab.runs.run import Run
from lab.runs.sets import RunSet

P = ParamSpec("P")
Drawn = TypeVar("Drawn", Axes, list[Axes])
Tables = pd.DataFrame | Sequence[pd.DataFrame]


class Shot(Protocol):
    """One snapshot: a `Snapshot` that was just taken, or a recorded `Run`."""

    def df_faults(self) -> pd.DataFrame: ...
    def df_phases(self) -> pd.DataFrame: ...
    def df_progress(self) -> pd.DataFrame: ...


Data = RunSet | Shot | pd.DataFrame

TABLES = {
    "faults": "a log of write faults",
    "phases": "phases that its engine told",
    "progress": "samples of the guest's progress",
    "write_latency": "a guest that timed its operations",
    "slow_writes": "a guest that noted its slow writes",
    "floor": "steps of the floor",
    "requests": "requests to a server in the guest",
    "throughput": "counts of requests to a server in the guest",
}
"""What a run has that has a table, for people."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a figure says besides what it draws."""

    title: str
    """What is shown."""
    caption: str
    """How to read it, and what it is made from."""
    limits: str = ""
    """What it does not show."""

    @property
    def below(self) -> str:
        """Caption and limits, as one paragraph."""
        return f"{self.caption} {self.limits}".strip()


class Plot(Generic[P, Drawn]):
    """A figure.  Call it with a run set, or with the table (or tables) that it draws."""

    def __init__(
        self,
        draw: Callable[Concatenate[pd.DataFrame, P], Drawn],
        *,
        text: Text,
        table: Callable[[RunSet], Tables],
        needs: Sequence[str],
        problem: Callable[[RunSet], str | None],
        one_boot: bool,
        panels: bool,
    ) -> None:
        functools.update_wrapper(self, draw)
        self._draw: Callable[Concatenate[pd.DataFrame, P], Drawn] = draw
        self.text = text
        self.needs = needs
        self._table = table
        self._problem = problem
        self._one_boot = one_boot
        self._panels = panels

    def __call__(self, data: Data, /, *args: P.args, **kwargs: P.kwargs) -> Drawn:
        """Draw a run set or one snapshot, caption and stamp below, or a table.

        In axes of the caller (`ax=`) nothing is written below: they may share their figure.

        :raise UsageError: one snapshot cannot tell what this figure shows.
        """
        return self._made(data, self.text.below, *args, **kwargs)

    def without_caption(self, run_set: RunSet) -> Drawn:
        """Draw a set with its stamp alone, for where the caption stands beside the figure."""
        return self._made(run_set, "")

    def missing(self, run_set: RunSet) -> str | None:
        """Why a set has nothing for this figure, in a sentence; None where it has."""
        if self._runs(run_set):
            return self._problem(run_set)
        runs = run_set.measured()
        lacking = [name for name in self.needs if not any(_has(run, name) for run in runs)]
        named = [_called(name) for name in lacking or self.needs]
        if not runs:
            return f"no run of {run_set.name} counts"
        return f"no run of {run_set.name} has {' and '.join(named)}"

    def _runs(self, run_set: RunSet) -> list[Run]:
        """The runs that are drawn of a set."""
        runs = [r for r in run_set.measured() if all(_has(r, name) for name in self.needs)]
        if not self._one_boot:
            return runs
        having = run_set.of(runs)
        return [having.typical(case) for case in having.cases]

    def _made(self, data: Data, below: str, *args: Any, **kwargs: Any) -> Drawn:
        ax = kwargs.get("ax")
        with styled():
            tables, sentence = self._tables(data)
            if sentence:
                empty, below = blank(sentence, ax), ""
                drawn = cast(Drawn, [empty] if self._panels else empty)
            else:
                drawn = cast(Any, self._draw)(*tables, *args, **kwargs)
            self._titled(drawn, ax)
            if ax is None and not isinstance(data, pd.DataFrame):
                stamp = repr(data)
                if isinstance(data, RunSet):
                    stamp = stamp_text(data, drawn=self._runs(data) or None)
                write_under(_first(drawn), stamp=stamp, caption=below)
            return drawn

    def _tables(self, data: Data) -> tuple[Sequence[pd.DataFrame], str | None]:
        """What is drawn, and where that is nothing, why."""
        if isinstance(data, pd.DataFrame):
            found: Tables = data
        elif isinstance(data, RunSet):
            if sentence := self.missing(data):
                return [], sentence
            found = self._table(data.of(self._runs(data)))
        else:
            tell = getattr(data, f"df_{next(iter(self.needs), '')}", None)
            if tell is None:
                raise UsageError(
                    f"a {type(data).__name__} alone has nothing for this figure",
                    "pass a run set, or a table of it, such as lab.df_runs gives",
                )
            try:
                found = tell()
            except LabError as error:
                return [], error.cause
        tables = [found] if isinstance(found, pd.DataFrame) else found
        nothing = all(table.empty for table in tables)
        return tables, "the table has no rows" if nothing else None

    def _titled(self, drawn: Drawn, ax: Axes | None) -> Drawn:
        """Set the title: over the axes, or over all of them where each has a title of its own."""
        first = _first(drawn)
        whole = first.get_figure()
        if not first.get_title(loc="left"):
            first.set_title(self.text.title)
        elif ax is None and isinstance(whole, Figure) and not whole.get_suptitle():
            title_over(first, self.text.title)
        return drawn


def _first(drawn: Axes | list[Axes]) -> Axes:
    return drawn[0] if isinstance(drawn, list) else drawn


def _called(name: str) -> str:
    return TABLES.get(name, f"the table {name}") if name in COLUMNS else METRICS[name].title


def _has(run: Run, name: str) -> bool:
    return run.has(name) if name in COLUMNS else run.summary.get(name) is not None


def figure(
    *,
    title: str,
    caption: str,
    limits: str = "",
    table: Callable[[RunSet], Tables],
    needs: Sequence[str] = (),
    problem: Callable[[RunSet], str | None] = lambda _: None,
    one_boot: bool = False,
    panels: bool = False,
) -> Callable[[Callable[Concatenate[pd.DataFrame, P], Drawn]], Plot[P, Drawn]]:
    """Make a figure of a function that draws a table.

    :param table: makes of a set what is drawn; several tables are given one after the other.
    :param needs: tables, and fields of the summary line, that a run has to have to be drawn.
    :param problem: why a set has nothing to draw although its runs have what is needed.
    :param one_boot: of each case draw the boot of median duration alone.
    :param panels: the function returns a list of axes.
    """

    def made(draw: Callable[Concatenate[pd.DataFrame, P], Drawn]) -> Plot[P, Drawn]:
        return Plot(
            draw,
            text=Text(title=title, caption=caption, limits=limits),
            table=table,
            needs=needs,
            problem=problem,
            one_boot=one_boot,
            panels=panels,
        )

    return made
