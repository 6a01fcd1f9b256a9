"""Build the lab's Debian: a disk with services, a compiler and fio, and its kernel.

Debian 12 comes from the archive that the system's apt is set up with, and apt verifies it.  Root is
not needed where the kernel and ``/etc/subuid`` give an ordinary user a user namespace with ids of
its own.  `setup.sh` beside this file says what is set up in it.

What is in the cache, in a folder for each build::

    debian/<key>-<build>/disk.img    ext4, without a partition table; raw and sparse, mode 0444
    debian/<key>-<build>/vmlinuz     its kernel
    debian/<key>-<build>/initrd      with the drivers of QEMU's disks
    debian/<key>-<build>/key         logs in as root by ssh, mode 0600; key.pub
    debian/<key>-<build>/debian.json what was built
    debian/build.log                 what the tools said

The key stands for the recipe: what is set up, and which packages.  A folder appears complete or not
at all.  No build replaces another, because snapshots may stand on its disk; delete a folder that no
snapshot needs, and `lab build --guest debian` asks the archive for today's packages.

Nobody writes to the disk: whoever boots it puts an overlay of his own on it.
"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.errors import BuildError, HostError, LabError, TransientError
from lab.guests.guest import Progress
from lab.host.cache import cache_dir, locked
from lab.host.debian import Apt, archive_keyring, has_apt
from lab.host.files import content_key
from lab.host.room import require_room
from lab.host.tools import require_tools, run_tool

SUITE = "bookworm"
PACKAGES = (
    *("systemd", "systemd-sysv", "udev", "dbus", "linux-image-cloud-amd64", "zstd"),
    *("openssh-server", "iproute2", "procps", "e2fsprogs"),
    *("redis-server", "redis-tools", "postgresql", "sqlite3"),
    *("gcc", "libc6-dev", "make", "fio"),
)
"""What is asked for; apt adds what these depend on, and nothing that they only recommend."""
DISK_BYTES = 8 << 30
LABEL = "lab-debian"
APPEND = f"root=LABEL={LABEL} rw console=ttyS0 quiet"
NEEDED_BYTES = 3 << 30
"""The tree and the disk together, while it is built."""

_SETUP = Path(__file__).with_name("setup.sh")
_DOCUMENTATION = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
)
_KEPT_DOCUMENTATION = "/usr/share/doc/*/copyright"
_FILE_SYSTEM = (
    *("-t", "ext4", "-L", LABEL, "-m", "0", "-J", "size=64"),
    # A new file is all zeros, so that its inode tables and its journal need no writing, neither
    # here nor by the guest's kernel in the first minutes after each boot.
    *("-E", "assume_storage_prezeroed=1,root_owner=0:0"),
)
_TEMPORARY = ".build-"
_REMEDY = "run `lab build --guest debian`"
_PROGRAMS_OF_ROOT = "/usr/local/sbin:/usr/sbin:/sbin"


@dataclass(frozen=True, kw_only=True)
class DebianDisk:
    """The lab's Debian in the cache.

    :param disk: a raw image of `DISK_BYTES` with an ext4 file system, that is only read.
    :param kernel: for QEMU's ``-kernel``; there is no boot loader.
    :param initrd: for QEMU's ``-initrd``.
    :param append: for QEMU's ``-append``; names the root file system by its label, so any kind of
        disk will do.
    :param key: the private key with which root logs in by ssh.
    :param packages: versions of `PACKAGES`, by name.
    :param disk_bytes: what the disk takes of the host's, which is less than its size.
    :param build_s: how long it took to build, downloads included.
    """

    disk: Path
    kernel: Path
    initrd: Path
    append: str
    key: Path
    packages: dict[str, str]
    disk_bytes: int
    build_s: float


def debian_folder() -> Path:
    """The part of the cache that belongs to the lab's Debian."""
    path = cache_dir() / "debian"
    path.mkdir(exist_ok=True)
    return path


def recipe_key() -> str:
    """What stands for the recipe, so that another one is built anew."""
    options = (SUITE, str(DISK_BYTES), APPEND, *PACKAGES, *_FILE_SYSTEM, *_DOCUMENTATION)
    return content_key(_SETUP.read_bytes(), *(option.encode() for option in options))


