"""Who else measures on this host, or runs a guest of the lab's, while something is measured here.

Measurements know of each other by a file in the cache, so those of another user with a cache of his
own are seen only by their guests.  Not looked for: what else the host does.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from lab.host.cache import cache_dir
from lab.host.running import running_qemus

ANOTHER_MEASUREMENT = "another measurement"


class Neighbours:
    """Who was there so far, in words; empty as long as nobody was."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def note(self, who: str) -> None:
        """Add somebody, once."""
        if who not in self.found:
            self.found.append(who)

    def note_guests(self, own_pid: int) -> None:
        """Look for guests of the lab's that are not the measured one."""
        others = sum(qemu.pid != own_pid for qemu in running_qemus())
        if others:
            self.note("another guest" if others == 1 else f"{others} other guests")


@contextlib.contextmanager
def neighbours(own_pid: int = 0) -> Iterator[Neighbours]:
    """Look who else measures, at any moment of the context, or has a guest at its begin or end.

    What it found is complete after the context.

    :param own_pid: the QEMU that is measured, if there is one.
    """
    found = Neighbours()
    path = cache_dir() / "measuring"
    with contextlib.closing(_File(path)) as file:
        if not file.begin():
            found.note(ANOTHER_MEASUREMENT)
        found.note_guests(own_pid)
        yield found
        found.note_guests(own_pid)
        if file.others_began():
            found.note(ANOTHER_MEASUREMENT)


class _File:
    """Locked by all that measure at present; each adds a byte when it begins."""

    def __init__(self, path: os.PathLike[str]) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._size = 0

    def begin(self) -> bool:
        """Return whether nobody else measures."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            alone = True
        except BlockingIOError:
            alone = False
        # He who looks whether he is alone keeps others from this for a moment only.
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        os.write(self._descriptor, b".")
        self._size = os.fstat(self._descriptor).st_size
        return alone

    def others_began(self) -> bool:
        """Whether somebody has begun since."""
        return os.fstat(self._descriptor).st_size > self._size

    def close(self) -> None:
        os.close(self._descriptor)
