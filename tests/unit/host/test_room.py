"""What the lab writes leaves a reserve of the disk free."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.errors import HostError
from lab.host.room import require_room, reserve_bytes, room_bytes

MIB, GIB = 1 << 20, 1 << 30

Disk = Callable[[int, int], None]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A function that makes up a file system: its size, and what is free of it."""

    def of(total: int, free: int) -> None:
        usage = shutil._ntuple_diskusage(total, total - free, free)
        monkeypatch.setattr("lab.host.room.shutil.disk_usage", lambda path: usage)

    return of


@pytest.mark.parametrize(
    ("size", "reserve"),
    [
        (1000 * GIB, 50 * GIB),
        (30 * GIB, 2 * GIB),
        (20 * GIB, 2 * GIB),
        (10 * GIB, GIB // 2),
        (100 * MIB, 5 * MIB),
        (0, 0),
    ],
)
def test_the_reserve_is_a_share_and_of_a_large_file_system_at_least_2_gib(
    size: int, reserve: int
) -> None:
    assert reserve_bytes(size) == pytest.approx(reserve, abs=1)


def test_a_larger_file_system_never_keeps_less() -> None:
    sizes = range(0, 64 * GIB, GIB // 4)
    reserves = [reserve_bytes(size) for size in sizes]
    assert reserves == sorted(reserves)
    assert all(reserve <= size / 10 for reserve, size in zip(reserves, sizes, strict=True))


def test_what_is_free_is_not_all_to_be_had(disk: Disk, tmp_path: Path) -> None:
    """Field report F11."""
    disk(100 * GIB, 6 * GIB)
    assert room_bytes(tmp_path) == GIB
    require_room(tmp_path, GIB, "it", "make room")
    with pytest.raises(HostError) as caught:
        require_room(tmp_path, GIB + 1, "it", "make room")
    assert str(caught.value) == (
        f"it needs 1025 MiB in {tmp_path} and 1024 MiB are free there beyond the reserve of its"
        " file system; make room"
    )


def test_a_disk_that_is_in_the_reserve_already_has_no_room(disk: Disk, tmp_path: Path) -> None:
    disk(100 * GIB, GIB)
    assert room_bytes(tmp_path) < 0
    with pytest.raises(HostError, match="and 0 MiB are free there"):
        require_room(tmp_path, 1, "it", "make room")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="name a folder that exists"):
        require_room(tmp_path / "missing", 1, "it", "make room")
