"""An image and its sidecar are published and opened as one, whoever replaces them meanwhile."""

import contextlib
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from lab.errors import RestoreError, SnapshotError
from lab.snapshot.checksums import checksums_of
from lab.snapshot.image import (
    MARK_BYTES,
    check_image,
    mark_of,
    open_image,
    partial_image,
    read_sidecar,
)
from lab.snapshot.sidecar import Sidecar, sidecar_path
from tests.support.paths import ROOT
from tests.unit.snapshot.test_sidecar import SIDECAR

CONTENT_BYTES = 100
ROUNDS = 2000


def content(generation: int) -> bytes:
    """All images are equally long, so that their sizes tell nothing."""
    return f"{generation:08}".encode() * (CONTENT_BYTES // 8)


def sidecar_for(path: Path, mark: str, generation: int) -> Sidecar:
    return msgspec.structs.replace(
        SIDECAR,
        image_bytes=path.stat().st_size,
        mark=mark,
        checksums=None,
        created_utc=str(generation),
    )


def publish(image: Path, generation: int) -> None:
    with partial_image(image) as partial:
        partial.path.write_bytes(content(generation))
        mark = partial.add_mark()
        partial.publish(sidecar_for(partial.path, mark, generation))


def whole_generation(image: Path) -> int:
    """Open what has the name; return which one it is, having seen that it is one."""
    with open_image(image) as opened:
        generation = int(opened.sidecar.created_utc)
        found = os.pread(opened.descriptor, CONTENT_BYTES * 2, 0)
        assert found[:-MARK_BYTES] == content(generation)
    return generation


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.snap"
    publish(path, 1)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_published_has_its_names_and_its_mark_and_is_private(image: Path) -> None:
    assert names(image.parent) == ["a.snap", "a.snap.json"]
    for path in (image, sidecar_path(image)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with open_image(image) as opened:
        assert opened.sidecar.mark == mark_of(opened.descriptor) is not None
    publish(image, 2)
    assert names(image.parent) == ["a.snap", "a.snap.json"]
    assert whole_generation(image) == 2


WRITER = """
import sys
from pathlib import Path
from tests.unit.snapshot.test_image import publish
for generation in range(2, int(sys.argv[2]) + 1):
    publish(Path(sys.argv[1]), generation)
"""


def test_whoever_opens_a_name_that_is_replaced_again_and_again_gets_a_whole_image(
    image: Path,
) -> None:
    """Field report F10."""
    found = []
    with subprocess.Popen([sys.executable, "-c", WRITER, image, str(ROUNDS)], cwd=ROOT) as writer:
        while writer.poll() is None:
            found.append(whole_generation(image))
    assert writer.returncode == 0
    assert whole_generation(image) == ROUNDS
    assert found == sorted(found)
    assert len(set(found)) > 100


def test_an_open_image_stays_the_one_that_it_is(image: Path) -> None:
    """Field report F10."""
    with open_image(image) as opened:
        for generation in (2, 3):
            publish(image, generation)
        assert os.pread(opened.descriptor, CONTENT_BYTES, 0).startswith(content(1))
        assert opened.sidecar.created_utc == "1"
    image.unlink()
    with pytest.raises(RestoreError, match="there is no image"), open_image(image):
        pass


def test_copies_of_both_belong_together_and_one_of_each_do_not(image: Path) -> None:
    folder = image.parent
    for name, generation in (("b.snap", 2), ("c.snap", 3)):
        publish(folder / name, generation)
    copy = folder / "copy.snap"
    shutil.copyfile(folder / "b.snap", copy)
    shutil.copyfile(folder / "b.snap.json", sidecar_path(copy))
    assert whole_generation(copy) == 2
    shutil.copyfile(folder / "c.snap.json", sidecar_path(copy))
    with pytest.raises(RestoreError, match="not the image of its sidecar") as caught:
        read_sidecar(copy)
    assert "keep both files together" in caught.value.remedy
    sidecar_path(copy).unlink()
    with pytest.raises(RestoreError, match=r"has no sidecar copy\.snap\.json"):
        read_sidecar(copy)


async def test_checksums_are_those_of_the_image_with_its_mark(image: Path) -> None:
    with partial_image(image) as partial:
        partial.path.write_bytes(content(2))
        mark = partial.add_mark()
        sidecar = sidecar_for(partial.path, mark, 2)
        sums = await checksums_of(partial.path, sidecar.image_bytes)
        partial.publish(msgspec.structs.replace(sidecar, checksums=sums))
    with open_image(image) as opened:
        await check_image(opened)
        # Another file under the name is not what is checked.
        publish(image, 3)
        await check_image(opened)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.snapshot.test_image import publish
image, when = Path(sys.argv[1]), sys.argv[2]
rename = Path.rename

def killed(self, target):
    if target == image or when == "after":
        if when == "after":
            rename(self, target)
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

Path.rename = killed
publish(image, 2)
"""


def killed_while_it_publishes(image: Path, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, image, when], cwd=ROOT, timeout=60)
    assert done.returncode == -9


@pytest.mark.parametrize(("when", "left"), [("before", 1), ("after", 2)])
def test_a_writer_that_is_killed_while_it_publishes_leaves_a_whole_image(
    image: Path, when: str, left: int
) -> None:
    """Field report F10."""
    killed_while_it_publishes(image, when)
    assert whole_generation(image) == left
    # A later snapshot that fails takes nothing of it away.
    with pytest.raises(RuntimeError), partial_image(image):
        raise RuntimeError
    assert whole_generation(image) == left
    assert names(image.parent) == ["a.snap", "a.snap.json"]
    publish(image, 3)
    assert whole_generation(image) == 3
    assert names(image.parent) == ["a.snap", "a.snap.json"]


def test_whoever_finds_a_name_just_published_takes_nothing_of_it(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking its partial files another snapshot may have published them."""
    real = os.open
    late = iter([True])

    def open_late(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = real(path, flags, mode)
        if flags & os.O_CREAT and next(late, False):
            # Somebody else has the name locked, and publishes.
            path.rename(path.with_name("held"))
            publish(image, 2)
        return descriptor

    monkeypatch.setattr("lab.snapshot.image.os.open", open_late)
    with partial_image(image):
        assert whole_generation(image) == 2
    assert whole_generation(image) == 2


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond what an image has before its mark.

    Not a fixture: the tests' own output may go to a file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CONTENT_BYTES + 4, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_an_image_whose_mark_has_no_room_is_not_published(tmp_path: Path) -> None:
    reason = r"a\.snap cannot be completed: File too large"
    with full_disk(), pytest.raises(SnapshotError, match=reason):
        publish(tmp_path / "a.snap", 1)
    assert names(tmp_path) == []


def test_an_image_whose_sidecar_has_no_name_yet_is_whole(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if target == sidecar_path(image):
            raise OSError(5, "Input/output error")
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        publish(image, 2)
    assert "a.snap.json keeps the name a.snap.json.partial" in caplog.text
    assert whole_generation(image) == 2
    publish(image, 3)
    assert names(image.parent) == ["a.snap", "a.snap.json"]
