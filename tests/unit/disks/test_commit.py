"""A chain is shortened without changing the disk, and without taking a layer from anybody."""

import asyncio
import json
import os
import random
import signal
from functools import partial
from pathlib import Path

import msgspec
import pytest

from lab.disks import commit as room
from lab.disks.chain import Layer, read_chain
from lab.disks.commit import commit, export
from lab.disks.frozen import FrozenDisk, Stamp, frozen_disks
from lab.disks.store import HeldLayer, Store
from lab.errors import HostError, LabError, UsageError
from tests.unit.disks.conftest import Make, call
from tests.unit.disks.test_killed import forked, kill_at

CLUSTER = 1 << 16
MARK = "0123456789abcdef" * 2


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "layers")


@pytest.fixture
async def base(qemu_img: Path, tmp_path: Path) -> Layer:
    disk = tmp_path / "user's disk.raw"
    disk.write_bytes(random.Random(1).randbytes(16 * CLUSTER))
    (layer,) = await read_chain(qemu_img, disk, format="raw")
    return layer


def write(qemu_img: Path, layer: Path, cluster: int, value: int) -> None:
    """Write two clusters as a guest would."""
    told = ("-w", "-f", "qcow2", "-c", "1", "-d", "1", "-s", str(2 * CLUSTER))
    call(qemu_img, "bench", *told, "-o", str(cluster * CLUSTER), f"--pattern={value}", layer)


def content(qemu_img: Path, layer: Path) -> bytes:
    """What a guest finds on the disk."""
    raw = layer.with_name("read")
    call(qemu_img, "convert", "-O", "raw", layer, raw)
    found = raw.read_bytes()
    raw.unlink()
    return found


async def grown(qemu_img: Path, store: Store, base: Layer, count: int) -> list[HeldLayer]:
    """Layers on each other, each written to: also to what one below has, and with zeros."""
    held: list[HeldLayer] = []
    for k in range(count):
        held.append(await store.new_layer(qemu_img, held[-1].layer if held else base))
        write(qemu_img, held[-1].layer.path, k, k + 1)
        write(qemu_img, held[-1].layer.path, 8 + k, 0)
    return held


def publish(store: Store, layer: Layer, snapshot: Path) -> None:
    store.keep_for(layer.path, snapshot, MARK)
    snapshot.with_name(snapshot.name + ".json").write_text(json.dumps({"mark": MARK}))


def release(held: list[HeldLayer]) -> None:
    for one in held:
        one.release()


async def test_layers_that_nobody_else_needs_are_taken_in(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path
) -> None:
    held = await grown(qemu_img, store, base, 4)
    top = held[-1].layer.path
    publish(store, held[-1].layer, tmp_path / "a.snap")
    release(held)
    before, users = content(qemu_img, top), base.path.read_bytes()
    stages: list[str] = []

    done = await commit(qemu_img, top, progress=stages.append, store=store)

    assert content(qemu_img, top) == before
    assert done.merged == tuple(one.layer.path for one in held[-2::-1])
    assert await read_chain(qemu_img, top) == (done.top, base)
    assert set(await store.collect(qemu_img)) == set(done.merged)
    assert content(qemu_img, top) == before
    assert base.path.read_bytes() == users
    assert top.stat().st_mode & 0o777 == 0o600
    assert await store.collect(qemu_img, gone=True) == []
    with pytest.raises(UsageError, match="as short as it can be"):
        await commit(qemu_img, top, store=store)


@pytest.mark.parametrize("by", ["a process", "a snapshot", "a layer on it"])
async def test_it_goes_down_to_what_somebody_else_needs(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path, by: str
) -> None:
    held = await grown(qemu_img, store, base, 4)
    lowest, needed, merged, top = (one.layer for one in held)
    publish(store, top, tmp_path / "a.snap")
    release(held)
    others = []
    match by:
        case "a process":
            others.append(await store.hold(needed))
        case "a snapshot":
            publish(store, needed, tmp_path / "b.snap")
        case "a layer on it":
            others.append(await store.new_layer(qemu_img, needed))
    whole = needed.path.read_bytes()
    before = content(qemu_img, top.path)

    done = await commit(qemu_img, top.path, store=store)

    assert done.merged == (merged.path,)
    chain = await read_chain(qemu_img, top.path)
    assert [layer.path for layer in chain] == [top.path, needed.path, lowest.path, base.path]
    assert needed.path.read_bytes() == whole
    assert content(qemu_img, top.path) == before
    assert await store.collect(qemu_img) == [merged.path]
    with pytest.raises(UsageError, match=f"{needed.path.name} cannot be merged") as caught:
        await commit(qemu_img, top.path, store=store)
    said = {"a process": str(os.getpid()), "a snapshot": "b.snap", "a layer on it": "is on it"}
    assert said[by] in caught.value.cause
    assert "lab disk export" in caught.value.remedy
    release(others)


