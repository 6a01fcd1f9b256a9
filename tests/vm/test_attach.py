"""A VM that somebody else started: it is snapshotted, runs on, and comes back with its disk."""

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import lab
from lab.errors import HostError, LabError, SnapshotError, UsageError
from lab.guests.image.guest import uefi_code
from lab.qemu.build import find_qemu
from lab.scenario.methods import Variant
from lab.session import VM
from lab.snapshot.image import read_sidecar
from lab.vm.qmp import connected

pytestmark = pytest.mark.platforms("micro-tcg")

BLOCK = 4096


@pytest.fixture(autouse=True)
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Layers of this test's own."""
    folder = tmp_path / "layers"
    monkeypatch.setenv("LAB_LAYERS_DIR", str(folder))
    return folder


def program(variant: str) -> Path:
    if variant == "system":
        found = shutil.which("qemu-system-x86_64")
        if found is None:
            pytest.skip("no QEMU of the distribution's is installed")
        return Path(found)
    return find_qemu("patched" if variant == "patched" else "unpatched").path


@contextlib.asynccontextmanager
async def started(
    variant: str, folder: Path, *arguments: str | Path, pass_fds: Sequence[int] = ()
) -> AsyncIterator[tuple[Path, Process]]:
    """A QEMU as somebody starts it in a terminal; yields its monitor's socket."""
    monitor = folder / "monitor"
    command: list[str | Path] = [program(variant), "-nodefaults", "-display", "none", "-m", "32"]
    command += ["-accel", "tcg", "-qmp", f"unix:{monitor},server=on,wait=off", *arguments]
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *map(str, command), cwd=folder, stdout=log, stderr=log, pass_fds=pass_fds
        )
    try:
        while not _listens(monitor):
            assert process.returncode is None, (folder / "log").read_text()
            await asyncio.sleep(0.02)
        yield monitor, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _listens(monitor: Path) -> bool:
    # Looked up, as the one connection that it takes is not to be used up.
    listening = [
        line.split()[7]
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]
        if line.split()[3] == "00010000" and len(line.split()) > 7
    ]
    return str(monitor) in listening


async def made(path: Path, form: str) -> Path:
    tool = find_qemu("patched").qemu_img
    process = await asyncio.create_subprocess_exec(
        tool, "create", "-q", "-f", form, path, "8M", stdout=subprocess.DEVNULL
    )
    assert await process.wait() == 0
    return path


async def do_io(vm: VM, what: str, log: Path) -> str:
    block = next(b for b in await vm.execute("query-block") if b.get("inserted"))
    before = len(log.read_text())
    said = await vm.hmp(f'qemu-io -d {block["qdev"]} "{what}"')
    return said + log.read_text()[before:]


async def write(vm: VM, value: int, log: Path) -> None:
    assert "wrote" in await do_io(vm, f"write -P {value:#x} 0 {BLOCK}", log)


async def holds(vm: VM, value: int, log: Path) -> bool:
    said = await do_io(vm, f"read -P {value:#x} 0 {BLOCK}", log)
    assert "read" in said, said
    return "verification failed" not in said


LINES = {
    "drive": ("raw", "-drive file={disk},format=raw,if=virtio"),
    "drive-relative-qcow2": ("qcow2", "-drive file=disk.qcow2,if=ide,cache=none"),
    "hda": ("qcow2", "-hda {disk}"),
    "blockdev": (
        "qcow2",
        "-blockdev driver=file,filename={disk},node-name=below"
        " -blockdev driver=qcow2,file=below,node-name=above"
        " -device virtio-blk-pci,drive=above",
    ),
    "scsi-thread": (
        "raw",
        "-object iothread,id=t -device virtio-scsi-pci,iothread=t"
        " -drive file={disk},format=raw,if=none,id=d -device scsi-hd,drive=d",
    ),
}


