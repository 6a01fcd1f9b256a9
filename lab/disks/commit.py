"""Write what is in several layers into one: shorten a chain, or write a disk for somebody.

A layer is never written to where it is.  `qemu-img commit` would change the layer below, which
others may be on; here a new file is made with the content of the upper layers, compared with them,
and given the name of the topmost.  Whoever reads that name gets the old file or the new one, and
the disk in them is the same.  A guest that runs on the old one keeps it until it ends.
"""

import asyncio
import contextlib
import itertools
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.disks.chain import Layer, read_chain
from lab.disks.overlay import cannot_be_made, give_name, open_partial
from lab.disks.qemu_img import run_qemu_img
from lab.disks.store import Kept, Store
from lab.errors import HostError, UsageError
from lab.host.room import require_room, room_bytes, said

Progress = Callable[[str], None]

EXPORT_FORMATS = ("qcow2", "raw")

_SPARE_BYTES = 1 << 20
"""For the tables of a new image, beside what is in those of the old ones."""


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A chain that was shortened.

    `top` is the layer that has taken in the `merged` ones, whose files are still there for whom
    else they may be of use to: `Store.collect` removes them.
    """

    top: Layer
    merged: tuple[Path, ...]


async def commit(
    qemu_img: Path,
    top: Path,
    *,
    progress: Progress | None = None,
    store: Store | None = None,
) -> Committed:
    """Take into a layer those below it that nobody else needs.

    It goes down to the first one that another snapshot, another layer or a process needs, or that
    is the user's own: `top` is directly on that one afterwards.  The disk that a guest sees does
    not change.  Killed at any moment it leaves the old file or the new one; so does a disk that
    fills up.

    :param store: the one that `top` is in; the default one where none is given.
    :raise UsageError: when there is nothing to take in; names who needs the layer below.
    :raise HostError: when there is no room, or a file cannot be read or made.
    """
    store = Store.default() if store is None else store
    if not store.owns(top):
        raise UsageError(
            f"{top} is no layer of {store.folder} but a file of yours, and who needs those is not "
            "counted",
            "write the disk into a file of its own with `lab disk export`; QEMU shortens the chain "
            "of a running VM with its command block-stream",
        )
    chain = await read_chain(qemu_img, top, format="qcow2")
    merged, base = _split(chain, await store.survey(qemu_img))
    async with _held(store, [chain[0], *merged, base]):
        needed_bytes = sum(layer.allocated_bytes for layer in (chain[0], *merged)) + _SPARE_BYTES
        require_room(store.folder, needed_bytes, "a shorter chain", "free some disk space")
        new = open_partial(top, replaces=True)
        try:
            work = _Work(qemu_img, top, new, progress, needed_bytes)
            # What is in the topmost alone, and then what the ones between have, too.
            await work.run(
                *("copy", "convert", "-f", "qcow2", "-O", "qcow2", "-o", "compat=1.1"),
                *("-B", chain[1].path, "-F", chain[1].format, "--", top, new),
            )
            await work.run(
                "merge", "rebase", "-f", "qcow2", "-b", base.path, "-F", base.format, "--", new
            )
            await work.run("compare", "compare", "-f", "qcow2", "-F", "qcow2", "--", top, new)
            await asyncio.to_thread(_replace, new, top)
        finally:
            new.unlink(missing_ok=True)
    (committed, *_) = await read_chain(qemu_img, top, format="qcow2")
    return Committed(top=committed, merged=tuple(layer.path for layer in merged))


async def export(
    qemu_img: Path,
    top: Path,
    path: Path,
    *,
    format: str = "qcow2",
    progress: Progress | None = None,
    store: Store | None = None,
) -> Path:
    """Write a disk, with all that it is on, into one file that needs no other; return its path.

    The file is private, gets its name when it is complete, and replaces none.

    :param top: a layer of `store`, or any other disk image.
    :raise UsageError: when the name is taken, or a file of the chain is none that can be used.
    :raise HostError: when there is no room, or a file cannot be read or made.
    """
    if format not in EXPORT_FORMATS:
        raise UsageError(
            f"a disk is not written as {format}", f"choose {' or '.join(EXPORT_FORMATS)}"
        )
    store = Store.default() if store is None else store
    path = path.absolute()
    chain = await read_chain(qemu_img, top)
    async with _held(store, chain):
        new = open_partial(path)
        try:
            needed_bytes = await _needed_bytes(qemu_img, chain[0])
            require_room(path.parent, needed_bytes, f"the disk {path.name}", "choose another path")
            work = _Work(qemu_img, path, new, progress, needed_bytes)
            source = ("-f", chain[0].format, "-O", format, "--", chain[0].path)
            await work.run("write", "convert", *source, new)
            give_name(new, path)
        finally:
            new.unlink(missing_ok=True)
    return path


def who_needs(kept: Kept, *, beside: Path | None = None) -> list[str]:
    """Who needs a layer, each as part of a sentence.

    :param beside: a layer on it that does not count.
    """
    reasons = []
    if kept.held:
        pids = ", ".join(map(str, kept.held_by))
        reasons.append(f"process {pids} uses it" if pids else "a process uses it")
    for found in kept.references:
        said = {
            "there": "",
            "gone": ", which is not there any more,",
            "away": ", whose folder is not there,",
            "unreadable": ", which cannot be read,",
        }[found.state]
        named = "a snapshot" if found.snapshot is None else f"the snapshot {found.snapshot}"
        reasons.append(f"{named}{said} needs it")
    reasons += [f"the layer {path.name} is on it" for path in kept.above if path != beside]
    return reasons


def _split(chain: Sequence[Layer], survey: Sequence[Kept]) -> tuple[list[Layer], Layer]:
    """Which layers below the topmost can be taken into it, and which one it is on then."""
    known = {kept.path: kept for kept in survey}
    if known[chain[0].path].held:
        raise UsageError(
            f"{chain[0].path.name} cannot be replaced: {who_needs(known[chain[0].path])[0]}",
            "wait until that has ended",
        )
    merged: list[Layer] = []
    for above, layer in itertools.pairwise(chain):
        kept = known.get(layer.path)
        reasons = [] if kept is None else who_needs(kept, beside=above.path)
        if kept is not None and not reasons:
            merged.append(layer)
        elif merged:
            return merged, layer
        elif reasons:
            raise UsageError(
                f"{layer.path.name} cannot be merged into what is on it: {reasons[0]}",
                "write the disk to a file of its own with `lab disk export`",
            )
        else:
            break
    # The last of a chain is what a user has named, and stays.
    raise UsageError(f"the chain of {chain[0].path} is as short as it can be")


@contextlib.asynccontextmanager
async def _held(store: Store, layers: Sequence[Layer]) -> AsyncIterator[None]:
    """Hold those of the layers that are the store's."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if store.owns(layer.path):
                stack.callback((await store.hold(layer)).release)
        yield


