"""The RAM blocks of QEMU."""

import re
from dataclasses import dataclass

from lab.errors import QmpError


@dataclass(frozen=True, kw_only=True)
class RamBlock:
    """One RAM block of QEMU, as `info ramblock` shows it.

    `host_address` is where it is mapped in the QEMU process, 0 where QEMU is too old to say so
    (before 8.0); only `used_bytes` of it are migrated.
    """

    name: str
    host_address: int
    used_bytes: int
    total_bytes: int
    page_bytes: int
    read_only: bool


_RAM_BLOCK = re.compile(
    r"^\s*(?P<name>(?:\S.*?)?)\s+(?P<page>\d+) (?P<unit>[KMG]iB)"
    r"\s+0x[0-9a-f]+\s+0x(?P<used>[0-9a-f]+)\s+0x(?P<total>[0-9a-f]+)"
    r"(?:\s+0x(?P<host>[0-9a-f]+)\s+(?P<access>ro|rw))?\s*$"
)
_UNIT_BYTES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_ram_blocks(text: str) -> list[RamBlock]:
    """Read the table that HMP's `info ramblock` prints.

    A block without a name is of no device yet, and in no image: it is left out.

    :raise QmpError: when a line after the heading is no RAM block.
    """
    blocks = []
    for line in text.replace("\r", "").splitlines()[1:]:
        if not line.strip():
            continue
        match = _RAM_BLOCK.match(line)
        if match is None:
            raise QmpError(f"not a RAM block: {line.strip()!r}")
        if not match["name"]:
            continue
        blocks.append(
            RamBlock(
                name=match["name"],
                host_address=int(match["host"] or "0", 16),
                used_bytes=int(match["used"], 16),
                total_bytes=int(match["total"], 16),
                page_bytes=int(match["page"]) * _UNIT_BYTES[match["unit"]],
                read_only=match["access"] == "ro",
            )
        )
    return blocks