async def test_a_layer_that_is_written_to_is_not_replaced(
    qemu_img: Path, store: Store, base: Layer
) -> None:
    held = await grown(qemu_img, store, base, 3)
    held[0].release()
    held[1].release()

    with pytest.raises(UsageError, match=f"process {os.getpid()} uses it"):
        await commit(qemu_img, held[2].layer.path, store=store)
    with pytest.raises(UsageError, match="is no layer of"):
        await commit(qemu_img, base.path, store=store)
    release(held)


async def test_a_layer_on_the_shortened_one_goes_on(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path
) -> None:
    held = await grown(qemu_img, store, base, 2)
    publish(store, held[1].layer, tmp_path / "a.snap")
    restored = await store.new_layer(qemu_img, held[1].layer)
    write(qemu_img, restored.layer.path, 5, 77)
    release(held)
    before = content(qemu_img, restored.layer.path)

    await commit(qemu_img, held[1].layer.path, store=store)
    await store.collect(qemu_img)

    assert content(qemu_img, restored.layer.path) == before
    restored.release()


async def test_without_room_nothing_is_begun(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = await grown(qemu_img, store, base, 2)
    publish(store, held[1].layer, tmp_path / "a.snap")
    release(held)
    before = sorted(store.folder.iterdir())
    monkeypatch.setattr("lab.host.room.room_bytes", lambda folder: 1 << 20)

    for work in (
        commit(qemu_img, held[1].layer.path, store=store),
        export(qemu_img, held[1].layer.path, tmp_path / "x.qcow2", store=store),
    ):
        with pytest.raises(HostError, match="1 MiB are free") as caught:
            await work
        assert caught.value.remedy
    assert sorted(store.folder.iterdir()) == before
    assert not list(tmp_path.glob("*x.qcow2*"))


async def test_a_disk_that_fills_up_meanwhile_leaves_the_old_one(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = await grown(qemu_img, store, base, 3)
    top = held[2].layer.path
    publish(store, held[2].layer, tmp_path / "a.snap")
    release(held)
    before, files = content(qemu_img, top), sorted(store.folder.iterdir())
    monkeypatch.setattr(room, "room_bytes", lambda folder: -1)
    slow = tmp_path / "qemu-img"
    slow.write_text(f'#!/bin/sh\n[ "$1" = info ] || sleep 1\nexec {qemu_img} "$@"\n')
    slow.chmod(0o755)

    with pytest.raises(HostError, match="has filled up meanwhile"):
        await commit(slow, top, store=store)

    assert content(qemu_img, top) == before
    assert sorted(store.folder.iterdir()) == files
    assert len(await read_chain(qemu_img, top)) == 4


@pytest.mark.parametrize("kib", [0, 64, 200, 400, 600])
@pytest.mark.parametrize("ends", ["XFSZ", ""])
async def test_a_write_that_fails_leaves_the_old_one(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path, kib: int, ends: str
) -> None:
    """At any byte, and whether or not `qemu-img` lives to say so."""
    held = await grown(qemu_img, store, base, 3)
    top = held[2].layer.path
    publish(store, held[2].layer, tmp_path / "a.snap")
    release(held)
    before, files = content(qemu_img, top), sorted(store.folder.iterdir())
    limited = tmp_path / "qemu-img"
    # Dash counts in blocks of 512 bytes.
    deaf = "" if ends else "trap '' XFSZ\n"
    limited.write_text(f'#!/bin/sh\n{deaf}ulimit -f {kib * 2}\nexec {qemu_img} "$@"\n')
    limited.chmod(0o755)

    for work in (
        commit(limited, top, store=store),
        export(limited, top, tmp_path / "out.raw", format="raw", store=store),
        store.new_layer(limited, base) if kib < 192 else export(limited, top, top, store=store),
    ):
        with pytest.raises(LabError) as caught:
            await work
        assert "cannot be made" in caught.value.cause or "already" in caught.value.cause

    assert content(qemu_img, top) == before
    assert sorted(store.folder.iterdir()) == files
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".json") == [
        *("layers", "qemu-img", base.path.name)
    ]
    assert len(await read_chain(qemu_img, top)) == 4


async def test_a_file_that_is_not_the_same_does_not_take_its_place(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path
) -> None:
    held = await grown(qemu_img, store, base, 2)
    top = held[1].layer.path
    publish(store, held[1].layer, tmp_path / "a.snap")
    release(held)
    before = content(qemu_img, top)
    broken = tmp_path / "qemu-img"
    # It loses what the layer between has.
    broken.write_text(
        f'#!/bin/sh\nif [ "$1" = rebase ]; then shift; set -- rebase -u "$@"; fi\n'
        f'exec {qemu_img} "$@"\n'
    )
    broken.chmod(0o755)

    with pytest.raises(HostError, match="mismatch"):
        await commit(broken, top, store=store)

    assert content(qemu_img, top) == before
    assert len(await read_chain(qemu_img, top)) == 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.thorough)])
