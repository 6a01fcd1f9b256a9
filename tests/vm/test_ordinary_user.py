"""An ordinary user who was given the device for userfaultfd can do all, and one who was not is told
what is missing.

The user's device is a node of the test's own, in a mount namespace of its own: nothing on the
host is permitted to anybody.
"""

import asyncio
import json
import os
import shutil
import stat
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.host.cache import cache_dir
from lab.host.needs import require_setpriv
from lab.host.probe import UFFD_DEVICE
from lab.qemu.build import find_qemu
from tests.support.paths import ROOT

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg")]

USER = 54321
"""Of nobody: neither an account nor a group is needed."""

#: Shows the user the lab and its Python, which may be where only root can look, and the device.
SCRIPT = """
set -e
mount --bind "$ROOT" "$SEEN/checkout"
mount --bind "$PREFIX" "$SEEN/python"
mount --bind "$PACKAGES" "$SEEN/packages"
mount -t tmpfs -o mode=755 devices "$SEEN/dev"
cp -a "$UFFD_DEVICE" "$SEEN/dev/userfaultfd"
chmod "$UFFD_MODE" "$SEEN/dev/userfaultfd"
mount --bind "$SEEN/dev/userfaultfd" "$UFFD_DEVICE"
cd "$SEEN/home"
exec setpriv --reuid "$USER_ID" --regid "$USER_ID" --clear-groups --inh-caps=-all \
    "$SEEN/python/bin/$PYTHON" -m lab "$@"
"""


class User:
    """Somebody without privileges, with a home, a cache and, if permitted, userfaultfd."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        for name in ("checkout", "python", "packages", "dev", "home"):
            (folder / name).mkdir(mode=0o755, parents=True)
        # What the user would have built.
        built = find_qemu("patched")
        qemu = shutil.copy2(built.path, folder / "qemu")
        shutil.copy2(built.qemu_img, folder / "qemu-img")
        shutil.copytree(cache_dir() / "guest", self.home / "cache" / "guest", symlinks=True)
        for path in (self.home, *self.home.rglob("*")):
            os.chown(path, USER, USER, follow_symlinks=False)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "LAB_CACHE": str(self.home / "cache"),
            "LAB_QEMU_PATCHED": str(qemu),
            "PYTHONPATH": f"{folder / 'checkout'}:{folder / 'packages'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LD_LIBRARY_PATH": str(folder / "python" / "lib"),
            "PYTHON": "python{}.{}".format(*sys.version_info),
            "ROOT": str(ROOT),
            "PREFIX": sys.base_prefix,
            "PACKAGES": sysconfig.get_path("purelib"),
            "SEEN": str(folder),
            "UFFD_DEVICE": str(UFFD_DEVICE),
            "USER_ID": str(USER),
        }

    async def lab(self, *arguments: str, permitted: bool = True) -> tuple[int, str, str]:
        """Run a command of the lab's; return its exit status and what it said."""
        command = ("unshare", "--mount", "--propagation", "private", "sh", "-c", SCRIPT, "lab")
        process = await asyncio.create_subprocess_exec(
            *command,
            *arguments,
            env=self.environment | {"UFFD_MODE": "666" if permitted else "600"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else; as an ordinary user all tests are this test")
    if not UFFD_DEVICE.exists():
        pytest.skip(f"this kernel has no {UFFD_DEVICE}, which is what is permitted here")
    if shutil.which("unshare") is None or not require_setpriv():
        pytest.skip("unshare and setpriv, of util-linux, are needed")
    # The folders of tests let only their owner in.
    folders = [tmp_path, *(p for p in tmp_path.parents if p.name.startswith("pytest-"))]
    modes = [folder.stat().st_mode for folder in folders]
    for folder, mode in zip(folders, modes, strict=True):
        folder.chmod(mode | 0o011)
    yield User(tmp_path)
    for folder, mode in zip(folders, modes, strict=True):
        folder.chmod(mode)


async def test_a_user_with_the_device_takes_and_restores_snapshots(user: User) -> None:
    status, out, err = await user.lab("doctor", "--json")
    assert status == 0, err
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert found["userfaultfd"]["status"] == "ok"
    assert "device" in found["userfaultfd"]["detail"]

    guest = ("--guest", "micro", "--accel", "tcg", "--ram-mib", "128", "--wss-mib", "16")
    for method in ("live", "live-rfc", "live-inline"):
        status, out, err = await user.lab(
            "snapshot", "a.snap", "--method", method, "--json", *guest
        )
        assert status == 0, err
        assert json.loads(out)["outcome"] == "ok"
        for path in (user.home / "a.snap", user.home / "a.snap.json"):
            assert path.stat().st_uid == USER
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        status, out, err = await user.lab("restore", "a.snap", "--seconds", "1")
        assert status == 0, err


async def test_a_user_without_the_device_is_told_how_to_get_it(user: User) -> None:
    status, out, err = await user.lab("doctor", "--json", permitted=False)
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert found["userfaultfd"]["status"] == "fail"
    assert "setfacl" in found["userfaultfd"]["remedy"]

    arguments = ("snapshot", "a.snap", "--guest", "micro", "--accel", "tcg", "--ram-mib", "128")
    status, out, err = await user.lab(*arguments, "--wss-mib", "16", permitted=False)
    assert status == 2
    assert "setfacl" in err.splitlines()[-1]
    assert not (user.home / "a.snap").exists()


async def test_a_user_who_may_not_rebuild_huge_pages_is_told_before_anything_is_measured(
    user: User,
) -> None:
    arguments = ("--guest", "micro", "--accel", "tcg", "--ram-mib", "128", "--wss-mib", "16")
    status, _, err = await user.lab(
        "measure", "--repeats", "1", "--method", "live", "--rebuild-huge-pages", *arguments
    )
    assert status == 2
    assert "CAP_SYS_NICE" in err.splitlines()[-1]


async def test_a_user_gets_memory_and_disks_of_one_instant(user: User) -> None:
    arguments = ("stamps", "--method", "live", "--instants", "2", "--seed", "3", "--json")
    status, out, err = await user.lab(*arguments)
    assert status == 0, err
    assert json.loads(out)["one_instant"] == 2
    assert not list(user.home.rglob("*.qcow2"))
