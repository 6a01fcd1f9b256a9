"""A file system that a test has frozen is thawed whatever ends the test."""

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.failing_disk import MOUNT, stalling
from tests.support.paths import ROOT

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg")]

BOUND_S = 60.0
FITHAW = 0xC0045878

# A test as it is when it is ended: it has frozen a disk, and a process of its own waits for that.
STALLED = """
import asyncio, os, subprocess, sys
from pathlib import Path
from tests.support.failing_disk import MOUNT, stalling

async def main():
    async with stalling(Path(sys.argv[1]), 16) as disk:
        await disk.freeze()
        writer = subprocess.Popen(["dd", "if=/dev/zero", f"of={disk.folder}/file", "count=1"],
                                  stderr=subprocess.DEVNULL)
        print(disk.holder, writer.pid, flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(*pids: int) -> None:
    end = time.monotonic() + BOUND_S
    while not all(is_gone(pid) for pid in pids):
        assert time.monotonic() < end, f"of {pids} somebody is still there"
        time.sleep(0.01)


def waits_in_the_kernel(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_DISK_SLEEP


@contextlib.contextmanager
def thawed_after_all(folder: Path) -> Iterator[None]:
    """Leave nothing frozen on this host, whatever is found."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it was thawed
            fcntl.ioctl(descriptor, FITHAW, 0)
        os.close(descriptor)


def mounted_from(image: Path) -> list[str]:
    """The loop devices that stand on a file, which has no name any more."""
    devices = []
    for device in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if str(image) in device.read_text():
                devices.append(device.parts[3])
    return devices


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("whom", ["the test", "all of its group"])
def test_what_is_frozen_is_thawed_whatever_ends_the_test(
    whom: str, number: signal.Signals, tmp_path: Path
) -> None:
    """Field report F20."""
    asyncio.run(skip_where_nothing_stalls(tmp_path / "try"))
    image = tmp_path / "disk"
    test = subprocess.Popen(
        [sys.executable, "-c", STALLED, image],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    with test:
        assert test.stdout is not None
        holder, writer = (int(word) for word in test.stdout.readline().split())
        end = time.monotonic() + BOUND_S
        while not waits_in_the_kernel(writer):
            assert time.monotonic() < end, "nobody waits for the disk"
            time.sleep(0.01)
        assert mounted_from(image)
        with thawed_after_all(Path(f"/proc/{holder}/root{MOUNT}")):
            if whom == "the test":
                test.send_signal(number)
            else:
                os.killpg(test.pid, number)
            try:
                wait_until_gone(holder, writer)
            finally:
                test.kill()
    end = time.monotonic() + BOUND_S
    while mounted_from(image):
        assert time.monotonic() < end, "its file system is still there"
        time.sleep(0.01)


async def skip_where_nothing_stalls(image: Path) -> None:
    async with stalling(image, 16):
        pass
