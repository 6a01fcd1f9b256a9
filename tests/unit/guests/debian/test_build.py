"""The lab's Debian is found whole or not at all, is built once, and what is missing is named.

Nothing is downloaded: the stand-in for mmdebstrap makes a tree of a few files, of which the real
mke2fs makes a disk.
"""

import asyncio
import json
import os
import stat
import subprocess
from pathlib import Path

import psutil
import pytest

from lab.errors import BuildError, HostError, TransientError
from lab.guests.debian import build
from lab.guests.debian.build import (
    APPEND,
    DISK_BYTES,
    PACKAGES,
    debian_folder,
    ensure_debian,
    find_debian,
    recipe_key,
)
from lab.host.debian import Apt
from lab.host.tools import run_tool


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- Finding -------------------------------------------------------------------------------------


def put_debian(name: str) -> Path:
    folder = debian_folder() / name
    folder.mkdir()
    for file in ("vmlinuz", "initrd", "key"):
        (folder / file).touch()
    with (folder / "disk.img").open("wb") as disk:
        disk.truncate(DISK_BYTES)
    told = {"append": "root=x", "packages": {"redis-server": "7"}, "disk_bytes": 5, "build_s": 1.5}
    (folder / "debian.json").write_text(json.dumps(told))
    return folder


def test_it_is_found_with_what_was_told_of_its_build() -> None:
    folder = put_debian(f"{recipe_key()}-a")

    found = find_debian()

    assert found.disk == folder / "disk.img"
    assert (found.kernel, found.initrd) == (folder / "vmlinuz", folder / "initrd")
    assert found.key == folder / "key"
    assert found.append == "root=x"
    assert found.packages == {"redis-server": "7"}
    assert (found.disk_bytes, found.build_s) == (5, 1.5)


def test_of_several_the_newest_is_found() -> None:
    for age, name in enumerate("bca"):
        folder = put_debian(f"{recipe_key()}-{name}")
        os.utime(folder / "disk.img", ns=(0, -age))

    assert find_debian().disk.parent.name.endswith("-b")


def test_that_it_is_not_built_comes_with_the_command_that_builds_it() -> None:
    with pytest.raises(HostError, match=r"is not built; run `lab build --guest debian`"):
        find_debian()


def test_one_of_another_recipe_is_another_one() -> None:
    put_debian("0123456789abcdef-a")

    with pytest.raises(HostError, match=r"another version of the lab; run `lab build --guest"):
        find_debian()


@pytest.mark.parametrize("missing", ["disk.img", "vmlinuz", "initrd", "key", "debian.json"])
def test_one_that_lacks_a_file_is_none(missing: str) -> None:
    (put_debian(f"{recipe_key()}-a") / missing).unlink()

    with pytest.raises(HostError, match="lab build --guest debian"):
        find_debian()


def test_one_with_a_truncated_disk_or_unreadable_record_is_none() -> None:
    os.truncate(put_debian(f"{recipe_key()}-a") / "disk.img", 4096)
    (put_debian(f"{recipe_key()}-b") / "debian.json").write_text("{")

    with pytest.raises(HostError, match="lab build --guest debian"):
        find_debian()


# --- Building ------------------------------------------------------------------------------------

APT = """#!/bin/sh
printf 'Origin: Debian\\nLabel: Debian\\nRepo-URI: http://%s.example/debian/\\n\\n' $ARCHIVES
"""

