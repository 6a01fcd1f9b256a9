"""The session that the RFC of 2016 shows, typed into the monitor on stdio.

The command line is the RFC's own, with four changes: an empty disk image of the test's, user
networking (a tap needs more than a test should ask for), a VNC display on a UNIX socket, and the
lab's kernel and initramfs, whose progress page shows that the guest goes on.
"""

import asyncio
import re
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lab.guests.linux.guest import LinuxGuest
from lab.guests.protocol import PROGRESS_OPS, ReadyRecord, kernel_command_line, parse_record
from lab.host.process import wrapped
from lab.qemu.build import find_qemu

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600), pytest.mark.platforms("tcg")]

PROMPT = b"(qemu) "
NONCE_WORD = 2
ERRORS_WORD = 8
#: Terminal control sequences of the monitor's line editor.
CONTROL = re.compile(rb"\x1b\[[0-9;]*[A-Za-z]")


class Monitor:
    """A QEMU whose monitor is on its standard input and output, as the RFC's."""

    def __init__(self, process: asyncio.subprocess.Process, serial: Path) -> None:
        self.process = process
        self.serial = serial

    async def _until_prompt(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            return CONTROL.sub(b"", await self.process.stdout.readuntil(PROMPT)).decode()

    async def greet(self) -> None:
        """Read the banner."""
        await self._until_prompt()

    async def type(self, command: str) -> str:
        """Type a command and return what the monitor says, without the echo."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        await self.process.stdin.drain()
        said = await self._until_prompt()
        _, _, reply = said.partition("\n")
        return reply.removesuffix(PROMPT.decode()).replace("\r", "")

    async def word(self, ready: ReadyRecord, index: int) -> int:
        """Read a word of the guest's progress page."""
        said = await self.type(f"xp /1gx {ready.progress_gpa + 8 * index:#x}")
        return int(said.split(":")[1], 16)

    async def until_done(self, ready: ReadyRecord, operations: int) -> None:
        """Wait until the guest has done so many operations."""
        async with asyncio.timeout(60):
            while True:
                if await self.word(ready, PROGRESS_OPS) >= operations:
                    return
                await asyncio.sleep(0.05)

    async def ready(self) -> ReadyRecord:
        """Wait until the workload runs."""
        async with asyncio.timeout(120):
            while True:
                *lines, _incomplete = self.serial.read_text(errors="replace").split("\n")
                for line in lines:
                    record = parse_record(line.rstrip("\r"))
                    if record is not None and record.kind == "ready":
                        return ReadyRecord.from_record(record)
                await asyncio.sleep(0.1)

    async def status(self, command: str, *wanted: str) -> str:
        """Repeat a command until what it says has one of the wanted phrases."""
        async with asyncio.timeout(300):
            while True:
                said = await self.type(command)
                if any(phrase in said for phrase in wanted):
                    return said
                await asyncio.sleep(0.05)


def command_line(folder: Path, ram_mib: int, serial: Path) -> list[str]:
    guest = LinuxGuest().find()
    return [
        str(find_qemu("patched").path),
        *("-machine", "pc-i440fx-2.5,accel=tcg,usb=off"),
        "-drive",
        f"file={folder}/disk.qcow2,if=none,id=drive-ide0-0-1,format=qcow2,cache=none",
        *("-device", "ide-hd,bus=ide.0,unit=1,drive=drive-ide0-0-1,id=ide0-0-1"),
        *("-vnc", f"unix:{folder}/vnc-{serial.stem}"),
        *("-m", str(ram_mib)),
        *("-smp", "1"),
        *("-netdev", "user,id=bn0"),
        *("-device", "virtio-net-pci,id=net-pci0,netdev=bn0"),
        *("--monitor", "stdio"),
        *("-serial", f"file:{serial}"),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initramfs)),
        *("-append", kernel_command_line(kind="random", wss_mib=64, threads=1, seed=7)),
    ]


@asynccontextmanager
async def started(command: Sequence[str], serial: Path) -> AsyncIterator[Monitor]:
    # Like every guest of the lab it ends with whoever started it, also with a test that is killed.
    process = await asyncio.create_subprocess_exec(
        *wrapped(command, thp=None),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        monitor = Monitor(process, serial)
        await monitor.greet()
        yield monitor
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def make_disk(folder: Path) -> None:
    image_tool = find_qemu("patched").path.with_name("qemu-img")
    process = await asyncio.create_subprocess_exec(
        str(image_tool), "create", "-q", "-f", "qcow2", f"{folder}/disk.qcow2", "64M"
    )
    assert await process.wait() == 0


@pytest.mark.parametrize("ram_mib", [512, pytest.param(8192, marks=pytest.mark.slow)])
async def test_the_guest_runs_on_and_its_image_continues_from_the_command(
    tmp_path: Path, ram_mib: int
) -> None:
    await make_disk(tmp_path)
    image = tmp_path / "snapshot"
    serial = tmp_path / "first.log"

    async with started(command_line(tmp_path, ram_mib, serial), serial) as vm:
        ready = await vm.ready()
        await vm.type("migrate_set_capability background-snapshot on")
        await vm.type("migrate_set_parameter x-snapshot-engine rfc")
        before = await vm.word(ready, PROGRESS_OPS)
        assert await vm.type(f"migrate -d file:{image}") == ""
        ends = [f"Migration status: {end}" for end in ("completed", "failed", "cancelled")]
        said = await vm.status("info migrate", *ends)
        assert "Migration status: completed" in said
        assert "snapshot engine: rfc" in said
        after = await vm.word(ready, PROGRESS_OPS)
        assert before < after
        assert "running" in await vm.type("info status")
        await vm.until_done(ready, after + 1_000_000)

    assert stat.S_IMODE(image.stat().st_mode) == 0o600

    again = tmp_path / "second.log"
    restore = [*command_line(tmp_path, ram_mib, again), "-incoming", f"file:{image}", "-S"]
    async with started(restore, again) as vm:
        await vm.status("info status", "paused (prelaunch)", "VM status: paused\n")
        instant = await vm.word(ready, PROGRESS_OPS)
        assert before <= instant < after
        assert await vm.word(ready, NONCE_WORD) == ready.nonce
        await vm.type("cont")
        assert "running" in await vm.type("info status")
        await vm.until_done(ready, instant + 1_000_000)
        assert await vm.word(ready, ERRORS_WORD) == 0
