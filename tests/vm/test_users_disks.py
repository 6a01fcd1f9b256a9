"""The disks of a user's VM are frozen at the instant, and his own image is never written to.

What a disk holds is written and read by QEMU's monitor, so no system has to be installed on it.
"""

import asyncio
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lab
from lab.disks.store import Store
from lab.errors import HostError, LabError, RestoreError, SnapshotError, UsageError
from lab.guests.image.guest import uefi_code
from lab.qemu.build import find_qemu
from lab.session import VM
from lab.snapshot.image import read_sidecar

pytestmark = pytest.mark.platforms("micro-tcg")

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture(autouse=True)
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Layers of this test's own."""
    folder = tmp_path / "layers"
    monkeypatch.setenv("LAB_LAYERS_DIR", str(folder))
    return folder


async def qemu_img(*arguments: str | Path) -> str:
    process = await asyncio.create_subprocess_exec(
        find_qemu("patched").qemu_img, *map(str, arguments), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def new_image(path: Path, form: str) -> Path:
    await qemu_img("create", "-q", "-f", form, path, "8M")
    return path


def machine(*images: Path, **others: Any) -> lab.Machine:
    return lab.Machine(ram_mib=32, image=tuple(map(str, images)), **others)


async def do_io(vm: VM, disk: int, what: str) -> str:
    """Have the device's own end of the disk do it, as the guest does."""
    node = vm.files.disks[disk].node
    device = next(
        block["qdev"]
        for block in await vm.execute("query-block")
        if block.get("inserted", {}).get("node-name") == node
    )
    # It tells the result on its own output.
    before = len(vm.process.log_text())
    said = await vm.hmp(f'qemu-io -d {device} "{what}"')
    return said + vm.process.log_text()[before:]


async def write(vm: VM, value: int, disk: int = 0, offset: int = 0) -> None:
    said = await do_io(vm, disk, f"write -P {value:#x} {offset} {BLOCK}")
    assert "wrote" in said, said


async def holds(vm: VM, value: int, disk: int = 0, offset: int = 0) -> bool:
    said = await do_io(vm, disk, f"read -P {value:#x} {offset} {BLOCK}")
    assert "read" in said, said
    return "verification failed" not in said


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


KINDS: Mapping[str, Mapping[str, Any]] = {
    "virtio": {},
    "virtio-thread": {"disk_iothread": True},
    "virtio-none-native": {"disk_cache": "none", "disk_aio": "native"},
    "scsi-thread": {"disk": "scsi", "disk_iothread": True},
    "ide": {"disk": "ide"},
    "sata": {"disk": "ide", "chipset": "q35"},
}


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_disk_is_of_the_instant_and_each_restore_has_its_own(
    tmp_path: Path, kind: str, form: str
) -> None:
    image = await new_image(tmp_path / f"disk,of:mine.{form}", form)
    before = digest(image)
    snap = tmp_path / "a.snap"
    async with lab.boot(machine(image, **KINDS[kind])) as vm:
        await write(vm, 0x11)
        await vm.snapshot(snap, checksums=False)
        await write(vm, 0x22)
        assert await holds(vm, 0x22)
        async with lab.restore(snap) as one, lab.restore(snap) as two:
            assert await holds(one, 0x11)
            await write(one, 0x33)
            assert await holds(two, 0x11)
            assert await holds(one, 0x33)
            assert await one.is_running()
        assert await holds(vm, 0x22)
    async with lab.restore(snap) as again:
        assert await holds(again, 0x11)
    assert digest(image) == before


@pytest.mark.parametrize(
    "method",
    ["live", "live-rfc", "live-inline", "live-mapped", "migrate-to-file", "stop-and-copy"],
)
async def test_every_method_freezes_all_disks_together(tmp_path: Path, method: str) -> None:
    await _freeze_all(tmp_path, method, "patched")


@pytest.mark.parametrize("method", ["background", "migrate-to-file", "stop-and-copy"])
async def test_so_does_the_unpatched_qemu(tmp_path: Path, method: str) -> None:
    await _freeze_all(tmp_path, method, "unpatched")


async def _freeze_all(tmp_path: Path, method: str, binary: Any) -> None:
    images = [await new_image(tmp_path / f"{number}.qcow2", "qcow2") for number in range(3)]
    async with lab.boot(machine(*images), binary=binary) as vm:
        for number in range(3):
            await write(vm, number + 1, number)
        for name in ("a.snap", "b.snap"):
            snapshot = await vm.snapshot(tmp_path / name, method)
            assert snapshot.pause_ms is not None
            for number in range(3):
                await write(vm, number + 0x41, number, offset=MIB)
        assert await vm.is_running()
    for name, later in (("a.snap", False), ("b.snap", True)):
        async with lab.restore(tmp_path / name) as vm:
            for number in range(3):
                assert await holds(vm, number + 1, number)
                assert await holds(vm, number + 0x41, number, offset=MIB) is later
            # A restored one can be snapshotted as well.
            await vm.snapshot(tmp_path / "again.snap", method)
    async with lab.restore(tmp_path / "again.snap") as vm:
        assert await holds(vm, 0x41, offset=MIB)


async def test_a_snapshot_without_disks_leaves_the_chain_alone(tmp_path: Path) -> None:
    image = await new_image(tmp_path / "a.raw", "raw")
    async with lab.boot(machine(image)) as vm:
        node = vm.files.disks[0].node
        await vm.snapshot(tmp_path / "a.snap", disks=False)
        assert vm.files.disks[0].node == node
    assert read_sidecar(tmp_path / "a.snap").disks == ()
    with pytest.raises(RestoreError, match="of the memory alone, and its guest has a disk"):
        async with lab.restore(tmp_path / "a.snap"):
            pass
    async with lab.restore(tmp_path / "a.snap", check=False) as vm:
        assert await vm.is_running()


async def test_a_snapshot_that_is_cancelled_or_refused_takes_the_overlays_back(
    tmp_path: Path, layers: Path
) -> None:
    image = await new_image(tmp_path / "a.raw", "raw")
    async with lab.boot(machine(image)) as vm:
        node, made = vm.files.disks[0].node, _files(layers)
        with pytest.raises(SnapshotError):
            await vm.snapshot(tmp_path / "no" / "folder.snap")
        assert (vm.files.disks[0].node, _files(layers)) == (node, made)
        names = {one["node-name"] for one in await vm.execute("query-named-block-nodes")}
        task = asyncio.create_task(vm.snapshot(tmp_path / "b.snap"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert names == {one["node-name"] for one in await vm.execute("query-named-block-nodes")}
        assert _files(layers) == made
        await write(vm, 0x11)
        await vm.snapshot(tmp_path / "c.snap")
    async with lab.restore(tmp_path / "c.snap") as vm:
        assert await holds(vm, 0x11)


async def top_node(vm: VM) -> str:
    """Return the node that a device's end of the first disk is on, as QEMU says."""
    blocks = [block["inserted"] for block in await vm.execute("query-block") if "inserted" in block]
    return str(blocks[0]["node-name"])


async def overlays_wanted(vm: VM) -> object:
    return (await vm.execute("query-migrate-parameters"))["x-snapshot-overlays"]


@pytest.mark.parametrize("method", ["live", "live-rfc", "live-inline"])
async def test_the_guest_does_not_wait_for_the_lab_to_freeze_its_disks(
    tmp_path: Path, method: str
) -> None:
    image = await new_image(tmp_path / "a.raw", "raw")
    async with lab.boot(machine(image)) as vm:
        before = vm.files.disks[0].node
        await vm.snapshot(tmp_path / "a.snap", method)
        states = [e.data["status"] for e in vm.qmp.events if e.name == "MIGRATION"]
        assert "pre-switchover" not in states
        assert await top_node(vm) == vm.files.disks[0].node != before
        # The next snapshot of anybody is to be one without disks.
        assert await overlays_wanted(vm) == []


async def test_a_snapshot_cancelled_after_its_instant_leaves_the_guest_on_its_overlay(
    tmp_path: Path,
) -> None:
    image = await new_image(tmp_path / "a.raw", "raw")
    async with lab.boot(machine(image)) as vm:
        before = vm.files.disks[0].node
        await write(vm, 0x11)
        since = len(vm.qmp.events)
        task = asyncio.create_task(vm.snapshot(tmp_path / "a.snap", storage_mib_per_s=1))
        await vm.qmp.wait_event(lambda event: event.name == "RESUME", since=since, timeout_s=60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert await top_node(vm) == vm.files.disks[0].node != before
        assert await overlays_wanted(vm) == []
        await write(vm, 0x22, offset=MIB)
        await vm.snapshot(tmp_path / "b.snap")
        await write(vm, 0x33)
    async with lab.restore(tmp_path / "b.snap") as vm:
        assert await holds(vm, 0x11)
        assert await holds(vm, 0x22, offset=MIB)


async def test_a_snapshot_cancelled_at_any_moment_leaves_a_disk_that_is_known(
    tmp_path: Path,
) -> None:
    image = await new_image(tmp_path / "a.raw", "raw")
    async with lab.boot(machine(image)) as vm:
        await write(vm, 0x11)
        for moment in range(12):
            task = asyncio.create_task(vm.snapshot(tmp_path / "a.snap", progress=False))
            await asyncio.wait([task], timeout=moment * 0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await top_node(vm) == vm.files.disks[0].node
            assert await overlays_wanted(vm) == []
            assert await vm.is_running()
        await vm.snapshot(tmp_path / "b.snap")
    async with lab.restore(tmp_path / "b.snap") as vm:
        assert await holds(vm, 0x11)


def _files(layers: Path) -> set[str]:
    return {path.name for path in layers.glob("*.qcow2")}


async def test_layers_go_with_their_snapshot(tmp_path: Path, layers: Path) -> None:
    image = await new_image(tmp_path / "a.raw", "raw")
    async with lab.boot(machine(image)) as vm:
        await vm.snapshot(tmp_path / "a.snap")
        await vm.snapshot(tmp_path / "b.snap")
    tool = find_qemu("patched").qemu_img
    assert len(_files(layers)) == 2
    (tmp_path / "b.snap").unlink()
    (tmp_path / "b.snap.json").unlink()
    # It may have been moved.
    await Store.default().collect(tool)
    assert len(_files(layers)) == 2
    await Store.default().collect(tool, gone=True)
    assert len(_files(layers)) == 1
    moved = tmp_path / "elsewhere" / "c.snap"
    moved.parent.mkdir()
    for name in ("a.snap", "a.snap.json"):
        (tmp_path / name).rename(moved.parent / name.replace("a", "c", 1))
    async with lab.restore(moved) as vm:
        assert await vm.is_running()
    await Store.default().collect(tool, gone=True)
    assert len(_files(layers)) == 1
    async with lab.restore(moved) as vm:
        await vm.snapshot(moved)
    # The lab itself has replaced the one that needed the other layer.
    async with lab.restore(moved) as vm:
        assert await vm.is_running()
    moved.unlink()
    await Store.default().collect(tool, gone=True)
    moved.with_name("c.snap.json").unlink()
    await Store.default().collect(tool, gone=True)
    assert not _files(layers)


async def test_snapshots_of_one_name_keep_the_layers_of_the_last(
    tmp_path: Path, layers: Path
) -> None:
    image = await new_image(tmp_path / "a.raw", "raw")
    for value in range(3):
        async with lab.boot(machine(image)) as vm:
            await write(vm, value)
            await vm.snapshot(tmp_path / "a.snap")
    assert len(_files(layers)) == 1
    async with lab.restore(tmp_path / "a.snap") as vm:
        assert await holds(vm, 2)


async def test_an_image_that_was_written_to_since_is_refused(tmp_path: Path) -> None:
    image = await new_image(tmp_path / "a.raw", "raw")
    async with lab.boot(machine(image)) as vm:
        await vm.snapshot(tmp_path / "a.snap")
    async with lab.restore(tmp_path / "a.snap") as vm:
        assert await vm.is_running()
    with image.open("r+b") as file:
        file.write(b"later")
    with pytest.raises(RestoreError, match=r"a\.raw was written to after a\.snap was taken"):
        async with lab.restore(tmp_path / "a.snap"):
            pass
    async with lab.restore(tmp_path / "a.snap", check=False) as vm:
        assert await vm.is_running()


async def test_a_guest_that_ends_leaves_no_layer(tmp_path: Path, layers: Path) -> None:
    image = await new_image(tmp_path / "a.raw", "raw")
    async with lab.boot(machine(image)) as vm:
        await write(vm, 0x11)
    assert not _files(layers)


async def test_an_image_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path) -> None:
    image = await new_image(tmp_path / "a.qcow2", "qcow2")
    (tmp_path / "text").write_text("no disk\n" * 100)
    (tmp_path / "empty").touch()
    top = tmp_path / "top.qcow2"
    base = await new_image(tmp_path / "base.qcow2", "qcow2")
    await qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
    base.unlink()
    for path, said in (
        (tmp_path / "none.qcow2", "none.qcow2"),
        (tmp_path, "director"),
        (tmp_path / "empty", "empty"),
        (top, "base.qcow2"),
    ):
        with pytest.raises(LabError, match=re.escape(said)) as caught:
            async with lab.boot(machine(path)):
                pass
        assert "\n" not in str(caught.value)
    async with lab.boot(machine(image)) as vm:
        writer = {"driver": "qcow2", "node-name": "w", "file": {"driver": "file"}}
        writer["file"] = {"driver": "file", "filename": str(await _copy(image, "w.qcow2"))}
        await vm.execute("blockdev-add", writer)
        with pytest.raises(LabError, match=f"w.qcow2.*{vm.pid}"):
            async with lab.boot(machine(image.with_name("w.qcow2"))):
                pass


async def _copy(image: Path, name: str) -> Path:
    copy = image.with_name(name)
    copy.write_bytes(image.read_bytes())
    return copy


async def test_a_port_of_the_host_leads_to_the_guest_or_is_refused(tmp_path: Path) -> None:
    image = await new_image(tmp_path / "a.raw", "raw")
    async with lab.boot(machine(image, forward=("0:22", "0:80"))) as vm:
        assert set(vm.ports) == {22, 80}
        taken = dataclasses.replace(vm.machine, forward=(f"{vm.ports[22]}:22",))
        with pytest.raises(HostError, match=f"port {vm.ports[22]} of this host"):
            async with lab.boot(taken):
                pass


async def test_uefi_boots_with_variables_of_its_own_and_comes_back(tmp_path: Path) -> None:
    try:
        code = uefi_code()
    except HostError as error:
        pytest.skip(error.cause)
    variables = tmp_path / "vars"
    variables.write_bytes(code.with_name(code.name.replace("CODE", "VARS")).read_bytes())
    before = digest(variables)
    image = await new_image(tmp_path / "a.raw", "raw")
    users = machine(image, chipset="q35", firmware="uefi", uefi_vars=str(variables))
    async with lab.boot(dataclasses.replace(users, ram_mib=256)) as vm:
        await vm.console.wait_text("BdsDxe", timeout_s=300)
        await write(vm, 0x11)
        await vm.snapshot(tmp_path / "a.snap")
    async with lab.restore(tmp_path / "a.snap") as vm:
        assert await holds(vm, 0x11)
        await vm.snapshot(tmp_path / "b.snap")
        assert await vm.is_running()
    assert digest(variables) == before


async def test_the_command_line_takes_one_of_an_image(tmp_path: Path) -> None:
    image = await new_image(tmp_path / "a.raw", "raw")
    snap = tmp_path / "a.snap"

    async def run(*arguments: str) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lab", *arguments, "--json"), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        found: dict[str, Any] = json.loads(out.splitlines()[0])
        return found

    told = await run(
        "snapshot", str(snap), f"--image={image}", "--forward=0:22", "--ram-mib=32"
    )  # fmt: skip
    assert told["workload"] == "idle"
    [disk] = read_sidecar(snap).disks
    assert [one["frozen"] for one in told["disks"]] == [disk.layer]
    assert set((await run("restore", str(snap), "--seconds=0"))["ports"]) == {"22"}
    assert (await run("restore", str(snap), "--seconds=0", "--no-forward"))["ports"] == {}


async def test_a_restore_has_the_ports_that_are_asked_for(tmp_path: Path) -> None:
    image = await new_image(tmp_path / "a.raw", "raw")
    async with lab.boot(machine(image, forward=("0:22",))) as vm:
        await vm.snapshot(tmp_path / "a.snap")
    for forward in ((), ("0:80", "0:443")):
        async with lab.restore(tmp_path / "a.snap", forward=forward) as vm:
            assert set(vm.ports) == {int(one.partition(":")[2]) for one in forward}
            # It is the same machine, and so are those that come of it.
            await vm.snapshot(tmp_path / "b.snap")
        async with lab.restore(tmp_path / "b.snap") as vm:
            assert await vm.is_running()
    async with lab.boot(machine(image)) as vm:
        await vm.snapshot(tmp_path / "c.snap")
    with pytest.raises(UsageError, match="without a network card"):
        async with lab.restore(tmp_path / "c.snap", forward=("0:22",)):
            pass