@dataclass(frozen=True)
class _Work:
    """Runs of `qemu-img` that write `new`, which is to be `path`."""

    qemu_img: Path
    path: Path
    new: Path
    progress: Progress | None
    needed_bytes: int

    async def run(self, stage: str, *arguments: str | Path) -> None:
        """Run one, as long as it does not take what its disk keeps free.

        :raise HostError: when it fails.
        """

        def look() -> None:
            room = room_bytes(self.new.parent)
            if room < 0:
                raise HostError(
                    f"the disk of {self.path} has filled up meanwhile: {said(room)}",
                    "free some disk space",
                )
            if self.progress is not None:
                mib, of_mib = (
                    -(-size // (1 << 20))
                    for size in (_allocated_bytes(self.new), self.needed_bytes)
                )
                self.progress(f"{stage} {self.path.name}: {mib}/{max(mib, of_mib)} MiB")

        done = await run_qemu_img(self.qemu_img, *arguments, look=look)
        if done.status != 0:
            raise cannot_be_made(self.path, done.said or done.output.decode(errors="replace"))


async def _needed_bytes(qemu_img: Path, layer: Layer) -> int:
    """What a file with all of a disk in it occupies; also a raw one, whose holes are left out."""
    told = ("--output=json", "-O", "qcow2", "-f", layer.format, "--", layer.path)
    done = await run_qemu_img(qemu_img, "measure", *told)
    if done.status != 0:
        raise HostError(f"{layer.path} cannot be read: {done.said}")
    return int(json.loads(done.output)["required"])


def _allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def _replace(new: Path, path: Path) -> None:
    """Let a file take another one's place, in such a way that a host that loses power has either.

    :raise HostError: when it cannot be written.
    """
    try:
        for what, flags in ((new, os.O_RDWR), (path.parent, os.O_RDONLY)):
            descriptor = os.open(what, flags | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
                if what == new:
                    new.rename(path)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise cannot_be_made(path, error.strerror or str(error)) from error
