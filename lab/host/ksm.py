"""The kernel's merging of equal pages (KSM), which takes write protection off guest memory.

When it merges a page, the kernel writes a new page table entry that knows nothing of userfaultfd:
what was protected for a live snapshot no longer is, and the image gets what the guest writes there
later.  QEMU by itself offers all guest RAM for merging, so the lab starts every QEMU with
`mem-merge=off`.  A process can also be told to offer all of its memory, whatever it asks for
itself (`PR_SET_MEMORY_MERGE`, which systemd's `MemoryKSM=` sets), and hands that down to what it
starts: `lab.host.process.wrapped` takes that back for QEMU.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lab.errors import HostError, TransientError

KSM = Path("/sys/kernel/mm/ksm")

PR_SET_MEMORY_MERGE = 67
_PR_GET_MEMORY_MERGE = 68

# In this order: the number of pages cannot be set while the kernel's advisor chooses it.
_FULL_SPEED = {
    "advisor_mode": "none",
    "smart_scan": "0",
    "sleep_millisecs": "0",
    "pages_to_scan": "1000000",
    "run": "1",
}

# Restores the settings when its input ends, whatever becomes of the process that changed them.
# Until then it holds the lock on descriptor 3, which it inherits.
_RESTORER = """
trap '' HUP INT TERM
echo ready
read -r _
status=0
for setting; do
    echo "${setting#*=}" > "${setting%%=*}" || status=1
done
exit $status
"""


def ksm_runs(folder: Path = KSM) -> bool:
    """Whether the kernel looks for equal pages at present."""
    return _setting(folder, "run") == "1"


def merges_everything() -> bool:
    """Whether the kernel may merge all memory of this process and of what it starts."""
    # An error means a kernel before Linux 6.4, which cannot.
    return int(ctypes.CDLL(None).prctl(_PR_GET_MEMORY_MERGE, 0, 0, 0, 0)) == 1


def _setting(folder: Path, name: str) -> str:
    """What a file of `folder` is set to, empty where this kernel has none."""
    try:
        text = (folder / name).read_text().strip()
    except OSError:
        return ""
    # A choice is shown in brackets among the others.
    return text.partition("[")[2].partition("]")[0] or text


@contextlib.contextmanager
def ksm_running(folder: Path = KSM) -> Iterator[None]:
    """Have the kernel merge equal pages as fast as it can, for as long as the context lasts.

    The host's settings are put back at its end, and also when this process is killed before.
    Pages that were merged stay so until they are written to, or their process ends.

    :param folder: where the settings are.
    :raise HostError: when the kernel has no KSM, or this process may not change its settings.
    :raise TransientError: when another process has it running in this way.
    """
    before = {name: _setting(folder, name) for name in _FULL_SPEED}
    try:
        lock = os.open(folder / "run", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise HostError(
            "this kernel does not merge equal pages", "run on a kernel built with CONFIG_KSM"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TransientError(
                "another process has KSM running for a test", "wait until that has ended"
            ) from error
        # Read again under the lock: another process may just have put them back.
        before = {name: value for name in _FULL_SPEED if (value := _setting(folder, name))}
        with _restored_afterwards(folder, before, lock):
            for name in before:
                _change(folder, name, _FULL_SPEED[name])
            yield
    finally:
        os.close(lock)


def _change(folder: Path, name: str, value: str) -> None:
    try:
        (folder / name).write_text(value)
    except OSError as error:
        remedy = "run as root" if error.errno in (errno.EACCES, errno.EPERM) else ""
        raise HostError(f"{folder / name} cannot be set: {error.strerror}", remedy) from error


@contextlib.contextmanager
def _restored_afterwards(folder: Path, before: dict[str, str], lock: int) -> Iterator[None]:
    # First nothing is to be looked for any more, last the advisor is given the choice again.
    settings = [
        f"{folder / name}={before[name]}" for name in reversed(_FULL_SPEED) if name in before
    ]
    restorer = subprocess.Popen(
        ["sh", "-c", _RESTORER, "sh", *settings],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Not in reach of an interrupt of the terminal.
        start_new_session=True,
        pass_fds=[lock],
    )
    assert restorer.stdin is not None
    assert restorer.stdout is not None
    with restorer:
        try:
            # Nothing is changed before there is somebody to put it back.
            if restorer.stdout.readline() != b"ready\n":
                raise HostError("no shell can be started that puts KSM's settings back")
            yield
        finally:
            restorer.stdin.close()
            restorer.wait()
    if restorer.returncode != 0:
        # Somebody killed it, or it may not write there.
        for name in reversed(before):
            if _setting(folder, name) != before[name]:
                _change(folder, name, before[name])
