"""What a disk image is: its format, its size, and the files that it is an overlay of.

Everything that would go wrong later is refused here, in one line, before anything is started.  No
byte of an image is written, and a QEMU that has it open is not disturbed.

A raw image has no header, so that an image is raw can only be said or guessed.  The guess is
QEMU's own: raw is what no other format recognizes.  Whoever may write to a raw disk, and that is
its guest, can write a qcow2 header to its beginning and name any file of the host there, which
would be read into the guest from then on.  So say `format="raw"` for a raw disk whose guest is not
trusted.  An overlay that the lab makes always names the format of what it is on, so once there
is one nothing is guessed any more.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.disks.header import Header, read_header
from lab.disks.qemu_img import run_qemu_img
from lab.errors import HostError, LabError, UsageError

FORMATS = (
    *("raw", "qcow2", "qcow", "qed", "vdi", "vmdk", "vpc", "vhdx"),
    *("parallels", "bochs", "cloop", "dmg"),
)
"""The formats of disk images that QEMU has a driver for.  A `qemu-img` may have fewer: the lab's
own has the first two."""

SECTOR_BYTES = 512

_CONVERT = "convert it: `qemu-img convert -O qcow2` of the package qemu-utils"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One file of a disk image.

    `path` is absolute.  `format` is QEMU's name of it.  `virtual_bytes` is the size of the disk as
    a guest sees it, `allocated_bytes` what the file occupies on the host's disk, 0 for a block
    device.  `backing` is the file that has what this one has not, None for the last of a chain.
    """

    path: Path
    format: str
    virtual_bytes: int
    allocated_bytes: int
    backing: Path | None


