"""``lab disk``: who needs which layer, and what is removed."""

import asyncio
import json
import os
from pathlib import Path

import pytest

import lab.__main__ as command_line
import lab.cli.disk
from lab.disks.chain import Layer, read_chain
from lab.disks.store import HeldLayer, Store

MARK = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def store(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qemu_img: Path,
) -> Store:
    monkeypatch.setenv("LAB_LAYERS_DIR", str(tmp_path / "layers"))
    monkeypatch.setattr(lab.cli.disk, "_qemu_img", lambda: qemu_img)
    return Store.default()


@pytest.fixture
def chain(qemu_img: Path, store: Store, tmp_path: Path) -> list[Layer]:
    """Three layers on a user's disk, of which a snapshot needs the topmost."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"user" * 16384)

    async def grow() -> list[HeldLayer]:
        (base,) = await read_chain(qemu_img, disk)
        held: list[HeldLayer] = []
        for _ in range(3):
            held.append(await store.new_layer(qemu_img, held[-1].layer if held else base))
        return held

    held = asyncio.run(grow())
    store.keep_for(held[-1].layer.path, tmp_path / "a.snap", MARK)
    write_sidecar(tmp_path / "a.snap", [held[-1].layer])
    for one in held:
        one.release()
    return [one.layer for one in held]


def write_sidecar(snapshot: Path, layers: list[Layer]) -> None:
    disks = [
        {
            "node": f"disk{k}",
            "layer": str(layer.path),
            "format": layer.format,
            "virtual_bytes": layer.virtual_bytes,
            "named": "",
            "stands_on": [],
        }
        for k, layer in enumerate(layers)
    ]
    snapshot.with_name(snapshot.name + ".json").write_text(
        json.dumps({"mark": MARK, "disks": disks})
    )


def run(*arguments: str | Path | int) -> int:
    return command_line.main(["disk", *map(str, arguments)])


def test_each_layer_is_listed_with_who_needs_it(
    chain: list[Layer],
    store: Store,
    qemu_img: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    held = asyncio.run(store.new_layer(qemu_img, chain[0]))

    assert run("list") == 0
    text = capsys.readouterr().out
    assert f"process {os.getpid()} uses it" in text
    assert f"the snapshot {tmp_path / 'a.snap'} needs it" in text
    assert f"the layer {chain[1].path.name} is on it" in text
    assert "4 in" in text

    held.release()
    assert run("list", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    layers = {Path(layer["path"]): layer for layer in document["layers"]}
    assert [layers[layer.path]["needed"] for layer in chain] == [True] * 3
    assert not layers[held.layer.path]["needed"]
    assert layers[chain[2].path]["snapshots"][0]["state"] == "there"
    assert layers[chain[0].path]["backing"] == str(tmp_path / "disk.raw")


def test_an_empty_store_is_said_to_be_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    assert "no layers" in capsys.readouterr().out


def test_what_may_have_been_moved_is_named_and_removed_only_when_asked_for(
    chain: list[Layer], store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.snap.json").unlink()

    assert run("clean") == 0
    text = capsys.readouterr().out
    assert "0 layers removed, 0.0 MiB freed; 3 are kept" in text
    assert f"the snapshot {tmp_path / 'a.snap'}, which is not there any more" in text

    assert run("clean", "--yes", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["removed"] == sorted(str(layer.path) for layer in chain)
    assert document["freed_bytes"] == sum(layer.allocated_bytes for layer in chain)
    assert document["layers"] == []


def test_a_folder_that_is_gone_for_good_is_forgotten(
    store: Store,
    qemu_img: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(4096))
    (base,) = asyncio.run(read_chain(qemu_img, disk))
    held = asyncio.run(store.new_layer(qemu_img, base))
    (tmp_path / "usb").mkdir()
    store.keep_for(held.layer.path, tmp_path / "usb" / "a.snap", MARK)
    held.release()
    (tmp_path / "usb").rmdir()

    assert run("clean", "--yes") == 0
    assert "whose folder is not there" in capsys.readouterr().out
    assert run("clean", "--forget", tmp_path / "usb") == 0
    assert "1 layers removed" in capsys.readouterr().out


def test_a_chain_is_shortened_and_says_so(
    chain: list[Layer],
    qemu_img: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert run("commit", tmp_path / "a.snap") == 0
    text = capsys.readouterr().out
    assert f"disk0: 2 layers are in {chain[2].path.name} now" in text
    assert "2 layers removed" in text
    assert len(asyncio.run(read_chain(qemu_img, chain[2].path))) == 2

    assert run("commit", tmp_path / "a.snap") == 2
    assert "as short as it can be" in capsys.readouterr().err


def test_a_disk_is_exported(
    chain: list[Layer],
    qemu_img: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert run("export", tmp_path / "a.snap", 0, tmp_path / "out.img") == 0
    assert "raw" in capsys.readouterr().out
    assert (tmp_path / "out.img").read_bytes() == b"user" * 16384
    assert run("export", tmp_path / "a.snap", 0, tmp_path / "out") == 0
    (layer,) = asyncio.run(read_chain(qemu_img, tmp_path / "out"))
    assert layer.format == "qcow2"


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["export", "a.snap", "1", "out"], "has no disk 1"),
        (["export", "a.snap", "-1", "out"], "-1"),
        (["export", "none.snap", "0", "out"], "there is no snapshot"),
        (["export", "a.snap", "0", "disk.raw"], "is there already"),
        (["commit", "memory.snap"], "has no disks"),
        ([], "required"),
    ],
)
def test_what_cannot_work_is_one_line(
    chain: list[Layer],
    arguments: list[str],
    cause: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory.snap.json").write_text(json.dumps({"mark": MARK}))

    assert run(*arguments) == 2

    error = capsys.readouterr().err
    assert cause in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_snapshot_that_was_moved_is_known_again(
    chain: list[Layer], store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.snap.json").rename(tmp_path / "b.snap.json")

    assert run("export", tmp_path / "b.snap", 0, tmp_path / "out") == 0
    assert run("clean", "--yes") == 0

    assert "0 layers removed" in capsys.readouterr().out
    assert chain[2].path.exists()
