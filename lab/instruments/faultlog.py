"""The patched QEMU's fault log: one record for each write fault of a snapshot.

A page faults at most once a snapshot, so QEMU can set the room aside beforehand and the log is
complete; `FaultLog.dropped` says so.  The times are those of the handler: what the faulting vCPU
waits in addition, until the kernel has woken the handler and the handler has been scheduled, is
not in them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lab.errors import RunError

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
    did not happen on behalf of this fault); `latency_ns` released - read, <NA> when another
    thread released it; `pages` released together; `resolver` who saved the page (`not-paused`:
    nobody, the VM was yet to be paused); `queue_depth` faults, or pages copied aside, that waited
    when this one was read.
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
        raise RunError(f"the fault log {path.name} can not be read: {error.strerror}") from error
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
    released, read = records["released_ns"].astype("i8"), records["read_ns"].astype("i8")
    latency = pd.array(released - read, dtype="Int64")
    latency[released == 0] = pd.NA
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
            "latency_ns": latency,
            "pages": records["pages"].astype("i8"),
            "resolver": _labelled(records["resolver"], RESOLVERS),
            "queue_depth": records["queue_depth"].astype("i8"),
        }
    )


def _labelled(
    codes: "np.ndarray[Any, np.dtype[Any]]", names: Sequence[str]
) -> "pd.Categorical[str]":
    return pd.Categorical.from_codes(codes.astype(np.int64), pd.Index(list(names)))
