"""The engine's own account of a snapshot: what it did when, and how often."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pandas as pd

from lab.column import Column, Metric
from lab.instruments.instrument import Found, Instrument, Taken

TABLE = (
    Column("phase", "text", "", "name of the phase, by the engine"),
    Column("start_ns", "int64", "ns", "CLOCK_MONOTONIC at its start"),
    Column("end_ns", "int64", "ns", "CLOCK_MONOTONIC at its end"),
    Column("duration_ns", "int64", "ns", "end_ns - start_ns"),
)
COLUMNS = tuple(column.name for column in TABLE)

METRICS = (
    Metric(
        "pages_copied",
        "int64",
        "1",
        "pages that the fault thread copied aside; null where QEMU does not count them",
        title="pages copied",
    ),
    Metric(
        "buffer_max_bytes",
        "int64",
        "B",
        "the most that was in the copy buffer; null likewise",
        title="buffer max MiB",
        scale=2.0**-20,
    ),
    Metric(
        "buffer_waits",
        "int64",
        "1",
        "how often faults had to wait because the copy buffer was full; null likewise",
        title="buffer waits",
    ),
)


def df_phases(query_migrate: Mapping[str, Any]) -> pd.DataFrame:
    """Return the phases in the reply to `query-migrate`, in the order in which they began.

    Columns: `phase` its name; `start_ns` and `end_ns`, CLOCK_MONOTONIC, ns; `duration_ns`.
    Empty when the QEMU does not say: only the patched one does, for background snapshots.
    """
    phases = query_migrate.get("snapshot", {}).get("phases", [])
    rows = [(str(p["phase"]), int(p["start-ns"]), int(p["end-ns"])) for p in phases]
    rows.sort(key=lambda row: row[1])
    df = pd.DataFrame(rows, columns=list(COLUMNS[:3]))
    df = df.astype({"phase": "str", "start_ns": "int64", "end_ns": "int64"})
    df["duration_ns"] = df["end_ns"] - df["start_ns"]
    return df


def buffer_summary(engine_counters: Mapping[str, int]) -> dict[str, int | None]:
    """Fields pages_copied, buffer_max_bytes and buffer_waits of the summary line; null where the
    engine has no buffer to count.
    """
    names = {
        "pages_copied": "pages_copied",
        "buffer_max_bytes": "buffer_max",
        "buffer_waits": "buffer_waits",
    }
    return {field: engine_counters.get(name) for field, name in names.items()}


def counters(query_migrate: Mapping[str, Any]) -> dict[str, int]:
    """Return the engine's counters in the reply to `query-migrate`, such as `faults`."""
    snapshot = query_migrate.get("snapshot", {})
    return {
        name.replace("-", "_"): int(value)
        for name, value in snapshot.items()
        if isinstance(value, int) and not isinstance(value, bool) and not name.endswith("-ns")
    }


class PhasesInstrument(Instrument):
    """The engine's own account, where QEMU gives one.  It is asked for nothing."""

    title: ClassVar = "phases"
    tables: ClassVar = {"phases": TABLE}
    metrics: ClassVar = METRICS

    def found(self, taken: Taken) -> Found:
        phases = df_phases(taken.migration)
        return Found(
            tables={"phases": phases} if len(phases) else {},
            figures=buffer_summary(counters(taken.migration)),
        )
