"""Obtain the guest's kernel, compile its program and pack both for QEMU's `-kernel` and `-initrd`.

The kernel is the distribution's own, for virtual machines: the package is resolved and downloaded
with the system's apt, which verifies it, and unpacked into the cache. It is never installed, and
root is not needed. `LAB_GUEST_KERNEL` names another kernel image to use instead; the drivers of
the devices that a machine is given have to be built into it.

What is in the cache::

    guest/kernel.json            which kernel: version, sha256, path; written last
    guest/kernel-<sha256>/vmlinuz
    guest/kernel-<sha256>/modules/  drivers for the devices a machine can have
    guest/initramfs-<key>.cpio   key: hash of everything the bytes depend on
    guest/apt/                   private package lists, if the system's are of no use

Files appear under their final names complete or not at all. Once there is a kernel nothing asks
the network again; delete `guest/kernel.json` to fetch the current one.
"""

import asyncio
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lab.errors import BuildError, HostError
from lab.guests import common
from lab.guests.linux import modules, newc
from lab.host.cache import cache_dir
from lab.host.files import sha256_of
from lab.host.process import kill_child

__all__ = ["Guest", "ensure_guest", "find_guest"]

_log = logging.getLogger(__name__)

Progress = Callable[[str], None]

#: Packages that depend on the current kernel for virtual machines: Debian's, Ubuntu's.
KERNEL_METAPACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual")

_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / name for name in ("workload.c", "devices.c")]
_HEADERS = [_FOLDER / "workload.h", *common.HEADERS]
_CFLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-static", "-pthread", "-s")
#: musl gives a program a tenth of the size, and no code that wants a newer CPU than QEMU's.
_COMPILERS = ("musl-gcc", "gcc", "cc")
_BOOT_SECTOR_MAGIC = b"HdrS"
_FIND_REMEDY = "run `lab build`"


@dataclass(frozen=True)
class Guest:
    """A kernel and an initramfs that QEMU can boot.

    :param kernel: the bzImage.
    :param initramfs: an uncompressed newc archive whose /init is made of workload.c and devices.c.
    :param kernel_version: what the guest's `uname -r` says.
    """

    kernel: Path
    initramfs: Path
    kernel_version: str
    kernel_sha256: str
    initramfs_sha256: str


@dataclass(frozen=True)
class _Kernel:
    path: Path
    version: str
    sha256: str
    modules: Path | None
    """A folder of modules, None for a kernel of the user's."""

    def read_modules(self) -> dict[str, bytes]:
        """Return the modules by name."""
        paths = [] if self.modules is None else sorted(self.modules.glob("*.ko"))
        return {path.stem: path.read_bytes() for path in paths}


def find_guest() -> Guest:
    """Return the guest that is in the cache, without building or downloading anything.

    :raises HostError: it is not built, or was built from other sources.
    """
    kernel = _override_kernel() or _cached_kernel()
    if kernel is None:
        raise HostError("the guest's kernel is not in the cache", _FIND_REMEDY)
    initramfs = _initramfs_path(_compiler(), kernel.read_modules())
    if not initramfs.is_file():
        raise HostError("the guest's initramfs is not built", _FIND_REMEDY)
    return _guest(kernel, initramfs)


async def ensure_guest(progress: Progress | None = None) -> Guest:
    """Return the guest, after downloading and building what is missing.

    Quick when nothing is missing. Two of these at the same time do the work twice, but both
    end with complete files.

    :param progress: called with one line for each step that takes time.
    :raises HostError: no compiler, or no apt.
    :raises BuildError: the download or the compilation failed.
    """
    say = progress or _log.info
    kernel = _override_kernel() or _cached_kernel() or await _fetch_kernel(say)
    compiler, drivers = _compiler(), kernel.read_modules()
    initramfs = _initramfs_path(compiler, drivers)
    if not initramfs.is_file():
        say("guest: compiling the workload")
        await _build_initramfs(compiler, drivers, initramfs)
    return _guest(kernel, initramfs)


