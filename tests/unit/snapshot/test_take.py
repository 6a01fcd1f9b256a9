"""An image has its name only when it is complete, and nobody else may read it."""

import os
import socket
import stat
from pathlib import Path

import pytest

from lab.errors import SnapshotError
from lab.snapshot.image import partial_image


def test_the_partial_image_is_private_whatever_was_there(tmp_path: Path) -> None:
    left_over = tmp_path / "a.snap.partial"
    left_over.write_bytes(b"old")
    left_over.chmod(0o644)
    with partial_image(tmp_path / "a.snap") as partial:
        assert partial.path == left_over
        assert left_over.read_bytes() == b""
        assert stat.S_IMODE(left_over.stat().st_mode) == 0o600


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with partial_image(tmp_path / "a.snap") as partial:
            partial.path.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_two_snapshots_can_not_write_one_image(tmp_path: Path) -> None:
    image = tmp_path / "a.snap"
    with partial_image(image) as partial:
        partial.path.write_bytes(b"first")
        with (
            pytest.raises(SnapshotError, match="another snapshot is being written"),
            partial_image(image),
        ):
            pass
        assert partial.path.read_bytes() == b"first"


@pytest.mark.parametrize(
    "name", ["", "missing/a.snap", "x" * 256, "x" * 245, "a\0b", "file/a.snap"]
)
def test_a_path_that_can_not_be_written_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SnapshotError) as caught, partial_image(tmp_path / name):
        pass
    assert caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("in_the_way", ["a.snap", "a.snap.json", "link"])
@pytest.mark.parametrize("kind", ["directory", "FIFO", "socket", "device"])
def test_what_is_no_file_is_never_replaced(tmp_path: Path, kind: str, in_the_way: str) -> None:
    # A link as /dev/stdout is one.
    place = tmp_path / ("elsewhere" if in_the_way == "link" else in_the_way)
    if kind == "directory":
        place.mkdir()
    elif kind == "FIFO":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place))
    elif os.geteuid() == 0:
        os.mknod(place, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    else:
        pytest.skip("only root makes devices")
    if in_the_way == "link":
        (tmp_path / "a.snap").symlink_to(place)
    before = {path.name: path.lstat() for path in tmp_path.iterdir()}
    with (
        pytest.raises(SnapshotError, match=f"is a {kind}; name a file"),
        partial_image(tmp_path / "a.snap"),
    ):
        pass
    assert {path.name: path.lstat() for path in tmp_path.iterdir()} == before


def test_a_link_in_the_partial_images_place_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a.snap.partial").symlink_to(victim)
    with pytest.raises(SnapshotError), partial_image(tmp_path / "a.snap"):
        pass
    assert victim.read_text() == "precious"
