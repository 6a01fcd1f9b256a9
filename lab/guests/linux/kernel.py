"""Obtain the Linux guest's kernel.

The kernel is the distribution's own, for virtual machines: the package is resolved and downloaded
with the system's apt, which verifies it, and unpacked into the cache. It is never installed, and
root is not needed. `LAB_GUEST_KERNEL` names another kernel image to use instead; the drivers of
the devices that a machine is given have to be built into it.

What is in the cache::

    guest/kernel.json            which kernel: version, sha256, path; written last
    guest/kernel-<sha256>/vmlinuz
    guest/kernel-<sha256>/modules/  drivers for the devices a machine can have
    guest/apt/                   private package lists, if the system's are of no use
    guest/build.log              what the tools said

Files appear under their final names complete or not at all. Once there is a kernel nothing asks
the network again; delete `guest/kernel.json` to fetch the current one.
"""

import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lab.errors import BuildError, HostError
from lab.guests import common
from lab.guests.guest import Progress
from lab.guests.linux import modules
from lab.host.debian import Apt, has_apt
from lab.host.files import sha256_of

#: Packages that depend on the current kernel for virtual machines: Debian's, Ubuntu's.
KERNEL_METAPACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual")

_BOOT_SECTOR_MAGIC = b"HdrS"
_REMEDY = "set LAB_GUEST_KERNEL to a Linux kernel image (bzImage)"


@dataclass(frozen=True)
class Kernel:
    """A kernel, and the drivers that are not in it.

    :param version: what its `uname -r` says.
    :param modules: a folder of drivers, None for a kernel of the user's.
    """

    path: Path
    version: str
    sha256: str
    modules: Path | None

    def read_modules(self) -> dict[str, bytes]:
        """Return the modules by name."""
        paths = [] if self.modules is None else sorted(self.modules.glob("*.ko"))
        return {path.stem: path.read_bytes() for path in paths}


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


def find_kernel() -> Kernel | None:
    """Return the kernel that the environment names, or else the one in the cache.

    :raise HostError: when the environment names something else.
    """
    return _override_kernel() or _cached_kernel()


def _read_kernel(path: Path) -> Kernel:
    with path.open("rb") as file:
        version = kernel_release(file.read(64 << 10))
    return Kernel(path=path, version=version, sha256=sha256_of(path), modules=None)


def _drivers() -> set[str]:
    return {name for names in modules.DRIVERS.values() for name in names}


def _override_kernel() -> Kernel | None:
    name = os.environ.get("LAB_GUEST_KERNEL")
    if not name:
        return None
    try:
        return _read_kernel(Path(name).absolute())
    except (OSError, ValueError) as error:
        raise HostError(
            f"LAB_GUEST_KERNEL={name}: {error}", "name a bzImage, or unset the variable"
        ) from error


def _cached_kernel() -> Kernel | None:
    try:
        stamp = json.loads((common.cache_folder() / "kernel.json").read_text())
        if not _drivers() <= set(stamp["drivers"]):
            return None  # unpacked when the guest had other devices: some modules may be missing
        kernel = Kernel(
            path=common.cache_folder() / stamp["path"],
            version=stamp["version"],
            sha256=stamp["sha256"],
            modules=common.cache_folder() / stamp["modules"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing, or not ours: it is made again
    # The hash is part of the path; a look at the file itself is for the caller that boots it.
    return kernel if kernel.path.is_file() else None


async def fetch_kernel(say: Progress) -> Kernel:
    """Download the distribution's kernel and put it into the cache.

    :raise HostError: no apt.
    :raise BuildError: when it cannot be downloaded, or is none.
    """
    if not has_apt():
        raise HostError("no apt on this host to obtain the guest's kernel with", _REMEDY)
    cache = common.cache_folder()
    with tempfile.TemporaryDirectory(prefix=".kernel-", dir=cache) as temporary:
        work = Path(temporary)
        apt = Apt(log=common.build_log())
        try:
            package = await _download_kernel(apt, work, say)
        except BuildError as error:
            remedy = f"check the network and apt's sources, or {_REMEDY}"
            raise BuildError(error.cause, remedy) from error
        await apt.unpack(package, work / "tree")
        images = sorted((work / "tree" / "boot").glob("vmlinuz-*"))
        if len(images) != 1:
            raise BuildError(
                f"{package.name} has {len(images)} kernels in /boot instead of one", _REMEDY
            )
        try:
            kernel = _read_kernel(images[0])
        except ValueError as error:
            raise BuildError(f"the kernel in {package.name}: {error}", _REMEDY) from error
        target = cache / f"kernel-{kernel.sha256[:16]}" / "vmlinuz"
        folder = target.parent / "modules"
        folder.mkdir(parents=True, exist_ok=True)
        images[0].chmod(0o644)
        images[0].replace(target)
        for name, content in modules.collect_modules(work / "tree").items():
            (work / name).write_bytes(content)
            (work / name).replace(folder / f"{name}.ko")
        stamp = asdict(kernel) | {
            "path": str(target.relative_to(cache)),
            "modules": str(folder.relative_to(cache)),
            "package": package.name,
            "drivers": sorted(_drivers()),
        }
        (work / "stamp").write_text(json.dumps(stamp, indent=1) + "\n")
        (work / "stamp").replace(cache / "kernel.json")
    return replace(kernel, path=target, modules=folder)


async def _download_kernel(apt: Apt, work: Path, say: Progress) -> Path:
    """Download the kernel's package into `work`.

    The system's package lists are tried first. They may be empty, as in a fresh container, or
    name a version that the mirror has replaced since; then lists of our own are fetched.
    """
    try:
        return await _download_with(apt, work, say)
    except BuildError:
        say("guest: fetching package lists")
        own = apt.with_lists(common.cache_folder() / "apt")
        await own.update()
        return await _download_with(own, work, say)


async def _download_with(apt: Apt, work: Path, say: Progress) -> Path:
    package = await _resolve_kernel(apt)
    say(f"guest: downloading {package}")
    return await apt.download(package, work)


async def _resolve_kernel(apt: Apt) -> str:
    """Return the package the metapackage stands for, such as linux-image-6.1.0-1-cloud-amd64."""
    for metapackage in KERNEL_METAPACKAGES:
        try:
            listing = await apt.depends(metapackage)
        except BuildError:
            continue  # unknown to these lists
        match = re.search(r"^\s*Depends: (linux-image-[0-9][^\s:<>]*)", listing, re.MULTILINE)
        if match:
            return match[1]
    raise BuildError(f"apt knows none of {', '.join(KERNEL_METAPACKAGES)}")