def initramfs_archive(init: bytes, drivers: Mapping[str, bytes] | None = None) -> bytes:
    """Return the bytes of an initramfs whose PID 1 is `init`, a static executable.

    /dev/console is what the kernel opens as PID 1's standard streams before any file system
    is mounted, so it has to be in the archive.

    :param drivers: kernel modules by name; a list for each device says which to load for it.
    """
    entries = [
        newc.directory("dev"),
        newc.character_device("dev/console", 5, 1),
        newc.regular_file("init", init, permissions=0o755),
        newc.directory("proc"),
        newc.directory("sys"),
    ]
    if drivers:
        entries.append(newc.directory("modules"))
        entries += [newc.regular_file(f"modules/{n}.ko", drivers[n]) for n in drivers]
        for device, names in modules.DRIVERS.items():
            order = "".join(f"{name}\n" for name in modules.load_order(names, drivers))
            entries.append(newc.regular_file(f"modules/{device}.list", order.encode()))
    return newc.write_archive(entries)


def kernel_release(image: bytes) -> str:
    """Return the release (`uname -r`) that a bzImage names in its header.

    :param image: the first 64 KiB of the file, or more.
    :raises ValueError: these are not the first bytes of an x86 Linux kernel.
    """
    if image[0x202:0x206] != _BOOT_SECTOR_MAGIC:
        raise ValueError("no x86 Linux boot header")
    # The header's pointer counts from 0x200; the text there goes on with who built it and when.
    start = int.from_bytes(image[0x20E:0x210], "little") + 0x200
    text = image[start : start + 256].split(b"\0")[0].decode("ascii", "replace").split()
    if start == 0x200 or not text:
        raise ValueError("the boot header names no version")
    return text[0]


def _directory() -> Path:
    path = cache_dir() / "guest"
    path.mkdir(exist_ok=True)
    return path


def _guest(kernel: _Kernel, initramfs: Path) -> Guest:
    return Guest(
        kernel=kernel.path,
        initramfs=initramfs,
        kernel_version=kernel.version,
        kernel_sha256=kernel.sha256,
        initramfs_sha256=sha256_of(initramfs),
    )


# The kernel


def _read_kernel(path: Path) -> _Kernel:
    with path.open("rb") as file:
        version = kernel_release(file.read(64 << 10))
    return _Kernel(path=path, version=version, sha256=sha256_of(path), modules=None)


def _drivers() -> set[str]:
    return {name for names in modules.DRIVERS.values() for name in names}


def _override_kernel() -> _Kernel | None:
    name = os.environ.get("LAB_GUEST_KERNEL")
    if not name:
        return None
    try:
        return _read_kernel(Path(name).absolute())
    except (OSError, ValueError) as error:
        raise HostError(
            f"LAB_GUEST_KERNEL={name}: {error}", "name a bzImage, or unset the variable"
        ) from error


