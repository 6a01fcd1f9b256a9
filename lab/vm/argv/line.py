"""A command line, and how a process was started."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from lab.errors import HostError, UsageError

log = logging.getLogger(__name__)

PROC = Path("/proc")

_DELETED = " (deleted)"


@dataclass(frozen=True)
class CommandLine:
    """What a QEMU is started with."""

    program: Path
    arguments: tuple[str, ...]
    """What follows the program's name."""
    folder: Path
    """The working directory, against which relative paths on the line are meant."""

    def absolute(self, filename: str) -> Path:
        """Return the path of a file that the line names."""
        return self.folder / filename


def read_command_line(pid: int) -> CommandLine:
    """Return how the process `pid` was started.

    A QEMU that was told to go into the background has left the folder it was started in.  That is
    then the one of its first environment, as a shell sets it, which is wrong only where another
    program changed the folder and started QEMU.

    When another file lies where the program was, as after an upgrade, a warning says so: the
    snapshot may not be readable for it.

    :raise HostError: when the process is another user's, or its program is no longer on the disk.
    :raise UsageError: when there is no such process.
    """
    process = PROC / str(pid)
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")[:-1]
        # As text: the kernel may add to these what is no part of a path.
        program = os.readlink(process / "exe")  # noqa: PTH115
        folder = os.readlink(process / "cwd")  # noqa: PTH115
        if any(word in (b"-daemonize", b"--daemonize") for word in words):
            folder = _first_folder(process) or folder
    except (FileNotFoundError, ProcessLookupError) as error:
        raise UsageError(
            f"there is no process {pid}", "is the machine still running, and on this host?"
        ) from error
    except PermissionError as error:
        raise HostError(
            f"process {pid} is another user's, and how it was started cannot be read",
            "run as that user, or as root",
        ) from error
    if not words:
        raise UsageError(f"process {pid} has ended", "start the machine again")
    path = Path(program.removesuffix(_DELETED))
    if program.endswith(_DELETED) and not Path(program).exists():
        if not path.exists():
            raise HostError(
                f"{path}, which process {pid} runs, was deleted since it was started",
                "put that version of QEMU back there",
            )
        log.warning(
            "%s was replaced since process %d was started; a snapshot of the old one may not be "
            "readable for the new one",
            *(path, pid),
        )
    return CommandLine(path, tuple(os.fsdecode(word) for word in words[1:]), Path(folder))


def _first_folder(process: Path) -> str:
    for entry in (process / "environ").read_bytes().split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name == b"PWD" and value.startswith(b"/"):
            return os.fsdecode(value)
    return ""
