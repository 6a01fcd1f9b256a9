"""The data dictionary: a record for each column of the stored tables, and for each field of the
summary line.

What is spelled here is spelled nowhere else: tables, headings, figures and the report take names,
units and meanings from these records, and a test holds data/README.md to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd

from lab.scenario.dimensions import DIMENSIONS, Dimension

DType = Literal["int64", "uint64", "int32", "float64", "text", "category", "bool"]
"""What a column holds.  `text` and `category` are strings; a category repeats a few of them.  Every
kind may be null."""


@dataclass(frozen=True)
class Column:
    """Name, kind, unit and meaning of one column; the unit is empty for what is no number."""

    name: str
    dtype: DType
    unit: str
    doc: str


@dataclass(frozen=True)
class Metric(Column):
    """A number of the summary line.

    `title` names it for people with the unit that it is shown in, which is `unit` times `scale`.
    A `short` one is in the table that one sees first; all of them are in the report.
    """

    title: str = field(kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    short: bool = field(default=False, kw_only=True)

    def shown(self, value: float | None) -> str:
        """A value in the unit of the title, three significant digits; `-` for null."""
        return three_digits(None if value is None else value * self.scale)


def three_digits(value: float | None) -> str:
    """A number with three significant digits; `-` for null."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


COLUMNS: Mapping[str, Mapping[str, Column]] = {
    table: {column.name: column for column in columns}
    for table, columns in {
        "faults": (
            Column("seq", "int64", "1", "order in which the handler read the faults, from 0"),
            Column(
                "gpa",
                "uint64",
                "B",
                "guest-physical address of the page; NA when the block is not mapped for the guest",
            ),
            Column("offset", "uint64", "B", "offset of the page in its RAM block"),
            Column("block", "category", "", "name of the RAM block"),
            Column("tid", "int64", "", "host thread that faulted; 0 when the kernel did not say"),
            Column(
                "vcpu",
                "int64",
                "",
                "index of the vCPU that faulted; NA when the thread is not a vCPU",
            ),
            Column(
                "read_ns", "int64", "ns", "CLOCK_MONOTONIC when the handler read the fault message"
            ),
            Column(
                "taken_ns",
                "int64",
                "ns",
                "CLOCK_MONOTONIC when the snapshot thread took the fault up; 0 when it did not",
            ),
            Column(
                "saved_ns",
                "int64",
                "ns",
                "CLOCK_MONOTONIC when the page was in the stream or copied aside; 0 when it was "
                "saved before",
            ),
            Column(
                "released_ns",
                "int64",
                "ns",
                "CLOCK_MONOTONIC when the unprotect call returned; 0 when another thread "
                "released the page",
            ),
            Column(
                "latency_ns",
                "int64",
                "ns",
                "released_ns - read_ns; NA when another thread released the page",
            ),
            Column("pages", "int64", "pages", "pages released together with this one"),
            Column(
                "resolver",
                "category",
                "",
                "who saved the page: the sweep before the fault, the snapshot thread, the fault "
                "thread; or nobody, because the VM was yet to be paused (`not-paused`)",
            ),
            Column(
                "queue_depth",
                "int64",
                "1",
                "what waited for the snapshot thread when this one was read: faults, or with the "
                "engine `copy` pages that were copied aside",
            ),
        ),
        "progress": (
            Column("t_ns", "int64", "ns", "CLOCK_MONOTONIC of the sample: middle of the read"),
            Column(
                "ops",
                "int64",
                "1",
                "operations completed since the guest's writers started, summed over its threads",
            ),
            Column("read_ns", "int64", "ns", "how long the read of the guest's page took"),
        ),
        "write_latency": (
            Column(
                "window",
                "text",
                "",
                "`before`: from a second before the request; `during`: request until completion",
            ),
            Column(
                "low_ns", "int64", "ns", "shortest duration of an operation that is counted here"
            ),
            Column(
                "high_ns", "int64", "ns", "duration from which on it is counted in the next bucket"
            ),
            Column(
                "ops", "int64", "1", "operations that took so long, summed over the guest's writers"
            ),
        ),
        "slow_writes": (
            Column(
                "thread",
                "int64",
                "",
                "index of the writer, which is that of its vCPU modulo the vCPUs",
            ),
            Column("op", "int64", "1", "which of the writer's operations it was, from 1"),
            Column("offset", "int64", "B", "offset of its page in the guest's main RAM block"),
            Column(
                "start_ns",
                "int64",
                "ns",
                "when it began, by the guest's clock, which has its own zero",
            ),
            Column("latency_ns", "int64", "ns", "how long it took, by the same clock"),
        ),
        "threads": (
            Column(
                "window",
                "text",
                "",
                "`before`: from a second before the request; `during`: request until completion, "
                "of an ordinary migration until the guest runs on",
            ),
            Column(
                "thread",
                "text",
                "",
                "`vCPU` and its index, `main loop`, `snapshot thread`, `fault thread`, QEMU's "
                "own name of any other; `ended`: all threads that ended, after the last look at "
                "each",
            ),
            Column("tid", "int64", "", "the host's id of the thread; NA for `ended`"),
            Column("cpu_ns", "int64", "ns", "CPU time"),
            Column(
                "wait_ns",
                "int64",
                "ns",
                "how long it could have run and waited for a CPU; NA for `ended`",
            ),
            Column("window_ns", "int64", "ns", "length of the window"),
        ),
        "host_memory": (
            Column(
                "reading",
                "text",
                "",
                "`before`: before the baseline; `after`: after progress was recorded to its end",
            ),
            Column("t_ns", "int64", "ns", "CLOCK_MONOTONIC at its beginning"),
            Column("resident_bytes", "int64", "B", "memory that is mapped in the QEMU process"),
            Column(
                "huge_bytes",
                "int64",
                "B",
                "how much of it is transparent huge pages that are mapped as such",
            ),
            Column(
                "thp_split_pmd",
                "int64",
                "1",
                "how often the mapping of a huge page was split, on the host since it booted",
            ),
            Column(
                "thp_split_page", "int64", "1", "how often a huge page itself was split, likewise"
            ),
            Column(
                "page_cache_bytes",
                "int64",
                "B",
                "the host's page cache, with tmpfs and shared memory",
            ),
            Column("dirty_bytes", "int64", "B", "what of it has yet to be written"),
        ),
        "phases": (
            Column("phase", "text", "", "name of the phase, by the engine"),
            Column("start_ns", "int64", "ns", "CLOCK_MONOTONIC at its start"),
            Column("end_ns", "int64", "ns", "CLOCK_MONOTONIC at its end"),
            Column("duration_ns", "int64", "ns", "end_ns - start_ns"),
        ),
        "floor": (
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
            Column(
                "busy_threads", "int32", "1", "threads that computed meanwhile in the same process"
            ),
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
        ),
    }.items()
}
"""The stored tables, by name: their columns, by name, in order."""
_METRICS = (
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
    Metric(
        "faults",
        "int64",
        "1",
        "write faults on protected pages that the handler read; null where nothing logs them",
        title="faults",
        short=True,
    ),
    Metric(
        "fault_p50_us",
        "float64",
        "us",
        "median of latency_ns over the faults that their reader saw released",
        title="fault p50 µs",
        short=True,
    ),
    Metric(
        "fault_p99_us",
        "float64",
        "us",
        "99 % quantile of the same",
        title="fault p99 µs",
        short=True,
    ),
    Metric("fault_max_us", "float64", "us", "largest of the same", title="fault max µs"),
    Metric(
        "known_faults_logged",
        "int64",
        "1",
        "write faults in the log that the lab itself made, to compare with the `known_faults` of "
        "the scenario; null when none were asked for",
        title="known faults logged",
    ),
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
    Metric(
        "stalls",
        "int64",
        "1",
        "guest operations between request and completion that took longer than 4 us by the "
        "guest's clock; null unless the guest timed them",
        title="stalls > 4 µs",
    ),
    Metric(
        "stall_sum_ms",
        "float64",
        "ms",
        "all of these together, summed over the guest's writers",
        title="stall sum ms",
    ),
    Metric("stall_p50_us", "float64", "us", "median of them", title="stall p50 µs"),
    Metric("stall_p99_us", "float64", "us", "99 % quantile of the same", title="stall p99 µs"),
    Metric("stall_p999_us", "float64", "us", "99.9 % quantile of the same", title="stall p99.9 µs"),
    Metric("stall_max_us", "float64", "us", "longest of the same", title="stall max µs"),
    Metric(
        "qemu_cpu_ms",
        "float64",
        "ms",
        "CPU time of QEMU's threads other than vCPUs, in the window `during` of the threads; "
        "null when nobody looked at them",
        title="QEMU CPU ms",
    ),
    Metric(
        "vcpu_wait_ms",
        "float64",
        "ms",
        "how long vCPUs could have run and waited for a CPU of the host meanwhile, summed over "
        "vCPUs; null likewise",
        title="vCPU wait ms",
    ),
    Metric(
        "rss_growth_mib",
        "float64",
        "MiB",
        "memory mapped in the QEMU process, after against before; null when nobody read it, like "
        "the next three",
        title="RSS growth MiB",
    ),
    Metric(
        "thp_lost_mib",
        "float64",
        "MiB",
        "transparent huge pages mapped in it, before against after",
        title="THP lost MiB",
    ),
    Metric(
        "thp_splits",
        "int64",
        "1",
        "mappings of huge pages that were split between the readings, on the whole host",
        title="THP splits",
    ),
    Metric(
        "page_cache_growth_mib",
        "float64",
        "MiB",
        "the host's page cache with tmpfs and shared memory, after against before",
        title="page cache growth MiB",
    ),
    Metric(
        "rebuild_ms",
        "float64",
        "ms",
        "how long it took to put guest RAM into huge pages again, guest running; null unless "
        "asked for, like the next three",
        title="THP rebuild ms",
    ),
    Metric(
        "rebuilt_mib",
        "float64",
        "MiB",
        "huge pages mapped in QEMU, after that against before",
        title="THP rebuilt MiB",
    ),
    Metric(
        "rate_before_rebuild",
        "float64",
        "1",
        "rate in the second before it, after all else was recorded, as a share of the baseline",
        title="rate before rebuild %",
        scale=100.0,
    ),
    Metric(
        "rate_after_rebuild",
        "float64",
        "1",
        "rate in the second after it, likewise",
        title="rate after rebuild %",
        scale=100.0,
    ),
)

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
        "ok, failed (the snapshot was not taken) or undecided (taken, but the figures or the check "
        "are not trusted)",
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
