"""The layers that the lab keeps: overlays of guests that run, and those that snapshots need.

A guest that the lab boots writes to an overlay in here and never to its user's image.  A snapshot
of it needs the layer that was written to until its instant, and all that this one is on.  So a
layer outlives its guest, and nobody can tell from a process whether it is needed: files say it.

Files in the folder, of a layer UUID::

    UUID.qcow2            the layer
    UUID.lock             who holds the layer has a shared lock (flock) on this; it is made before
                          the layer and removed after it, and a layer without one is not the lab's
    UUID.needed/MARK.KEY  a reference: names a snapshot that needs the layer as it is
    .UUID.qcow2.*.partial a layer that is being written
    store.lock            held by who makes, holds or removes layers

A layer is **needed** while a process holds it, while a reference says that a snapshot needs it, or
while a needed layer is on it.  Whatever becomes of a process at any moment, the kernel gives back
its locks, and each file is there whole or not at all.

A reference names the path of a snapshot's image, and the mark that this snapshot has in its sidecar
(the JSON file beside it).  It is written before the snapshot is published, by a process that holds
the layer.  It **counts as long as the lab does not know that the snapshot is gone, and that can not
be known from its path**: a snapshot that is not there, or is another one, may have been deleted, or
moved with `mv` before the next one took its name.  Therefore:

- `Store.collect` by itself removes only layers that no snapshot was ever given: those of guests
  that ended.
- `collect(gone=True)`, which is what `lab disk clean --yes` asks for, also removes layers of
  snapshots that are not at their path any more.  What their user has moved is lost then, so
  `lab disk list` and `lab disk clean` name them first.
- Not even that removes a layer whose snapshot cannot be looked for: its folder is not there, or
  is another one than it was (a disk that is not mounted), or may not be read.  `Store.forget`,
  `lab disk clean --forget PATH`, is for folders that are gone for good.
- `Store.keep_for` with the new path makes a moved or copied snapshot known again.  Whoever uses one
  does that (`lab.disks.frozen.remember`), so a snapshot that was restored where it is now keeps its
  layers.
- `Store.let_go` is for a snapshot that the lab itself has replaced with another of its name: that
  one is gone for certain.  A copy of it that was never used where it lies is not known, and loses
  them.

What this is no protection against: a host that loses power within half a minute may lose what was
written last, a reference as well as the snapshot (`lab/snapshot/README.md`).  Nothing is flushed,
because that would take seconds beside a guest that writes.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import stat
import uuid
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab.disks.chain import Layer, read_backing
from lab.disks.header import read_header
from lab.disks.overlay import PARTIAL, create_overlay
from lab.errors import HostError, LabError, UsageError
from lab.host.cache import cache_dir, locked
from lab.host.files import content_key, kernel_text, write_atomically

log = logging.getLogger(__name__)

_STORE_LOCK = "store.lock"
_UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_LOCK = re.compile(rf"({_UUID})\.lock")
_LAYER = re.compile(rf"({_UUID})\.qcow2")
_PARTIAL = re.compile(rf"\.({_UUID})\.qcow2\..*{re.escape(PARTIAL)}")
_MARK = re.compile("[0-9A-Za-z_-]{1,128}")

State = Literal["there", "gone", "away", "unreadable"]
"""What is at the path of a snapshot that a reference names: that snapshot; nothing or another one;
no such folder, or not the one that it was in; or nobody can tell."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A snapshot that needs a layer.

    `snapshot` is the path of its image, None where the reference itself cannot be read.
    """

    snapshot: Path | None
    mark: str
    state: State


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A layer in the store, and who needs it.

    `held_by` are the processes that hold it, as far as the kernel names them; `held` is whether
    any does.  `above` are needed layers directly on it.  `needed` is False for what the next
    `Store.collect` removes.  `allocated_bytes` is what it occupies on the disk.
    """

    path: Path
    allocated_bytes: int
    backing: Path | None
    held: bool
    held_by: tuple[int, ...]
    references: tuple[Reference, ...]
    above: tuple[Path, ...]
    needed: bool


