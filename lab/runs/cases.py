"""The cases of a run set, and one row per run.

A table of several runs has at its front, after `run` where a row is of one run, what *case* its
rows are of: a column `method`, and one for each parameter that a run set varied.  Runs of several
hosts have a column `host`, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd

from lab.runs.columns import METRICS, SUMMARY_FIELDS
from lab.runs.run import Run
from lab.scenario.dimensions import DIMENSIONS


def case_columns(frame: pd.DataFrame) -> list[str]:
    """The columns that say what case a row of a table is of."""
    names = (str(name) for name in frame.columns if name != "run")
    return list(takewhile(DIMENSIONS.__contains__, names))


def by_case(
    frame: pd.DataFrame, columns: Sequence[str] | None = None
) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """The cases in a table and their rows, in the order of the dimensions: methods first.

    :param columns: tell only these apart; by default `case_columns` of the table.
    """
    names = case_columns(frame) if columns is None else list(columns)
    if not names or frame.empty:
        return [({}, frame)] if len(frame) else []
    grouped = frame.groupby(names, sort=False, dropna=False, observed=True)
    found = [(dict(zip(names, map(python_value, key), strict=True)), part) for key, part in grouped]
    return sorted(found, key=lambda one: case_place(one[0]))


def python_value(value: Any) -> Any:
    """A value of a column as what it was before: pandas has its own of None and of numbers."""
    if pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def case_place(case: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """A key that sorts cases by their dimensions, as they are in the case."""
    return [DIMENSIONS[name].place(value) for name, value in case.items()]


def case_label(case: Mapping[str, Any]) -> str:
    """What a legend calls a case: its method, and what was varied by name."""
    named = {name: DIMENSIONS[name].shown(value) for name, value in case.items()}
    method = [named.pop("method")] if "method" in named else []
    return ", ".join([*method, *(f"{name}={value}" for name, value in named.items())])


def together(runs: Iterable[Run]) -> list[Run]:
    """Runs of one set, or of several, as they stand below each other in a table: each is of a case
    that says all that was varied in any of their sets, and the host where there are several.
    """
    runs = list(runs)
    names = dict.fromkeys(name for run in runs for name in run.varied)
    if len({run.host for run in runs}) > 1:
        names["host"] = None
    varied = tuple(names)
    return [run if run.varied == varied else replace(run, varied=varied) for run in runs]


def case_names(runs: Sequence[Run]) -> list[str]:
    """The columns of the case of runs that are `together`."""
    return ["method", *(runs[0].varied if runs else ())]


def df_runs(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per run, of one set or of several: `df_runs([*here, *there])`.

    Columns: run, its case, round, order, warmup, and the rest of the summary line
    (`lab.runs.columns.SUMMARY_FIELDS`).  Rows in the order they were measured.
    """
    runs = together(runs)
    rows = [
        {
            "run": run.name,
            "round": run.record.round,
            "order": run.record.order,
            "warmup": run.record.warmup,
        }
        | {field: run.summary.get(field) for field in SUMMARY_FIELDS}
        | {"outcome": run.record.outcome, "reason": run.record.reason}
        | run.case_values
        for run in runs
    ]
    columns = dict.fromkeys(["run", *case_names(runs), "round", "order", "warmup", *SUMMARY_FIELDS])
    frame = pd.DataFrame(rows, columns=list(columns))
    for metric in METRICS:
        frame[metric] = pd.to_numeric(frame[metric])
    return frame.sort_values("order", kind="stable", ignore_index=True)


def varying(frames: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Those of `names` that differ between rows: what a comparison has to name."""
    return [name for name in names if len({str(row.get(name)) for row in frames}) > 1]
