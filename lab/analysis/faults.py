"""The latency of write faults."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from lab.runs.cases import case_names, together
from lab.runs.run import Run
from lab.stats import quantile
from lab.units import NS_PER_MS, Ns


def fault_latency_ns(faults: pd.DataFrame) -> Ns:
    """Handler's-side latency of every fault whose reader saw it released: message read until
    unprotected.

    What the guest waits is longer: delivery of the fault before the message is read and the wake-
    up after it are not in it.  Faults on pages that another thread was about to release
    (released_ns 0) are left out, not counted as 0.
    """
    read = faults["read_ns"].to_numpy(dtype=np.int64)
    released = faults["released_ns"].to_numpy(dtype=np.int64)
    seen = released > 0
    latency: Ns = released[seen] - read[seen]
    return latency


def fault_summary(faults: pd.DataFrame | None) -> dict[str, float | int | None]:
    """Fields faults, fault_p50_us, fault_p99_us, fault_max_us of the summary line; null
    without a fault log.
    """
    names = ("fault_p50_us", "fault_p99_us", "fault_max_us")
    result: dict[str, float | int | None] = {"faults": None}
    for name in names:
        result[name] = None
    if faults is None:
        return result
    result["faults"] = len(faults)
    latency = fault_latency_ns(faults)
    if len(latency) > 0:
        for name, q in zip(names, (0.5, 0.99, 1.0), strict=True):
            result[name] = quantile(latency, q) / 1e3
    return result


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
        latency = (faults["released_ns"] - faults["read_ns"]) / 1e3
        parts.append(
            pd.DataFrame(
                {
                    "run": run.name,
                    **run.case_values,
                    "latency_us": latency.where(faults["released_ns"] > 0),
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
