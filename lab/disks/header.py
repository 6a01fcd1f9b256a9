"""What the first bytes of a disk image say.

`qemu-img` takes for raw what no driver of its own recognizes, and the lab's QEMU has few drivers: a
VMDK would be booted as if its header were the disk's first sector, and a `disk.qcow2.xz` too.  So
the formats that other programs write are recognized here, to be refused by name.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

QCOW2_MAGIC = b"QFI\xfb"

_HEADER_BYTES = 4096
_END_BYTES = 512
_MAX_BACKING_BYTES = 1023
"""As the format's description says."""

# Offset and bytes; one is enough.
_IMAGES = (
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("qed", 0, b"QED\0"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("luks", 0, b"LUKS\xba\xbe"),
)
_PACKED = (
    ("gzip", 0, b"\x1f\x8b"),
    ("xz", 0, b"\xfd7zXZ\0"),
    ("zstd", 0, b"\x28\xb5\x2f\xfd"),
    ("bzip2", 0, b"BZh"),
    ("zip", 0, b"PK\3\4"),
    ("7z", 0, b"7z\xbc\xaf\x27\x1c"),
    ("tar", 257, b"ustar"),
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What was recognized.

    `kind` is the name that QEMU has for a format of disk images, or None.  `packed` is what the
    file was packed with, or None.  The rest is of a qcow2: `backing` is what its header names,
    as it is written there; `encrypted`; `tables_end` is where its first table ends, which is in
    the file unless that was cut off.
    """

    kind: str | None = None
    packed: str | None = None
    backing: str | None = None
    encrypted: bool = False
    tables_end: int = 0


def read_header(path: Path) -> Header:
    """Return what the first and last bytes of a file say.

    :raise OSError: when it cannot be read.
    """
    # A FIFO would wait for its other end.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        start = os.pread(descriptor, _HEADER_BYTES, 0)
        size = os.lseek(descriptor, 0, os.SEEK_END)
        end = os.pread(descriptor, _END_BYTES, max(size - _END_BYTES, 0))
        if start.startswith(QCOW2_MAGIC):
            return _qcow(descriptor, start)
    finally:
        os.close(descriptor)
    for kind, offset, magic in _IMAGES:
        if start.startswith(magic, offset):
            return Header(kind=kind)
    for packed, offset, magic in _PACKED:
        if start.startswith(magic, offset):
            return Header(packed=packed)
    # Virtual PC's fixed disks and Apple's images have theirs at the end.
    if end.startswith(b"conectix"):
        return Header(kind="vpc")
    if end.startswith(b"koly"):
        return Header(kind="dmg")
    return Header()


def _qcow(descriptor: int, start: bytes) -> Header:
    try:
        version, backing_at, backing_bytes = struct.unpack_from(">IQI", start, 4)
        if version < 2:
            return Header(kind="qcow")
        crypt_method, l1_entries, l1_at = struct.unpack_from(">IIQ", start, 32)
    except struct.error:
        return Header(kind="qcow2")
    backing = None
    if backing_at and 0 < backing_bytes <= _MAX_BACKING_BYTES:
        name = os.pread(descriptor, backing_bytes, min(backing_at, 1 << 62))
        backing = os.fsdecode(name)
    return Header(
        kind="qcow2",
        backing=backing,
        encrypted=crypt_method != 0,
        tables_end=l1_at + 8 * l1_entries,
    )
