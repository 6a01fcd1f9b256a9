import asyncio
from pathlib import Path

import pytest

from lab.errors import HostError
from lab.host.cache import cache_dir, locked


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("LAB_CACHE", raising=False)
    assert cache_dir() == tmp_path / "xdg/vm-snapshot-lab"

    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_a_relative_xdg_cache_home_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert cache_dir() == tmp_path / ".cache/vm-snapshot-lab"


def test_the_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "own"))

    assert cache_dir().stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_made_is_the_hosts_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("file").touch()
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "file/cache"))

    with pytest.raises(HostError, match="set LAB_CACHE"):
        cache_dir()


async def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    waited = asyncio.Event()
    order: list[str] = []

    async def second() -> None:
        async with locked(path, waited.set):
            order.append("second")

    async with locked(path, lambda: None):
        task = asyncio.create_task(second())
        await waited.wait()
        order.append("first")
    await task

    assert order == ["first", "second"]
