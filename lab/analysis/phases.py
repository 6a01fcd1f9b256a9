"""The phases of snapshots."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from lab.runs.cases import case_names, together
from lab.runs.run import Run
from lab.units import NS_PER_MS


def df_phases_by_method(runs: Iterable[Run]) -> pd.DataFrame:
    """Phases of several runs below each other.  Columns: run, its case, phase, start_ms (since
    the request), duration_ms.
    """
    parts = []
    for run in (runs := together(runs)):
        if not run.has("phases"):
            continue
        phases = run.df_phases()
        parts.append(
            pd.DataFrame(
                {
                    "run": run.name,
                    **run.case_values,
                    "phase": phases["phase"].astype(str),
                    "start_ms": (phases["start_ns"] - (run.record.marks.request_ns or 0))
                    / NS_PER_MS,
                    "duration_ms": phases["duration_ns"] / NS_PER_MS,
                }
            )
        )
    if not parts:
        return pd.DataFrame(columns=["run", *case_names(runs), "phase", "start_ms", "duration_ms"])
    return pd.concat(parts, ignore_index=True)
