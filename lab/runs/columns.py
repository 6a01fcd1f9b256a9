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

_REQUESTS = (
    Column(
        "due_delta_ns",
        "int64",
        "ns",
        "when the request was due, since the one before it was; the first was due at "
        "`summary.packed.due_ns`",
    ),
    Column("sent_delta_ns", "int64", "ns", "sent less due; NA when it was not sent yet"),
    Column(
        "done_delta_ns",
        "int64",
        "ns",
        "done less what `summary.packed.done_from` says: `next`, when the next request of this "
        "connection was due (where there is none, when this one was), or `sent`; NA when it was not"
        " done before the table was read, at `summary.packed.until_ns`",
    ),
    Column("client", "int32", "", "index of the connection; NA when the request was not sent yet"),
    Column("operation", "category", "", "what was asked for"),
    Column("number_delta", "int64", "", "0: of sequences, which these loads do not write"),
    Column("ok", "bool", "", "whether the server did it"),
)

_THROUGHPUT = (
    Column(
        "bin", "int32", "1", "number of the 10 ms since the snapshot's request; negative before it"
    ),
    Column("requests", "int32", "1", "requests that were done in it"),
)

_TABLES = {name: table for one in INSTRUMENTS for name, table in one.tables.items()}
_OTHERS = {"floor": _FLOOR, "requests": _REQUESTS, "throughput": _THROUGHPUT}

COLUMNS: Mapping[str, Mapping[str, Column]] = {
    name: {column.name: column for column in table} for name, table in (_TABLES | _OTHERS).items()
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


_IN_WINDOW = "of requests outstanding at an instant between the request and 0.5 s after the end"
_BEFORE = "of requests due in the second before the request, and done in it"

_APPLICATION_METRICS = (
    Metric("pause_ms", "float64", "ms", "VM stopped; null where it was not", title="pause ms"),
    Metric(
        "duration_ms",
        "float64",
        "ms",
        "request until the image, or the server's own file, was written; 1 s where nothing was",
        title="duration ms",
    ),
    Metric(
        "image_bytes",
        "int64",
        "B",
        "size of the image, of the state in the layer, or of the server's own file",
        title="written MiB",
        scale=2.0**-20,
    ),
    Metric(
        "window_ms",
        "float64",
        "ms",
        "the window: request until 0.5 s after the end",
        title="window ms",
    ),
    Metric("requests", "int64", "1", f"number {_IN_WINDOW}", title="requests"),
    Metric(
        "requests_per_s_before",
        "float64",
        "1/s",
        "requests done a second in the second before the request",
        title="before 1/s",
    ),
    Metric(
        "lost_requests",
        "float64",
        "1",
        "requests that would have been done in the window at the rate of before, less those that "
        "were; negative when more were done",
        title="lost requests",
    ),
    Metric(
        "refused_requests",
        "int64",
        "1",
        "requests that the server answered with an error in the window",
        title="refused",
    ),
    Metric(
        "censored_requests",
        "int64",
        "1",
        "requests of the window that had no answer when the load was ended",
        title="unanswered",
    ),
    Metric("request_p50_us", "float64", "us", f"median latency {_IN_WINDOW}", title="p50 us"),
    Metric("request_p99_us", "float64", "us", "99 % quantile of the same", title="p99 us"),
    Metric("request_p999_us", "float64", "us", "99.9 % quantile of the same", title="p99.9 us"),
    Metric("request_worst_ms", "float64", "ms", "largest of the same", title="worst ms"),
    Metric(
        "request_p50_before_us",
        "float64",
        "us",
        f"median latency {_BEFORE}",
        title="before: p50 us",
    ),
    Metric(
        "request_p99_before_us",
        "float64",
        "us",
        "99 % quantile of the same",
        title="before: p99 us",
    ),
    Metric(
        "request_p999_before_us",
        "float64",
        "us",
        "99.9 % quantile of the same",
        title="before: p99.9 us",
    ),
    Metric(
        "request_worst_before_ms",
        "float64",
        "ms",
        "largest of the same",
        title="before: worst ms",
    ),
    Metric(
        "vmm_cpu_s",
        "float64",
        "s",
        "CPU time of QEMU's threads other than vCPUs in the window; the main loop forwards the "
        "requests, so it is never zero",
        title="QEMU CPU s",
    ),
)

APPLICATION_METRICS: Mapping[str, Metric] = {one.name: one for one in _APPLICATION_METRICS}
"""The numbers of the summary line of a set that `lab applications` recorded."""

_APPLICATION_FIELDS: tuple[Column, ...] = (
    Column("method", "text", "", "how the state was saved; none: it was not"),
    Column("application", "text", "", "what asked for what"),
    Column("outcome", "text", "", "ok, or failed: the sample was not taken"),
    Column(
        "asked_per_s",
        "float64",
        "1/s",
        "the rate at which requests were due, half of what this boot could do; null for a closed "
        "loop",
    ),
    *_APPLICATION_METRICS,
    Column(
        "request_worst_censored",
        "bool",
        "",
        "whether the worst request had no answer yet: it lasted longer than that",
    ),
    Column("packed", "text", "", "what is needed to read `requests.parquet`: an object"),
    Column("reason", "text", "", "why the outcome is not ok; null when it is"),
)
APPLICATION_FIELDS: Mapping[str, Column] = {one.name: one for one in _APPLICATION_FIELDS}
"""That summary line, by name, in order."""


def definitions() -> pd.DataFrame:
    """What each number of the summary line is.  Columns: field, unit, meaning."""
    return pd.DataFrame(
        [{"field": name, "unit": c.unit, "meaning": c.doc} for name, c in SUMMARY_FIELDS.items()]
    )
