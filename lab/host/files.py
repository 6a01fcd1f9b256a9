"""Small things about files that more than one module needs."""

import hashlib
import os
from pathlib import Path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that readers see the old one or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def content_key(*parts: bytes) -> str:
    """Sixteen hexadecimal digits that stand for all the parts: a name for what is made of them.

    Where one part ends and the next begins counts too.
    """
    key = hashlib.sha256()
    for part in parts:
        key.update(len(part).to_bytes(8, "little") + part)
    return key.hexdigest()[:16]


def kernel_text(path: str | Path) -> str:
    """A file of /proc or /sys, empty where this kernel has none."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