# The last arguments are suite, tree and archive; the tree is in the folder of the build.
MMDEBSTRAP = """#!/bin/sh
echo run >>"$COUNT"
while [ $# -gt 2 ]; do shift; done
tree=$1 out=${1%/*}
mkdir -p "$tree/var/lib/dpkg/info" "$tree/etc"
id -u >"$tree/etc/uid"
hostname >"$tree/etc/hostname"
case "$2" in
*silent*)
    echo 'Err:1 http://silent.example/debian bookworm InRelease'
    echo 'E: Failed to fetch http://silent.example/ Could not connect'
    echo 'E: setup failed'
    exit 1 ;;
*broken*) echo 'E: a package is broken'; echo 'E: setup failed'; exit 1 ;;
*slow*) echo $$ >"$COUNT.started"; sleep 1000 ;;
esac
for name in $NAMES; do
    printf 'Package: %s\\nStatus: install ok installed\\nVersion: 1.0\\nArchitecture: all\\n' $name
    printf 'Maintainer: x <x@x.example>\\nDescription: x\\n\\n'
done >"$tree/var/lib/dpkg/status"
: >"$out/vmlinuz"
: >"$out/initrd"
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that come before the system's."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in (("apt-get", APT), ("mmdebstrap", MMDEBSTRAP)):
        put_tool(folder, name, text)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("ARCHIVES", "first")
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    monkeypatch.setenv("NAMES", " ".join((*PACKAGES, "postgresql-15")))
    keyring = tmp_path / "keyring"
    keyring.touch()
    monkeypatch.setattr("lab.host.debian._KEYRINGS", (keyring,))
    return folder


def put_tool(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def root(tools: Path) -> None:
    """Root, or root of a user namespace; and the programs that are no stand-ins."""
    done = subprocess.run([*build._root_command(), "true"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no root of a namespace: {done.stderr.strip()}")
    try:
        build._require_programs()
    except HostError as error:
        pytest.skip(str(error))


def left_over() -> list[Path]:
    return [path for path in debian_folder().iterdir() if path.name not in ("build.log", "lock")]


def runs(tmp_path: Path) -> int:
    return (tmp_path / "count").read_text().count("run")


@pytest.mark.usefixtures("root")
async def test_a_build_is_whole_private_where_it_must_be_and_never_written_again(
    tmp_path: Path,
) -> None:
    said: list[str] = []

    built = await ensure_debian(said.append)

    assert built == find_debian()
    assert built.append == APPEND
    assert built.packages == dict.fromkeys((*PACKAGES, "postgresql-15"), "1.0")
    assert built.disk.stat().st_size == DISK_BYTES
    assert 0 < built.disk_bytes < 64 << 20
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in built.disk.parent.iterdir()}
    assert modes["disk.img"] == modes["vmlinuz"] == modes["initrd"] == 0o444
    assert modes["key"] == 0o600
    assert left_over() == [built.disk.parent]
    assert said[-1] == "Debian: writing the disk"


@pytest.mark.usefixtures("root")
async def test_the_disk_is_a_sound_file_system_of_roots_files_and_knows_no_name_of_this_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    built = await ensure_debian()

    async def debugfs(request: str) -> str:
        said = await run_tool(["debugfs", "-R", request, built.disk], log=tmp_path / "log")
        return "\n".join(said)

    await run_tool(["e2fsck", "-fn", built.disk], log=tmp_path / "log")
    assert "\n0" in await debugfs("cat /etc/uid")
    assert "\nlab-debian" in await debugfs("cat /etc/hostname")
    assert "User:     0   Group:     0" in await debugfs("stat /etc/uid")
    assert "Filesystem volume name:   lab-debian" in await debugfs("show_super_stats -h")


@pytest.mark.usefixtures("root")
async def test_two_builds_at_once_are_one(tmp_path: Path) -> None:
    said: list[str] = []

    one, other = await asyncio.gather(ensure_debian(said.append), ensure_debian(said.append))

    assert one == other
    assert runs(tmp_path) == 1
    assert "Debian: another build of it is going on" in said


@pytest.mark.usefixtures("root")
async def test_what_is_built_needs_no_tool_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = await ensure_debian()
    monkeypatch.setenv("PATH", str(tmp_path))

    assert await ensure_debian() == built


@pytest.mark.usefixtures("root")
async def test_an_archive_that_does_not_answer_gives_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVES", "silent second")

    await ensure_debian()

    assert runs(tmp_path) == 2


@pytest.mark.usefixtures("root")
async def test_no_archive_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIVES", "silent")

    with pytest.raises(TransientError, match=r"silent.*Could not connect; check the network") as it:
        await ensure_debian()

    assert "\n" not in str(it.value)
    assert left_over() == []


@pytest.mark.usefixtures("root")
async def test_a_failing_step_is_told_by_its_first_complaint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ARCHIVES", "broken")

    with pytest.raises(BuildError, match=r"a package is broken.*whole log"):
        await ensure_debian()

    assert left_over() == []


@pytest.mark.usefixtures("root")
async def test_apt_without_an_archive_of_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Apt, "debian_archives", no_archives)

    with pytest.raises(HostError, match=r"no.* archive of Debian; add one"):
        await ensure_debian()


async def no_archives(self: Apt) -> list[str]:
    return []


@pytest.mark.usefixtures("root")
async def test_a_build_that_is_interrupted_leaves_neither_files_nor_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVES", "slow")
    before = set(psutil.Process().children(recursive=True))
    task = asyncio.create_task(ensure_debian())
    started = tmp_path / "count.started"
    while not (started.exists() and started.read_text()):
        assert not task.done()
        await asyncio.sleep(0.05)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert set(psutil.Process().children(recursive=True)) <= before
    assert left_over() == []


@pytest.mark.usefixtures("root")
async def test_what_a_killed_build_left_goes_with_the_next() -> None:
    abandoned = debian_folder() / ".build-killed"
    (abandoned / "tree").mkdir(parents=True)

    built = await ensure_debian()

    assert left_over() == [built.disk.parent]


@pytest.mark.usefixtures("root")
async def test_a_disk_without_room_is_told_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "NEEDED_BYTES", 1 << 60)

    with pytest.raises(HostError, match=r"building Debian needs .* MiB .*; free some"):
        await ensure_debian()

    assert not (tmp_path / "count").exists()


async def test_missing_programs_are_named_with_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "_PROGRAMS_OF_ROOT", "")

    with pytest.raises(HostError, match=r"packages mmdebstrap e2fsprogs openssh-client$"):
        await ensure_debian()


@pytest.mark.parametrize(("user", "remedy"), [(0, "CAP_SYS_ADMIN"), (1000, "uidmap.*subuid")])
async def test_a_host_that_permits_no_namespace(
    tools: Path, monkeypatch: pytest.MonkeyPatch, user: int, remedy: str
) -> None:
    for name in ("mke2fs", "ssh-keygen", "apt-cache", "dpkg-deb"):
        put_tool(tools, name, "#!/bin/sh\n")
    put_tool(tools, "unshare", "#!/bin/sh\necho 'unshare: Operation not permitted'\nexit 1\n")
    monkeypatch.setattr(os, "geteuid", lambda: user)

    with pytest.raises(HostError, match=f"Operation not permitted; .*{remedy}"):
        await ensure_debian()
