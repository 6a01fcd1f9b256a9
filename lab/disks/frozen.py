"""Which layers a snapshot needs, as its sidecar says."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from lab.disks.chain import Layer
from lab.disks.store import Store, snapshot_mark
from lab.errors import UsageError


class Stamp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of the user's that a frozen disk stands on, and when it was written to last.

    Whoever writes to it later changes the frozen disk as well, and nothing in the disk tells.
    """

    path: str
    bytes: int
    mtime_ns: int


class FrozenDisk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One disk of a guest as it was at the instant of a snapshot, as the sidecar has it.

    `node` is the name that QEMU had for the disk, `layer` the file that has its content, together
    with those that it is on, to which its header leads; `format` that file's, `virtual_bytes` the
    size of the disk.  `named` is the file by which the recorded command line of a VM names the
    disk, empty where the lab made the line.  `stands_on` are those of the files that are the
    user's.
    """

    node: str
    layer: str
    format: str
    virtual_bytes: int
    named: str
    stands_on: tuple[Stamp, ...]


def stamped(chain: Iterable[Layer], store: Store) -> tuple[Stamp, ...]:
    """The files of a chain that are not the store's, as they are now.

    :raise OSError: one is not there.
    """
    return tuple(_stamp(layer.path) for layer in chain if not store.owns(layer.path))


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(path=os.fspath(path), bytes=status.st_size, mtime_ns=status.st_mtime_ns)


def changed(disk: FrozenDisk) -> str:
    """Name a file of the user's that was written to since the disk was frozen; empty if none was.

    A file that is not there is not named: whoever reads the chain is told of that.
    """
    for stamp in disk.stands_on:
        path = Path(stamp.path)
        if path.exists() and _stamp(path) != stamp:
            return stamp.path
    return ""


def frozen_disks(snapshot: Path) -> tuple[FrozenDisk, ...]:
    """The disks of a snapshot, in the order of the machine; none for one of memory alone.

    The snapshot is not looked at otherwise: whether it is whole, a restore finds out.

    :param snapshot: the image; its sidecar is beside it.
    :raise UsageError: when there is no such snapshot, or its sidecar is none.
    """
    sidecar = _sidecar(snapshot)
    try:
        document = json.loads(sidecar.read_bytes())
        return msgspec.convert(document.get("disks") or [], tuple[FrozenDisk, ...])
    except OSError as error:
        raise UsageError(
            f"there is no snapshot {snapshot}: {sidecar.name}: {error.strerror}", "check the path"
        ) from error
    except (ValueError, AttributeError, msgspec.ValidationError) as error:
        raise UsageError(f"{sidecar} is no sidecar of a snapshot: {error!r}") from error


def remember(store: Store, snapshot: Path) -> tuple[FrozenDisk, ...]:
    """Return the disks of a snapshot, and note where it is now, as it may have been moved.

    Whoever uses a snapshot calls this: its layers are kept for it from then on.

    :raise UsageError: when there is no such snapshot, or its sidecar is none.
    :raise HostError: when that cannot be written down.
    """
    disks = frozen_disks(snapshot)
    mark = snapshot_mark(_sidecar(snapshot))
    for disk in disks:
        if mark is not None and store.owns(Path(disk.layer)):
            store.keep_for(Path(disk.layer), snapshot, mark)
    return disks


def _sidecar(snapshot: Path) -> Path:
    return snapshot.with_name(snapshot.name + ".json")
