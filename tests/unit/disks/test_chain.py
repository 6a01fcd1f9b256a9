"""What a disk image is, and which are refused before anything is started."""

import fcntl
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.disks.chain import Layer, read_chain, require_unlocked
from lab.disks.header import read_header
from lab.errors import HostError, LabError
from tests.unit.disks.conftest import Make, call

MIB = 1 << 20


async def refusal(qemu_img: Path, image: Path, *, format: str | None = None) -> LabError:
    """How an image is refused: in one line, with a cause and a remedy."""
    with pytest.raises(LabError) as caught:
        await read_chain(qemu_img, image, format=format)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    return caught.value


async def test_a_chain_is_read_from_its_top_to_its_end(qemu_img: Path, make: Make) -> None:
    base = make("base.raw", "raw", mib=2)
    middle = make("middle.qcow2", on=base, mib=2)
    top = make("top.qcow2", on=middle, mib=3)

    chain = await read_chain(qemu_img, top)

    assert [layer.path for layer in chain] == [top, middle, base]
    assert [layer.format for layer in chain] == ["qcow2", "qcow2", "raw"]
    assert [layer.virtual_bytes // MIB for layer in chain] == [3, 2, 2]
    assert [layer.backing for layer in chain] == [middle, base, None]
    assert [layer.allocated_bytes for layer in chain] == [
        layer.path.stat().st_blocks * 512 for layer in chain
    ]


async def test_the_size_of_a_raw_disk_is_in_whole_sectors(qemu_img: Path, tmp_path: Path) -> None:
    disk = tmp_path / "odd"
    disk.write_bytes(b"x" * 1000)

    assert [layer.virtual_bytes for layer in await read_chain(qemu_img, disk)] == [1024]


@pytest.mark.parametrize(
    "name",
    [
        "with space.img",
        "a,b=c.img",
        "file.driver=null-co,x.img",
        "nbd:localhost:10809",
        "file:x.img",
        'json:{"driver":"null-co"}',
        "ünïcödé 磁盤.img",
        "-o.img",
        "%s\\n*?.img",
        "two\nlines",
    ],
)
@pytest.mark.parametrize("relative", [False, True])
async def test_an_image_may_have_any_name(
    qemu_img: Path,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    relative: bool,
) -> None:
    base = make(name)
    top = make(f"on {name}", on=base)
    monkeypatch.chdir(tmp_path)

    chain = await read_chain(qemu_img, Path(top.name) if relative else top)

    assert [layer.path for layer in chain] == [top, base]


async def test_a_backing_file_is_found_from_where_the_overlay_lies(
    qemu_img: Path, make: Make, tmp_path: Path
) -> None:
    base = make("base.qcow2")
    (tmp_path / "sub").mkdir()
    for name in ("../base.qcow2", f"file:{base}"):
        on = ("-u", "-b", name, "-F", "qcow2")
        call(qemu_img, "create", "-q", "-f", "qcow2", *on, tmp_path / "sub" / "top", "1M")

        assert [x.path for x in await read_chain(qemu_img, tmp_path / "sub" / "top")][1] == base


async def test_a_link_is_followed_so_that_an_overlay_stays_on_the_file(
    qemu_img: Path, make: Make, tmp_path: Path
) -> None:
    base = make("base.qcow2")
    link = tmp_path / "current"
    link.symlink_to(base.name)

    assert [layer.path for layer in await read_chain(qemu_img, link)] == [base]


async def test_what_is_not_there_is_refused(qemu_img: Path, tmp_path: Path) -> None:
    error = await refusal(qemu_img, tmp_path / "none.qcow2")
    assert "there is no disk image" in error.cause
    assert str(tmp_path / "none.qcow2") in error.cause

    (tmp_path / "dangling").symlink_to("nowhere")
    assert "there is no disk image" in (await refusal(qemu_img, tmp_path / "dangling")).cause
    (tmp_path / "round").symlink_to("round")
    assert "there is no disk image" in (await refusal(qemu_img, tmp_path / "round")).cause
    assert "null" in (await refusal(qemu_img, Path("/a\0b"))).cause
    assert "UTF-8" in (await refusal(qemu_img, Path(os.fsdecode(b"/a\xff")))).cause


async def test_what_is_no_file_is_refused_without_waiting_for_it(
    qemu_img: Path, tmp_path: Path
) -> None:
    assert "is a directory" in (await refusal(qemu_img, tmp_path)).cause
    assert "no regular file" in (await refusal(qemu_img, Path("/dev/null"))).cause
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "no regular file" in (await refusal(qemu_img, fifo)).cause
    with socket.socket(socket.AF_UNIX) as listener:
        # A socket's whole path has to be short.
        folder = os.open(tmp_path, os.O_PATH)
        listener.bind(f"/proc/self/fd/{folder}/s")
        os.close(folder)
    await refusal(qemu_img, tmp_path / "s")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_what_may_not_be_read_is_refused(qemu_img: Path, make: Make) -> None:
    base = make("base.qcow2")
    top = make("top.qcow2", on=base)
    base.chmod(0)

    assert isinstance(await refusal(qemu_img, base), HostError)
    error = await refusal(qemu_img, top)
    assert f"{top} is an overlay of {base}, which cannot be read" in error.cause


async def test_a_backing_file_that_is_missing_is_named_and_so_is_who_needs_it(
    qemu_img: Path, make: Make
) -> None:
    base = make("base.raw", "raw")
    middle = make("middle.qcow2", on=base)
    top = make("top.qcow2", on=middle)
    base.unlink()

    error = await refusal(qemu_img, top)

    assert f"{middle} is an overlay of {base}, which is not there" in error.cause
    assert "rebase" in error.remedy


async def test_a_chain_that_goes_round_is_refused(qemu_img: Path, make: Make) -> None:
    one = make("one.qcow2")
    two = make("two.qcow2", on=one)
    call(qemu_img, "rebase", "-u", "-F", "qcow2", "-b", two, one)
    assert "in a circle" in (await refusal(qemu_img, two)).cause

    call(qemu_img, "rebase", "-u", "-F", "qcow2", "-b", one, one)
    assert "in a circle" in (await refusal(qemu_img, one)).cause


@pytest.mark.parametrize(
    "name", ["nbd://localhost/x", 'json:{"driver":"null-co"}', "http://x/y", "file://x/y"]
)
async def test_a_backing_file_elsewhere_is_refused_and_not_asked_for(
    qemu_img: Path, tmp_path: Path, name: str, make: Make
) -> None:
    top = make("top.qcow2", on=tmp_path / ("x" * len(name)))
    content = top.read_bytes()
    old = os.fsencode(tmp_path / ("x" * len(name)))
    assert content.count(old) == 1
    header = bytearray(content)
    header[16:20] = struct.pack(">I", len(name))
    (at,) = struct.unpack_from(">Q", content, 8)
    header[at : at + len(name)] = name.encode()
    top.write_bytes(header)

    assert "no file of this host" in (await refusal(qemu_img, top)).cause


async def test_an_encrypted_image_is_refused(qemu_img: Path, make: Make, tmp_path: Path) -> None:
    for method in (1, 2):
        image = make(f"encrypted-{method}.qcow2")
        with image.open("r+b") as file:
            file.seek(32)
            file.write(struct.pack(">I", method))
        assert "encrypted" in (await refusal(qemu_img, image)).cause

    luks = tmp_path / "luks.img"
    luks.write_bytes(b"LUKS\xba\xbe\0\1" + bytes(MIB))
    assert "encrypted" in (await refusal(qemu_img, luks)).cause
    assert (await read_chain(qemu_img, luks, format="raw"))[0].format == "raw"


FOREIGN = {
    "vmdk": b"KDMV\1\0\0\0",
    "vdi": b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(0x40, b"\0") + b"\x7f\x10\xda\xbe",
    "vhdx": b"vhdxfile",
    "vpc": b"conectix\0\0\0\2",
    "qed": b"QED\0",
    "qcow": b"QFI\xfb\0\0\0\1",
    "parallels": b"WithoutFreeSpace",
}


@pytest.mark.parametrize("kind", FOREIGN)
async def test_a_format_without_a_driver_is_not_taken_for_raw(
    qemu_img: Path, tmp_path: Path, kind: str
) -> None:
    image = tmp_path / "image"
    image.write_bytes(FOREIGN[kind].ljust(MIB, b"\0"))

    error = await refusal(qemu_img, image)

    assert str(image) in error.cause
    assert read_header(image).kind == kind
    assert (await read_chain(qemu_img, image, format="raw"))[0].virtual_bytes == MIB


@pytest.mark.parametrize(
    ("packed", "magic"),
    [("gzip", b"\x1f\x8b"), ("xz", b"\xfd7zXZ\0"), ("zstd", b"\x28\xb5\x2f\xfd")],
)
async def test_a_packed_image_is_refused_and_told_to_be_unpacked(
    qemu_img: Path, tmp_path: Path, packed: str, magic: bytes
) -> None:
    image = tmp_path / f"disk.qcow2.{packed}"
    image.write_bytes(magic.ljust(MIB, b"\0"))

    error = await refusal(qemu_img, image)

    assert f"packed with {packed}" in error.cause
    assert "unpack" in error.remedy


async def test_a_fixed_disk_of_virtual_pc_is_known_by_its_end(tmp_path: Path) -> None:
    image = tmp_path / "disk.vhd"
    image.write_bytes(bytes(MIB) + b"conectix".ljust(512, b"\0"))

    assert read_header(image).kind == "vpc"


async def test_a_format_is_believed_to_its_user(qemu_img: Path, make: Make) -> None:
    image = make("disk.qcow2")

    (layer,) = await read_chain(qemu_img, image, format="raw")
    assert (layer.format, layer.virtual_bytes) == ("raw", -(-image.stat().st_size // 512) * 512)

    raw = make("disk.raw", "raw")
    assert "no qcow2 image" in (await refusal(qemu_img, raw, format="qcow2")).cause
    for format in ("nbd", "file", "blkdebug", "luks", ""):
        assert "no format" in (await refusal(qemu_img, raw, format=format)).cause


@pytest.mark.parametrize("size", [0, 1, 511])
async def test_a_file_without_a_whole_sector_is_refused(
    qemu_img: Path, tmp_path: Path, size: int
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(size))

    assert "no disk" in (await refusal(qemu_img, image)).cause


async def test_a_disk_of_no_size_is_refused(qemu_img: Path, make: Make) -> None:
    assert "no size" in (await refusal(qemu_img, make("none.qcow2", mib=0))).cause


async def test_a_damaged_header_is_refused(qemu_img: Path, make: Make) -> None:
    image = make("disk.qcow2")
    whole = image.read_bytes()

    image.write_bytes(whole[:100].ljust(600, b"\xff"))
    assert str(image) in (await refusal(qemu_img, image)).cause
    image.write_bytes(whole[:4] + b"\xff" * 1000)
    assert str(image) in (await refusal(qemu_img, image)).cause
    # It has its header still, and none of its tables.
    image.write_bytes(whole[: 1 << 16])
    await refusal(qemu_img, image)


@pytest.mark.parametrize(("bit", "cause"), [(0, "not closed"), (1, "damaged")])
async def test_an_image_that_is_marked_dirty_or_corrupt_is_refused(
    qemu_img: Path, make: Make, bit: int, cause: str
) -> None:
    image = make("disk.qcow2")
    with image.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 1 << bit))

    error = await refusal(qemu_img, image)

    assert cause in error.cause
    assert "qemu-img check" in error.remedy


async def test_an_image_whose_data_is_in_another_file_is_refused(
    qemu_img: Path, make: Make, tmp_path: Path
) -> None:
    image = make("disk.qcow2", options=f"data_file={tmp_path / 'data'}")

    assert "another file" in (await refusal(qemu_img, image)).cause


async def test_without_a_qemu_img_it_is_told_how_to_get_one(tmp_path: Path, make: Make) -> None:
    error = await refusal(tmp_path / "qemu-img", make("disk.qcow2"))

    assert isinstance(error, HostError)
    assert "lab build" in error.remedy


async def test_nothing_is_written_to_an_image(qemu_img: Path, make: Make) -> None:
    base = make("base.raw", "raw")
    top = make("top.qcow2", on=base)
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in (base, top)]

    await read_chain(qemu_img, top)
    await require_unlocked(qemu_img, base, top)

    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in (base, top)] == before


