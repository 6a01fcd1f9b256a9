"""Memory of another process is read as it is, or an error says why not."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from lab.hostmem import RemoteWindow, read_process

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


class Holder:
    def __init__(self, process: "subprocess.Popen[str]", address: int) -> None:
        self.process = process
        self.address = address

    def set_first_byte(self, value: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{value}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def holder() -> Iterator[Holder]:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield Holder(process, int(process.stdout.readline()))
        process.kill()


def test_a_read_returns_what_the_process_holds(holder: Holder) -> None:
    assert read_process(holder.process.pid, holder.address, 4096) == PATTERN
    assert read_process(holder.process.pid, holder.address + 7, 23) == PATTERN[7:30]


def test_a_window_shows_what_changed_since(holder: Holder) -> None:
    window = RemoteWindow(holder.process.pid, holder.address, 8)
    window.read()
    assert bytes(window.buffer) == PATTERN[:8]
    holder.set_first_byte(200)
    window.read()
    assert bytes(window.buffer) == b"\xc8" + PATTERN[1:8]


def test_a_range_that_is_not_mapped_is_an_error(holder: Holder) -> None:
    with pytest.raises(OSError, match="process_vm_readv"):
        read_process(holder.process.pid, 4096, 8)


def test_a_process_that_is_gone_is_an_error(holder: Holder) -> None:
    holder.process.kill()
    holder.process.wait()
    with pytest.raises(OSError, match="process_vm_readv"):
        read_process(holder.process.pid, holder.address, 8)


@pytest.mark.parametrize("length", [0, -1, (1 << 30) + 1])
def test_a_window_of_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="length"):
        RemoteWindow(1, 0, length)