def _cached_kernel() -> _Kernel | None:
    try:
        stamp = json.loads((_directory() / "kernel.json").read_text())
        if not _drivers() <= set(stamp["drivers"]):
            return None  # unpacked when the guest had other devices: some modules may be missing
        kernel = _Kernel(
            path=_directory() / stamp["path"],
            version=stamp["version"],
            sha256=stamp["sha256"],
            modules=_directory() / stamp["modules"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing, or not ours: it is made again
    # The hash is part of the path; a look at the file itself is for the caller that boots it.
    return kernel if kernel.path.is_file() else None


async def _fetch_kernel(say: Progress) -> _Kernel:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise HostError(
            "no apt on this host to obtain the guest's kernel with",
            "set LAB_GUEST_KERNEL to a Linux kernel image (bzImage)",
        )
    with tempfile.TemporaryDirectory(prefix=".kernel-", dir=_directory()) as temporary:
        work = Path(temporary)
        package = await _download_kernel(work, say)
        await _run("dpkg-deb", "-x", str(package), str(work / "tree"))
        images = sorted((work / "tree" / "boot").glob("vmlinuz-*"))
        if len(images) != 1:
            raise BuildError(
                f"{package.name} has {len(images)} kernels in /boot instead of one",
                "set LAB_GUEST_KERNEL to a kernel image",
            )
        try:
            kernel = _read_kernel(images[0])
        except ValueError as error:
            raise BuildError(
                f"the kernel in {package.name}: {error}", "set LAB_GUEST_KERNEL to a kernel image"
            ) from error
        target = _directory() / f"kernel-{kernel.sha256[:16]}" / "vmlinuz"
        folder = target.parent / "modules"
        folder.mkdir(parents=True, exist_ok=True)
        images[0].chmod(0o644)
        images[0].replace(target)
        for name, content in modules.collect_modules(work / "tree").items():
            (work / name).write_bytes(content)
            (work / name).replace(folder / f"{name}.ko")
        stamp = asdict(kernel) | {
            "path": str(target.relative_to(_directory())),
            "modules": str(folder.relative_to(_directory())),
            "package": package.name,
            "drivers": sorted(_drivers()),
        }
        (work / "stamp").write_text(json.dumps(stamp, indent=1) + "\n")
        (work / "stamp").replace(_directory() / "kernel.json")
    return replace(kernel, path=target, modules=folder)


async def _download_kernel(work: Path, say: Progress) -> Path:
    """Download the kernel's package into `work`.

    The system's package lists are tried first. They may be empty, as in a fresh container, or
    name a version that the mirror has replaced since; then lists of our own are fetched.
    """
    options: tuple[str, ...] = ()
    error: BuildError | None = None
    for private in (False, True):
        if private:
            say("guest: fetching package lists")
            options = _private_lists()
            await _run("apt-get", *_apt_options(), *options, "update", remedy=_NETWORK_REMEDY)
        package = await _resolve_kernel(options)
        if package is None:
            continue
        say(f"guest: downloading {package}")
        try:
            await _run(
                "apt-get", *_apt_options(), *options, "download", package,
                cwd=work, remedy=_NETWORK_REMEDY,
            )  # fmt: skip
        except BuildError as failed:
            error = failed
            continue
        packages = sorted(work.glob("*.deb"))
        if len(packages) == 1:
            return packages[0]
        error = BuildError(f"apt downloaded no {package}", _NETWORK_REMEDY)
    raise error or BuildError(
        f"apt knows none of {', '.join(KERNEL_METAPACKAGES)}",
        "set LAB_GUEST_KERNEL to a Linux kernel image (bzImage)",
    )


_NETWORK_REMEDY = "check the network and apt's sources, or set LAB_GUEST_KERNEL to a kernel image"


def _apt_options() -> tuple[str, ...]:
    # As root apt would hand downloads to the user _apt, who may not enter our private cache;
    # it then warns and goes on as root. Saying so beforehand avoids the warning.
    return ("-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2")


def _private_lists() -> tuple[str, ...]:
    lists = _directory() / "apt" / "lists"
    cache = _directory() / "apt" / "cache"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    (cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    return ("-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}")


async def _resolve_kernel(options: Sequence[str]) -> str | None:
    """Return the package the metapackage stands for, such as linux-image-6.1.0-1-cloud-amd64."""
    for metapackage in KERNEL_METAPACKAGES:
        try:
            listing = await _run("apt-cache", *options, "depends", "--important", metapackage)
        except BuildError:
            continue  # unknown to these lists
        match = re.search(r"^\s*Depends: (linux-image-[0-9][^\s:<>]*)", listing, re.MULTILINE)
        if match:
            return match[1]
    return None


# The initramfs


def _compiler() -> str:
    for name in _COMPILERS:
        path = shutil.which(name)
        if path:
            return path
    raise HostError("no C compiler for the guest's workload", "install musl-tools, or gcc")


def _initramfs_path(compiler: str, drivers: Mapping[str, bytes]) -> Path:
    """Return where the initramfs made by `compiler` from today's sources is kept."""
    key = hashlib.sha256()
    parts = [Path(compiler).name.encode(), " ".join(_CFLAGS).encode()]
    parts += [path.read_bytes() for path in (*_SOURCES, *_HEADERS)]
    parts += [Path(module).read_bytes() for module in (newc.__file__, modules.__file__, __file__)]
    for name in sorted(drivers):
        parts += [name.encode(), drivers[name]]
    for part in parts:
        key.update(len(part).to_bytes(8, "little") + part)
    return _directory() / f"initramfs-{key.hexdigest()[:16]}.cpio"


async def _build_initramfs(compiler: str, drivers: Mapping[str, bytes], target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".initramfs-", dir=_directory()) as temporary:
        work = Path(temporary)
        await _run(
            compiler, *_CFLAGS, f"-I{common.FOLDER}", "-o", "init", *map(str, _SOURCES),
            cwd=work, remedy="install musl-tools, or gcc and libc6-dev",
        )  # fmt: skip
        (work / "archive").write_bytes(initramfs_archive((work / "init").read_bytes(), drivers))
        (work / "archive").replace(target)


async def _run(*command: str, cwd: Path | None = None, remedy: str = "") -> str:
    """Run a command in the C locale and return its output; BuildError if it fails."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        kill_child(process)
        await process.wait()
        raise
    text = output.decode(errors="replace")
    if process.returncode != 0:
        lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
        errors = [line for line in lines if line.startswith("E:") or " error: " in line]
        raise BuildError(f"{command[0]} failed: {(errors or lines)[-1].strip()}", remedy)
    return text
