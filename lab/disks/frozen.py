"""Which layers a snapshot needs, as its sidecar says."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.disks.store import Store, snapshot_mark
from lab.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class FrozenDisk:
    """One disk of a guest as it was at the instant of a snapshot.

    `node` is the name that QEMU had for the disk, `layer` the file that has its content, together
    with those that it is on, `format` that file's, `virtual_bytes` the size of the disk.
    """

    node: str
    layer: Path
    format: str
    virtual_bytes: int


def frozen_disks(snapshot: Path) -> tuple[FrozenDisk, ...]:
    """The disks of a snapshot, in the order of the machine; none for one of memory alone.

    The snapshot is not looked at otherwise: whether it is whole, a restore finds out.

    :param snapshot: the image; its sidecar is beside it.
    :raise UsageError: when there is no such snapshot, or its sidecar is none.
    """
    sidecar = _sidecar(snapshot)
    try:
        document = json.loads(sidecar.read_bytes())
        disks: list[Any] = document.get("disks") or []
        return tuple(
            FrozenDisk(
                node=str(disk["node"]),
                layer=Path(disk["layer"]),
                format=str(disk["format"]),
                virtual_bytes=int(disk["virtual_bytes"]),
            )
            for disk in disks
        )
    except OSError as error:
        raise UsageError(
            f"there is no snapshot {snapshot}: {sidecar.name}: {error.strerror}", "check the path"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
        if mark is not None and store.owns(disk.layer):
            store.keep_for(disk.layer, snapshot, mark)
    return disks


def _sidecar(snapshot: Path) -> Path:
    return snapshot.with_name(snapshot.name + ".json")
