"""QEMU puts overlays on disks at the instant of a snapshot, all or none, and the pause holds no
flush.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

import lab
from lab.errors import SnapshotError
from lab.qemu.build import find_qemu
from lab.session import VM
from lab.snapshot.take import take
from lab.verify.oracle import verify_method

LIVE = ("live", "live-rfc", "live-inline", "live-mapped")
BLOCK = 64 << 10


class HoldError(Exception):
    pass


def small(**devices: Any) -> tuple[lab.Machine, lab.Workload]:
    machine = lab.Machine(ram_mib=256, **devices)
    return machine, lab.Workload("random", wss_mib=16, threads=machine.vcpus)


async def new_image(path: Path, mib: int) -> Path:
    command = [find_qemu("patched").qemu_img, "create", "-q", "-f", "qcow2", path, f"{mib}M"]
    process = await asyncio.create_subprocess_exec(*map(str, command))
    assert await process.wait() == 0
    return path


async def add(vm: VM, name: str, path: Path, **of_file: Any) -> None:
    """Add a qcow2 node without what is below it."""
    file: dict[str, Any] = {"driver": "file", "filename": str(path)}
    if of_file:
        file = {"driver": "blkdebug", "image": file, **of_file}
    node = {"driver": "qcow2", "node-name": name, "backing": None, "file": file}
    await vm.execute("blockdev-add", node)


async def add_disk(vm: VM, number: int, folder: Path, **of_file: Any) -> None:
    """Add a disk that no device has: `root` is its own end, `disk` its image, and an overlay."""
    await add(vm, f"disk{number}", await new_image(folder / f"disk{number}", 8), **of_file)
    await add(vm, f"over{number}", await new_image(folder / f"over{number}", 8))
    root = {"driver": "raw", "node-name": f"root{number}", "file": f"disk{number}"}
    await vm.execute("blockdev-add", root)


async def want(vm: VM, *pairs: tuple[str, str]) -> None:
    overlays = [{"node": node, "overlay": overlay} for node, overlay in pairs]
    await vm.execute("migrate-set-parameters", {"x-snapshot-overlays": overlays})


async def write(vm: VM, number: int, value: int) -> None:
    await vm.hmp(f'qemu-io root{number} "write -q -P {value} 0 {BLOCK}"')


async def is_read_only(vm: VM, name: str) -> bool:
    nodes = await vm.execute("query-named-block-nodes", {"flat": True})
    return bool(next(node["ro"] for node in nodes if node["node-name"] == name))


async def below(vm: VM, name: str) -> str:
    """Return the node that a node reads from."""
    nodes = await vm.execute("query-blockstats", {"query-nodes": True})
    return str(next(n["parent"]["node-name"] for n in nodes if n["node-name"] == name))


async def first_bytes(path: Path) -> bytes:
    """Read a disk as another program does, which its own QEMU must not be writing to."""
    command = ("convert", "-f", "qcow2", "-O", "raw", str(path), str(path.with_suffix(".raw")))
    process = await asyncio.create_subprocess_exec(str(find_qemu("patched").qemu_img), *command)
    assert await process.wait() == 0
    return path.with_suffix(".raw").read_bytes()[:BLOCK]


@pytest.mark.platforms("micro-tcg", "micro-kvm")
@pytest.mark.parametrize(
    "memory", [{}, {"ram_kind": "memfd", "vcpus": 2}], ids=["anon", "memfd-2-vcpus"]
)
@pytest.mark.parametrize("method", LIVE)
async def test_disks_are_those_of_the_instant(
    method: str, memory: dict[str, Any], tmp_path: Path
) -> None:
    async with lab.boot(*small(**memory)) as vm:
        for number in range(2):
            await add_disk(vm, number, tmp_path)
            await write(vm, number, 0x11)
        await want(vm, ("disk0", "over0"), ("disk1", "over1"))

        found = await verify_method(vm, method, tmp_path)

        assert found.equal, found.detail
        for number in range(2):
            assert await below(vm, f"root{number}") == f"over{number}"
            assert await is_read_only(vm, f"disk{number}")
            await write(vm, number, 0x22)
            assert await first_bytes(tmp_path / f"disk{number}") == b"\x11" * BLOCK


@pytest.mark.platforms("micro-tcg")
async def test_used_overlays_are_refused_until_they_are_set_again(tmp_path: Path) -> None:
    async with lab.boot(*small()) as vm:
        await add_disk(vm, 0, tmp_path)
        await want(vm, ("disk0", "over0"))
        await take(vm, tmp_path / "1", "live")

        with pytest.raises(SnapshotError, match="over0"):
            await take(vm, tmp_path / "2", "live")
        assert not (tmp_path / "2").exists()

        await want(vm)
        await take(vm, tmp_path / "2", "live")
        assert await below(vm, "root0") == "over0"


@pytest.mark.platforms("micro-tcg")
@pytest.mark.parametrize("method", ["live", "live-rfc", "live-inline"])
async def test_no_disk_gets_its_overlay_if_the_snapshot_fails_in_the_pause(
    method: str, tmp_path: Path
) -> None:
    async with lab.boot(*small()) as vm:
        for number in range(2):
            await add_disk(vm, number, tmp_path)
        await want(vm, ("disk0", "over0"), ("disk1", "over1"))

        async def lose_an_overlay() -> None:
            await vm.execute("blockdev-del", {"node-name": "over1"})

        with pytest.raises(SnapshotError, match="over1"):
            await take(vm, tmp_path / "1", method, hold=lose_an_overlay)

        for number in range(2):
            assert await below(vm, f"root{number}") == f"disk{number}"
            assert not await is_read_only(vm, f"disk{number}")
        await want(vm)
        assert (await verify_method(vm, method, tmp_path)).equal


@pytest.mark.platforms("micro-tcg")
async def test_no_disk_gets_its_overlay_if_the_snapshot_is_given_up_in_the_hold(
    tmp_path: Path,
) -> None:
    async def give_up() -> None:
        raise HoldError

    async with lab.boot(*small()) as vm:
        await add_disk(vm, 0, tmp_path)
        await want(vm, ("disk0", "over0"))

        with pytest.raises(HoldError):
            await take(vm, tmp_path / "1", "live", hold=give_up)

        assert await below(vm, "root0") == "disk0"
        await take(vm, tmp_path / "1", "live")
        assert await below(vm, "root0") == "over0"


@pytest.mark.platforms("micro-tcg")
@pytest.mark.parametrize("method", LIVE)
async def test_the_pause_holds_no_flush(method: str, tmp_path: Path) -> None:
    """A flush that fails would be noticed."""
    fails = [{"event": "none", "iotype": "flush"}]
    async with lab.boot(*small()) as vm:
        await add_disk(vm, 0, tmp_path, **{"inject-error": fails})
        await write(vm, 0, 0x11)

        found = await verify_method(vm, method, tmp_path)

        assert found.equal, found.detail


@pytest.mark.platforms("micro-tcg")
async def test_what_cannot_be_flushed_fails_the_snapshot_that_froze_it(tmp_path: Path) -> None:
    fails = [{"event": "flush_to_os", "iotype": "flush", "once": True}]
    async with lab.boot(*small()) as vm:
        await add_disk(vm, 0, tmp_path, **{"inject-error": fails})
        await write(vm, 0, 0x11)
        await want(vm, ("disk0", "over0"))

        with pytest.raises(SnapshotError, match="Write to node 'disk0' failed"):
            await take(vm, tmp_path / "1", "live")

        assert not (tmp_path / "1").exists()
        # Once the guest goes on, it stays on its overlay.
        assert await below(vm, "root0") == "over0"
        assert not await is_read_only(vm, "disk0")


@pytest.mark.thorough
@pytest.mark.platforms("tcg", "kvm")
@pytest.mark.parametrize(
    "devices",
    [
        pytest.param({"disk": "virtio"}, id="virtio"),
        pytest.param({"disk": "virtio", "disk_iothread": True}, id="virtio-iothread"),
        pytest.param({"disk": "scsi", "disk_iothread": True}, id="scsi-iothread"),
        pytest.param({"disk": "ide", "disk_cache": "none"}, id="ide-uncached"),
    ],
)
async def test_a_guest_goes_on_with_its_disk_on_the_overlay(
    devices: dict[str, Any], tmp_path: Path
) -> None:
    async with lab.boot(*small(**devices)) as vm:
        disk = next(b for b in await vm.execute("query-block") if b.get("inserted"))["inserted"]
        mib = disk["image"]["virtual-size"] >> 20
        await add(vm, "over", await new_image(tmp_path / "over", mib))
        await want(vm, (disk["node-name"], "over"))

        found = await verify_method(vm, "live", tmp_path)

        assert found.equal, found.detail
        assert await is_read_only(vm, disk["node-name"])
        before = await vm.progress_page()
        async with asyncio.timeout(120):
            while (now := await vm.progress_page()).disk_ops < before.disk_ops + 20:
                await asyncio.sleep(0.01)
        assert (now.page_errors, now.device_errors) == (0, 0), vm.console.tail()
