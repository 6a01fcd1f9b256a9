"""The instants of a snapshot, and tables that name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pandas as pd


class Marks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Instants of the host's CLOCK_MONOTONIC, in ns; null when the run did not get there.

    request: just before the command that starts the snapshot was sent.
    stop, resume: when QEMU stamped its STOP and RESUME events.
    end: when QEMU reported the migration completed.
    back: from when the guest ran at its old rate again (`lab.analysis.slowdown.slowdown` defines
        it).
    """

    request_ns: int | None = None
    stop_ns: int | None = None
    resume_ns: int | None = None
    end_ns: int | None = None
    back_ns: int | None = None


def with_marks(table: pd.DataFrame, case: Mapping[str, Any], marks: Marks) -> pd.DataFrame:
    """`table` with the snapshot it is of in its `attrs`: `case`, which is its method and its values
    of what a run set varied, and the instants, each by its name in `Marks`.

    The columns stay what is stored; figures of one snapshot's table read the rest from there.
    """
    marked = table.copy(deep=False)
    marked.attrs = {"case": dict(case)}
    for name, t_ns in msgspec.structs.asdict(marks).items():
        marked.attrs[name] = t_ns
    return marked