async def test_killed_at_any_step_it_leaves_the_old_chain_or_the_new_one(
    qemu_img: Path, base: Layer, tmp_path: Path, stride: int
) -> None:
    async def work(top: Path, store: Store, step: int) -> None:
        kill_at(step)
        await commit(qemu_img, top, store=store)

    lengths = []
    step, killed = random.randrange(stride), True
    while killed:
        store = Store(tmp_path / f"layers-{step}")
        held = await grown(qemu_img, store, base, 2)
        top = held[1].layer.path
        publish(store, held[1].layer, tmp_path / f"{step}.snap")
        release(held)
        before = content(qemu_img, top)

        process = forked(partial(work, top, store, step))
        await asyncio.to_thread(process.join)
        killed = process.exitcode == -signal.SIGKILL
        assert killed or process.exitcode == 0

        assert content(qemu_img, top) == before
        await store.collect(qemu_img)
        assert content(qemu_img, top) == before
        lengths.append(len(await read_chain(qemu_img, top)))
        assert len(list(store.folder.glob("*.qcow2"))) == lengths[-1] - 1
        assert not list(store.folder.glob(".*"))
        step += stride
    assert lengths == sorted(lengths, reverse=True)
    assert (lengths[0], lengths[-1]) == (3, 2)


async def test_cancelled_it_leaves_the_old_chain(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path
) -> None:
    held = await grown(qemu_img, store, base, 2)
    top = held[1].layer.path
    publish(store, held[1].layer, tmp_path / "a.snap")
    release(held)
    files, before = sorted(store.folder.iterdir()), content(qemu_img, top)

    for turns in (0, 2, 10, 30):
        task = asyncio.create_task(commit(qemu_img, top, store=store))
        await asyncio.sleep(turns * 0.001)
        if not task.cancel():
            break
        await asyncio.gather(task, return_exceptions=True)
        assert sorted(store.folder.iterdir()) == files
        assert content(qemu_img, top) == before


@pytest.mark.parametrize("format", ["qcow2", "raw"])
async def test_an_exported_disk_is_one_private_file(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path, format: str
) -> None:
    held = await grown(qemu_img, store, base, 3)
    top = held[2].layer.path
    release(held)
    stages: list[str] = []

    path = await export(
        *(qemu_img, top, tmp_path / "file:out,1.img"),
        format=format,
        store=store,
        progress=stages.append,
    )

    (layer,) = await read_chain(qemu_img, path, format=format)
    assert (layer.format, layer.backing) == (format, None)
    assert content(qemu_img, path) == content(qemu_img, top)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="is there already"):
        await export(qemu_img, top, path, store=store)
    with pytest.raises(UsageError, match="choose qcow2 or raw"):
        await export(qemu_img, top, tmp_path / "x", format="vmdk", store=store)
    with pytest.raises(HostError):
        await export(qemu_img, top, tmp_path / "none" / "x", store=store)
    assert not list(tmp_path.glob(".*"))


async def test_an_exported_raw_disk_has_holes(
    qemu_img: Path, make: Make, tmp_path: Path, store: Store
) -> None:
    path = await export(
        qemu_img, make("empty.qcow2", mib=512), tmp_path / "out.raw", format="raw", store=store
    )

    assert path.stat().st_size == 512 << 20
    assert path.stat().st_blocks * 512 < 1 << 20


def test_the_disks_of_a_snapshot_are_those_that_its_sidecar_names(tmp_path: Path) -> None:
    snapshot = tmp_path / "a.snap"
    sidecar = tmp_path / "a.snap.json"
    disk = FrozenDisk(
        node="disk0",
        layer="/x/y.qcow2",
        format="qcow2",
        virtual_bytes=1 << 30,
        named="",
        stands_on=(Stamp(path="/x/base.raw", bytes=1 << 30, mtime_ns=1),),
    )
    sidecar.write_text(json.dumps({"mark": MARK, "disks": [msgspec.to_builtins(disk)]}))
    assert frozen_disks(snapshot) == (disk,)

    sidecar.write_text(json.dumps({"mark": MARK}))
    assert frozen_disks(snapshot) == ()
    for text in ("", "[]", '{"disks": [{}]}', '{"disks": [1]}', '{"disks": 1}'):
        sidecar.write_text(text)
        with pytest.raises(UsageError, match="no sidecar"):
            frozen_disks(snapshot)
    sidecar.unlink()
    with pytest.raises(UsageError, match="there is no snapshot"):
        frozen_disks(snapshot)
