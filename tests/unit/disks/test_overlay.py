"""An overlay is complete or not there, private, and takes nobody's place."""

import asyncio
import os
import stat
from pathlib import Path

import pytest

from lab.disks.chain import read_chain
from lab.disks.overlay import create_overlay
from lab.errors import HostError, UsageError
from tests.unit.disks.conftest import Make, call


async def test_an_overlay_is_a_private_qcow2_that_names_what_it_is_on(
    qemu_img: Path, make: Make, tmp_path: Path
) -> None:
    (base,) = await read_chain(qemu_img, make("a,b:c=ü.raw", "raw", mib=3))
    old = os.umask(0)
    try:
        made = await create_overlay(qemu_img, tmp_path / "file:x,y.qcow2", base)
    finally:
        os.umask(old)

    assert await read_chain(qemu_img, made.path) == (made, base)
    assert made.format == "qcow2"
    assert made.virtual_bytes == base.virtual_bytes
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
    info = call(qemu_img, "info", "--output=json", made.path)
    assert '"backing-filename-format": "raw"' in info
    assert '"compat": "1.1"' in info


async def test_the_format_of_the_base_is_not_guessed_again(
    qemu_img: Path, make: Make, tmp_path: Path
) -> None:
    """A guest that writes a header to the beginning of its raw disk gets no other file by that."""
    disk = make("disk.raw", "raw")
    (base,) = await read_chain(qemu_img, disk, format="raw")
    overlay = await create_overlay(qemu_img, tmp_path / "o", base)
    disk.write_bytes(make("secret.qcow2", on=Path("/etc/passwd")).read_bytes())

    chain = await read_chain(qemu_img, overlay.path)

    assert [layer.format for layer in chain] == ["qcow2", "raw"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder"])
async def test_an_overlay_replaces_nothing(
    qemu_img: Path, make: Make, tmp_path: Path, kind: str
) -> None:
    (base,) = await read_chain(qemu_img, make("base.qcow2"))
    taken = tmp_path / "taken"
    match kind:
        case "file":
            taken.write_text("mine")
        case "link":
            (tmp_path / "other").write_text("mine")
            taken.symlink_to("other")
        case "dangling link":
            taken.symlink_to("nowhere")
        case "folder":
            taken.mkdir()
    before = sorted(tmp_path.iterdir())

    with pytest.raises(UsageError, match="is there already"):
        await create_overlay(qemu_img, taken, base)

    assert sorted(tmp_path.iterdir()) == before


async def test_of_several_for_one_name_one_wins(qemu_img: Path, make: Make, tmp_path: Path) -> None:
    (base,) = await read_chain(qemu_img, make("base.qcow2"))
    tries = [create_overlay(qemu_img, tmp_path / "one", base) for _ in range(5)]

    results = await asyncio.gather(*tries, return_exceptions=True)

    assert sorted(type(result).__name__ for result in results) == ["Layer"] + ["UsageError"] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.qcow2", "one"]


async def test_what_cannot_be_made_leaves_nothing(
    qemu_img: Path, make: Make, tmp_path: Path
) -> None:
    (base,) = await read_chain(qemu_img, make("base.qcow2"))
    deep = tmp_path / "/".join(["d" * 200] * 6)
    deep.mkdir(parents=True)
    (long,) = await read_chain(qemu_img, Path(make("x").rename(deep / "base.qcow2")))
    before = sorted(tmp_path.iterdir())

    for path, on in (
        (tmp_path / "none" / "overlay", base),
        (tmp_path / ("x" * 300), base),
        (tmp_path / "long", long),
    ):
        with pytest.raises(HostError, match="cannot be made"):
            await create_overlay(qemu_img, path, on)
    with pytest.raises(UsageError, match="UTF-8"):
        await create_overlay(qemu_img, tmp_path / os.fsdecode(b"\xff"), base)
    with pytest.raises(HostError, match="no program"):
        await create_overlay(tmp_path / "qemu-img", tmp_path / "o", base)

    assert sorted(tmp_path.iterdir()) == before


async def test_cancelled_it_leaves_nothing(qemu_img: Path, make: Make, tmp_path: Path) -> None:
    (base,) = await read_chain(qemu_img, make("base.qcow2"))
    for turns in range(12):
        task = asyncio.create_task(create_overlay(qemu_img, tmp_path / f"o{turns}", base))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        task.cancel()
        done = await asyncio.gather(task, return_exceptions=True)
        found = {path.name for path in tmp_path.iterdir()} - {"base.qcow2"}
        assert found == (set() if isinstance(done[0], BaseException) else {f"o{turns}"})
        for name in found:
            (tmp_path / name).unlink()
