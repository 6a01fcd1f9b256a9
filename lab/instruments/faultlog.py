"""The patched QEMU's fault log: one record for each write fault of a snapshot.

A page faults at most once a snapshot, so QEMU can set the room aside beforehand and the log is
complete; `FaultLog.dropped` says so.  The times are those of the handler: what the faulting vCPU
waits in addition, until the kernel has woken the handler and the handler has been scheduled, is
not in them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from lab.column import Column, Metric
from lab.errors import RunError
from lab.instruments.instrument import Found, Instrument, Taken
from lab.stats import quantile
from lab.units import NS_PER_US

TABLE = (
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
    Column("read_ns", "int64", "ns", "CLOCK_MONOTONIC when the handler read the fault message"),
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
        "CLOCK_MONOTONIC when the unprotect call returned; 0 when another thread released the page",
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
)
COLUMNS = tuple(column.name for column in TABLE)

METRICS = (
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
)


MAGIC = b"QSNAPFLT"
VERSION = 1
ENGINES = ("inline", "rfc", "copy")
RESOLVERS = ("sweep", "snapshot-thread", "fault-thread", "not-paused")
NO_GPA = (1 << 64) - 1

HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("header_size", "<u4"),
        ("record_size", "<u4"),
        ("engine", "<u4"),
        ("records", "<u8"),
        ("dropped", "<u8"),
        ("start_ns", "<i8"),
        ("blocks", "<u4"),
        ("block_size", "<u4"),
        ("reserved", "<u8"),
    ]
)
BLOCK = np.dtype(
    [
        ("idstr", "S256"),
        ("host", "<u8"),
        ("used_length", "<u8"),
        ("page_size", "<u8"),
        ("reserved", "<u8", 5),
    ]
)
RECORD = np.dtype(
    [
        ("gpa", "<u8"),
        ("offset", "<u8"),
        ("block", "<u4"),
        ("tid", "<u4"),
        ("read_ns", "<i8"),
        ("taken_ns", "<i8"),
        ("saved_ns", "<i8"),
        ("released_ns", "<i8"),
        ("pages", "<u2"),
        ("resolver", "u1"),
        ("flags", "u1"),
        ("queue_depth", "<u4"),
    ]
)


@dataclass(frozen=True)
class FaultLog:
    """A fault log, read.

    `df` has one row for each fault, in the order in which the handler read them: `seq` from 0;
    `gpa` guest-physical address of the page, <NA> when the block is not mapped for the guest;
    `offset` of the page in its RAM block; `block` the block's name; `tid` host thread that
    faulted, 0 when the kernel did not say; `vcpu` its vCPU, <NA> for another thread; `read_ns`,
    `taken_ns`, `saved_ns`, `released_ns` CLOCK_MONOTONIC ns when the message was read, the
    snapshot thread took it up, the page was saved or copied and the page was released (0: that
    did not happen on behalf of this fault); `latency_ns` released - read, as the function of that
    name has it; `pages` released together; `resolver` who saved the page (`not-paused`: nobody,
    the VM was yet to be paused); `queue_depth` faults, or pages copied aside, that waited when
    this one was read.
    """

    df: pd.DataFrame
    blocks: pd.DataFrame
    engine: str
    start_ns: int
    dropped: int


def read_fault_log(path: Path, vcpu_threads: Mapping[int, int] | None = None) -> FaultLog:
    """Read the log at `path`.

    :param vcpu_threads: index of the vCPU for each host thread that runs one.
    :raise RunError: when the file is missing, of another version, cut short or inconsistent.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"the fault log {path.name} cannot be read: {error.strerror}") from error
    return parse_fault_log(content, vcpu_threads, name=path.name)