async def read_chain(
    qemu_img: Path, image: Path, *, format: str | None = None
) -> tuple[Layer, ...]:
    """Return the files of a disk image, the one that is named first.

    Links to regular files are followed, so that an overlay stays on the file that it was made on.

    :param format: of `image`, where its user says it; otherwise it is probed.
    :raise UsageError: when the image, or a file that it needs, is not there, is no regular file or
        block device, is of no format that this `qemu-img` reads, is encrypted, empty, packed, cut
        off or damaged; when the chain of its files has an end that is missing, or none.
    :raise HostError: when a file cannot be read, or there is no `qemu-img`.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f"{format} is no format of disk images", f"name {', '.join(FORMATS)}")
    layers: list[Layer] = []
    seen: set[tuple[int, int]] = set()
    path, needed_by = image.absolute(), None
    while True:
        path, status = _found(path, needed_by)
        if (status.st_dev, status.st_ino) in seen:
            raise UsageError(
                f"the backing files of {image} go round in a circle: {needed_by} is on {path}",
                "`qemu-img rebase -u` names another backing file",
            )
        seen.add((status.st_dev, status.st_ino))
        header = _checked_header(path, status, format)
        layer, backing_format = await _read_layer(qemu_img, path, format, header)
        layers.append(layer)
        if layer.backing is None:
            return tuple(layers)
        path, needed_by, format = layer.backing, path, backing_format


async def read_backing(qemu_img: Path, image: Path) -> Path | None:
    """The file that an image is directly on, whatever else there is to say of the image.

    None for the last of a chain; also where the image is not there, although its folder is, or is
    on something that is no file of this host.

    :raise OSError: when it cannot be found out.
    """
    try:
        os.close(os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except FileNotFoundError:
        os.scandir(image.parent).close()
        return None
    done = await run_qemu_img(qemu_img, "info", "-U", "--output=json", image)
    if done.status != 0:
        raise OSError(errno.EIO, _reason(done.said))
    try:
        backing = _backing(image, json.loads(done.output))
    except UsageError:
        return None
    return None if backing is None else Path(os.path.realpath(backing))


async def require_unlocked(qemu_img: Path, *images: Path) -> None:
    """Check that no other QEMU has these files open for writing.

    It looks at each file alone and not at what it is on; `read_chain` tells which these are.  Only
    programs that lock as QEMU does are seen: QEMU itself, `qemu-nbd`, `qemu-storage-daemon`.

    :raise HostError: when one has; names the process where that can be seen.
    """
    for image in images:
        path, _ = _found(image.absolute(), None)
        # QEMU's own look does not see that a raw image is written to, because that would not
        # disturb its own reading.
        done = await run_qemu_img(qemu_img, "info", "--output=json", path)
        if (done.status != 0 and " lock" in done.said) or _is_locked(path):
            raise HostError(
                f"{path} is in use: {writers(path)} has it open for writing",
                "shut that guest down, or name a copy of the image",
            )


_LOCK_BYTES = (101, 200)
"""QEMU locks one byte of a file for each thing that it does with it, from 100 on, and one for each
that it does not bear from others, from 200 on.  101: it writes; 200: what is in the file makes no
sense meanwhile, so nobody may read it."""

_FLOCK = "hhqqi4x"


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        for byte in _LOCK_BYTES:
            wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, wanted)
            if struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK:
                return True
    return False


def writers(path: Path) -> str:
    """The processes that have a file open for writing, for a sentence; as far as can be seen."""
    found = []
    wanted = path.stat()
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end at any moment, and those of other users cannot be looked into.
        with contextlib.suppress(OSError, ValueError, IndexError):
            for link in (folder / "fd").iterdir():
                if not os.path.samestat(link.stat(), wanted):
                    continue
                info = (folder / "fdinfo" / link.name).read_text()
                flags = int(info.split("flags:")[1].split()[0], 8)
                if flags & os.O_ACCMODE != os.O_RDONLY:
                    name = (folder / "comm").read_text().strip()
                    found.append(f"process {folder.name} ({name})")
                    break
    return " and ".join(found) or "another process"


def _found(path: Path, needed_by: Path | None) -> tuple[Path, os.stat_result]:
    """The path that a file has in the end, and its status.

    :raise LabError: when it is none that can be read.
    """
    called = f"{path}" if needed_by is None else f"{needed_by} is an overlay of {path}, which"
    try:
        os.fspath(path).encode()
        status = path.stat()
        # A device's name may be given to another device after a restart; that of a link is kept.
        if not stat.S_ISBLK(status.st_mode):
            path = Path(os.path.realpath(path))
        # Whether it may be read, only this tells for certain.
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except UnicodeEncodeError:
        raise UsageError(
            f"{os.fsencode(path)!r} is not UTF-8, in which QEMU is told of it", "rename it"
        ) from None
    except ValueError as error:  # a null byte
        raise UsageError(f"{os.fspath(path)!r} is no path: {error}") from error
    except OSError as error:
        raise _not_found(path, called, needed_by, error) from error
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file or block device"
        raise UsageError(f"{called} is {kind}", "name a disk image")
    return path, status


def _not_found(path: Path, called: str, needed_by: Path | None, error: OSError) -> LabError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG):
        if needed_by is None:
            return UsageError(f"there is no disk image {path}: {error.strerror}", "check the path")
        return UsageError(
            f"{called} is not there: {error.strerror}",
            "bring it back, or name where it is now with `qemu-img rebase -u`",
        )
    return HostError(
        f"{called} cannot be read: {error.strerror}",
        "give your user read permission",
    )


def _checked_header(path: Path, status: os.stat_result, format: str | None) -> Header:
    """What a file begins with, where that is nothing to refuse.

    :raise LabError: otherwise.
    """
    if stat.S_ISREG(status.st_mode) and status.st_size < SECTOR_BYTES:
        size = f"has {status.st_size} bytes" if status.st_size else "is empty"
        raise UsageError(f"{path} {size}, which is no disk", "name a disk image")
    try:
        header = read_header(path)
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}") from error
    if format == "raw":
        # Whatever is in it then is the guest's.
        return Header()
    if header.packed is not None:
        raise UsageError(
            f"{path} is packed with {header.packed}",
            "unpack it; if the guest is to see it as it is, say that its format is raw",
        )
    if header.kind == "luks" or (header.kind == "qcow2" and header.encrypted):
        raise UsageError(
            f"{path} is encrypted for QEMU, which the lab has no key for",
            "convert it to an image that is not; if its guest opens it, say that its format is raw",
        )
    return header


async def _read_layer(
    qemu_img: Path, path: Path, format: str | None, header: Header
) -> tuple[Layer, str | None]:
    """One file, and the format of what it is on where it names that."""
    told = [] if format is None else ["-f", format]
    done = await run_qemu_img(qemu_img, "info", "-U", "--output=json", *told, path)
    if done.status != 0:
        raise _unreadable(path, format, done.said)
    info: dict[str, Any] = json.loads(done.output)
    found = str(info["format"])
    if found not in FORMATS:
        raise UsageError(f"{path} is of the format {found}, which the lab cannot use", _CONVERT)
    if header.kind not in (None, found):
        raise UsageError(
            f"{path} is of the format {header.kind}, which this QEMU cannot read",
            f"{_CONVERT}; if the guest is to see it as it is, say that its format is raw",
        )
    _check_info(path, info, header)
    return Layer(
        path=path,
        format=found,
        virtual_bytes=int(info["virtual-size"]),
        allocated_bytes=int(info.get("actual-size", 0)),
        backing=_backing(path, info),
    ), info.get("backing-filename-format")


def _check_info(path: Path, info: dict[str, Any], header: Header) -> None:
    specific = info.get("format-specific", {}).get("data", {})
    if info.get("encrypted"):
        raise UsageError(f"{path} is encrypted, and the lab has no key for it", _CONVERT)
    if specific.get("corrupt"):
        raise UsageError(
            f"{path} is marked as damaged", f"`qemu-img check -r all {path}` tries to mend it"
        )
    if info.get("dirty-flag"):
        raise UsageError(
            f"{path} was not closed, because its QEMU was killed or still runs",
            f"shut its guest down, or mend it with `qemu-img check -r all {path}`",
        )
    if "data-file" in specific:
        raise UsageError(f"{path} keeps its data in another file", _CONVERT)
    if int(info["virtual-size"]) == 0:
        raise UsageError(f"{path} is a disk of no size", "name a disk image")
    with contextlib.suppress(OSError):
        if path.is_file() and header.tables_end > path.stat().st_size:
            raise UsageError(f"{path} is cut off: its first table is not in it", "copy it again")


def _backing(path: Path, info: dict[str, Any]) -> Path | None:
    """The file that an image is on, as a path.

    :raise UsageError: when that is no file of this host.
    """
    name = info.get("full-backing-filename", info.get("backing-filename"))
    if not name:
        return None
    name = str(name)
    before, colon, after = name.partition(":")
    if colon and "/" not in before:
        # QEMU takes it for a protocol then, or a description.
        if before != "file" or after.startswith("//"):
            raise UsageError(
                f"{path} is an overlay of {name}, which is no file of this host", _CONVERT
            )
        name = after
    return path.parent / name


def _unreadable(path: Path, format: str | None, said: str) -> LabError:
    reason = _reason(said)
    if "Unknown driver" in said:
        return UsageError(f"{path}: this QEMU cannot read the format {format}", _CONVERT)
    if "Permission denied" in said:
        return HostError(f"{path} cannot be read: {reason}", "give your user read permission")
    what = "disk image" if format is None else f"{format} image"
    return UsageError(f"{path} is no {what} that can be opened: {reason}", "name another image")


def _reason(said: str) -> str:
    """What `qemu-img` says, without the names of files that it begins with."""
    for _ in range(3):
        if not said.startswith("Could not open '"):
            break
        said = said.split("': ", 1)[-1]
    return said