def arguments(name: str, disk: Path) -> Sequence[str]:
    return LINES[name][1].format(disk=disk).split()


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize(
    ("variant", "method"),
    [
        ("patched", "live"),
        ("unpatched", "background"),
        ("unpatched", "migrate-to-file"),
        ("system", "migrate-to-file"),
    ],
)
async def test_a_vm_started_by_hand_runs_on_and_comes_back_with_its_disk(
    tmp_path: Path, variant: str, method: str, name: str
) -> None:
    form = LINES[name][0]
    disk = await made(tmp_path / f"disk.{form}", form)
    log = tmp_path / "log"
    async with started(variant, tmp_path, *arguments(name, disk)) as (monitor, process):
        async with lab.attach(monitor) as vm:
            assert vm.pid == process.pid
            before = await settings(vm)
            await write(vm, 0x11, log)
            await vm.snapshot(tmp_path / "a.snap", method)
            await write(vm, 0x22, log)
        # Another session goes on from the layer that this one has left.
        async with lab.attach(monitor) as vm:
            assert await settings(vm) == before
            assert await holds(vm, 0x22, log)
            await vm.snapshot(tmp_path / "b.snap", method)
            await write(vm, 0x33, log)
            assert await vm.is_running()
        assert process.returncode is None
        for snap, value in (("a.snap", 0x11), ("b.snap", 0x22)):
            async with lab.restore(tmp_path / snap) as one, lab.restore(tmp_path / snap) as two:
                assert await holds(one, value, one.process.log_path)
                await write(one, 0x44, one.process.log_path)
                assert await holds(two, value, two.process.log_path)
                assert await two.is_running()
    frozen = read_sidecar(tmp_path / "b.snap").disks[0]
    assert Path(frozen.named) == disk
    assert Path(frozen.layer) == tmp_path / "disk.a.qcow2"
    assert (tmp_path / "disk.b.qcow2").exists()


@pytest.mark.parametrize(("variant", "method"), [("patched", "live"), ("unpatched", "background")])
async def test_a_vm_with_uefi_comes_back_with_the_variables_of_the_instant(
    tmp_path: Path, variant: str, method: str
) -> None:
    try:
        code = uefi_code()
    except HostError as error:
        pytest.skip(str(error))
    variables = tmp_path / "variables.raw"
    shutil.copy(code.with_name(code.name.replace("CODE", "VARS")), variables)
    flash = [
        *("-machine", "q35", "-m", "128"),
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"),
        *("-drive", f"if=pflash,unit=1,format=raw,file={variables}"),
        *("-serial", f"file:{tmp_path / 'serial'}"),
    ]
    untouched = variables.read_bytes()
    async with started(variant, tmp_path, *flash) as (monitor, process):
        # It has written its variables when its shell asks.  Reading the flash before says how far
        # a write is, and not what is in it.
        while b"Shell>" not in (tmp_path / "serial").read_bytes():
            assert process.returncode is None
            await asyncio.sleep(0.1)
        assert variables.read_bytes() != untouched
        async with lab.attach(monitor) as vm:
            await vm.snapshot(tmp_path / "a.snap", method)
            frozen = variables.read_bytes()
            assert await vm.is_running()
    (disk,) = read_sidecar(tmp_path / "a.snap").disks
    assert Path(disk.layer) == Path(disk.named) == variables
    async with lab.restore(tmp_path / "a.snap") as one:
        assert await one.is_running()
        tops = [b["inserted"] for b in await one.execute("query-block") if b.get("inserted")]
        (top,) = [inserted for inserted in tops if not inserted["ro"]]
        assert top["image"]["backing-image"]["filename"] == str(variables)
        size = len(frozen)
        # Below 4 GiB the flash ends with the code, and has the variables in front of it.
        address = (1 << 32) - code.stat().st_size - size
        seen = tmp_path / "seen"
        await one.execute("pmemsave", {"val": address, "size": size, "filename": str(seen)})
        assert seen.read_bytes() == frozen
    assert variables.read_bytes() == frozen


