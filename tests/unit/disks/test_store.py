"""Which layers are kept, and for how long."""

import json
import multiprocessing
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lab.disks.chain import Layer, read_chain
from lab.disks.store import HeldLayer, Store, holders, snapshot_mark
from lab.errors import HostError, UsageError
from tests.unit.disks.conftest import Make

MARK = "0123456789abcdef" * 2


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "layers")


@pytest.fixture
async def base(qemu_img: Path, make: Make) -> Layer:
    (layer,) = await read_chain(qemu_img, make("user's disk.raw", "raw"))
    return layer


def publish(snapshot: Path, mark: str = MARK) -> Path:
    """Make what a snapshot has beside its image, and return the image's path."""
    snapshot.parent.mkdir(exist_ok=True)
    snapshot.write_bytes(b"image" + bytes.fromhex(mark))
    sidecar(snapshot).write_text(json.dumps({"format": "lab.snapshot/3", "mark": mark}))
    return snapshot


def sidecar(snapshot: Path) -> Path:
    return snapshot.with_name(snapshot.name + ".json")


def remove(snapshot: Path) -> None:
    snapshot.unlink()
    sidecar(snapshot).unlink()


def files(store: Store) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if path.name != "store.lock")


async def kept(
    qemu_img: Path, store: Store, base: Layer, snapshot: Path, mark: str = MARK
) -> Layer:
    """A layer that nobody holds and a snapshot needs, which is still to be published."""
    held = await store.new_layer(qemu_img, base)
    store.keep_for(held.layer.path, snapshot, mark)
    held.release()
    return held.layer


async def test_a_layer_is_there_as_long_as_it_is_held(
    qemu_img: Path, store: Store, base: Layer
) -> None:
    held = await store.new_layer(qemu_img, base)

    assert await read_chain(qemu_img, held.layer.path) == (held.layer, base)
    assert store.owns(held.layer.path)
    assert not store.owns(base.path)
    assert await store.collect(qemu_img) == []
    assert held.layer.path.exists()
    (shown,) = await store.survey(qemu_img)
    assert (shown.held, shown.held_by, shown.backing) == (True, (os.getpid(),), base.path)

    held.release()
    held.release()
    assert held.layer.path.exists()
    assert await store.collect(qemu_img) == [held.layer.path]
    assert files(store) == []
    assert base.path.exists()


