"""An image has its name only when it is complete, and nobody else may read it."""

import stat
from pathlib import Path

import pytest

from lab.errors import SnapshotError
from lab.snapshot import _partial_image


def test_the_partial_image_is_private_whatever_was_there(tmp_path: Path) -> None:
    left_over = tmp_path / "a.snap.partial"
    left_over.write_bytes(b"old")
    left_over.chmod(0o644)
    with _partial_image(tmp_path / "a.snap") as partial:
        assert partial == left_over
        assert partial.read_bytes() == b""
        assert stat.S_IMODE(partial.stat().st_mode) == 0o600


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with _partial_image(tmp_path / "a.snap") as partial:
            partial.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_complete_image_stays_under_its_name(tmp_path: Path) -> None:
    image = tmp_path / "a.snap"
    with _partial_image(image) as partial:
        partial.write_bytes(b"all")
        partial.rename(image)
    assert image.read_bytes() == b"all"


def test_two_snapshots_can_not_write_one_image(tmp_path: Path) -> None:
    image = tmp_path / "a.snap"
    with _partial_image(image) as partial:
        partial.write_bytes(b"first")
        with (
            pytest.raises(SnapshotError, match="another snapshot is being written"),
            _partial_image(image),
        ):
            pass
        assert partial.read_bytes() == b"first"


@pytest.mark.parametrize("name", ["", "missing/a.snap"])
def test_a_path_that_can_not_be_written_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SnapshotError), _partial_image(tmp_path / name):
        pass


def test_a_link_in_the_partial_images_place_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a.snap.partial").symlink_to(victim)
    with pytest.raises(SnapshotError), _partial_image(tmp_path / "a.snap"):
        pass
    assert victim.read_text() == "precious"
