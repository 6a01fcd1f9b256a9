"""The disks of a user's VM: the layer that each is written to, and QEMU's description of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lab.disks.chain import Layer


class Held(Protocol):
    """A layer, and what is to be done when a VM does not need it any more."""

    @property
    def layer(self) -> Layer: ...
    def release(self) -> None:
        """Let go of it; whoever else needs it keeps it."""

    def discard(self) -> None:
        """Remove it, as nothing was written to it."""


@dataclass
class Disk:
    """A disk of a running VM.

    :param node: the name of the block node that is its top.
    :param layer: the file that the guest writes to now.
    :param direct: whether it is read and written past the host's page cache.
    :param aio: who does its I/O, as QEMU calls that.
    :param named: the file by which the command line of a VM that the lab did not start names it.
    :param held: the layers that the lab keeps for as long as the VM runs, oldest first.
    """

    node: str
    layer: Layer
    direct: bool
    aio: str
    named: Path | None = None
    held: list[Held] = field(default_factory=list)


def blockdev(disk_node: str, path: Path, *, direct: bool, aio: str) -> dict[str, Any]:
    """Return what QEMU is told of a qcow2 layer, as `-blockdev` and `blockdev-add` have it."""
    return {
        "driver": "qcow2",
        "node-name": disk_node,
        "discard": "unmap",
        "cache": {"direct": direct},
        "file": {
            "driver": "file",
            "filename": str(path),
            "aio": aio,
            "discard": "unmap",
            "cache": {"direct": direct},
        },
    }


_DESCRIBED = "json:"


def file_of(inserted: Mapping[str, Any], folder: Path) -> Path | None:
    """Return the file of a disk as `query-block` describes it, None for what is no file.

    :param folder: QEMU's working directory.
    """
    name = inserted["file"]
    if name.startswith(_DESCRIBED):
        # As QEMU writes it where its layers are not those that the file's own header leads to: the
        # header has another spelling of a path, for example.
        name = json.loads(name.removeprefix(_DESCRIBED)).get("file", {}).get("filename", "")
    path = folder / name.removeprefix("file:")
    return path if name and path.is_file() else None
