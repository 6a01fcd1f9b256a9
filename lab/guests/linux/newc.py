"""Write and read `newc` cpio archives, the format of an initramfs, reproducibly.

The writer is a pure function of its entries: owner and group 0, modification time 0, inode
numbers counted from 1 in the order of the names, no padding beyond the format's own.  The
same entries give the same bytes on every machine, so an archive's hash names its content.

Only what an initramfs needs is here: directories, regular files, symbolic links and device
nodes.  There are no hard links.
"""

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_MAGIC = b"070701"
_HEADER_BYTES = 110
_TRAILER = "TRAILER!!!"
_FIELDS = 13  # eight hexadecimal digits each
_MAX_U32 = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One member of an archive: `path` is relative, `mode` has the file type's bits too."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if not self.path or any(part in ("", ".", "..") for part in parts) or "\0" in self.path:
            raise ValueError(f"not a plain relative path: {self.path!r}")
        if self.path == _TRAILER:
            raise ValueError(f"{_TRAILER} ends an archive and cannot be a member")
        if not (stat.S_ISREG(self.mode) or stat.S_ISLNK(self.mode)) and self.data:
            raise ValueError(f"{self.path}: only files and symbolic links have data")
        if len(self.data) > _MAX_U32:
            raise ValueError(f"{self.path}: the format cannot hold 4 GiB or more")


def directory(path: str, permissions: int = 0o755) -> Entry:
    """Describe a directory."""
    return Entry(path=path, mode=stat.S_IFDIR | permissions)


def regular_file(path: str, data: bytes, permissions: int = 0o644) -> Entry:
    """Describe a regular file."""
    return Entry(path=path, mode=stat.S_IFREG | permissions, data=data)


def character_device(path: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """Describe a character device node."""
    return Entry(path=path, mode=stat.S_IFCHR | permissions, device=(major, minor))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _member(entry_path: str, inode: int, mode: int, links: int, entry: Entry | None) -> bytes:
    data = entry.data if entry else b""
    major, minor = entry.device if entry else (0, 0)
    name = entry_path.encode() + b"\0"
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(name), 0)
    header = _MAGIC + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(data)


def write_archive(entries: Iterable[Entry]) -> bytes:
    """Return the archive that holds `entries`, sorted by path so that parents come first.

    Raises ValueError if two entries have the same path.
    """
    by_path: dict[str, Entry] = {}
    for entry in entries:
        if entry.path in by_path:
            raise ValueError(f"{entry.path} is there twice")
        by_path[entry.path] = entry
    # By component, so that "a/b" follows "a" even when there is an "a-b".
    ordered = sorted(by_path.values(), key=lambda entry: entry.path.split("/"))
    members = [
        _member(entry.path, inode, entry.mode, 2 if stat.S_ISDIR(entry.mode) else 1, entry)
        for inode, entry in enumerate(ordered, start=1)
    ]
    return b"".join(members) + _member(_TRAILER, 0, 0, 1, None)


def read_archive(archive: bytes) -> Iterator[Entry]:
    """Yield the entries of an archive in its order.

    Raises ValueError if the bytes are not a complete newc archive.
    """
    position = 0
    while True:
        header = archive[position : position + _HEADER_BYTES]
        if len(header) < _HEADER_BYTES or header[:6] != _MAGIC:
            raise ValueError(f"no newc header at byte {position}")
        values = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(_FIELDS)]
        mode, data_bytes, major, minor, name_bytes = (values[i] for i in (1, 6, 9, 10, 11))
        name_at = position + _HEADER_BYTES
        data_at = name_at + name_bytes + -(_HEADER_BYTES + name_bytes) % 4
        path = archive[name_at : name_at + name_bytes - 1].decode()
        if path == _TRAILER:
            return
        if data_at + data_bytes > len(archive):
            raise ValueError(f"{path} is cut short")
        data = archive[data_at : data_at + data_bytes]
        yield Entry(path=path, mode=mode, data=data, device=(major, minor))
        position = data_at + data_bytes + -data_bytes % 4