def parse_fault_log(
    content: bytes, vcpu_threads: Mapping[int, int] | None = None, *, name: str = "fault log"
) -> FaultLog:
    """Decode the bytes of a log; see `read_fault_log`."""
    if len(content) < HEADER.itemsize or content[:8] != MAGIC:
        raise RunError(f"{name} is not a fault log", "take the snapshot with the patched QEMU")
    header = np.frombuffer(content, HEADER, 1)[0]
    if header["version"] != VERSION:
        raise RunError(
            f"{name} has version {header['version']} and this lab reads {VERSION}",
            "use the lab and the QEMU of the same checkout",
        )
    sizes = (int(header["header_size"]), int(header["block_size"]), int(header["record_size"]))
    if sizes != (HEADER.itemsize, BLOCK.itemsize, RECORD.itemsize):
        raise RunError(f"{name} has record sizes {sizes}", "rebuild with `lab build`")
    block_count, record_count = int(header["blocks"]), int(header["records"])
    records_at = HEADER.itemsize + block_count * BLOCK.itemsize
    expected = records_at + record_count * RECORD.itemsize
    if len(content) != expected:
        raise RunError(f"{name} has {len(content)} bytes where its header says {expected}")
    if int(header["engine"]) >= len(ENGINES):
        raise RunError(f"{name} names engine {header['engine']}, which this lab does not know")
    blocks = np.frombuffer(content, BLOCK, block_count, HEADER.itemsize)
    records = np.frombuffer(content, RECORD, record_count, records_at)
    names = [bytes(idstr).decode("utf-8", "replace") for idstr in blocks["idstr"]]
    if len(set(names)) != len(names):
        raise RunError(f"{name} names a RAM block twice")
    return FaultLog(
        df=_df_faults(records, names, vcpu_threads or {}, name),
        blocks=pd.DataFrame(
            {"block": names}
            | {field: blocks[field].astype("u8") for field in ("host", "used_length", "page_size")}
        ),
        engine=ENGINES[int(header["engine"])],
        start_ns=int(header["start_ns"]),
        dropped=int(header["dropped"]),
    )


def _df_faults(
    records: "np.ndarray[tuple[int], np.dtype[np.void]]",
    names: list[str],
    vcpu_threads: Mapping[int, int],
    name: str,
) -> pd.DataFrame:
    if len(records) and (
        int(records["block"].max()) >= len(names)
        or int(records["resolver"].max()) >= len(RESOLVERS)
    ):
        raise RunError(f"{name} has a record out of range")
    gpa = pd.array(records["gpa"].astype("u8"), dtype="UInt64")
    gpa[records["gpa"] == NO_GPA] = pd.NA
    released, read = (pd.Series(records[name].astype("i8")) for name in ("released_ns", "read_ns"))
    tid = pd.Series(records["tid"].astype("i8"))
    return pd.DataFrame(
        {
            "seq": np.arange(len(records), dtype="i8"),
            "gpa": gpa,
            "offset": records["offset"].astype("u8"),
            "block": _labelled(records["block"], names),
            "tid": tid,
            "vcpu": tid.map(dict(vcpu_threads)).astype("Int64"),
            "read_ns": read,
            "taken_ns": records["taken_ns"].astype("i8"),
            "saved_ns": records["saved_ns"].astype("i8"),
            "released_ns": released,
            "latency_ns": latency_ns(read, released),
            "pages": records["pages"].astype("i8"),
            "resolver": _labelled(records["resolver"], RESOLVERS),
            "queue_depth": records["queue_depth"].astype("i8"),
        }
    )


def latency_ns(read_ns: "pd.Series[int]", released_ns: "pd.Series[int]") -> "pd.Series[Any]":
    """Return the latency of faults, as their handler sees it: message read until page released.

    <NA> where another thread released the page, which is where `released_ns` is 0.  What the guest
    waits is longer: delivery of the fault before the message is read and the wake-up after it are
    not in it.
    """
    return (released_ns - read_ns).astype("Int64").mask(released_ns == 0)


def fault_summary(faults: pd.DataFrame | None) -> dict[str, float | int | None]:
    """Fields faults, fault_p50_us, fault_p99_us, fault_max_us of the summary line; null without a
    fault log.  Faults without a latency are left out of the quantiles, not counted as 0.
    """
    figures: dict[str, float | int | None] = {metric.name: None for metric in METRICS}
    if faults is None:
        return figures
    figures["faults"] = len(faults)
    latency = latency_ns(faults["read_ns"], faults["released_ns"]).dropna().to_numpy(np.int64)
    if len(latency):
        for name, q in _QUANTILES.items():
            figures[name] = quantile(latency, q) / NS_PER_US
    return figures


_QUANTILES = {"fault_p50_us": 0.5, "fault_p99_us": 0.99, "fault_max_us": 1.0}


class FaultLogInstrument(Instrument):
    """The fault log, which QEMU itself writes.  Other methods than live ones have none."""

    title: ClassVar = "fault log"
    switch: ClassVar = "log_faults"
    tables: ClassVar = {"faults": TABLE}
    metrics: ClassVar = METRICS

    def found(self, taken: Taken) -> Found:
        if taken.faults is None:
            return Found()
        dropped = taken.faults_dropped
        return Found(
            tables={"faults": taken.faults},
            figures=fault_summary(taken.faults),
            warnings=[f"the fault log dropped {dropped} faults"] if dropped else [],
        )


def _labelled(
    codes: "np.ndarray[Any, np.dtype[Any]]", names: Sequence[str]
) -> "pd.Categorical[str]":
    return pd.Categorical.from_codes(codes.astype(np.int64), pd.Index(list(names)))