def find_debian() -> DebianDisk:
    """Return the lab's Debian, the newest where there are several of this recipe.

    :raise HostError: when it is not built, or was built by another recipe.
    """
    folder = debian_folder()
    found = [disk for path in folder.glob(f"{recipe_key()}-*") if (disk := _read(path))]
    if found:
        return max(found, key=lambda disk: disk.disk.stat().st_mtime_ns)
    others = any(path.name[0] != "." for path in folder.glob("*/debian.json"))
    what = "was built by another version of the lab" if others else "is not built"
    raise HostError(f"the lab's Debian {what}", _REMEDY)


def key_of(disk: Path) -> Path | None:
    """The key with which root logs in to a guest of a disk; None of a disk that is not Debian's.

    Every build has its own, and guests go on from the disks of old ones.
    """
    found = _read(disk.parent)
    return found.key if found is not None and found.disk == disk else None


def _read(folder: Path) -> DebianDisk | None:
    try:
        told = json.loads((folder / "debian.json").read_text())
        disk = DebianDisk(
            disk=folder / "disk.img",
            kernel=folder / "vmlinuz",
            initrd=folder / "initrd",
            append=told["append"],
            key=folder / "key",
            packages=told["packages"],
            disk_bytes=told["disk_bytes"],
            build_s=told["build_s"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not complete, or not ours: another is built
    paths = (disk.disk, disk.kernel, disk.initrd, disk.key)
    if not all(path.is_file() for path in paths) or disk.disk.stat().st_size != DISK_BYTES:
        return None
    return disk


async def ensure_debian(progress: Progress | None = None) -> DebianDisk:
    """Return the lab's Debian, after building it when it is not there: a minute or two.

    Two of these at the same time build it once.

    :param progress: called with one line for each step that takes time.
    :raise HostError: when a tool, a permission, an archive in apt's sources or room on the disk is
        missing.
    :raise TransientError: when the archive does not answer.
    :raise BuildError: when a step fails.
    """
    say = progress or (lambda _: None)
    with contextlib.suppress(HostError):
        return find_debian()
    mke2fs = _require_programs()
    folder = debian_folder()
    log = folder / "build.log"
    await _require_root(log)
    async with locked(folder / "lock", lambda: say("Debian: another build of it is going on")):
        with contextlib.suppress(HostError):
            return find_debian()
        for abandoned in folder.glob(f"{_TEMPORARY}*"):
            await _remove(abandoned, log)
        require_room(folder, NEEDED_BYTES, "building Debian", "free some, or set LAB_CACHE")
        async with _temporary(folder, log) as work:
            await _build(work, mke2fs, log, say)
            target = folder / f"{recipe_key()}-{secrets.token_hex(4)}"
            work.rename(target)
    return find_debian()


def _root_command() -> list[str]:
    """What precedes a command that has to run as root, with mounts and a host name of its own.

    For an ordinary user that is root of a user namespace, in which his own files are root's.
    """
    own = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        own += ["--map-root-user", "--map-auto"]
    # Should the lab be killed outright, the kernel ends unshare, and with it all that it began;
    # a signal that can be caught unshare would leave to its child.
    named = ["sh", "-c", f'hostname {LABEL} && exec "$@"', "sh"]
    return ["setpriv", "--pdeathsig=KILL", "--", *own, "--", *named]


async def _require_root(log: Path) -> None:
    """Check that `_root_command` works here.

    :raise HostError: when it does not.
    """
    require_tools(["unshare", "setpriv", "hostname"])
    try:
        await run_tool([*_root_command(), "true"], log=log)
    except BuildError as error:
        if os.geteuid() == 0:
            what, remedy = "a mount namespace", "build where root may mount (CAP_SYS_ADMIN)"
        else:
            what = "a user namespace with ids of its own"
            remedy = (
                "install the Debian package uidmap, see that /etc/subuid and /etc/subgid have a "
                "line for this user and that sysctl user.max_user_namespaces is not 0, or build "
                "as root"
            )
        raise HostError(f"building Debian needs {what}: {error.cause}", remedy) from error


def _require_programs() -> Path:
    """Check that what builds a disk is there, and return where mke2fs is.

    :raise HostError: naming the Debian packages that are missing.
    """
    path = f"{os.environ.get('PATH', os.defpath)}:{_PROGRAMS_OF_ROOT}"
    packages = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "ssh-keygen": "openssh-client"}
    missing = [name for name in packages if shutil.which(name, path=path) is None]
    if missing:
        names = " ".join(packages[name] for name in missing)
        raise HostError(
            f"building Debian needs {', '.join(missing)}", f"install the Debian packages {names}"
        )
    if not has_apt():
        raise HostError("no apt on this host to obtain Debian with", "build on a Debian system")
    found = shutil.which("mke2fs", path=path)
    assert found is not None
    return Path(found)


async def _remove(folder: Path, log: Path) -> None:
    """Remove a folder of a build, in which files may belong to a user namespace's ids."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        await run_tool([*_root_command(), "rm", "-rf", "--one-file-system", folder], log=log)


@contextlib.asynccontextmanager
async def _temporary(folder: Path, log: Path) -> AsyncIterator[Path]:
    work = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder))
    try:
        yield work
    finally:
        if work.exists():
            await _remove(work, log)


async def _archives(log: Path) -> list[str]:
    """Lines of apt's sources, one for each archive of Debian's that this system's apt knows."""
    archives = await Apt(log=log).debian_archives()
    if not archives:
        raise HostError(
            "apt is not set up with an archive of Debian", "add one to /etc/apt/sources.list.d"
        )
    keyring = archive_keyring()
    return [f"deb [signed-by={keyring}] {uri} {SUITE} main" for uri in archives]


async def _build(work: Path, mke2fs: Path, log: Path, say: Progress) -> None:
    """Fill a folder with all of a build."""
    began = time.monotonic()
    tree, disk = work / "tree", work / "disk.img"
    key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", LABEL, "-f", str(work / "key")]
    await run_tool(key, log=log)
    await _unpack(tree, work, log, say)
    query = ["dpkg-query", f"--admindir={tree / 'var/lib/dpkg'}", "-W"]
    # The metapackage's version is not the server's.
    names = [*PACKAGES, "postgresql-[0-9]*"]
    lines = await run_tool([*query, "-f", "${Package} ${Version}\\n", *names], log=log)
    say("Debian: writing the disk")
    command = [*_root_command(), str(mke2fs), "-q", *_FILE_SYSTEM, "-d", str(tree), str(disk)]
    await run_tool([*command, f"{DISK_BYTES >> 20}M"], log=log)
    await _remove(tree, log)
    for name in ("disk.img", "vmlinuz", "initrd"):
        (work / name).chmod(0o444)
    told = {
        "append": APPEND,
        "packages": dict(parts for line in lines if len(parts := line.split()) == 2),
        "disk_bytes": disk.stat().st_blocks * 512,
        "build_s": round(time.monotonic() - began, 1),
    }
    (work / "debian.json").write_text(json.dumps(told, indent=1) + "\n")


async def _unpack(tree: Path, work: Path, log: Path, say: Progress) -> None:
    """Install and set up Debian in a folder, from the first archive that answers."""
    environment = {
        **os.environ,
        "PATH": f"{os.environ.get('PATH', os.defpath)}:{_PROGRAMS_OF_ROOT}",
        "TMPDIR": str(work),
        # Of the databases of PostgreSQL, too.
        "LC_ALL": "C.UTF-8",
    }
    setup = shlex.join(["sh", str(_SETUP)]) + f' "$1" {shlex.quote(str(work))}'
    options = [
        *("--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}"),
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _DOCUMENTATION),
        f"--dpkgopt=path-include={_KEPT_DOCUMENTATION}",
        f"--customize-hook={setup}",
    ]
    failure: LabError | None = None
    for archive in await _archives(log):
        problems: list[str] = []

        def hear(line: str, problems: list[str] = problems) -> None:
            if line.startswith("I: "):
                say(f"Debian: {line[3:].rstrip('.')}")
            elif line.startswith(("Err:", "E: ")):
                problems.append(line)

        command = [*_root_command(), "mmdebstrap", *options, SUITE, str(tree), archive]
        try:
            await run_tool(command, log=log, env=environment, on_line=hear)
            return
        except BuildError as error:
            await _remove(tree, log)
            failure = _explained(error, problems, archive)
    assert failure is not None
    raise failure


def _explained(error: BuildError, problems: Sequence[str], archive: str) -> LabError:
    """What a failure of mmdebstrap means, by what it said before its last words."""
    unreachable = [line for line in problems if "Failed to fetch" in line or line[:4] == "Err:"]
    if unreachable:
        return TransientError(
            f"the archive {archive.split()[2]} does not give Debian {SUITE}: {unreachable[-1]}",
            "check the network and apt's sources, and try again",
        )
    return BuildError(f"{error.cause}: {problems[0]}" if problems else error.cause, error.remedy)
