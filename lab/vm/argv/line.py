"""A command line, and how a process was started."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CommandLine:
    """What a QEMU is started with."""

    program: Path
    arguments: tuple[str, ...]
    """What follows the program's name."""
    folder: Path
    """The working directory, against which relative paths on the line are meant."""


def read_command_line(pid: int) -> CommandLine:
    """Return how the process `pid` was started.

    :raise HostError: when it is another user's, or the program it runs is no longer on the disk.
    :raise UsageError: when there is no such process, or where it was started cannot be told and
        the line needs it.
    """
    raise NotImplementedError
