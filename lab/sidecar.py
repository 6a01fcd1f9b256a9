"""What has to be known about an image to restore it, in a JSON file beside it.

A migration stream does not describe the machine it came from well enough to build that machine
again, and it does not know its own length: the sidecar does.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lab.checksums import Checksums, damaged_pieces
from lab.errors import RestoreError, UsageError
from lab.guest.protocol import ReadyRecord
from lab.qemu.build import QemuBinary
from lab.scenario import Machine, Workload, from_json

FORMAT = "lab.snapshot/2"


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The description of one image.

    `machine_type` is the versioned one.  `ready` is what the guest said at its boot; its nonce is
    nowhere else but in the image.  It is None when the guest was still booting.  `binary` and
    `kernel_sha256` say what took it, for the record: another QEMU that knows the machine type may
    restore it.  `checksums` is None where nobody asked for them.
    """

    method: str
    engine: str | None
    machine: Machine
    workload: Workload
    machine_type: str
    image_bytes: int
    checksums: Checksums | None
    created_utc: str
    ready: ReadyRecord | None
    binary: QemuBinary
    kernel_sha256: str

    def to_text(self) -> str:
        """Return the file's content."""
        data = {"format": FORMAT} | msgspec.to_builtins(self, enc_hook=str)
        # As text, because JSON readers keep only 53 bits of a number.
        if self.ready is not None:
            data["ready"]["nonce"] = f"{self.ready.nonce:016x}"
        return json.dumps(data, indent=1) + "\n"


def sidecar_path(image: Path) -> Path:
    """Return where the sidecar of `image` is."""
    return image.with_name(image.name + ".json")


def read_sidecar(image: Path) -> Sidecar:
    """Read the sidecar of `image` and check the image against it.

    :raise RestoreError: when either is missing, unreadable or of another version, or the image
        has not the size it had.
    """
    path = sidecar_path(image)
    try:
        size = image.stat().st_size if image.is_file() else None
    except OSError as error:
        raise RestoreError(f"{image} can not be read: {error.strerror}") from error
    if size is None:
        raise RestoreError(f"there is no image {image}", "check the path, or take a snapshot")
    try:
        sidecar = _parse(path.read_bytes())
    except FileNotFoundError:
        raise RestoreError(
            f"{image.name} has no sidecar {path.name}, so its machine is unknown",
            "keep both files together; an image without one is not complete",
        ) from None
    except OSError as error:
        raise RestoreError(f"{path} can not be read: {error.strerror}") from error
    except (ValueError, UsageError, msgspec.ValidationError) as error:
        raise RestoreError(
            f"{path.name} is not a sidecar: {error}", "take the snapshot again"
        ) from (error)
    if size != sidecar.image_bytes:
        raise RestoreError(
            f"{image.name} has {size} bytes and had {sidecar.image_bytes} when it was taken",
            "copy it again in full, or take the snapshot again",
        )
    return sidecar


async def check_image(image: Path, sidecar: Sidecar) -> None:
    """Read all of `image` against the checksums of its sidecar, where it has them.

    :raise RestoreError: when a byte differs, or the image can not be read.
    """
    sums = sidecar.checksums
    if sums is None:
        return
    try:
        damaged = await damaged_pieces(image, sidecar.image_bytes, sums)
    except OSError as error:
        raise RestoreError(f"{image} can not be read: {error.strerror}") from error
    if damaged:
        start = damaged[0] * sums.piece_bytes
        end = min(start + sums.piece_bytes, sidecar.image_bytes)
        more = f" and {len(damaged) - 1} more places" if len(damaged) > 1 else ""
        raise RestoreError(
            f"{image.name} is damaged: bytes {start} to {end - 1}{more} are not those that were "
            "written",
            "copy it again, or take the snapshot again",
        )


def _parse(content: bytes) -> Sidecar:
    data = json.loads(content)
    if not isinstance(data, dict):
        raise ValueError("no JSON object")
    found = data.pop("format", None)
    if found != FORMAT:
        raise RestoreError(
            f"the sidecar has format {found!r} and this lab reads {FORMAT!r}",
            "use the version of the lab that wrote it",
        )
    expected = {f.name for f in dataclasses.fields(Sidecar)}
    if set(data) != expected:
        raise ValueError(f"keys {', '.join(sorted(set(data) ^ expected))} missing or unknown")
    nested: dict[str, Any] = {
        "machine": from_json(Machine, data["machine"]),
        "workload": from_json(Workload, data["workload"]),
    }
    if isinstance(data["ready"], dict) and isinstance(data["ready"].get("nonce"), str):
        data["ready"]["nonce"] = int(data["ready"]["nonce"], 16)
    plain = msgspec.convert(
        {k: v for k, v in data.items() if k not in nested}, _Plain, dec_hook=_decode_path
    )
    if plain.checksums is not None and not plain.checksums.covers(plain.image_bytes):
        raise ValueError("its checksums are not those of all of the image")
    return Sidecar(**msgspec.structs.asdict(plain), **nested)


class _Plain(msgspec.Struct, frozen=True, kw_only=True):
    """The parts whose dataclasses validate nothing themselves."""

    method: str
    engine: str | None
    machine_type: str
    image_bytes: int
    checksums: Checksums | None
    created_utc: str
    ready: ReadyRecord | None
    binary: QemuBinary
    kernel_sha256: str


def _decode_path(kind: type, value: Any) -> Any:
    if issubclass(kind, Path) and isinstance(value, str):
        return Path(value)
    raise TypeError(f"{value!r} is not a {kind.__name__}")
