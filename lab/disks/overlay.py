"""Make an overlay: it takes what a guest writes, and the image below it stays as it is."""

import contextlib
import errno
import os
import secrets
from pathlib import Path

from lab.disks.chain import Layer
from lab.disks.qemu_img import run_qemu_img
from lab.errors import HostError, LabError, UsageError

PARTIAL = ".partial"
"""What ends the name of a file that is not complete."""

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""How file systems say that a file can have no second name there."""


async def create_overlay(qemu_img: Path, path: Path, base: Layer) -> Layer:
    """Make an empty qcow2 image on `base`, of the same size, that its owner alone may read.

    It names the format of `base`, so that nobody guesses it again.  The file gets its name when it
    is complete, and never takes the place of another one.  `base` is not opened: it may be in use.

    :raise UsageError: when the name is taken, or a path is one that a qcow2 cannot have.
    :raise HostError: when the file cannot be made.
    """
    path = path.absolute()
    partial = open_partial(path)
    try:
        done = await run_qemu_img(
            *(qemu_img, "create", "-q", "-f", "qcow2", "-o", "compat=1.1"),
            # Without looking at it: its size is known, and a guest may be running on it.
            *("-u", "-b", base.path, "-F", base.format, "--", partial, str(base.virtual_bytes)),
        )
        if done.status != 0:
            raise cannot_be_made(path, done.said)
        allocated_bytes = partial.stat().st_blocks * 512
        give_name(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Layer(
        path=path,
        format="qcow2",
        virtual_bytes=base.virtual_bytes,
        allocated_bytes=allocated_bytes,
        backing=base.path,
    )


def open_partial(path: Path, *, replaces: bool = False) -> Path:
    """Make an empty private file beside `path` to be written and then given that name.

    :param replaces: whether it is to take the place of what has the name.
    :raise UsageError: when the name is taken, or cannot be told QEMU.
    :raise HostError: when it cannot be made.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        os.fspath(path).encode()
        if not replaces and os.path.lexists(path):
            raise _taken(path)
        # QEMU would make it readable for all that the umask lets.
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except UnicodeEncodeError:
        raise UsageError(
            f"{os.fsencode(path)!r} is not UTF-8, in which QEMU is told of it", "choose another"
        ) from None
    except ValueError as error:  # a null byte
        raise UsageError(f"{os.fspath(path)!r} is no path: {error}") from error
    except OSError as error:
        raise cannot_be_made(path, error.strerror or str(error)) from error
    return partial


def give_name(partial: Path, path: Path) -> None:
    """Let a complete file have its name, unless another one has it.

    :raise UsageError: when another one has.
    :raise HostError: when it cannot be given.
    """
    try:
        try:
            # Unlike a renaming it replaces nothing.
            os.link(partial, path)
        except FileExistsError:
            raise _taken(path) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(path):
                raise _taken(path) from None
            partial.rename(path)
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    except OSError as error:
        raise cannot_be_made(path, error.strerror or str(error)) from error


def cannot_be_made(path: Path, reason: str) -> LabError:
    """The error for a file that was not written."""
    remedy = "free some disk space" if "No space left" in reason else "choose another path"
    return HostError(f"{path} cannot be made: {reason}", remedy)


def _taken(path: Path) -> UsageError:
    return UsageError(f"{path} is there already", "choose another name")
