"""A folder goes with its owner: at once when that can clean up, with the next one if not."""

import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.host.workdir import LOCK_NAME, private_folder, remove_abandoned

PREFIX = "lab-vm-"
OWNER = """
import sys
from lab.host.workdir import private_folder
with private_folder("lab-vm-") as folder:
    (folder / "qemu.log").write_text("said")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # it is looked up once and then remembered
    yield tmp_path
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.fixture
def owner() -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_folder_is_private_and_goes_with_its_context(temporary: Path) -> None:
    with private_folder(PREFIX) as folder:
        assert folder.parent == temporary
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.joinpath("faults.bin").write_bytes(b"x")
    assert list(temporary.iterdir()) == []


def test_a_killed_owners_folder_is_removed_by_the_next(
    temporary: Path, owner: tuple["subprocess.Popen[str]", Path]
) -> None:
    process, left = owner
    process.kill()
    process.wait()
    assert left.joinpath("qemu.log").exists()
    with private_folder(PREFIX) as folder:
        assert list(temporary.iterdir()) == [folder]


def test_a_folder_can_be_anywhere_and_prefixes_are_kept_apart(
    temporary: Path, owner: tuple["subprocess.Popen[str]", Path]
) -> None:
    process, left = owner
    process.kill()
    process.wait()
    elsewhere = temporary / "images"
    elsewhere.mkdir()
    with private_folder("lab-verify-", elsewhere) as folder:
        assert folder.parent == elsewhere
        assert left.exists()


def test_folders_of_living_owners_stay(
    temporary: Path, owner: tuple["subprocess.Popen[str]", Path]
) -> None:
    _, theirs = owner
    with private_folder(PREFIX) as first, private_folder(PREFIX) as second:
        assert remove_abandoned(PREFIX, temporary) == []
        assert all(folder.joinpath(LOCK_NAME).exists() for folder in (theirs, first, second))
        assert theirs.joinpath("qemu.log").exists()


def test_what_is_not_surely_an_abandoned_folder_of_ours_stays(temporary: Path) -> None:
    without_lock = temporary / "lab-vm-being-made"
    without_lock.mkdir()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    elsewhere.joinpath(LOCK_NAME).touch()
    temporary.joinpath("lab-vm-link").symlink_to(elsewhere)
    temporary.joinpath("lab-vm-file").touch()
    before = sorted(temporary.rglob("*"))
    assert remove_abandoned(PREFIX, temporary) == []
    assert sorted(temporary.rglob("*")) == before