class HeldLayer:
    """A layer that this process holds: nobody removes it until `release`.  Made by `Store`.

    The lock is this process's alone.  A child that is started, or forked, does not have it.
    """

    def __init__(self, store: "Store", layer: Layer, descriptor: int) -> None:
        self._store = store
        self._descriptor: int | None = descriptor
        self.layer = layer
        _HELD.add(self)

    def release(self) -> None:
        """Hold it no longer.  The file stays until it is collected; may be called again."""
        if self._descriptor is not None:
            # Not by closing alone: a fork that was going on may have the descriptor, too.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._drop()

    def discard(self) -> None:
        """Hold it no longer, and remove it at once if nobody else needs it.

        It is left to the next `Store.collect` when another process is at work in the store.
        """
        if self._descriptor is not None:
            self.release()
            self._store._discard(self.layer.path)

    def _drop(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_HELD: "weakref.WeakSet[HeldLayer]" = weakref.WeakSet()


def _drop_inherited() -> None:
    for held in list(_HELD):
        held._drop()


os.register_at_fork(after_in_child=_drop_inherited)


class Store:
    """A folder of layers, which any number of processes use at the same time.

    :param folder: made private to this user where it is not there.
    :raise HostError: when it cannot be made, or other users may write to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.realpath(folder))
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = self.folder.stat().st_mode
        except OSError as error:
            raise HostError(
                f"the folder of layers {self.folder} cannot be made: {error.strerror}",
                "set LAB_LAYERS_DIR to a writable folder",
            ) from error
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise HostError(
                f"other users may write to the folder of layers {self.folder}",
                f"`chmod go-w {self.folder}`, or set LAB_LAYERS_DIR to another folder",
            )

    @classmethod
    def default(cls) -> "Store":
        """The store of this user: `LAB_LAYERS_DIR`, or `layers` in the cache."""
        chosen = os.environ.get("LAB_LAYERS_DIR")
        return cls(Path(chosen) if chosen else cache_dir() / "layers")

    def owns(self, path: Path) -> bool:
        """Whether a file is a layer of this store."""
        name = _LAYER.fullmatch(path.name)
        return name is not None and path.parent == self.folder and self._lock_path(name[1]).exists()

    async def new_layer(self, qemu_img: Path, base: Layer) -> HeldLayer:
        """Make an empty overlay on `base`, and hold it.

        :raise HostError: when it cannot be made, or `base` was a layer that has been removed.
        """
        async with self._alone():
            # Nobody removes a layer from here until the new one, which needs it, is held.
            if base.path.parent == self.folder and not base.path.exists():
                raise HostError(f"the layer {base.path} has been removed", "take a new snapshot")
            name = str(uuid.uuid4())
            with self._told():
                descriptor = os.open(
                    self._lock_path(name), os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600
                )
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                layer = await create_overlay(qemu_img, self._path(name), base)
            except BaseException:
                self._lock_path(name).unlink(missing_ok=True)
                os.close(descriptor)
                raise
            return HeldLayer(self, layer, descriptor)

    async def hold(self, layer: Layer) -> HeldLayer:
        """Hold a layer that is there, as any number of processes may.

        :raise HostError: when it has been removed.
        """
        async with self._alone():
            if not self.owns(layer.path):
                raise HostError(f"the layer {layer.path} has been removed", "take a new snapshot")
            return HeldLayer(self, layer, self._held_descriptor(layer.path.stem))

    def _held_descriptor(self, name: str) -> int:
        with self._told():
            descriptor = os.open(self._lock_path(name), os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def keep_for(self, layer: Path, snapshot: Path, mark: str) -> None:
        """Write down that a snapshot needs a layer as it is now.

        Before the snapshot is published, and while this process holds the layer or one that is on
        it: from then on there is no moment at which it could be removed.  It counts once the
        sidecar of the snapshot has this mark.  Again with another path for a snapshot that was
        moved or copied.

        :param snapshot: the image; its sidecar is beside it, with `.json` added to the name.
        :raise UsageError: when it is no layer of this store.
        :raise HostError: when it cannot be written.
        """
        snapshot = snapshot.absolute()
        if not self.owns(layer):
            raise UsageError(f"{layer} is no layer of {self.folder}")
        if not _MARK.fullmatch(mark):
            raise UsageError(f"{mark!r} is no mark of a snapshot")
        folder = self._needed_path(layer.stem)
        with self._told():
            content = {"snapshot": os.fspath(snapshot), "folder": _inode(snapshot.parent)}
            folder.mkdir(mode=0o700, exist_ok=True)
            name = f"{mark}.{content_key(os.fsencode(snapshot))}"
            write_atomically(folder / name, json.dumps(content).encode())

    def let_go(self, layer: Path, snapshot: Path, mark: str) -> None:
        """Take back what `keep_for` has written down: the lab itself has replaced the snapshot."""
        name = f"{mark}.{content_key(os.fsencode(snapshot.absolute()))}"
        with contextlib.suppress(OSError):
            (self._needed_path(layer.stem) / name).unlink()

    async def forget(self, path: Path) -> int:
        """Drop the references to snapshots that were at or below a path and are not there now.

        For a folder that was removed, or a disk that will not come back.  Their layers are removed
        by the next `collect`.  Returns how many references that were.
        """
        path = path.absolute()
        dropped = 0
        async with self._alone():
            for file in (file for name in self._names() for file in self._reference_files(name)):
                found = _read_reference(file)
                at = found.snapshot
                if at is not None and at.is_relative_to(path) and found.state != "there":
                    file.unlink(missing_ok=True)
                    dropped += 1
        return dropped

    async def collect(self, qemu_img: Path, *, gone: bool = False) -> list[Path]:
        """Remove the layers that nobody needs, and return which these were.

        Safe beside any number of processes that make, hold, reference and collect.  It removes
        nothing where it cannot find out what a needed layer is on.

        :param gone: also remove layers whose snapshots are not at their path any more.
        :raise HostError: when the folder cannot be used.
        """
        async with self._alone():
            found = await self._survey(qemu_img, gone=gone)
            unneeded = {kept.path: kept for kept in found if not kept.needed}
            removed = []
            # What is on another one first, so that no chain is broken meanwhile.
            for path in _tops_first({path: kept.backing for path, kept in unneeded.items()}):
                if self._remove(path.stem):
                    removed.append(path)
            self._remove_rests({kept.path.stem for kept in found})
            return removed

    async def survey(self, qemu_img: Path, *, gone: bool = False) -> tuple[Kept, ...]:
        """Every layer, and who needs it; `gone` as for `collect`."""
        async with self._alone():
            return await self._survey(qemu_img, gone=gone)

    # Who needs what

    async def _survey(self, qemu_img: Path, *, gone: bool) -> tuple[Kept, ...]:
        names = [name for name in self._names() if self._path(name).exists()]
        held = {name: _is_held(self._lock_path(name)) for name in names}
        references = {
            name: tuple(map(_read_reference, self._reference_files(name))) for name in names
        }
        roots = [
            self._path(name)
            for name in names
            if held[name] or any(not (gone and found.state == "gone") for found in references[name])
        ]
        backing: dict[Path, Path | None] = {}
        above: dict[Path, list[Path]] = {}
        needed = set(roots)
        certain = True
        while roots:
            path = roots.pop()
            try:
                below = backing[path] = await self._backing(qemu_img, path)
            except (OSError, LabError) as error:
                log.warning("no layer is removed, as %s cannot be read: %s", path, error)
                certain = False
                continue
            if below is not None:
                above.setdefault(below, []).append(path)
                if below not in needed:
                    needed.add(below)
                    roots.append(below)
        for path in map(self._path, names):
            if path not in backing:
                with contextlib.suppress(OSError, LabError):
                    backing[path] = await self._backing(qemu_img, path)
        return tuple(
            Kept(
                path=path,
                allocated_bytes=_allocated_bytes(path),
                backing=backing.get(path),
                held=held[name],
                held_by=holders(self._lock_path(name)) if held[name] else (),
                references=references[name],
                above=tuple(above.get(path, ())),
                needed=path in needed or not certain,
            )
            for name in names
            for path in [self._path(name)]
        )

    def _names(self) -> list[str]:
        """Of all that was begun here and is not removed."""
        with self._told():
            found = (_LOCK.fullmatch(entry.name) for entry in os.scandir(self.folder))
            return sorted(match[1] for match in found if match)

    def _reference_files(self, name: str) -> list[Path]:
        folder = self._needed_path(name)
        if not folder.exists():
            return []
        with self._told():
            return sorted(path for path in folder.iterdir() if not path.name.startswith("."))

    # Removing

    def _remove(self, name: str) -> bool:
        """Remove a layer, and its lock last; return whether that went well."""
        try:
            self._path(name).unlink(missing_ok=True)
            folder = self._needed_path(name)
            if folder.is_dir():
                for file in folder.iterdir():
                    file.unlink(missing_ok=True)
                folder.rmdir()
            self._lock_path(name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("the layer %s cannot be removed: %s", name, error.strerror)
            return False
        return True

    def _remove_rests(self, layers: set[str]) -> None:
        """Remove what was left by those that were killed while they made or removed a layer."""
        for name in set(self._names()) - layers:
            if not self._path(name).exists() and not _is_held(self._lock_path(name)):
                self._remove(name)
        for entry in list(os.scandir(self.folder)):
            match = _PARTIAL.fullmatch(entry.name)
            if match and not _is_held(self._lock_path(match[1])):
                with contextlib.suppress(OSError):
                    Path(entry.path).unlink(missing_ok=True)

    def _discard(self, path: Path) -> None:
        with contextlib.suppress(OSError), (self.folder / _STORE_LOCK).open("w") as lock:
            # Whoever has it may take minutes, and the next one to collect finds the layer.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_held(self._lock_path(path.stem)) or self._reference_files(path.stem):
                return
            others = (self._path(name) for name in self._names() if self._path(name) != path)
            if all(_own_backing(other) != path for other in others if other.exists()):
                self._remove(path.stem)

    # Names

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.qcow2"

    def _lock_path(self, name: str) -> Path:
        return self.folder / f"{name}.lock"

    def _needed_path(self, name: str) -> Path:
        return self.folder / f"{name}.needed"

    # Calls

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Be the only one who makes, holds and removes layers meanwhile."""
        async with contextlib.AsyncExitStack() as stack:
            with self._told():
                await stack.enter_async_context(
                    locked(self.folder / _STORE_LOCK, lambda: log.debug("wait for the layers"))
                )
            yield

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say of a call that fails that it was about the store."""
        try:
            yield
        except OSError as error:
            raise HostError(
                f"the folder of layers {self.folder} cannot be used: {error.strerror}",
                "set LAB_LAYERS_DIR to a writable folder",
            ) from error

    async def _backing(self, qemu_img: Path, path: Path) -> Path | None:
        """What a file is on; None for the end of a chain, and for a file that is not there."""
        # Users may have images of other formats, and in this folder, too.
        return _own_backing(path) if self.owns(path) else await read_backing(qemu_img, path)


def snapshot_mark(sidecar: Path) -> str | None:
    """The mark that a snapshot's sidecar has, None where it has none.

    :raise OSError: when it cannot be read.
    :raise ValueError: when it is no sidecar.
    """
    document = json.loads(sidecar.read_bytes())
    if not isinstance(document, dict):
        raise ValueError("no JSON object")
    mark = document.get("mark")
    return mark if isinstance(mark, str) else None


def _read_reference(file: Path) -> Reference:
    mark = file.name.rpartition(".")[0]
    try:
        content = json.loads(file.read_bytes())
        snapshot, inode = Path(content["snapshot"]), content["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return Reference(snapshot=None, mark=mark, state="unreadable")
    return Reference(snapshot=snapshot, mark=mark, state=_state(snapshot, mark, inode))


def _state(snapshot: Path, mark: str, inode: int) -> State:
    beside = snapshot.name + ".json"
    # The image gets its name before its sidecar does, which goes from the first of these names to
    # the second.
    try:
        with contextlib.suppress(FileNotFoundError, ValueError):
            partial = snapshot_mark(snapshot.with_name(beside + PARTIAL))
            if partial == mark and _ends_with(snapshot, bytes.fromhex(mark)):
                return "there"
        with contextlib.suppress(FileNotFoundError):
            if snapshot_mark(snapshot.with_name(beside)) == mark:
                return "there"
        os.scandir(snapshot.parent).close()
        return "gone" if _inode(snapshot.parent) == inode else "away"
    except (FileNotFoundError, NotADirectoryError):
        return "away"
    except (OSError, ValueError):
        return "unreadable"


def _ends_with(file: Path, content: bytes) -> bool:
    with file.open("rb") as opened:
        opened.seek(max(file.stat().st_size - len(content), 0))
        return opened.read() == content


def _inode(folder: Path) -> int:
    # A mount point without its disk is a folder, too, but not the same one.
    return folder.stat().st_ino


def _own_backing(path: Path) -> Path | None:
    """What one of the lab's layers is on.

    :raise OSError: when it cannot be read, or is none.
    """
    header = read_header(path)
    if header.kind != "qcow2":
        raise OSError(errno.EUCLEAN, "it is no qcow2 image")
    return None if header.backing is None else Path(header.backing)


def _is_held(lock: Path) -> bool:
    """Whether any process holds a layer; also where that cannot be found out."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def holders(lock: Path) -> tuple[int, ...]:
    """The processes that have a lock on a file, as far as the kernel names them."""
    found = set()
    with contextlib.suppress(OSError):
        status = lock.stat()
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        for line in kernel_text("/proc/locks").splitlines():
            match line.split():
                case [_, "FLOCK", _, _, pid, file, *_] if file == device and int(pid) > 0:
                    found.add(int(pid))
    return tuple(sorted(found))


def _allocated_bytes(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_blocks * 512
    return 0


def _tops_first(backing: Mapping[Path, Path | None]) -> list[Path]:
    """These layers, each before the one that it is on."""
    ordered: list[Path] = []
    for path in backing:
        chain: list[Path] = []
        at: Path | None = path
        while at is not None and at in backing and at not in ordered and at not in chain:
            chain.append(at)
            at = backing[at]
        # What has been seen already is below the end of this chain.
        ordered = chain + ordered
    return ordered
