"""An image and its sidecar: two files that are published, and opened, as one.

A name can be given a new snapshot while others restore the one that it had.  No rename replaces two
files at once, so two measures together see to it that nobody gets half of each:

The mark
    The last bytes of every image are a random number, which its sidecar names.  It is in the file
    itself, because whatever is kept about a file (its inode, its times, extended attributes) is
    lost by `cp`, and checksums are not made of every image.  QEMU reads an image up to its own end
    and not what is behind it, as a stream or with each page in its place.
The order
    The new sidecar lies complete beside the old one, under its partial name, before the image gets
    its name; then it takes the old one's place.  So at any moment, also if the writer was killed
    in between, the image that has the name has its sidecar under one of the two names.

Whoever restores opens the image once.  The sidecar is looked up for that open file, and QEMU is
handed that open file: what becomes of the name in the meantime does not matter.  What this is no
protection against: a program that writes into the file of an image instead of replacing it.

Images of older versions have no mark, and their sidecars name none; they are taken as they are.
"""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.errors import RestoreError, SnapshotError, UsageError
from lab.snapshot.checksums import damaged_pieces
from lab.snapshot.sidecar import Sidecar, parse_sidecar, sidecar_path

log = logging.getLogger(__name__)

PARTIAL = ".partial"
"""What ends the names of an image and a sidecar that are not complete."""

_MARK_HEAD = b"lab.image-mark/1"
MARK_BYTES = len(_MARK_HEAD) + 16
"""How much longer an image is than what QEMU wrote."""

_MAX_SIDECAR_BYTES = 64 << 20


# Writing


class PartialImage:
    """An image that is being written, under a name of its own.  Made by `partial_image`."""

    def __init__(
        self, image: Path, path: Path, descriptor: int, beside: int, names: contextlib.ExitStack
    ) -> None:
        self._image = image
        self._descriptor = descriptor
        self._beside = beside
        self._names = names
        self.path = path
        """The private file that QEMU writes."""

    def add_mark(self) -> str:
        """Put a new mark behind what QEMU wrote, and return it for the sidecar.

        :raise SnapshotError: when it cannot be written.
        """
        mark = secrets.token_bytes(MARK_BYTES - len(_MARK_HEAD))
        try:
            size = os.fstat(self._descriptor).st_size
            _write_all(self._descriptor, _MARK_HEAD + mark, size)
        except OSError as error:
            raise self._incomplete(error) from error
        return mark.hex()

    def publish(self, sidecar: Sidecar) -> None:
        """Give the complete image its name, together with its sidecar.

        :raise SnapshotError: when that fails; then an older image of the name is as it was.
        """
        beside = sidecar_path(self._image)
        new = _partial(beside)
        try:
            _write_all(self._beside, sidecar.to_text().encode(), 0)
            # Some file systems tell only now, as NFS does, that what was written is not there.
            os.close(os.dup(self._descriptor))
            self.path.rename(self._image)
        except OSError as error:
            raise self._incomplete(error) from error
        # From here on they are somebody else's, or nobody's.
        self._names.pop_all()
        try:
            new.rename(beside)
        except OSError as error:
            # It is found there, and gets its name before the next snapshot is written.
            log.warning("%s keeps the name %s: %s", beside.name, new.name, error.strerror)

    def _incomplete(self, error: OSError) -> SnapshotError:
        return SnapshotError(
            f"{self._image.name} cannot be completed: {error.strerror}",
            "free some disk space or choose another path",
        )


@contextlib.contextmanager
def partial_image(image: Path) -> Iterator[PartialImage]:
    """Create the private file that QEMU writes; remove it unless it was published.

    :raise SnapshotError: when it cannot be created, or another snapshot writes it.
    """
    _check_path(image)
    path, beside = _partial(image), _partial(sidecar_path(image))
    with contextlib.ExitStack() as stack:
        # Held until the image and its sidecar have their names, so that two guests write neither
        # one image nor the sidecar of one beside the image of the other.
        lock = _lock_name(image, beside)
        stack.callback(os.close, lock)
        names = stack.enter_context(contextlib.ExitStack())
        names.callback(beside.unlink, missing_ok=True)
        descriptor = _open_private(path)
        stack.callback(os.close, descriptor)
        names.callback(path.unlink, missing_ok=True)
        os.ftruncate(descriptor, 0)
        yield PartialImage(image, path, descriptor, lock, names)