async def settings(vm: VM) -> tuple[Any, Any]:
    capabilities = await vm.execute("query-migrate-capabilities")
    parameters = await vm.execute("query-migrate-parameters")
    return (
        {one["capability"]: one["state"] for one in capabilities},
        # What was never set is not there, and once it was set it is empty.
        {name: value for name, value in parameters.items() if value != ""},
    )


@pytest.mark.parametrize("variant", ["patched", "unpatched"])
async def test_a_disk_stays_opened_as_its_user_has_chosen(tmp_path: Path, variant: str) -> None:
    disk = await made(tmp_path / "disk.raw", "raw")
    chosen = "cache.direct=on,cache.no-flush=on,aio=native,detect-zeroes=unmap,discard=unmap"
    drive = ("-drive", f"file={disk},format=raw,if=virtio,{chosen}")
    method = "live" if variant == "patched" else "background"
    async with (
        started(variant, tmp_path, *drive) as (monitor, _),
        lab.attach(monitor) as vm,
    ):
        (before,) = await opened(vm)
        await vm.snapshot(tmp_path / "a.snap", method)
        (after,) = await opened(vm)
        assert after == before == ({"direct": True, "no-flush": True}, "unmap")
        assert [one.aio for one in vm.files.disks] == ["native"]
        async with lab.restore(tmp_path / "a.snap") as again:
            assert await opened(again) == [before]
            assert [one.aio for one in again.files.disks] == ["native"]
            await again.snapshot(tmp_path / "b.snap", method)
            assert await opened(again) == [before]


async def opened(vm: VM) -> list[tuple[dict[str, bool], str]]:
    inserted = [b["inserted"] for b in await vm.execute("query-block") if b.get("inserted")]
    return [
        (
            {name: one["cache"][name] for name in ("direct", "no-flush")},
            one["detect_zeroes"],
        )
        for one in inserted
    ]


async def test_memory_alone_leaves_the_disk_alone(tmp_path: Path) -> None:
    disk = await made(tmp_path / "disk.raw", "raw")
    async with (
        started("patched", tmp_path, *arguments("drive", disk)) as (monitor, _),
        lab.attach(monitor) as vm,
    ):
        await vm.snapshot(tmp_path / "a.snap", disks=False)
        node = next(b for b in await vm.execute("query-block") if b.get("inserted"))
        assert node["inserted"]["image"]["filename"] == str(disk)
    assert not list(tmp_path.glob("disk.*.qcow2"))


async def test_a_disk_that_cannot_be_frozen_is_told_when_it_is_to_be(tmp_path: Path) -> None:
    null = ("-drive", "driver=null-co,if=virtio,size=1M,read-zeroes=on")
    async with started("patched", tmp_path, *null) as (monitor, _), lab.attach(monitor) as vm:
        with pytest.raises(SnapshotError, match="is no file, so no overlay has a place") as caught:
            await vm.snapshot(tmp_path / "a.snap")
        assert "\n" not in str(caught.value)
        await vm.snapshot(tmp_path / "a.snap", disks=False)
        assert await vm.is_running()


async def test_a_snapshot_that_fails_leaves_the_vm_and_its_disk_as_they_were(
    tmp_path: Path,
) -> None:
    disk = await made(tmp_path / "disk.raw", "raw")
    async with started("patched", tmp_path, *arguments("drive", disk)) as (monitor, process):
        async with lab.attach(monitor) as vm:
            task = asyncio.create_task(vm.snapshot(tmp_path / "a.snap"))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await vm.is_running()
            await vm.snapshot(tmp_path / "b.snap")
        assert process.returncode is None
    assert not list(tmp_path.glob("disk.a*"))


