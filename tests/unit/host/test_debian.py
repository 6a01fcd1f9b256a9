"""Apt is asked for what is set up here, and packages that are missing are named."""

from pathlib import Path

import pytest

from lab.errors import BuildError, HostError
from lab.host import debian
from lab.host.debian import Apt, main_archive_uris

INDEX_TARGETS = """\
MetaKey: main/binary-amd64/Packages
Codename: bookworm-security
Label: Debian-Security
Origin: Debian
Repo-URI: http://mirror.example/debian-security/

MetaKey: main/binary-amd64/Packages
Codename: bookworm
Label: Debian
Origin: Debian
Repo-URI: http://mirror.example/debian/

MetaKey: main/binary-amd64/Packages
Codename: bookworm-updates
Label: Debian
Origin: Debian
Repo-URI: http://mirror.example/debian/

MetaKey: stable/binary-amd64/Packages
Label: Something
Origin: Somebody
Repo-URI: https://other.example/apt/
"""


def test_the_main_archive_is_found_among_the_configured_ones() -> None:
    assert main_archive_uris(INDEX_TARGETS) == ["http://mirror.example/debian/"]


def test_before_the_first_update_apt_cannot_tell_archives_apart() -> None:
    text = "Repo-URI: http://a.example/debian-security/\n\nRepo-URI: http://a.example/debian/\n"

    assert main_archive_uris(text) == ["http://a.example/debian/"]


def test_an_archive_of_another_distribution_has_nothing_for_us() -> None:
    assert main_archive_uris("Origin: Ubuntu\nLabel: Ubuntu\nRepo-URI: http://u.example/\n") == []
    assert main_archive_uris("") == []


APT = """#!/bin/sh
echo "$LC_ALL $*"
case "$*" in
*showsrc*) printf 'Package: a\\nVersion: 1:10.0.2-1\\nVersion: 1:10.0.3-1\\nX-Version: 3\\n' ;;
*--download-only*) : > a_1.dsc; : > a_1.tar.xz ;;
*unknown*) exit 100 ;;
esac
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apt:
    """A client of an apt that writes down what it is asked."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("apt-get", "apt-cache"):
        (tools / name).write_text(APT)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    return Apt(log=tmp_path / "log")


async def test_a_source_is_looked_up_in_one_suite_and_in_folders_of_its_own(
    apt: Apt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    key.touch()
    monkeypatch.setattr(debian, "_KEYRINGS", (tmp_path / "missing", key))
    own = apt.with_debian_source(tmp_path / "own", "http://mirror.example/debian/", "trixie")
    await own.update()
    listing = (tmp_path / "own" / "sources.list").read_text()
    assert listing == f"deb-src [signed-by={key}] http://mirror.example/debian/ trixie main\n"
    asked = apt.log.read_text().splitlines()[-1]
    assert asked.startswith("C ")
    assert asked.endswith(" update")
    for name in ("lists", "cache"):
        assert f"={tmp_path / 'own' / name} " in asked
    assert await own.source_versions("a") == ["1:10.0.2-1", "1:10.0.3-1"]
    folder = tmp_path / "downloaded"
    folder.mkdir()
    assert await own.download_source("a", "1:10.0.3-1", folder) == folder / "a_1.dsc"


async def test_without_the_archives_keys_nothing_is_asked(
    apt: Apt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian, "_KEYRINGS", ())
    with pytest.raises(HostError, match="keys of Debian's archive") as caught:
        apt.with_debian_source(tmp_path / "own", "http://mirror.example/debian/", "trixie")
    assert "debian-archive-keyring" in caught.value.remedy


async def test_a_package_that_is_not_downloaded_is_an_error(apt: Apt, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="0 files of a"):
        await apt.download("a", tmp_path)
    with pytest.raises(BuildError, match="apt-cache failed"):
        await apt.depends("unknown")
