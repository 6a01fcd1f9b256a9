"""Storage of a limited rate: a process that writes what it is sent, no faster than that, to the
last byte or with a reason, and that nobody finds afterwards.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from lab.errors import SnapshotError
from lab.snapshot.slowdisk import CATCH_UP_S, piece_bytes
from lab.snapshot.throttle import BUFFER_BYTES, LimitedStorage, limited

MIB = 1 << 20
BOUND_S = 60.0


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    return path


def _send(sender: socket.socket, data: bytes) -> None:
    with sender:
        sender.setblocking(True)
        sender.sendall(data)


async def send(storage: LimitedStorage, data: bytes) -> None:
    """Send it all and close, as QEMU does."""
    await asyncio.to_thread(_send, storage.sender, data)


async def test_the_file_is_what_was_sent_and_no_faster_than_the_rate(image: Path) -> None:
    data = os.urandom(8 * MIB + 12345)
    async with limited(image, 64) as storage:
        started = time.monotonic()
        await send(storage, data)
        sent_s = time.monotonic() - started
        await storage.finish()
        elapsed_s = time.monotonic() - started
    assert image.read_bytes() == data
    assert elapsed_s >= len(data) / (64 * MIB) - CATCH_UP_S
    # The sender waits too, but for what the socket holds and the piece in hand.
    ahead = BUFFER_BYTES + piece_bytes(64 * MIB)
    assert sent_s >= (len(data) - ahead) / (64 * MIB) - CATCH_UP_S


async def test_a_pause_of_the_sender_is_not_caught_up_on(image: Path) -> None:
    async with limited(image, 16) as storage:
        with storage.sender as sender:
            sender.setblocking(True)
            await asyncio.to_thread(sender.sendall, b"1")
            await asyncio.sleep(0.2)
            started = time.monotonic()
            await asyncio.to_thread(sender.sendall, bytes(2 * MIB))
        await storage.finish()
        elapsed_s = time.monotonic() - started
    assert elapsed_s >= 2 / 16 - CATCH_UP_S


async def test_nothing_is_an_empty_file(image: Path) -> None:
    async with limited(image, 1) as storage:
        await send(storage, b"")
        await storage.finish()
        assert await storage.reason() is None
    assert image.stat().st_size == 0


async def test_a_file_that_can_not_be_written_is_told_of_and_the_sender_notices() -> None:
    async with limited(Path("/dev/full"), 1000) as storage:
        with pytest.raises(BrokenPipeError):
            await send(storage, bytes(MIB))
        assert await storage.reason() == "No space left on device"
        with pytest.raises(SnapshotError, match="cannot be written: No space left on device"):
            await storage.finish()


async def test_a_writer_that_was_killed_is_told_of(image: Path) -> None:
    async with limited(image, 1) as storage:
        os.kill(storage.pid, signal.SIGKILL)
        with pytest.raises(SnapshotError, match="ended by SIGKILL"):
            await storage.finish()


async def test_the_process_is_gone_after_the_context_whatever_happened(image: Path) -> None:
    async with limited(image, 1) as storage:
        assert os.getsid(storage.pid) == storage.pid
        pids = [storage.pid]
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def body() -> None:
        async with limited(image, 1) as storage:
            started.set_result(storage.pid)
            await send(storage, bytes(600 * MIB))

    task = asyncio.create_task(body())
    pids.append(await started)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(is_gone(pid) for pid in pids)


OWNER = textwrap.dedent(
    """
    import asyncio, pathlib, sys
    from lab.snapshot.throttle import limited
    async def main():
        async with limited(pathlib.Path(sys.argv[1]), 1) as storage:
            print(storage.pid, flush=True)
            await asyncio.sleep(600)
    asyncio.run(main())
    """
)


def test_the_process_is_gone_after_the_interpreter_was_killed(image: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(image)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert not is_gone(pid)
        owner.kill()
    end = time.monotonic() + BOUND_S
    while not is_gone(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.01)


@pytest.mark.parametrize("mib_per_s", [1, 10, 100, 1000, 1 << 20])
def test_a_piece_is_short_in_time_and_neither_tiny_nor_huge(mib_per_s: int) -> None:
    size = piece_bytes(mib_per_s * MIB)
    assert 4096 <= size <= 256 << 10
    assert size / (mib_per_s * MIB) <= 0.004
