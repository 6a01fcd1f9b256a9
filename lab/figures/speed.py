"""The guest's speed around a snapshot."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes

from lab.analysis.slowdown import df_rate, slowdown
from lab.errors import UsageError
from lab.figures.figure import figure
from lab.figures.style import GREY, CaseStyle, case_styles, panels
from lab.runs.cases import case_label
from lab.runs.sets import RunSet
from lab.units import NS_PER_MS

SLOWDOWN_BIN_MS = 10.0
"""Width of the bins in which the guest's speed around a snapshot is drawn by default."""
_FINEST_BIN_MS = 2.0
"""Less shows the sampler, not the guest."""
_NEEDS = ("progress", "baseline_ops_per_s", "lost_work_ms")


def progress_tables(run_set: RunSet) -> list[pd.DataFrame]:
    """The samples of each run of a set, case by case."""
    return [run.df_progress() for case in run_set.cases for run in run_set.measured(case)]


@figure(
    title="Guest speed around the snapshot (dark: VM paused, filled: work lost)",
    caption="One boot per case, the one of median duration: operations that the guest completed in "
    f"each bin of time, {SLOWDOWN_BIN_MS:g} ms by default, by a counter in its memory that is read "
    "from outside, against the second before the request.",
    limits="It does not show single slow operations, nor how boots differ.",
    table=progress_tables,
    needs=_NEEDS,
    one_boot=True,
    panels=True,
)
def plot_slowdown(
    progress: pd.DataFrame, *more: pd.DataFrame, bin_ms: float = SLOWDOWN_BIN_MS
) -> list[Axes]:
    """Guest speed against time around snapshots, a row per snapshot below each other.

    What the guest lost is filled, the pause is a dark band, and the lost work stands at the right.

    :param progress: what `df_progress()` of a `Snapshot` or of a recorded `Run` returns; which
        snapshot a table is of, and when, is in its `attrs`.
    :param bin_ms: width of the bins; under 2 ms they show the sampler, not the guest.
    :raise UsageError: a table does not say what it is of, or has too little before the request to
        know the rate by.
    """
    tables = [progress, *more]
    speeds = [_Speed(table) for table in tables]
    styles = case_styles([speed.case for speed in speeds])
    until_ms = 1.25 * max(speed.end_ms for speed in speeds) + 100
    axes = _rows(len(speeds), height=0.72)
    axes[0].set_xlim(-0.08 * until_ms - 20, until_ms)
    labels: list[str] = []
    for ax, speed, style in zip(axes, speeds, styles, strict=True):
        labels.append(style.label)
        seen = labels.count(style.label)
        label = style.label + (f" ({seen})" if seen > 1 else "")
        ms, percent = speed.at(bin_ms)
        ax.plot(ms, percent, **(style.line | {"label": label, "linewidth": 1.0}))
        back_ms = until_ms if speed.back_ms is None else speed.back_ms
        lost = (ms >= 0) & (ms <= back_ms) & (percent < 100)
        ax.fill_between(ms, percent, 100, where=lost, color=style.colour, alpha=0.2, linewidth=0)
        if speed.pause_ms is not None:
            start, end = speed.pause_ms
            # A pause of 2 ms would be thinner than a pixel.
            end = max(end, start + 0.003 * 1.1 * until_ms)
            ax.axvspan(start, end, color="#333333", linewidth=0, zorder=3)
        _beside(ax, style, label, speed.lost_ms)
    return axes


