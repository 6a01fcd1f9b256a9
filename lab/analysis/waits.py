"""How long the operations of the guest took."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from lab.analysis.slowdown import BASELINE_NS
from lab.runs.cases import case_names, together
from lab.runs.columns import COLUMNS
from lab.runs.run import Run
from lab.units import NS_PER_S, NS_PER_US


def df_write_latency_by_method(runs: Iterable[Run]) -> pd.DataFrame:
    """How long the guest's operations took, of several runs below each other.

    Columns: run, its case, window_s (how long that window was) and those of the table
    `write_latency`.  Runs whose guest did not time its operations are left out.
    """
    parts = []
    for run in (runs := together(runs)):
        if not run.has("write_latency"):
            continue
        marks = run.record.marks
        during_s = ((marks.end_ns or 0) - (marks.request_ns or 0)) / NS_PER_S
        table = run.df("write_latency")
        table["window"] = table["window"].astype(str)
        seconds = {"before": BASELINE_NS / NS_PER_S, "during": during_s}
        named = table.assign(run=run.name, window_s=table["window"].map(seconds), **run.case_values)
        parts.append(named)
    columns = ["run", *case_names(runs), "window_s", *COLUMNS["write_latency"]]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def df_waits_by_method(runs: Iterable[Run]) -> pd.DataFrame:
    """What the guest waited for a page beside what the handler took, fault by fault, of several
    runs below each other.

    Columns: run, its case, handler_us (the fault's latency; NaN when another thread
    released the page) and wait_us (of the operation that faulted).  Runs without both a fault log
    and slow writes are left out, and so is a fault for which the guest noted no operation.
    """
    parts = []
    for run in (runs := together(runs)):
        if not (run.has("faults") and run.has("slow_writes")):
            continue
        waits = match_faults(run.df("faults"), run.df("slow_writes"))
        us = waits[["latency_ns", "wait_ns"]].astype("Float64").astype(float) / NS_PER_US
        named = us.rename(columns={"latency_ns": "handler_us", "wait_ns": "wait_us"})
        parts.append(named.assign(run=run.name, **run.case_values))
    columns = ["run", *case_names(runs), "handler_us", "wait_us"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def match_faults(faults: pd.DataFrame, slow: pd.DataFrame) -> pd.DataFrame:
    """Return the faults for which the guest noted a slow operation on the same page, with `op`,
    `thread` and `wait_ns` of that.

    A page may have had several.  The guest's clock and the host's differ by a constant, but for a
    permille; the median over all pairs is near it, because most pages have one pair, and of several
    operations that one is taken which is nearest in time.

    :param faults: columns of the table `faults`.
    :param slow: columns of the table `slow_writes`.
    """
    noted = slow.rename(columns={"latency_ns": "wait_ns"})[
        ["thread", "op", "offset", "start_ns", "wait_ns"]
    ]
    named = faults[faults["vcpu"].notna()]
    pairs = named.astype({"offset": "int64"}).merge(noted, on="offset")
    apart = pairs["read_ns"] - pairs["start_ns"]
    nearest = (apart - apart.median()).abs().sort_values(kind="stable").index
    return pairs.loc[nearest].drop_duplicates("seq").sort_values("seq", ignore_index=True)