def _lock_name(image: Path, beside: Path) -> int:
    """Open the partial sidecar of an image, empty, for nobody else to write one meanwhile."""
    while True:
        descriptor = _open_private(beside)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It may have been published before it was locked here.
            if _is_same(beside, descriptor):
                if not _completes(image, descriptor):
                    os.ftruncate(descriptor, 0)
                    return descriptor
                beside.rename(sidecar_path(image))
        except BlockingIOError as error:
            os.close(descriptor)
            raise SnapshotError(
                f"another snapshot is being written to {image.name}", "choose another path"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise _no_creation(beside, error) from error
        os.close(descriptor)


def _completes(image: Path, beside: int) -> bool:
    """Whether a partial sidecar is that of the image: its writer was killed before it was named."""
    with contextlib.suppress(RestoreError, OSError), _open_file(image) as descriptor:
        return _problem(image, descriptor, parse_sidecar(image, _read_all(beside))) is None
    return False


def _open_private(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(PermissionError):  # it is another user's, who may read it anyway
            os.fchmod(descriptor, 0o600)
    except OSError as error:
        raise _no_creation(path, error) from error
    return descriptor


def _no_creation(path: Path, error: OSError) -> SnapshotError:
    return SnapshotError(f"{path} cannot be created: {error.strerror}", "choose another path")


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _check_path(image: Path) -> None:
    """Refuse a path that an image cannot have, before anything is created or replaced.

    A complete image takes the place of what has its name, which must not be a device.  Of a link
    to a file only the link is replaced.

    :raise SnapshotError: naming what is in the way.
    """
    beside = sidecar_path(image)
    try:
        if "\0" in image.name:
            raise ValueError("a null byte is in its name")
        try:
            os.fspath(image).encode()
        except UnicodeEncodeError:
            raise ValueError("its path is not UTF-8, in which QEMU is told of it") from None
        for path in (image, beside):
            kind = stat.S_IFMT(path.stat().st_mode) if path.exists() else stat.S_IFREG
            if kind != stat.S_IFREG:
                raise SnapshotError(f"{path} is {_KINDS.get(kind, 'no file')}", "name a file")
        longest = len(os.fsencode(_partial(beside).name))
        if longest > os.pathconf(image.parent, "PC_NAME_MAX"):
            raise SnapshotError(f"the name {image.name} is too long", "choose a shorter one")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SnapshotError(f"{image} cannot be created: {reason}", "choose another") from error


# Reading


@dataclass(frozen=True)
class OpenImage:
    """A complete image, open, and its own sidecar.  Made by `open_image`."""

    path: Path
    descriptor: int
    sidecar: Sidecar


@contextlib.contextmanager
def open_image(image: Path) -> Iterator[OpenImage]:
    """Open the image that has a name at this moment, together with its sidecar.

    It stays the same one as long as the context lasts, whatever is published under the name.

    :raise RestoreError: when either is missing, unreadable or of another version, or they do not
        belong together.
    """
    while True:
        with _open_file(image) as descriptor:
            found = _find_sidecar(image, descriptor)
            if isinstance(found, Sidecar):
                yield OpenImage(image, descriptor, found)
                return
            if _is_same(image, descriptor):
                raise found
            # Another one has its name now, and the sidecar that was read may be that one's.


def read_sidecar(image: Path) -> Sidecar:
    """Return the sidecar of `image`, which has been compared with it; see `open_image`."""
    with open_image(image) as opened:
        return opened.sidecar


def mark_of(descriptor: int) -> str | None:
    """Return the mark of an open image, None where it has none."""
    size = os.fstat(descriptor).st_size
    end = os.pread(descriptor, MARK_BYTES, max(size - MARK_BYTES, 0))
    if len(end) < MARK_BYTES or not end.startswith(_MARK_HEAD):
        return None
    return end[len(_MARK_HEAD) :].hex()


@contextlib.contextmanager
def _open_file(image: Path) -> Iterator[int]:
    missing = RestoreError(f"there is no image {image}", "check the path, or take a snapshot")
    try:
        # A FIFO would wait for its other end; a file does not care.
        descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENXIO):
            raise missing from error
        raise RestoreError(f"{image} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null byte
        raise missing from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise missing
        yield descriptor
    finally:
        os.close(descriptor)


def _find_sidecar(image: Path, descriptor: int) -> Sidecar | RestoreError:
    """Return the sidecar of an open image, or what is wrong with the one that is there.

    As long as the image has its name its sidecar has one of two, and goes over from the second to
    the first.  Read in this order it is not missed.
    """
    path = sidecar_path(image)
    problem = RestoreError("")
    for place in (path, _partial(path), path):
        try:
            sidecar = _read_one(image, place)
            found = _problem(image, descriptor, sidecar)
            if found is None:
                return sidecar
        except RestoreError as error:
            found = error
        if place == path:
            problem = found
    return problem


def _read_one(image: Path, place: Path) -> Sidecar:
    try:
        content = place.read_bytes()
    except FileNotFoundError:
        raise RestoreError(
            f"{image.name} has no sidecar {place.name}, so its machine is unknown",
            "keep both files together; an image without one is not complete",
        ) from None
    except OSError as error:
        raise RestoreError(f"{place} cannot be read: {error.strerror}") from error
    return parse_sidecar(image, content)


def _problem(image: Path, descriptor: int, sidecar: Sidecar) -> RestoreError | None:
    """Why a sidecar is not that of an open image, None if it is."""
    size = os.fstat(descriptor).st_size
    if size != sidecar.image_bytes:
        return RestoreError(
            f"{image.name} has {size} bytes and had {sidecar.image_bytes} when it was taken",
            "copy it again in full, or take the snapshot again",
        )
    if mark_of(descriptor) != sidecar.mark:
        return RestoreError(
            f"{image.name} is damaged or not the image of its sidecar: its mark, bytes "
            f"{size - MARK_BYTES} to {size - 1}, is not the one that the sidecar names",
            "keep both files together, copy both again, or take the snapshot again",
        )
    return None


async def check_image(image: OpenImage) -> None:
    """Read all of an image against the checksums of its sidecar.

    Where it has none that is said in a warning of the log, which the command line shows.

    :raise RestoreError: when a byte differs, or the image cannot be read.
    """
    name, sums = image.path.name, image.sidecar.checksums
    if sums is None:
        log.warning("%s has no checksums: if it is damaged, nobody can tell", name)
        return
    try:
        damaged = await damaged_pieces(image.descriptor, image.sidecar.image_bytes, sums)
    except OSError as error:
        raise RestoreError(f"{image.path} cannot be read: {error.strerror}") from error
    if damaged:
        start = damaged[0] * sums.piece_bytes
        end = min(start + sums.piece_bytes, image.sidecar.image_bytes)
        more = f" and {len(damaged) - 1} more places" if len(damaged) > 1 else ""
        raise RestoreError(
            f"{name} is damaged: bytes {start} to {end - 1}{more} are not those that were written",
            "copy it again, or take the snapshot again",
        )


# Both


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _is_same(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one that has a name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _read_all(descriptor: int) -> bytes:
    size = min(os.fstat(descriptor).st_size, _MAX_SIDECAR_BYTES)
    return os.pread(descriptor, size, 0)


def file_channel(path: Path) -> list[dict[str, object]]:
    """Return the QMP form of a migration to or from a file.

    Not the `file:` URI, which would read a comma in the path as the start of an option.

    :raise UsageError: when the path is not UTF-8, as all that QEMU's monitor is told has to be.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the path {path!r} is not UTF-8", "rename it") from error
    address = {"transport": "file", "filename": str(path), "offset": 0}
    return [{"channel-type": "main", "addr": address}]
