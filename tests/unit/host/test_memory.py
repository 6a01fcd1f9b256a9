"""Memory of another process is read as it is, or an error says why not."""

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from lab.host.memory import (
    RemoteWindow,
    Residency,
    parse_residency,
    read_process,
    residency,
    write_process,
)
from tests.support.told import Told, told

# Holds a page of known content at a known address until its stdin is closed.
_HOLDER = """
import ctypes, sys
page = ctypes.create_string_buffer(bytes(range(256)) * 16, 4096)
print(ctypes.addressof(page), flush=True)
for line in sys.stdin:
    page[0] = int(line)
    print("done", flush=True)
"""

PATTERN = bytes(range(256)) * 16


@pytest.fixture
def holder() -> Iterator[Told]:
    with told(_HOLDER) as process:
        yield process


def test_a_read_returns_what_the_process_holds(holder: Told) -> None:
    assert read_process(holder.process.pid, holder.address, 4096) == PATTERN
    assert read_process(holder.process.pid, holder.address + 7, 23) == PATTERN[7:30]


def test_a_window_shows_what_changed_since(holder: Told) -> None:
    window = RemoteWindow(holder.process.pid, holder.address, 8)
    window.read()
    assert bytes(window.buffer) == PATTERN[:8]
    holder.tell(200)
    window.read()
    assert bytes(window.buffer) == b"\xc8" + PATTERN[1:8]


def test_a_range_that_is_not_mapped_is_an_error(holder: Told) -> None:
    with pytest.raises(OSError, match="process_vm_readv"):
        read_process(holder.process.pid, 4096, 8)


def test_a_process_that_is_gone_is_an_error(holder: Told) -> None:
    holder.process.kill()
    holder.process.wait()
    with pytest.raises(OSError, match="process_vm_readv"):
        read_process(holder.process.pid, holder.address, 8)


def test_what_is_mapped_is_counted_for_the_mappings_that_begin_in_the_range() -> None:
    def mapping(start: int, **fields: int) -> list[str]:
        lines = [f"{name}: {kib:10} kB\n" for name, kib in fields.items()]
        return [f"{start:x}-{start + 4096:x} rw-p 00000000 00:00 0    [a]\n", *lines]

    smaps = [
        *mapping(0x1000, Rss=1, AnonHugePages=1),
        *mapping(0x2000, Size=99, Rss=8, AnonHugePages=4, ShmemPmdMapped=2, Swap=77),
        *mapping(0x3000, Rss=0, Shared_Hugetlb=16, Private_Hugetlb=32),
        "VmFlags: rd wr mr mw me ac sd\n",
        *mapping(0x4000, Rss=1),
    ]
    assert parse_residency(smaps, 0x2000, 0x2000) == Residency(
        resident=56 << 10, anon_huge=4 << 10, shmem_huge=2 << 10, hugetlb=48 << 10
    )


def test_memory_that_is_written_becomes_resident() -> None:
    memory = mmap.mmap(-1, 16 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert residency(os.getpid(), address, 16 << 20).resident == 0
    memory[: 1 << 20] = bytes(1 << 20)
    assert residency(os.getpid(), address, 16 << 20).resident >= 1 << 20


def test_what_is_written_is_there_and_nothing_beside_it(holder: Told) -> None:
    write_process(holder.process.pid, holder.address + 7, b"\0hello\0")
    content = read_process(holder.process.pid, holder.address, len(PATTERN))
    assert content == PATTERN[:7] + b"\0hello\0" + PATTERN[14:]


def test_what_is_not_mapped_can_not_be_written(holder: Told) -> None:
    with pytest.raises(OSError, match=r"process_vm_writev|mapped"):
        write_process(holder.process.pid, 4096, b"x")


@pytest.mark.parametrize("length", [0, -1, (1 << 30) + 1])
def test_a_window_of_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="length"):
        RemoteWindow(1, 0, length)
