"""Where built and downloaded things are kept between sessions."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from lab.errors import HostError


def cache_dir() -> Path:
    """Return the cache directory, created private to the user if it is not there.

    ``$LAB_CACHE`` wins, then ``$XDG_CACHE_HOME/vm-snapshot-lab``, then
    ``~/.cache/vm-snapshot-lab``. Everything below it can be rebuilt and may be deleted, except the
    layers that snapshots with disks need (`lab.disks.store`), unless LAB_LAYERS_DIR is elsewhere.

    :raise HostError: when it cannot be created.
    """
    if chosen := os.environ.get("LAB_CACHE"):
        path = Path(chosen)
    else:
        # The XDG specification says that a relative value is to be ignored.
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        path = (base if base.is_absolute() else Path.home() / ".cache") / "vm-snapshot-lab"
    path = path.absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"the cache directory {path} cannot be created: {error.strerror}",
            "set LAB_CACHE to a writable directory",
        ) from error
    return path


@contextlib.asynccontextmanager
async def locked(path: Path, waiting: Callable[[], None]) -> AsyncIterator[None]:
    """Hold a file's lock, so that two processes do not write the same part of the cache at once.

    The kernel releases it when the process ends, however it ends.

    :param waiting: called again and again while another process has it.
    """
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                await asyncio.sleep(0.2)
        yield