async def test_all_in_the_folder_is_private(qemu_img: Path, tmp_path: Path, base: Layer) -> None:
    store = Store(tmp_path / "a" / "layers")
    held = await store.new_layer(qemu_img, base)
    store.keep_for(held.layer.path, tmp_path / "a.snap", MARK)

    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    for path in store.folder.glob("*-*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    held.release()


async def test_what_is_discarded_is_removed_at_once(
    qemu_img: Path, store: Store, base: Layer
) -> None:
    held = await store.new_layer(qemu_img, base)

    held.discard()
    held.discard()

    assert files(store) == []


@pytest.mark.parametrize("by", ["another that holds it", "a snapshot", "a layer on it"])
async def test_what_is_discarded_stays_while_somebody_else_needs_it(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path, by: str
) -> None:
    held = await store.new_layer(qemu_img, base)
    other: HeldLayer | None = None
    match by:
        case "another that holds it":
            other = await store.hold(held.layer)
        case "a snapshot":
            store.keep_for(held.layer.path, tmp_path / "a.snap", MARK)
        case "a layer on it":
            other = await store.new_layer(qemu_img, held.layer)

    held.discard()

    assert held.layer.path.exists()
    if other is not None:
        other.discard()
        await store.collect(qemu_img)
        assert files(store) == []


async def test_a_layer_below_one_that_is_needed_is_kept(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path
) -> None:
    lower = await store.new_layer(qemu_img, base)
    upper = await store.new_layer(qemu_img, lower.layer)
    aside = await store.new_layer(qemu_img, lower.layer)
    store.keep_for(upper.layer.path, publish(tmp_path / "a.snap"), MARK)
    for held in (lower, upper, aside):
        held.release()

    assert await store.collect(qemu_img) == [aside.layer.path]
    assert await read_chain(qemu_img, upper.layer.path) == (upper.layer, lower.layer, base)
    shown = {layer.path: layer for layer in await store.survey(qemu_img)}
    assert shown[lower.layer.path].above == (upper.layer.path,)
    assert [x.state for x in shown[upper.layer.path].references] == ["there"]


async def test_a_layer_below_a_file_elsewhere_is_kept(
    qemu_img: Path, store: Store, base: Layer, make: Make
) -> None:
    lower = await store.new_layer(qemu_img, base)
    (elsewhere, *_) = await read_chain(qemu_img, make("between.qcow2", on=lower.layer.path))
    upper = await store.new_layer(qemu_img, elsewhere)
    lower.release()

    assert await store.collect(qemu_img) == []
    upper.release()
    assert set(await store.collect(qemu_img)) == {upper.layer.path, lower.layer.path}


async def test_a_layer_of_a_snapshot_is_removed_when_that_is_gone_and_it_is_asked_for(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path
) -> None:
    snapshot = tmp_path / "a.snap"
    layer = await kept(qemu_img, store, base, snapshot)
    publish(snapshot)
    assert await store.collect(qemu_img, gone=True) == []

    remove(snapshot)
    # It may have been moved.
    assert await store.collect(qemu_img) == []
    (shown,) = await store.survey(qemu_img)
    assert (shown.needed, shown.references[0].state) == (True, "gone")
    assert not (await store.survey(qemu_img, gone=True))[0].needed
    assert await store.collect(qemu_img, gone=True) == [layer.path]
    assert files(store) == []


async def test_another_snapshot_of_the_name_is_not_the_one(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path
) -> None:
    snapshot = publish(tmp_path / "a.snap", mark="f" * 32)
    layer = await kept(qemu_img, store, base, snapshot)

    assert await store.collect(qemu_img) == []
    assert await store.collect(qemu_img, gone=True) == [layer.path]


async def test_a_snapshot_that_was_moved_is_known_again_at_its_new_path(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path
) -> None:
    old, new = tmp_path / "a.snap", tmp_path / "b.snap"
    layer = await kept(qemu_img, store, base, old)
    publish(old)
    old.rename(new)
    sidecar(old).rename(sidecar(new))

    store.keep_for(layer.path, new, MARK)

    assert await store.collect(qemu_img, gone=True) == []
    (shown,) = await store.survey(qemu_img)
    assert sorted(found.state for found in shown.references) == ["gone", "there"]


async def test_a_sidecar_that_has_no_name_yet_counts(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path
) -> None:
    """Its writer was killed between the name of the image and that of the sidecar."""
    snapshot = tmp_path / "a.snap"
    await kept(qemu_img, store, base, snapshot)
    publish(snapshot)
    sidecar(snapshot).rename(tmp_path / "a.snap.json.partial")
    assert await store.collect(qemu_img, gone=True) == []

    sidecar(snapshot).write_text('{"mark": "of the one before"}')
    assert await store.collect(qemu_img, gone=True) == []

    # It was killed before that, and the image is the one before.
    snapshot.write_bytes(b"image" + bytes.fromhex("f" * 32))
    (shown,) = await store.survey(qemu_img)
    assert shown.references[0].state == "gone"

    (tmp_path / "a.snap.json.partial").write_bytes(b"")  # another one is being written
    assert len(await store.collect(qemu_img, gone=True)) == 1


@pytest.mark.parametrize("what", ["removed", "another one", "a file", "damaged", "a folder"])
async def test_a_snapshot_that_cannot_be_looked_for_keeps_its_layer(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path, what: str
) -> None:
    snapshot = tmp_path / "disk" / "a.snap"
    snapshot.parent.mkdir()
    layer = await kept(qemu_img, store, base, snapshot)
    publish(snapshot)
    match what:
        case "removed":
            snapshot.parent.rename(tmp_path / "elsewhere")
        case "another one":  # as when its disk is not mounted
            snapshot.parent.rename(tmp_path / "elsewhere")
            snapshot.parent.mkdir()
        case "a file":
            snapshot.parent.rename(tmp_path / "elsewhere")
            snapshot.parent.touch()
        case "damaged":
            sidecar(snapshot).write_bytes(b"\0" * 100)
        case "a folder":
            sidecar(snapshot).unlink()
            sidecar(snapshot).mkdir()

    assert await store.collect(qemu_img, gone=True) == []
    assert layer.path.exists()
    (shown,) = await store.survey(qemu_img, gone=True)
    away = what in ("removed", "another one", "a file")
    assert shown.references[0].state == ("away" if away else "unreadable")

    assert await store.forget(tmp_path / "other") == 0
    assert await store.forget(snapshot.parent) == 1
    assert await store.collect(qemu_img) == [layer.path]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("what", ["sidecar", "folder"])
async def test_a_snapshot_that_may_not_be_read_keeps_its_layer(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path, what: str
) -> None:
    snapshot = publish(tmp_path / "private" / "a.snap")
    await kept(qemu_img, store, base, snapshot)
    closed = sidecar(snapshot) if what == "sidecar" else snapshot.parent
    closed.chmod(0)
    try:
        assert await store.collect(qemu_img, gone=True) == []
        (shown,) = await store.survey(qemu_img)
        assert shown.references[0].state == "unreadable"
    finally:
        closed.chmod(0o700)


async def test_a_snapshot_that_is_there_is_not_forgotten(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path
) -> None:
    snapshot = publish(tmp_path / "a.snap")
    await kept(qemu_img, store, base, snapshot)

    assert await store.forget(tmp_path) == 0
    assert await store.collect(qemu_img, gone=True) == []


async def test_a_reference_that_cannot_be_read_keeps_its_layer(
    qemu_img: Path, store: Store, base: Layer, tmp_path: Path
) -> None:
    layer = await kept(qemu_img, store, base, tmp_path / "a.snap")
    (reference,) = layer.path.with_suffix(".needed").iterdir()
    for content in (b"", b"{}", b'{"snapshot": 3, "folder": 1}', b"\xff"):
        reference.write_bytes(content)

        assert await store.collect(qemu_img, gone=True) == []


async def test_nothing_is_removed_while_it_is_not_known_what_a_layer_is_on(
    qemu_img: Path, store: Store, base: Layer, caplog: pytest.LogCaptureFixture
) -> None:
    unneeded = await store.new_layer(qemu_img, base)
    unneeded.release()
    held = await store.new_layer(qemu_img, base)
    whole = held.layer.path.read_bytes()
    held.layer.path.write_bytes(b"\0" * 4096)

    assert await store.collect(qemu_img, gone=True) == []
    assert "no layer is removed" in caplog.text

    held.layer.path.write_bytes(whole)
    moved = base.path.parent / "other"
    # What a user has removed is nothing to wait for.
    base.path.rename(moved)
    assert await store.collect(qemu_img) == [unneeded.layer.path]
    held.release()


async def test_nothing_is_removed_while_the_folder_of_a_users_image_is_not_there(
    qemu_img: Path, store: Store, make: Make, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    disk = make("disk.qcow2").rename(tmp_path / "mnt" / "disk.qcow2")
    (base,) = await read_chain(qemu_img, disk)
    held = [await store.new_layer(qemu_img, base) for _ in range(2)]
    held[0].release()
    (tmp_path / "mnt").rename(tmp_path / "away")

    assert await store.collect(qemu_img) == []
    (tmp_path / "away").rename(tmp_path / "mnt")
    assert await store.collect(qemu_img) == [held[0].layer.path]
    held[1].release()


async def test_files_that_are_not_the_labs_are_left_alone(
    qemu_img: Path, store: Store, base: Layer
) -> None:
    held = await store.new_layer(qemu_img, base)
    other = store.folder / "6ba7b810-9dad-11d1-80b4-00c04fd430c8.qcow2"
    others = [other, store.folder / "disk.qcow2", store.folder / "x.lock"]
    for path in others:
        path.write_text("mine")
    held.release()

    assert await store.collect(qemu_img, gone=True) == [held.layer.path]
    assert sorted(files(store)) == sorted(path.name for path in others)
    with pytest.raises(UsageError, match="no layer of"):
        store.keep_for(other, Path("/a.snap"), MARK)
    with pytest.raises(HostError, match="has been removed"):
        await store.hold(held.layer)


async def test_a_users_disk_may_be_in_the_same_folder(
    qemu_img: Path, store: Store, make: Make
) -> None:
    disk = make("x").rename(store.folder / "6ba7b810-9dad-11d1-80b4-00c04fd430c8.qcow2")
    raw = make("y", "raw").rename(store.folder / "disk.raw")
    held = [
        await store.new_layer(qemu_img, (await read_chain(qemu_img, path))[0])
        for path in (disk, raw)
    ]

    assert await store.collect(qemu_img) == []
    for one in held:
        one.release()
    assert len(await store.collect(qemu_img)) == 2
    assert files(store) == sorted([disk.name, raw.name])


async def test_rests_of_what_was_killed_are_removed(
    qemu_img: Path, store: Store, base: Layer
) -> None:
    held = await store.new_layer(qemu_img, base)
    name = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    (store.folder / f"{name}.lock").touch()
    (store.folder / f"{name}.needed").mkdir()
    (store.folder / f"{name}.needed" / ".x.partial").touch()
    (store.folder / f".{name}.qcow2.01234567.partial").touch()
    mine = store.folder / f".{held.layer.path.name}.01234567.partial"
    mine.touch()

    assert await store.collect(qemu_img) == []
    assert name not in " ".join(files(store))
    assert mine.exists()
    held.discard()
    await store.collect(qemu_img)
    assert files(store) == []


async def test_a_layer_that_was_removed_gets_no_overlay(
    qemu_img: Path, store: Store, base: Layer
) -> None:
    held = await store.new_layer(qemu_img, base)
    held.discard()

    with pytest.raises(HostError, match="has been removed"):
        await store.new_layer(qemu_img, held.layer)
    assert files(store) == []


async def test_a_layer_that_cannot_be_made_leaves_nothing(
    qemu_img: Path, store: Store, base: Layer
) -> None:
    with pytest.raises(HostError, match="no program"):
        await store.new_layer(store.folder / "qemu-img", base)
    assert files(store) == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
async def test_a_child_does_not_hold_what_its_parent_does(
    qemu_img: Path, store: Store, base: Layer
) -> None:
    held = await store.new_layer(qemu_img, base)
    fork = multiprocessing.get_context("fork")
    ready, end = fork.Event(), fork.Event()

    def wait() -> None:
        ready.set()
        end.wait()

    child = fork.Process(target=wait)
    child.start()
    # It is only started, which blocks nobody for long, and has to inherit what this process has.
    started = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False
    )
    try:
        ready.wait()
        assert holders(held.layer.path.with_suffix(".lock")) == (os.getpid(),)
        # As the kernel does when this process is killed.
        held._drop()
        assert await store.collect(qemu_img) == [held.layer.path]
    finally:
        end.set()
        child.join()
        started.communicate(b"\n")


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(HostError, match="other users may write"):
        Store(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="LAB_LAYERS_DIR"):
        Store(tmp_path / "file")


def test_where_the_layers_are_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LAB_LAYERS_DIR", raising=False)
    assert Store.default().folder == tmp_path / "cache" / "layers"
    monkeypatch.setenv("LAB_LAYERS_DIR", str(tmp_path / "mine"))
    assert Store.default().folder == tmp_path / "mine"


def test_what_is_no_mark_is_refused(tmp_path: Path, store: Store) -> None:
    name = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    (store.folder / f"{name}.lock").touch()
    for mark in ("", "../x", "a.b", "a/b"):
        with pytest.raises(UsageError, match="no mark"):
            store.keep_for(store.folder / f"{name}.qcow2", tmp_path / "a.snap", mark)


def test_the_mark_of_a_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "a.snap.json"
    path.write_text('{"mark": "ab"}')
    assert snapshot_mark(path) == "ab"
    path.write_text('{"mark": null}')
    assert snapshot_mark(path) is None
    path.write_text("[]")
    with pytest.raises(ValueError):
        snapshot_mark(path)
