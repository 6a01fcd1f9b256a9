"""`lab build --guest debian` builds that and nothing else, and says what there is."""

import json
import os
from pathlib import Path

import pytest

import lab.__main__ as command_line
from lab.guests.debian.build import DISK_BYTES, debian_folder, recipe_key


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a Debian in a cache that has nothing else."""
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    folder = debian_folder() / f"{recipe_key()}-a"
    folder.mkdir()
    for file in ("disk.img", "vmlinuz", "initrd", "key"):
        (folder / file).touch()
    os.truncate(folder / "disk.img", DISK_BYTES)
    told = {"append": "a", "packages": {"fio": "3.33"}, "disk_bytes": 800 << 20, "build_s": 90.2}
    (folder / "debian.json").write_text(json.dumps(told))
    return folder


def test_size_and_time_are_reported(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["build", "--guest", "debian"]) == 0

    first, second = capsys.readouterr().out.splitlines()
    assert "800 MiB of a disk of 8 GiB, built in 90 s" in first
    assert first.endswith(str(built / "disk.img"))
    assert second == "fio 3.33"
    assert [path.name for path in debian_folder().parent.iterdir()] == ["debian"]


@pytest.mark.parametrize("option", ["--print", "--json"])
def test_a_script_reads_where_everything_is(
    built: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["build", "--guest", "debian", option]) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["disk"] == str(built / "disk.img")
    assert told["key"] == str(built / "key")
    assert told["packages"] == {"fio": "3.33"}


def test_another_guest_is_no_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["build", "--guest", "linux"]) == 2
    assert "debian" in capsys.readouterr().err