@figure(
    title="Guest speed around the snapshot in every boot (thick: median duration)",
    caption="A line is one boot: operations that the guest completed in each bin of time, "
    "a hundredth of the longest snapshot of the case and at least "
    f"{_FINEST_BIN_MS:g} ms, against the second before the request. The number is the thick "
    "one's.",
    limits="Between two samples, about a millisecond apart, it shows no detail.",
    table=progress_tables,
    needs=_NEEDS,
    panels=True,
)
def plot_slowdown_boots(progress: pd.DataFrame, *more: pd.DataFrame) -> list[Axes]:
    """Guest speed against time, close up: a row per case, a thin line per boot, and the boot of
    median duration thick.

    :param progress: as for `plot_slowdown`, of several boots.
    """
    speeds = [_Speed(table) for table in (progress, *more)]
    of_case: dict[str, list[_Speed]] = {}
    for speed in sorted(speeds, key=lambda one: one.end_ms):
        of_case.setdefault(case_label(speed.case), []).append(speed)
    order = list(dict.fromkeys(case_label(speed.case) for speed in speeds))
    styles = case_styles([of_case[label][0].case for label in order])
    axes = _rows(len(order), height=1.3, share=False)
    for ax, style in zip(axes, styles, strict=True):
        boots = of_case[style.label]
        typical = boots[(len(boots) - 1) // 2]
        longest = boots[-1].end_ms
        bin_ms = max(_FINEST_BIN_MS, longest / 100)
        for boot in boots:
            label = style.label if boot is typical else None
            look = {"label": label, "linewidth": 1.8 if boot is typical else 0.5}
            ax.plot(*boot.at(bin_ms), **(style.line | look))
        _beside(ax, style, style.label, typical.lost_ms)
        # Each case to its own end: a slow one beside a quick one would hide that.
        ax.set_xlim(-0.05 * longest - 10, 1.1 * longest + 40)
    return axes


class _Speed:
    """The guest's speed around one snapshot, and what it lost, by a table of its progress."""

    def __init__(self, progress: pd.DataFrame) -> None:
        self._progress = progress
        marks = progress.attrs
        request, end = marks.get("request_ns"), marks.get("end_ns")
        if "case" not in marks or request is None or end is None:
            raise UsageError(
                "this progress table does not say which snapshot it is of",
                "pass what df_progress() of a Snapshot or a Run returned",
            )
        self.case = dict(marks["case"])
        cost = slowdown(progress, request_ns=request, end_ns=end)
        if cost.baseline_ops_per_s is None:
            raise UsageError(
                f"the progress before the {case_label(self.case)} snapshot is too short to know "
                "the rate by",
                "sample for a second before it (before_s=1)",
            )
        self._request_ns = request
        self._baseline_ops_per_s = cost.baseline_ops_per_s

        def since_ms(at_ns: int | None) -> float | None:
            return None if at_ns is None else (at_ns - request) / NS_PER_MS

        self.lost_ms = cost.lost_work_ms
        self.end_ms = (end - request) / NS_PER_MS
        self.back_ms = since_ms(cost.back_ns)
        start, resume = since_ms(marks.get("stop_ns")), since_ms(marks.get("resume_ns"))
        self.pause_ms = None if start is None or resume is None else (start, resume)

    def at(self, bin_ms: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Time since the request in ms, and the speed then in percent of before."""
        rate = df_rate(
            self._progress,
            request_ns=self._request_ns,
            baseline_ops_per_s=self._baseline_ops_per_s,
            bin_ms=bin_ms,
        )
        ms, share = (rate[name].to_numpy(dtype=np.float64) for name in ("ms", "share"))
        return ms, 100 * share


def _rows(count: int, *, height: float, share: bool = True) -> list[Axes]:
    axes = panels(count, size=(7.6, 1.0 + height * count), rows=True, share=share)
    for ax in axes:
        ax.axhline(100, color=GREY, linewidth=0.8, zorder=0)
        ax.set_ylim(0, 135)
        ax.set_yticks([0, 50, 100])
    axes[(count - 1) // 2].set_ylabel("guest speed, % of before" if count > 2 else "speed, %")
    axes[-1].set_xlabel("since the request, ms")
    return axes


def _beside(ax: Axes, style: CaseStyle, label: str, lost_ms: float | None) -> None:
    """Name a row at its right end, and say what was lost."""
    where: dict[str, Any] = {"transform": ax.transAxes, "fontsize": 8, "va": "center"}
    ax.text(1.015, 0.68, label.replace(", ", "\n", 1), color=style.colour, **where)
    if lost_ms is not None:
        ax.text(1.015, 0.12, f"lost {lost_ms:,.0f} ms", color="#555555", **where)
