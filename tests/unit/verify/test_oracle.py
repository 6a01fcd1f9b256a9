"""The parts of the oracle that need no guest, against known answers."""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import QmpError
from lab.guests.protocol import PAGE_BYTES
from lab.verify.oracle import CHUNK_BYTES, _compare, _data, _Dump, _runs, _write_dump
from lab.vm.memory import RamBlock, parse_ram_blocks
from lab.vm.vm import vcpu_places


@given(st.lists(st.booleans(), max_size=40))
def test_runs_cover_what_is_true_and_nothing_else(flags: list[bool]) -> None:
    covered = [False] * len(flags)
    last_end = -1
    for first, end in _runs(np.array(flags, dtype=np.bool_)):
        assert last_end < first < end
        last_end = end
        covered[first:end] = [True] * (end - first)
    assert covered == flags


class Memory:
    """Memory of this process in the place of a guest's."""

    def __init__(self, length: int) -> None:
        self.buffer = (ctypes.c_uint8 * length)()
        self.block = RamBlock(
            name="pc.ram",
            host_address=ctypes.addressof(self.buffer),
            used_bytes=length,
            total_bytes=length,
            page_bytes=PAGE_BYTES,
            read_only=False,
        )


def test_a_dump_is_sparse_and_every_differing_page_is_found(tmp_path: Path) -> None:
    # 23 pages and a bit, of which a few hold something.
    memory = Memory(23 * PAGE_BYTES + 100)
    for page in (0, 5, 6, 22):
        memory.buffer[page * PAGE_BYTES + 17] = page + 1
    memory.buffer[23 * PAGE_BYTES + 99] = 9
    dump = _Dump(tmp_path / "ram", [memory.block], nonce=None)
    _write_dump(os.getpid(), dump)
    assert dump.path.stat().st_size == 24 * PAGE_BYTES
    assert dump.path.stat().st_blocks * 512 < 24 * PAGE_BYTES
    joined = b"".join(chunk.tobytes() for chunk in _data(dump.path))
    assert joined.rstrip(b"\0").endswith(b"\x09")
    with dump.path.open("rb") as file:
        same = _compare(file.fileno(), 0, memory.block, os.getpid(), memory.block)
        assert (same.pages, same.pages_differing) == (24, 0)
        memory.buffer[5 * PAGE_BYTES + 4095] = 1
        memory.buffer[12 * PAGE_BYTES] = 1
        memory.buffer[23 * PAGE_BYTES + 99] = 0
        other = _compare(file.fileno(), 0, memory.block, os.getpid(), memory.block)
    assert other.pages_differing == 3
    assert other.first_differing == (5 * PAGE_BYTES, 12 * PAGE_BYTES, 23 * PAGE_BYTES)


def test_a_page_that_differs_is_found_where_the_dump_has_nothing_but_a_hole(
    tmp_path: Path,
) -> None:
    memory = Memory(4 * CHUNK_BYTES)
    memory.buffer[2 * CHUNK_BYTES] = 1
    dump = _Dump(tmp_path / "ram", [memory.block], nonce=None)
    _write_dump(os.getpid(), dump)
    changed = [CHUNK_BYTES + PAGE_BYTES, 3 * CHUNK_BYTES]
    with dump.path.open("rb") as file:
        for address in changed:
            memory.buffer[address + 5] = 1
        found = _compare(file.fileno(), 0, memory.block, os.getpid(), memory.block)
    assert found.pages_differing == 2
    assert found.first_differing == tuple(changed)


def test_the_table_of_ram_blocks_is_read_with_names_that_hold_anything() -> None:
    text = (
        "              Block Name    PSize              Offset               Used"
        "              Total                HVA  RO\r\n"
        "                  pc.ram    4 KiB  0x0000000000000000 0x0000000020000000"
        " 0x0000000020000000 0x00007fdf00000000  rw\r\n"
        "    /rom@etc/acpi/tables    4 KiB  0x0000000020080000 0x0000000000020000"
        " 0x0000000000200000 0x00007fdf9ea00000  ro\r\n"
        "  0000:00:02.0/a b.rom    2 MiB  0x0000000020040000 0x0000000000040000"
        " 0x0000000000040000 0x00007fdf9ec00000  ro\r\n"
    )
    ram, tables, odd = parse_ram_blocks(text)
    assert (ram.name, ram.used_bytes, ram.read_only) == ("pc.ram", 512 << 20, False)
    assert ram.host_address == 0x7FDF00000000
    assert (tables.used_bytes, tables.total_bytes) == (0x20000, 0x200000)
    assert (odd.name, odd.page_bytes) == ("0000:00:02.0/a b.rom", 2 << 20)


def test_a_line_that_is_no_ram_block_is_an_error() -> None:
    with pytest.raises(QmpError, match="not a RAM block"):
        parse_ram_blocks("heading\nunknown command: 'info ramblock'\n")


def test_a_ram_block_that_belongs_to_no_device_yet_is_left_out() -> None:
    row = "4 KiB 0x000000000c300000 0x0000000001000000 0x0000000001000000 0x00007f07b8c00000 rw"
    assert parse_ram_blocks(f"heading\n              {row}\n") == []


def test_the_monitors_registers_are_condensed_to_where_each_vcpu_is() -> None:
    text = (
        "\r\nCPU#0\r\nRAX=0 RBX=1\r\nRIP=ffffffff81a3c0de RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1"
        " SMM=0 HLT=1\r\nES =0000\r\n\r\nCPU#1\r\nRIP=0000000000401000 RFL=00000202 HLT=0\r\n"
    )
    assert vcpu_places(text) == "vCPU 0 halted at ffffffff81a3c0de, vCPU 1 runs at 0000000000401000"
    assert "does not say" in vcpu_places("unknown command: 'info registers'")
