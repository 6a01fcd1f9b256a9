import dataclasses
import io
import tarfile
from pathlib import Path

import pytest

from lab.errors import BuildError, TransientError, UsageError
from lab.host.files import sha256_of
from lab.qemu import source
from lab.qemu.source import Source, known_source, newest_version, read_upstream


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LAB_QEMU_SOURCE", raising=False)


def test_the_newest_supported_version_is_chosen() -> None:
    versions = ["1:10.0.2+ds-2", "1:10.0.13+ds-0+deb13u1", "1:11.1.0+ds-1", "1:10.0.1+ds-1"]

    assert newest_version(versions, read_upstream()) == "1:10.0.13+ds-0+deb13u1"
    assert newest_version(["1:11.1.0+ds-1", "1:7.2+dfsg-7"], read_upstream()) is None


def test_the_release_is_one_the_series_is_kept_for() -> None:
    upstream = read_upstream()

    assert upstream.supports(upstream.release_version)
    assert upstream.release_version in upstream.release_url
    assert len(upstream.release_sha256) == 64
    assert not upstream.supports("10.0.1")
    assert not upstream.supports("10.1.0")


def make_tree(folder: Path, version: str = "10.0.5") -> Path:
    folder.mkdir(parents=True)
    folder.joinpath("VERSION").write_text(version + "\n")
    return folder


def test_a_tree_of_the_users_is_used_and_its_changes_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_tree(tmp_path / "tree")
    monkeypatch.setenv("LAB_QEMU_SOURCE", str(tree))
    before = known_source()
    tree.joinpath("new.c").touch()
    after = known_source()

    assert before is not None
    assert after is not None
    assert (before.version, before.origin, before.path) == ("10.0.5", "local", tree)
    assert before.identity != after.identity


def test_a_source_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, complaint in ((".", "no VERSION"), ("missing", "does not exist")):
        monkeypatch.setenv("LAB_QEMU_SOURCE", str(tmp_path / name))
        with pytest.raises(UsageError, match=complaint):
            known_source()


def test_there_is_no_source_before_one_was_obtained() -> None:
    assert known_source() is None


async def test_a_kept_source_is_found_again_without_the_network(tmp_path: Path) -> None:
    folder = tmp_path / "cache/qemu/fresh"
    folder.mkdir(parents=True)
    tarball = folder / "qemu-10.0.5.tar.xz"
    tarball.touch()
    kept = source._keep(
        Source(identity="release-10.0.5", version="10.0.5", origin="release", path=tarball)
    )

    assert known_source() == kept
    assert await source.obtain_source(tmp_path / "log", lambda message: None) == kept


def make_tarball(path: Path, version: str) -> Path:
    with tarfile.open(path, "w:xz") as archive:
        content = version.encode()
        entry = tarfile.TarInfo(f"qemu-{version}/VERSION")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return path


async def test_a_tarball_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tarball = make_tarball(tmp_path / "qemu-10.0.5.tar.xz", "10.0.5")
    monkeypatch.setenv("LAB_QEMU_SOURCE", str(tarball))
    found = known_source()
    assert found is not None

    await source.unpack(found, tmp_path / "out", tmp_path / "log")

    assert tmp_path.joinpath("out/VERSION").read_text() == "10.0.5"


async def test_a_damaged_tarball_is_refused(tmp_path: Path) -> None:
    tarball = make_tarball(tmp_path / "qemu-10.0.5.tar.xz", "10.0.5")
    known = Source(identity="x", version="10.0.5", origin="release", path=tarball, sha256="0" * 64)
    with pytest.raises(BuildError, match="damaged"):
        await source.unpack(known, tmp_path / "out", tmp_path / "log")


async def test_another_series_of_qemu_is_refused(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", "9.2.0")
    known = Source(identity="x", version="9.2.0", origin="local", path=tree)
    with pytest.raises(BuildError, match=r"QEMU 9\.2\.0; the patches are for 10\.0\.y, y >= 2"):
        await source.unpack(known, tmp_path / "out", tmp_path / "log")


async def test_the_users_tree_is_copied_without_its_history(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    tree.joinpath(".git").mkdir()
    known = Source(identity="x", version="10.0.5", origin="local", path=tree)

    await source.unpack(known, tmp_path / "out", tmp_path / "log")

    assert not tmp_path.joinpath("out/.git").exists()
    assert tree.joinpath(".git").exists()


def offer_release(monkeypatch: pytest.MonkeyPatch, tarball: Path, sha256: str) -> None:
    """Make the release one on disk, and Debian's archive one that does not answer."""
    upstream = dataclasses.replace(
        read_upstream(),
        release_version="10.0.5",
        release_url=tarball.as_uri(),
        release_sha256=sha256,
    )

    async def no_answer(*args: object) -> Source:
        raise TransientError("no mirror answered")

    monkeypatch.setattr(source, "read_upstream", lambda: upstream)
    monkeypatch.setattr(source, "_from_debian", no_answer)


async def test_the_release_is_used_when_debian_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tarball = make_tarball(tmp_path / "qemu-10.0.5.tar.xz", "10.0.5")
    offer_release(monkeypatch, tarball, sha256_of(tarball))
    seen: list[str] = []

    found = await source.obtain_source(tmp_path / "log", seen.append)
    await source.unpack(found, tmp_path / "out", tmp_path / "log")

    assert (found.identity, found.origin) == ("release-10.0.5", "release")
    assert tmp_path.joinpath("out/VERSION").read_text() == "10.0.5"
    assert known_source() == found
    assert any(line.startswith("download QEMU's release") for line in seen)


async def test_a_release_that_is_not_the_one_we_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tarball = make_tarball(tmp_path / "qemu-10.0.5.tar.xz", "10.0.5")
    offer_release(monkeypatch, tarball, "0" * 64)

    with pytest.raises(BuildError, match="has SHA-256"):
        await source.obtain_source(tmp_path / "log", lambda message: None)
    assert known_source() is None


async def test_without_any_source_the_remedy_is_to_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_release(monkeypatch, tmp_path / "missing.tar.xz", "0" * 64)

    with pytest.raises(TransientError, match="set LAB_QEMU_SOURCE"):
        await source.obtain_source(tmp_path / "log", lambda message: None)
