"""The data dictionary: a record for each column of the stored tables, and for each field of the
summary line.

Tables and metrics of an instrument are declared where it is (`lab.instruments`), all others here,
and each nowhere else: tables, headings, figures and the report take names, units and meanings from
these records, and a test holds data/README.md to them.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lab.column import Column, Metric
from lab.instruments import INSTRUMENTS
from lab.scenario.dimensions import DIMENSIONS, Dimension

_FLOOR = (
    Column(
        "block",
        "int32",
        "1",
        "place of the block in its run, from 0; a block is one process",
    ),
    Column(
        "benchmark",
        "category",
        "",
        "what was measured: arm, unprotect, fault, copy, scan or write",
    ),
    Column("variant", "category", "", "in which way"),
    Column("stage", "category", "", "which step of it was timed"),
    Column("ram_kind", "category", "", "kind of memory; NA for a file"),
    Column(
        "target",
        "category",
        "",
        "where a file was written: `image-dir` or `tmpfs` (/dev/shm); NA for memory",
    ),
    Column("pages", "int32", "pages", "4 KiB pages that the step handled"),
    Column("busy_threads", "int32", "1", "threads that computed meanwhile in the same process"),
    Column(
        "sample",
        "int32",
        "1",
        "place of the sample among those of its block and stage, from 0",
    ),
    Column(
        "value_ns",
        "int64",
        "ns",
        "how long the step took; negative where the first of two instants came later",
    ),
)

_TABLES = {name: table for one in INSTRUMENTS for name, table in one.tables.items()}

COLUMNS: Mapping[str, Mapping[str, Column]] = {
    name: {column.name: column for column in table}
    for name, table in (_TABLES | {"floor": _FLOOR}).items()
}
"""The stored tables, by name: their columns, by name, in order."""

_COST = (
    Metric(
        "setup_ms",
        "float64",
        "ms",
        "request until the VM is stopped, guest running: preparation",
        title="set-up ms",
    ),
    Metric(
        "pause_ms",
        "float64",
        "ms",
        "VM stopped: QEMU's STOP event until its RESUME event",
        title="pause ms",
        short=True,
    ),
    Metric(
        "duration_ms",
        "float64",
        "ms",
        "request until QEMU reports the migration completed",
        title="duration ms",
        short=True,
    ),
    Metric(
        "baseline_ops_per_s",
        "float64",
        "1/s",
        "guest operations a second in the second before the request",
        title="baseline Mops/s",
        scale=1e-6,
    ),
    Metric(
        "lost_work_ms",
        "float64",
        "ms",
        "work the guest did not do between request and back, in time at its baseline rate",
        title="lost work ms",
        short=True,
    ),
    Metric(
        "min_rate_50ms",
        "float64",
        "1",
        "lowest rate over any 50 ms between request and completion, as a share of the baseline",
        title="min rate %",
        scale=100.0,
        short=True,
    ),
    Metric(
        "max_gap_ms",
        "float64",
        "ms",
        "longest time between request and back without a completed operation, as the samples "
        "prove it",
        title="max gap ms",
        short=True,
    ),
    Metric("recovery_ms", "float64", "ms", "completion until back", title="recovery ms"),
    Metric(
        "image_bytes",
        "int64",
        "B",
        "size of the image file",
        title="image MiB",
        scale=2.0**-20,
        short=True,
    ),
)

_METRICS = (*_COST, *(metric for one in INSTRUMENTS for metric in one.metrics))

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _METRICS}
"""The numbers of the summary line, by name, in the order of tables."""

SHORT = tuple(metric.name for metric in _METRICS if metric.short)
"""The metrics of the short table."""

DEVICES = ("disk", "disk_cache", "disk_aio", "disk_iothread", "net", "vnc", "balloon")
"""The devices that the summary line names."""

_FIELDS: tuple[Column | Dimension, ...] = (
    DIMENSIONS["method"],
    Column("engine", "text", "", "snapshot engine inside QEMU; null for ordinary migration"),
    *(DIMENSIONS[name] for name in ("accel", "guest")),
    Column(
        "outcome",
        "text",
        "",
        "ok, failed (the snapshot was not taken, or the restored guest differed) or undecided "
        "(taken, but it could not be verified)",
    ),
    *(DIMENSIONS[name] for name in ("ram_mib", "wss_mib", "vcpus", "workload", "rate_ops_per_s")),
    *(DIMENSIONS[name] for name in (*DEVICES, "storage_mib_per_s")),
    *_METRICS,
    Column(
        "verified",
        "bool",
        "",
        "byte equality of every RAM block with the pause instant, in an untimed snapshot of the "
        "same boot; null when not asked for",
    ),
    Column(
        "back_capped",
        "bool",
        "",
        "true when the old rate was not seen again before the recording ended: lost_work_ms and "
        "recovery_ms are then lower bounds",
    ),
    Column("reason", "text", "", "why the outcome is not ok; null when it is"),
)
SUMMARY_FIELDS: Mapping[str, Column | Dimension] = {one.name: one for one in _FIELDS}
"""The summary line of a run, by name, in order: dimensions, metrics, and what became of it."""


def definitions() -> pd.DataFrame:
    """What each number of the summary line is.  Columns: field, unit, meaning."""
    return pd.DataFrame(
        [{"field": name, "unit": c.unit, "meaning": c.doc} for name, c in SUMMARY_FIELDS.items()]
    )
