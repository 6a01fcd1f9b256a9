"""A QEMU that somebody else started is found, described, and left as it was."""

import asyncio
import os
import re
import socket
from pathlib import Path

import pytest

from lab.errors import HostError, SnapshotError
from lab.qemu.build import find_qemu
from lab.vm import peer as peer_module
from lab.vm.argv import device_ids, read_command_line
from lab.vm.argv.options import WITH_VALUE, WITHOUT_VALUE
from lab.vm.peer import describe, find_process, put_back
from tests.support import foreign
from tests.support.foreign import Foreign, started

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg")]

SMALL = ("-accel", "tcg", "-m", "48", "-display", "none", "-smp", "2", "-nodefaults")
MONITOR = ("-qmp", "unix:qmp,server=on,wait=off")
VALUE_COLUMN = 16
"""Where `-help` begins to say what an option is for."""


def told(line: str) -> tuple[list[str], bool]:
    """The options of a line of `-help`, and whether they take a value."""
    match = re.match(r"--?([\w-]+)((?:(?:/| or )-[\w-]+)*)", line)
    assert match is not None, line
    end = match.end()
    if end < VALUE_COLUMN:
        takes = bool(line[end:VALUE_COLUMN].strip())
    else:
        takes = re.match(r" \S", line[end:]) is not None
    return [match[1], *re.findall(r"-([\w-]+)", match[2])], takes


def test_the_options_are_those_that_qemu_says_it_has(qemu: Path) -> None:
    process = os.popen(f"{qemu} -help")
    lines = [line for line in process.read().splitlines() if line.startswith("-")]
    process.close()
    assert len(lines) > 100
    for line in lines:
        names, takes = told(line)
        assert set(names) <= (WITH_VALUE if takes else WITHOUT_VALUE), line


async def test_what_it_is(qemu: Path, folder: Path) -> None:
    patched = qemu == find_qemu("patched").path
    devices = ("-device", "virtio-rng-pci,id=rng", "-object", "iothread,id=i")
    command: list[str | Path] = [
        qemu,
        "-M",
        "pc,usb=off",
        *SMALL,
        "-name",
        "mine",
        *devices,
        *MONITOR,
    ]
    async with started(command, folder / "qmp") as first:
        assert await find_process(first.qmp) == first.pid
        found = await describe(first.qmp, first.pid)
        assert found.patched == patched
        assert (found.vcpus, found.ram_mib, found.accel) == (2, 48, "tcg")
        assert re.fullmatch(r"pc-i440fx-\d+\.\d+", found.machine_type)
        assert found.machine_type.removeprefix("pc-i440fx-") in found.version
        assert found.run_state == "running"
        assert "background-snapshot" in found.saved.capabilities
        is_new = int(found.version.partition(".")[0]) >= 9
        assert ("mapped-ram" in found.saved.capabilities) == is_new
        assert found.devices == {"rng"} == device_ids(read_command_line(first.pid))
        await first.qmp.execute("device_add", {"driver": "virtio-rng-pci", "id": "later"})
        assert (await describe(first.qmp, first.pid)).devices == {"rng", "later"}


async def test_a_socket_that_another_process_made_leads_to_qemu(qemu: Path, folder: Path) -> None:
    """As with libvirt, which listens and hands the socket over."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "qmp"))
        listener.listen()
        os.set_inheritable(listener.fileno(), True)
        fd = listener.fileno()
        monitor = (
            *("-chardev", f"socket,id=charmonitor,fd={fd},server=on,wait=off"),
            *("-mon", "chardev=charmonitor,id=monitor,mode=control"),
        )
        async with started([qemu, *SMALL, *monitor], folder / "qmp", pass_fds=[fd]) as first:
            assert await find_process(first.qmp) == first.pid


async def test_a_qemu_that_cannot_be_seen_is_refused(
    qemu: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in another container: no process here has its threads, or one that is not it."""
    async with started([qemu, *SMALL, "-name", "mine", *MONITOR], folder / "qmp") as first:
        monkeypatch.setattr(peer_module, "PROC", folder)
        with pytest.raises(HostError, match="no process that can be seen here"):
            await find_process(first.qmp)
        for thread in await first.qmp.execute("query-cpus-fast"):
            status = folder / str(thread["thread-id"]) / "status"
            status.parent.mkdir(exist_ok=True)
            status.write_text(f"Name:\tx\nTgid:\t{os.getpid()}\nVmSize:\t1 kB\n")
        (folder / str(os.getpid())).mkdir()
        (folder / str(os.getpid()) / "maps").write_bytes(Path("/proc/self/maps").read_bytes())
        with pytest.raises(HostError, match="no process that can be seen here"):
            await find_process(first.qmp)


async def test_a_migration_that_runs_is_not_disturbed(qemu: Path, folder: Path) -> None:
    async with started([qemu, *SMALL, *MONITOR], folder / "qmp") as first:
        # So slow that it runs for the whole test.
        await first.qmp.execute("migrate-set-parameters", {"max-bandwidth": 4096})
        with (folder / "image").open("wb") as file:
            await first.qmp.send_descriptor("image", file.fileno())
            await first.qmp.execute("migrate", {"uri": "fd:image"})
            with pytest.raises(SnapshotError, match="a migration runs in this QEMU already"):
                await describe(first.qmp, first.pid)
            await first.qmp.execute("migrate_cancel")
            await ended(first)
        assert (await describe(first.qmp, first.pid)).run_state == "running"


async def ended(first: Foreign) -> None:
    async with asyncio.timeout(foreign.BOUND_S):
        while (await first.qmp.execute("query-migrate")).get("status") != "cancelled":
            await asyncio.sleep(0.02)


async def test_one_that_waits_for_a_snapshot_itself_is_refused(qemu: Path, folder: Path) -> None:
    command: list[str | Path] = [qemu, *SMALL, *MONITOR, "-incoming", "defer"]
    async with started(command, folder / "qmp") as first:
        with pytest.raises(SnapshotError, match="inmigrate"):
            await describe(first.qmp, first.pid)


async def test_its_settings_are_put_back(qemu: Path, folder: Path) -> None:
    async with started([qemu, *SMALL, *MONITOR], folder / "qmp") as first:
        await first.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
        before = (await describe(first.qmp, first.pid)).saved
        on = [{"capability": name, "state": True} for name in ("events", "xbzrle")]
        await first.qmp.execute("migrate-set-capabilities", {"capabilities": on})
        await first.qmp.execute(
            "migrate-set-parameters",
            {"max-bandwidth": 0, "tls-creds": "none", "multifd-channels": 3},
        )
        assert (await describe(first.qmp, first.pid)).saved != before
        await put_back(first.qmp, before)
        assert (await describe(first.qmp, first.pid)).saved == before
