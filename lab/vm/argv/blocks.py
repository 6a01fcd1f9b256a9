"""The disk images that a command line names."""

from dataclasses import dataclass
from pathlib import Path

from lab.vm.argv.line import CommandLine


@dataclass(frozen=True, kw_only=True)
class DiskOption:
    """A disk image on a command line."""

    option: str
    """The option that names it, such as "-drive"; empty for an image that stands alone."""
    index: int
    """Where in `arguments` the option begins."""
    name: str
    """The name of its topmost node, or the id of its drive; may be empty."""
    filename: str
    """As it is on the line."""
    path: Path | None
    """The file, absolute; None for what is no file, such as "nbd://host/export"."""
    format: str
    """The format, such as "qcow2"; empty where QEMU has to find out."""
    read_only: bool


def disks(line: CommandLine) -> tuple[DiskOption, ...]:
    """Return the disk images on a command line, in its order; not those of backing chains.

    A drive without a medium is not among them.

    :raise UsageError: when the line cannot be understood.
    """
    raise NotImplementedError
