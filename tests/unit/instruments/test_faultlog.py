"""A fault log is read as written, or refused in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import RunError
from lab.instruments.faultlog import (
    BLOCK,
    HEADER,
    NO_GPA,
    RECORD,
    RESOLVERS,
    parse_fault_log,
    read_fault_log,
)


def log_bytes(faults: list[dict[str, Any]], **header: Any) -> bytes:
    """Write a log of two blocks, as QEMU would."""
    head = np.zeros(1, HEADER)
    values = {
        "magic": b"QSNAPFLT",
        "version": 1,
        "header_size": HEADER.itemsize,
        "record_size": RECORD.itemsize,
        "engine": 1,
        "records": len(faults),
        "start_ns": 10**12,
        "blocks": 2,
        "block_size": BLOCK.itemsize,
    } | header
    for name, value in values.items():
        head[name] = value
    blocks = np.zeros(2, BLOCK)
    blocks["idstr"] = [b"pc.ram", b"vga.vram"]
    blocks["used_length"] = [1 << 30, 16 << 20]
    rows = np.zeros(len(faults), RECORD)
    for row, record in zip(rows, faults, strict=True):
        for name, value in record.items():
            row[name] = value
    return head.tobytes() + blocks.tobytes() + rows.tobytes()


FAULT: dict[str, Any] = {
    "gpa": 0x5000,
    "offset": 0x5000,
    "block": 0,
    "tid": 77,
    "read_ns": 1000,
    "taken_ns": 1100,
    "saved_ns": 1200,
    "released_ns": 1500,
    "pages": 1,
    "resolver": 1,
    "queue_depth": 3,
}


def test_the_format_has_the_sizes_of_the_contract() -> None:
    assert (HEADER.itemsize, BLOCK.itemsize, RECORD.itemsize) == (64, 320, 64)


def test_a_known_log_gives_known_rows(tmp_path: Path) -> None:
    released_by_another = FAULT | {"released_ns": 0, "resolver": 0, "tid": 78}
    device = FAULT | {"gpa": NO_GPA, "block": 1, "resolver": 2, "taken_ns": 0}
    path = tmp_path / "faults.bin"
    path.write_bytes(log_bytes([FAULT, released_by_another, device], dropped=5))
    log = read_fault_log(path, {77: 0})
    assert (log.engine, log.start_ns, log.dropped) == ("rfc", 10**12, 5)
    assert list(log.blocks["block"]) == ["pc.ram", "vga.vram"]
    df = log.df
    assert list(df["seq"]) == [0, 1, 2]
    assert df["latency_ns"].isna().tolist() == [False, True, False]
    assert df["latency_ns"].iloc[0] == 500
    assert df["gpa"].isna().tolist() == [False, False, True]
    assert df["vcpu"].isna().tolist() == [False, True, False]
    assert df["vcpu"].iloc[0] == 0
    assert df["block"].tolist() == ["pc.ram", "pc.ram", "vga.vram"]
    assert df["resolver"].tolist() == ["snapshot-thread", "sweep", "fault-thread"]
    assert isinstance(df["block"].dtype, pd.CategoricalDtype)


def test_a_log_without_faults_has_the_same_columns() -> None:
    assert list(parse_fault_log(log_bytes([])).df.columns) == list(
        parse_fault_log(log_bytes([FAULT])).df.columns
    )


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "gpa": st.integers(0, NO_GPA - 1),
                "offset": st.integers(0, 2**40),
                "block": st.integers(0, 1),
                "read_ns": st.integers(1, 2**60),
                "released_ns": st.integers(1, 2**60),
                "pages": st.integers(0, 2**16 - 1),
                "resolver": st.integers(0, len(RESOLVERS) - 1),
                "queue_depth": st.integers(0, 2**32 - 1),
            }
        ),
        max_size=20,
    )
)
def test_every_field_arrives_unchanged(records: list[dict[str, Any]]) -> None:
    df = parse_fault_log(log_bytes(records)).df
    assert df["gpa"].tolist() == [r["gpa"] for r in records]
    assert df["offset"].tolist() == [r["offset"] for r in records]
    assert df["pages"].tolist() == [r["pages"] for r in records]
    assert df["queue_depth"].tolist() == [r["queue_depth"] for r in records]
    assert df["latency_ns"].tolist() == [r["released_ns"] - r["read_ns"] for r in records]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"QSNAPFLT",
        b"x" * 1000,
        log_bytes([FAULT], version=2),
        log_bytes([FAULT], record_size=128),
        log_bytes([FAULT], records=2),
        log_bytes([FAULT], records=2**63),
        log_bytes([FAULT], blocks=2**31),
        log_bytes([FAULT], engine=9),
        log_bytes([FAULT | {"block": 2}]),
        log_bytes([FAULT | {"resolver": len(RESOLVERS)}]),
        log_bytes([FAULT])[:-1],
        log_bytes([FAULT]) + b"\0",
    ],
)
def test_what_is_no_log_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(RunError) as caught:
        parse_fault_log(content)
    assert "\n" not in str(caught.value)


def test_a_missing_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"faults\.bin cannot be read"):
        read_fault_log(tmp_path / "faults.bin")