_PERMISSIONS, _WRITE = 100, 1
"""QEMU locks a byte of a file for each permission that it has on it; this is the one to write."""


@pytest.fixture(params=["raw", "qcow2"])
def written_elsewhere(make: Make, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An image that is locked as a QEMU that writes to it does."""
    image = make(f"in use.{request.param}", request.param)
    with image.open("r+b") as file:
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, _PERMISSIONS + _WRITE, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        yield image


async def test_an_image_that_another_qemu_writes_to_is_refused(
    qemu_img: Path, make: Make, written_elsewhere: Path
) -> None:
    with pytest.raises(HostError) as caught:
        await require_unlocked(qemu_img, written_elsewhere)

    assert "in use" in caught.value.cause
    assert f"process {os.getpid()}" in caught.value.cause
    # It can be looked at all the same, and its own base is not in use.
    top = make("top.qcow2", on=written_elsewhere)
    assert len(await read_chain(qemu_img, top)) == 2
    await require_unlocked(qemu_img, top)
    with pytest.raises(HostError, match="in use"):
        await require_unlocked(qemu_img, top, written_elsewhere)


def test_a_layer_can_be_put_into_a_record() -> None:
    layer = Layer(path=Path("/x"), format="raw", virtual_bytes=1, allocated_bytes=0, backing=None)

    assert json.dumps(layer.__dict__, default=str)
