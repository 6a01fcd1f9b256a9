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


DEFAULT_AIO = "threads"
"""What QEMU does a disk's I/O with where it is told nothing."""


@dataclass
class Disk:
    """A disk of a running VM.

    How it is opened is how its overlays are opened, so that the VM keeps what its user has chosen.

    :param node: the name of the block node that is its top.
    :param layer: the file that the guest writes to now.
    :param direct: whether it is read and written past the host's page cache.
    :param aio: who does its I/O, as QEMU calls that.
    :param no_flush: whether the guest's flushes are ignored (`cache=unsafe`).
    :param detect_zeroes: what becomes of zeros that the guest writes, as QEMU calls that.
    :param named: the file by which the command line of a VM that the lab did not start names it.
    :param held: the layers that the lab keeps for as long as the VM runs, oldest first.
    """

    node: str
    layer: Layer
    direct: bool = False
    aio: str = DEFAULT_AIO
    no_flush: bool = False
    detect_zeroes: str = "off"
    named: Path | None = None
    held: list[Held] = field(default_factory=list)

    def note(self, inserted: Mapping[str, Any]) -> None:
        """Take over what QEMU calls its top and how that is opened, as `query-block` has it."""
        self.node = inserted["node-name"]
        self.direct = inserted["cache"]["direct"]
        self.no_flush = inserted["cache"]["no-flush"]
        self.detect_zeroes = inserted["detect_zeroes"]

    def blockdev(self, node: str, path: Path) -> dict[str, Any]:
        """Return what QEMU is told of a qcow2 layer of this disk, as `-blockdev` and
        `blockdev-add` have it.

        :param node: the name that the layer gets.
        """
        cache = {"direct": self.direct, "no-flush": self.no_flush}
        return {
            "driver": "qcow2",
            "node-name": node,
            "discard": "unmap",
            "detect-zeroes": self.detect_zeroes,
            "cache": cache,
            "file": {
                "driver": "file",
                "filename": str(path),
                "aio": self.aio,
                "discard": "unmap",
                "cache": cache,
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
