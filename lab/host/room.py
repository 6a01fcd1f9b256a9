"""Room on a disk: nothing that the lab writes takes the last of it from its owner.

A reserve stays free: 5 % of the file system or 2 GiB, whichever is more.  The 2 GiB hold only where
they are at most a tenth of the file system.  A smaller one is a scratch disk, a tmpfs or a medium
of its own, that is there to be filled, and keeps 5 %: with 2 GiB kept free it could not be used at
all.
"""

import shutil
from pathlib import Path

from lab.errors import HostError

RESERVE_SHARE = 0.05
RESERVE_BYTES = 2 << 30
LARGE_BYTES = 10 * RESERVE_BYTES
"""A file system of this size or more keeps `RESERVE_BYTES` free."""


def reserve_bytes(size_bytes: int) -> int:
    """What stays free of a file system of this size."""
    share = int(size_bytes * RESERVE_SHARE)
    return max(share, RESERVE_BYTES) if size_bytes >= LARGE_BYTES else share


def room_bytes(folder: Path) -> int:
    """What may still be written into a folder; negative when more than that is in use already.

    :raise HostError: when there is no such folder.
    """
    try:
        disk = shutil.disk_usage(folder)
    except OSError as error:
        raise HostError(f"{folder}: {error.strerror}", "name a folder that exists") from error
    return disk.free - reserve_bytes(disk.total)


def require_room(folder: Path, needed_bytes: int, what: str, remedy: str) -> None:
    """Check that so much may be written into a folder.

    :param what: what needs it, such as "an image".
    :raise HostError: when it may not, or there is no such folder.
    """
    room = room_bytes(folder)
    if room < needed_bytes:
        raise HostError(
            f"{what} needs {-(-needed_bytes // (1 << 20))} MiB in {folder} and {said(room)}", remedy
        )


def said(room: int) -> str:
    """How much room there is, as part of a sentence."""
    return f"{max(room, 0) >> 20} MiB are free there beyond the reserve of its file system"
