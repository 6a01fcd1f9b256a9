"""A table of one snapshot that names the snapshot's instants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd


def with_marks(
    table: pd.DataFrame,
    *,
    case: Mapping[str, Any],
    request_ns: int | None,
    stop_ns: int | None,
    resume_ns: int | None,
    end_ns: int | None,
) -> pd.DataFrame:
    """`table` with the snapshot it is of in its `attrs`: `case`, which is its method and its values
    of what a run set varied, and the instants in ns.

    The columns stay what is stored; figures of one snapshot's table read the rest from there.
    """
    marked = table.copy(deep=False)
    marked.attrs = {
        "case": dict(case),
        "request_ns": request_ns,
        "stop_ns": stop_ns,
        "resume_ns": resume_ns,
        "end_ns": end_ns,
    }
    return marked
