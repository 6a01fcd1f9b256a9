"""What has to be known about an image to restore it, in a JSON file beside it.

A migration stream does not describe the machine it came from well enough to build that machine
again, and it does not know its own length: the sidecar does.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from lab.disks.frozen import FrozenDisk
from lab.errors import RestoreError, UsageError
from lab.guests.protocol import ReadyRecord
from lab.qemu.build import QemuBinary
from lab.records import Schema
from lab.scenario.document import from_json
from lab.scenario.machine import Machine
from lab.scenario.workload import Workload
from lab.snapshot.checksums import Checksums
from lab.vm.argv import CommandLine


class Sidecar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The description of one image.

    `machine_type` is the versioned one.  `ready` is what the guest said at its boot; its nonce is
    nowhere else but in the image.  It is None when the guest was still booting; `boot_before` is
    then the nonce of the boot before, in hexadecimal, whose traces may still be in memory, and None
    when there was none.  `binary` and
    `kernel_sha256` say what took it, for the record: another QEMU that knows the machine type may
    restore it.  `disks` are the frozen layers of a user's disks, in the machine's order; a scratch
    disk is in no snapshot.  `line` is how a VM was started that the lab did not start, whose
    `machine` is only what its monitor told; None of all others.  `checksums` is None where none
    were asked for.  `mark` is what the last bytes of the image are, by which the two belong
    together (`lab.snapshot.image`); None in those of older versions, whose images have none.
    """

    method: str
    engine: str | None
    machine: Machine
    workload: Workload
    machine_type: str
    image_bytes: int
    mark: str | None
    checksums: Checksums | None
    created_utc: str
    ready: ReadyRecord | None
    boot_before: str | None = None
    binary: QemuBinary
    kernel_sha256: str
    disks: tuple[FrozenDisk, ...]
    line: CommandLine | None

    def to_text(self) -> str:
        """Return the file's content."""
        data = {SCHEMA.key: str(SCHEMA)} | msgspec.to_builtins(self, enc_hook=str)
        # As text, because JSON readers keep only 53 bits of a number.
        if self.ready is not None:
            data["ready"]["nonce"] = f"{self.ready.nonce:016x}"
        return json.dumps(data, indent=1) + "\n"


def sidecar_path(image: Path) -> Path:
    """Return where the sidecar of `image` is."""
    return image.with_name(image.name + ".json")


def parse_sidecar(image: Path, content: bytes) -> Sidecar:
    """Return the sidecar of `image` that a file's content is; it is not compared with the image.

    :raise RestoreError: when it is none, or of another version.
    """
    name = sidecar_path(image).name
    try:
        return _parse(content, name)
    except (ValueError, UsageError, msgspec.ValidationError) as error:
        raise RestoreError(
            f"{name} is not a sidecar: {error}", "take the snapshot again"
        ) from error


def _parse(content: bytes, name: str) -> Sidecar:
    document = json.loads(content)
    if not isinstance(document, dict):
        raise ValueError("no JSON object")
    data = SCHEMA.upgraded(document, name)
    del data[SCHEMA.key]
    # A parameter that did not exist yet is as it was then, which only `from_json` knows.
    for part, cls in (("machine", Machine), ("workload", Workload)):
        if part in data:
            data[part] = from_json(cls, data[part])
    if isinstance(data.get("ready"), dict) and isinstance(data["ready"].get("nonce"), str):
        data["ready"]["nonce"] = int(data["ready"]["nonce"], 16)
    found = msgspec.convert(data, SCHEMA.kind, dec_hook=_decode_path)
    if found.checksums is not None and not found.checksums.covers(found.image_bytes):
        raise ValueError("its checksums are not those of all of the image")
    return found


SCHEMA = Schema(
    family="lab.snapshot",
    version=4,
    kind=Sidecar,
    remedy="take the snapshot again",
    upgrades={
        # Images of version 2 had no mark; everything else was the same.
        2: lambda document: document | {"mark": None},
        3: lambda document: document | {"disks": [], "line": None},
    },
    key="format",
    error=RestoreError,
)


def _decode_path(kind: type, value: Any) -> Any:
    if issubclass(kind, Path) and isinstance(value, str):
        return Path(value)
    raise TypeError(f"{value!r} is not a {kind.__name__}")
