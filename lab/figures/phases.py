"""The phases of a snapshot, by the engine's own clock."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lab.analysis.phases import df_phases_by_method
from lab.figures.figure import figure
from lab.figures.style import (
    OTHER_COLOURS,
    axes_or_new,
    legend,
    legend_beside,
    log_axis,
    points,
    row_labels,
    styled_cases,
)
from lab.runs.cases import by_case, case_label

_RUNNING = (
    "populate",
    "setup",
    "arm-ahead",
    "sweep",
    "flush-disks",
    "complete",
    "release",
    "hold",
)
"""Phases during which the guest runs."""
_PAUSE = ("stop", "switch-disks", "device-state", "arm", "resume")
_NOTHING_MS = 0.001
"""An engine that has nothing to do in a phase reads the clock twice, which takes less."""


@figure(
    title="What the pause consists of",
    caption="The phases in which no vCPU runs, by the engine's clock, a bar per boot.",
    limits="QEMU's handling of the events around them is not in it.",
    table=df_phases_by_method,
    needs=("phases",),
)
def plot_phases(phases: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What the pause consists of: one stacked bar per boot, case by case.

    :param phases: `lab.analysis.phases.df_phases_by_method`, or one snapshot's `df_phases()`.
        Drawn are the phases between stop and resume; set-up and sweep, during which the guest runs,
        are left out.
    """
    if "duration_ms" not in phases:
        case = phases.attrs.get("case", {"method": "snapshot"})
        phases = phases.assign(duration_ms=phases["duration_ns"] / 1e6)[["phase", "duration_ms"]]
        for name, value in [*reversed(case.items()), ("run", "")]:
            phases.insert(0, name, value)
    inside = phases[~phases["phase"].isin(_RUNNING)]
    found = dict.fromkeys(inside["phase"].astype(str))
    names = [name for name in _PAUSE if name in found]
    names += [name for name in found if name not in names]
    cases = by_case(inside)
    boots = sum(part["run"].nunique() for _, part in cases)
    ax = axes_or_new(ax, (7.2, 1.3 + 0.2 * boots + 0.12 * len(cases)))
    middles, row = [], 0.0
    for _, part in cases:
        wide = part.groupby(["run", "phase"], sort=False, observed=True)["duration_ms"].sum()
        widths = wide.unstack(fill_value=0).reindex(columns=names, fill_value=0)
        rows = row + np.arange(len(widths))
        left = np.zeros(len(widths))
        for name, shade in zip(names, itertools.cycle(OTHER_COLOURS), strict=False):
            label = name if row == 0 else None
            width = widths[name].to_numpy(dtype=np.float64)
            ax.barh(rows, width, left=left, color=shade, label=label)
            left = left + width
        middles.append(float(rows.mean()))
        # A gap between cases.
        row += len(widths) + 0.6
    ax.set_yticks(middles, [case_label(case) or "snapshot" for case, _ in cases])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("ms")
    legend_beside(ax, fontsize=8)
    return ax


@figure(
    title="How long each phase takes, the guest running in most of them",
    caption="A point is one boot, the bar their median; by the engine's clock.",
    limits="Phases of less than a microsecond are left out: the engine had nothing to do in them.",
    table=df_phases_by_method,
    needs=("phases",),
)
def plot_phase_times(phases: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """How long every phase took, those included in which the guest runs: one point per boot, a bar
    at the median, log scale.

    :param phases: `lab.analysis.phases.df_phases_by_method`.  Phases in the order in which they
        begin; those of less than 1 µs, in which an engine has nothing to do, are left out.
    """
    phases = phases[phases["duration_ms"] >= _NOTHING_MS]
    names = phases.groupby("phase", observed=True)["start_ms"].median().sort_values().index.tolist()
    cases = styled_cases(phases)
    # Cases beside each other within a phase's row, which needs room for them.
    ax = axes_or_new(ax, (7.2, 1.2 + len(names) * max(0.3, 0.11 * len(cases))))
    for place, (style, part) in enumerate(cases):
        shift = (place - (len(cases) - 1) / 2) * 0.8 / max(1, len(cases))
        label: str | None = style.label
        for row, name in enumerate(names):
            values = part.loc[part["phase"] == name, "duration_ms"].to_numpy(dtype=np.float64)
            if len(values):
                points(ax, values, row + shift, style, label, half=0.35 / len(cases))
                label = None
    row_labels(ax, names)
    log_axis(ax.xaxis, phases["duration_ms"])
    ax.set_xlabel("ms")
    if len(cases) > 1:
        legend(ax, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return ax
