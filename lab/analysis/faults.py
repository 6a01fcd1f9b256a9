"""The latency of write faults of several runs: `lab.instruments.faultlog` says what it is."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from lab.instruments.faultlog import latency_ns
from lab.runs.cases import case_names, together
from lab.runs.run import Run
from lab.units import NS_PER_MS, NS_PER_US


def df_faults_by_method(runs: Iterable[Run]) -> pd.DataFrame:
    """Faults of several runs below each other.

    Columns: run, its case, latency_us (handler's side, NA when another thread released the page),
    ms (read, since the request), resolver and queue_depth.  Runs without a fault log are left out:
    their faults are unknown, not zero.
    """
    parts = []
    for run in (runs := together(runs)):
        if not run.has("faults"):
            continue
        faults = run.df_faults()
        latency = latency_ns(faults["read_ns"], faults["released_ns"])
        parts.append(
            pd.DataFrame(
                {
                    "run": run.name,
                    **run.case_values,
                    "latency_us": latency.astype("Float64").astype(float) / NS_PER_US,
                    "ms": (faults["read_ns"] - (run.record.marks.request_ns or 0)) / NS_PER_MS,
                    "resolver": faults["resolver"].astype(str),
                    "queue_depth": faults["queue_depth"],
                }
            )
        )
    if not parts:
        names = ["run", *case_names(runs), "latency_us", "ms", "resolver", "queue_depth"]
        return pd.DataFrame(columns=names)
    return pd.concat(parts, ignore_index=True)
