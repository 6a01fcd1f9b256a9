"""Private temporary folders that go with their owner, also when that is killed.

A folder belongs to whoever holds the lock on the file `owner` in it.  The kernel releases the lock
when that process ends, however it ends, so a folder whose lock is free has no owner any more: no
process id is compared that could have been given to another process since.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

LOCK_NAME = "owner"


@contextlib.contextmanager
def private_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a folder of mode 0700 that lasts as long as the context.

    Abandoned ones of the same prefix are removed first: a process that was killed left them.

    :param parent: where; among the temporary files by default.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    remove_abandoned(prefix, parent)
    with contextlib.ExitStack() as stack:
        folder, owner = _owned_folder(prefix, parent)
        stack.callback(os.close, owner)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def remove_abandoned(prefix: str, parent: Path) -> list[Path]:
    """Remove this user's folders of a prefix whose owner is gone, and return them.

    Folders without a lock file are left alone: they are being made, or are not the lab's.
    """
    removed = []
    for folder in sorted(parent.glob(f"{prefix}*")):
        try:
            if not _is_this_users(folder):
                continue
            descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if _lock(descriptor):
                log.info("removing %s, whose owner is gone", folder)
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
        finally:
            os.close(descriptor)
    return removed


def _owned_folder(prefix: str, parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        path = folder / LOCK_NAME
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        if _lock(descriptor) and path.exists():
            return folder, descriptor
        # Between the last two calls somebody took it for abandoned; that happens once in ages.
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_this_users(folder: Path) -> bool:
    # Anybody may make a folder of any name among temporary files.
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
