"""Control groups with a limit, for tests: of version 2 and of version 1, whichever has it here."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.host.limits import groups

#: By controller, the files of version 2 and version 1 that set its limit.
_FILES = {
    "memory": ("memory.max", "memory.limit_in_bytes"),
    "cpu": ("cpu.max", "cpu.cfs_quota_us"),
    "pids": ("pids.max", "pids.max"),
}
#: Short, so that what runs in it seems slow and not halting.
PERIOD_US = 10_000
#: How long the kernel may take to notice that a process of a group has ended.
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class LimitedGroup:
    """A control group that exists for one test."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def add(self, pid: int) -> None:
        """Put a process into it, with what it starts from now on."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def command(self, command: Sequence[str]) -> list[str]:
        """A command that runs in it from its first instruction on."""
        enter = 'echo $$ > "$1" && shift && exec "$@"'
        return ["sh", "-c", enter, "sh", str(self.folder / "cgroup.procs"), *command]


@contextlib.contextmanager
def limited_group(controller: str, limit: int) -> Iterator[LimitedGroup]:
    """Make a group with a limit: bytes of memory, processes, or microseconds of CPU time in each
    `PERIOD_US`.  It is gone afterwards; skip the test where none can be made.
    """
    for parent in reversed(groups(controller)):
        folder = parent.folder / f"lab-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if _set(folder, controller, limit):
                yield LimitedGroup(folder)
                return
        finally:
            _remove(folder)
    pytest.skip(f"no control group can be made here that limits {controller}")


def _set(folder: Path, controller: str, limit: int) -> bool:
    new, old = _FILES[controller]
    if (folder / new).exists():
        value = f"{limit} {PERIOD_US}" if controller == "cpu" else str(limit)
        (folder / new).write_text(value)
        return True
    if (folder / old).exists():
        if controller == "cpu":
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (folder / old).write_text(str(limit))
        return True
    return False


def _remove(folder: Path) -> None:
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            folder.rmdir()
        except OSError:
            # Who was in it has been waited for, but what he started may still be ending.
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return