async def test_what_is_no_qemu_is_refused_in_one_line(tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(silent))
        for path in (tmp_path / "none", tmp_path, silent):
            with pytest.raises(UsageError, match="cannot be connected to") as caught:
                async with lab.attach(path):
                    pass
            assert "\n" not in str(caught.value)

        async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 smtp\r\n")
            await writer.drain()
            writer.close()

    server = await asyncio.start_unix_server(other, tmp_path / "smtp")
    async with server:
        with pytest.raises(LabError, match="did not greet"):
            async with lab.attach(tmp_path / "smtp"):
                pass


@pytest.mark.parametrize("variant", ["patched", "unpatched"])
async def test_a_vm_that_ends_while_the_lab_is_attached_is_told_in_one_line(
    tmp_path: Path, variant: Variant
) -> None:
    disk = await made(tmp_path / "disk.raw", "raw")
    async with (
        started(variant, tmp_path, *arguments("drive", disk)) as (monitor, process),
        lab.attach(monitor) as vm,
    ):
        process.send_signal(signal.SIGKILL)
        await process.wait()
        with pytest.raises(LabError) as caught:
            await vm.snapshot(tmp_path / "a.snap", "migrate-to-file")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.snap").exists()


async def test_the_command_line_takes_one_of_a_running_vm(tmp_path: Path) -> None:
    disk = await made(tmp_path / "disk.raw", "raw")
    async with started("patched", tmp_path, *arguments("drive", disk)) as (monitor, _):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lab", "snapshot"),
            *("--qmp", str(monitor), str(tmp_path / "a.snap")),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert (process.returncode, b"a.snap" in out) == (0, True), err
        # Whoever starts the VM again has to know.
        assert f"the VM writes to {tmp_path / 'disk.a.qcow2'} from now on" in out.decode()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(monitor))
        sock.setblocking(False)
        async with connected(sock) as qmp:
            assert (await qmp.execute("query-status"))["running"]


async def test_what_could_be_taken_and_not_restored_is_told_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, other = socket.socketpair()
    with given, other:
        network = ("-netdev", f"socket,id=net,fd={given.fileno()}")
        async with started("patched", tmp_path, *network, pass_fds=[given.fileno()]) as (
            monitor,
            _,
        ):
            async with lab.attach(monitor) as vm:
                await vm.execute("device_add", {"driver": "virtio-rng-pci", "id": "later"})
            async with lab.attach(monitor) as vm:
                assert await vm.is_running()
    first, *_, plugged = [record.getMessage() for record in caplog.records]
    assert "could not be restored: -netdev socket (id net) stands on a file" in first
    assert "(later)" in plugged


KILLED = """
import asyncio, os, signal, sys
import lab
from lab.snapshot.take import take

async def main(monitor, path, method):
    async def die():
        os.kill(os.getpid(), signal.SIGKILL)

    async with lab.attach(monitor) as vm:
        await take(vm, path, method, hold=die)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("variant", "method"),
    [
        ("patched", "live"),
        ("patched", "stop-and-copy"),
        ("unpatched", "background"),
        ("unpatched", "migrate-to-file"),
    ],
)
async def test_a_vm_runs_on_when_the_lab_is_killed_while_it_holds_it(
    tmp_path: Path, variant: Variant, method: str
) -> None:
    disk = await made(tmp_path / "disk.raw", "raw")
    log = tmp_path / "log"
    async with started(variant, tmp_path, *arguments("drive", disk)) as (monitor, _):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", KILLED, str(monitor), str(tmp_path / "a.snap"), method)
        )
        assert await process.wait() == -signal.SIGKILL
        async with asyncio.timeout(60):
            while True:
                try:
                    async with lab.attach(monitor) as vm:
                        while not await vm.is_running():
                            await asyncio.sleep(0.05)
                        await write(vm, 0x11, log)
                        await vm.snapshot(tmp_path / "b.snap", method)
                    break
                except LabError:
                    # The monitor is still taken, or a migration still ends.
                    await asyncio.sleep(0.2)
        async with lab.restore(tmp_path / "b.snap") as vm:
            assert await holds(vm, 0x11, vm.process.log_path)
    assert not (tmp_path / "a.snap").exists()
