"""Layers of a QEMU that runs: its lock is seen, and nothing is taken from under it."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lab.disks.chain import Layer, read_chain, require_unlocked
from lab.disks.commit import commit, export
from lab.disks.store import HeldLayer, Store
from lab.errors import HostError
from lab.qemu.build import find_qemu

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg")]

CLUSTER = 1 << 16
MARK = "0123456789abcdef" * 2


@pytest.fixture
def qemu_img() -> Path:
    return find_qemu("unpatched").path.with_name("qemu-img")


class Disk:
    """A disk of a QEMU that runs, used through its monitor in a guest's stead."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def tell(self, command: str, until: str = "return", **arguments: str) -> Any:
        """Send a command, and return the answer, or the event, that has this key."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        text = json.dumps({"execute": command, "arguments": arguments})
        self._process.stdin.write(text.encode() + b"\n")
        async with asyncio.timeout(120):
            while line := await self._process.stdout.readline():
                # What `qemu-io` says goes the same way.
                with contextlib.suppress(ValueError):
                    said = json.loads(line)
                    assert "error" not in said, said
                    if until in said or said.get("event") == until:
                        return said.get("return", said.get("data"))
        raise AssertionError("QEMU has ended")

    async def write(self, cluster: int, value: int) -> None:
        how = f"write -P {value} {cluster * CLUSTER} {CLUSTER}"
        told = f'qemu-io -d /machine/peripheral/vd/virtio-backend "{how}"'
        assert await self.tell("human-monitor-command", **{"command-line": told}) == ""

    async def read(self, target: Path) -> bytes:
        """All that is on the disk, by way of a new file."""
        named = {"sync": "full", "format": "raw", "target": str(target), "job-id": "read"}
        done = await self.tell("drive-backup", "BLOCK_JOB_COMPLETED", device="disk", **named)
        assert "error" not in done
        return target.read_bytes()


@contextlib.asynccontextmanager
async def running(layer: Layer) -> AsyncIterator[Disk]:
    """A QEMU with a disk whose guest does not run."""
    blockdev = {
        "node-name": "disk",
        "driver": layer.format,
        "file": {"driver": "file", "filename": str(layer.path)},
    }
    process = await asyncio.create_subprocess_exec(
        find_qemu("unpatched").path,
        *("-S", "-machine", "q35", "-nodefaults", "-display", "none", "-qmp", "stdio"),
        *("-blockdev", json.dumps(blockdev), "-device", "virtio-blk-pci,drive=disk,id=vd"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    disk = Disk(process)
    try:
        await disk.tell("qmp_capabilities")
        yield disk
        await disk.tell("quit")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_an_image_that_a_qemu_writes_to_is_refused_naming_it(
    qemu_img: Path, tmp_path: Path, format: str
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(16 * CLUSTER))
    if format == "qcow2":
        store = Store(tmp_path)
        path = await export(qemu_img, path, tmp_path / "disk.qcow2", store=store)
    (image,) = await read_chain(qemu_img, path)
    await require_unlocked(qemu_img, path)

    async with running(image) as disk:
        with pytest.raises(HostError, match="in use") as caught:
            await require_unlocked(qemu_img, path)
        assert f"process {disk.pid} (qemu" in caught.value.cause
        # To look at it disturbs nobody.
        assert len(await read_chain(qemu_img, path)) == 1

    await require_unlocked(qemu_img, path)


async def test_a_guest_on_layers_that_are_shortened_and_removed_runs_on(
    qemu_img: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "layers")
    user = tmp_path / "disk.raw"
    whole = random.Random(1).randbytes(16 * CLUSTER)
    user.write_bytes(whole)
    content = bytearray(whole)
    (base,) = await read_chain(qemu_img, user, format="raw")
    held: list[HeldLayer] = []
    for k in range(3):
        held.append(await store.new_layer(qemu_img, held[-1].layer if held else base))
        async with running(held[-1].layer) as disk:
            await disk.write(k, k + 1)
        content[k * CLUSTER : (k + 1) * CLUSTER] = bytes([k + 1]) * CLUSTER
    frozen = held[-1].layer
    store.keep_for(frozen.path, tmp_path / "a.snap", MARK)
    (tmp_path / "a.snap.json").write_text(json.dumps({"mark": MARK}))
    for one in held:
        one.release()

    restored = await store.new_layer(qemu_img, frozen)
    async with running(restored.layer) as disk:
        done = await commit(qemu_img, frozen.path, store=store)
        assert set(await store.collect(qemu_img)) == set(done.merged)
        assert len(done.merged) == 2
        # It has the old files open, which have no names any more.
        assert await disk.read(tmp_path / "read") == bytes(content)
        await disk.write(5, 66)
        content[5 * CLUSTER : 6 * CLUSTER] = bytes([66]) * CLUSTER

    # Another QEMU finds the same on the new ones.
    async with running(restored.layer) as disk:
        assert await disk.read(tmp_path / "again") == bytes(content)
    restored.discard()
    assert user.read_bytes() == whole
    assert [path.name for path in store.folder.glob("*.qcow2")] == [frozen.path.name]
