"""Is the image the guest's memory at one instant?  Byte for byte, for every RAM block.

While the guest is stopped at the instant that the image shows, QEMU's memory is copied out with
`process_vm_readv`: an observer that shares no code with the migration.  Later the image is
restored into another QEMU whose vCPUs never run, and the two are compared.  No block and no byte
is exempt: nothing in a restored QEMU writes to RAM before the vCPUs run.

The instant, and how the guest is held there:

live methods of the patched QEMU
    the engine's pre-switchover hold, reached while the workload runs; all of the sweep happens
    under load after it.
`background` of the unpatched QEMU
    cannot be held.  The guest is stopped before the snapshot begins, and runs on as soon as QEMU
    reports pages transferred; the rest of the sweep happens under load.
ordinary migration
    completion, before the guest goes on.

Equality alone would not notice an instant that never was, such as RAM caught in the middle of a
page copy.  So the working set is also compared with a replay of the guest's operations up to the
count in the progress page; one operation in flight for each thread may be there in part, in the
order of its stores.
"""

import asyncio
import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lab.errors import GuestError, SnapshotError
from lab.guests.protocol import (
    PAGE_BYTES,
    REPLAYED_KINDS,
    ProgressPage,
    WorkingSetCheck,
    check_working_set,
    find_progress_page,
)
from lab.host.memory import RemoteWindow
from lab.host.room import require_room
from lab.scenario.methods import METHODS
from lab.session import VM, restore
from lab.snapshot.room import resident_bytes
from lab.snapshot.sidecar import sidecar_path
from lab.snapshot.take import take
from lab.verify.stuck import watching
from lab.vm.memory import RamBlock

CHUNK_BYTES = 8 << 20

Octets = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class BlockComparison:
    """One RAM block, compared page by page (4096 bytes)."""

    name: str
    pages: int
    pages_differing: int
    first_differing: tuple[int, ...]
    """Offsets in bytes of the first few pages that differ."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the oracle found.

    `equal` is the verdict: the same blocks, every byte of them equal, and the working set what a
    replay gives (`replay`; None for a workload that cannot be replayed, see
    `lab.guests.protocol.REPLAYED_KINDS`, and for a guest that was taken while it booted).
    `faults` is how many writes of the guest the snapshot held up, None where QEMU does not count
    them.  `detail` is one line about what is wrong, empty when nothing is.  `stuck` is one line
    about threads that waited for a page that nobody released (`lab.verify.stuck`), and `watched`
    whether the kernel shows that; neither is part of the verdict, which is about the image.
    """

    method: str
    equal: bool
    blocks: list[BlockComparison]
    pages_compared: int
    pages_differing: int
    operations: int
    replay: WorkingSetCheck | None
    detail: str
    faults: int | None = None
    stuck: str = ""
    watched: bool = False


@dataclass(frozen=True)
class _Dump:
    path: Path
    blocks: list[RamBlock]
    nonce: int | None
    """The guest's boot, None for a guest that was still booting."""

    def offsets(self) -> Iterator[tuple[RamBlock, int]]:
        """Give every block and where it begins in the file."""
        offset = 0
        for block in self.blocks:
            yield block, offset
            offset += -(-block.used_bytes // PAGE_BYTES) * PAGE_BYTES


async def verify_method(
    vm: VM,
    method: str,
    workdir: Path,
    *,
    channels: int = 1,
    fault_log: bool = False,
    storage_mib_per_s: int = 0,
    keep: Path | None = None,
) -> Verification:
    """Take a snapshot of `vm` by `method`, restore it elsewhere and compare all of its RAM.

    Needs, in `workdir`, room for the image and for all of the guest's pages that are not zero, and
    host memory for a second guest.  The guest runs on afterwards, if it ran before.  Nothing is
    left in `workdir`.

    :param channels: how many threads restore it, see `restore`.
    :param fault_log: log write faults while it is taken, see `VM.snapshot`.
    :param storage_mib_per_s: write the image no faster, see `VM.snapshot`.
    :param keep: have the image there, and leave it.
    :raise UsageError: when the method does not exist or needs the other QEMU.
    :raise HostError: when there is no room for image and copy, before or while they are written.
    :raise SnapshotError: when the snapshot fails.
    :raise RestoreError: when it cannot be restored.
    """
    image, dump_path = keep or workdir / "verify.snap", workdir / "verify.ram"
    dump: _Dump | None = None

    async def copy_out() -> None:
        nonlocal dump
        nonce = vm.ready.nonce if vm.is_ready else None
        dump = _Dump(dump_path, await vm.ram_blocks(), nonce)
        # Whoever waits for a page meanwhile waits for the lab.
        with watch.suspended():
            await asyncio.to_thread(_write_dump, vm.pid, dump)

    # The image has about as much.
    remedy = "free some disk space, use another folder, or a smaller guest"
    needed = 2 * min(vm.machine.ram_mib << 20, resident_bytes(vm.pid))
    require_room(workdir, needed, "an image and what it is compared with", remedy)
    try:
        async with watching(vm.pid) as watch:
            snapshot = await take(
                vm,
                image,
                method,
                fault_log=fault_log,
                storage_mib_per_s=storage_mib_per_s,
                hold=copy_out,
            )
        if dump is None:
            raise SnapshotError(f"{method} never held the guest at its instant")
        # It has no checksums: a byte that is damaged is for the comparison to find.
        async with restore(image, paused=True, channels=channels, check=False) as restored:
            found = {block.name: block for block in await restored.ram_blocks()}
            how = METHODS[snapshot.method]
            verdict = await asyncio.to_thread(_judge, vm, dump, restored.pid, found, how.name)
        # QEMU goes on telling about the last background snapshot after an ordinary migration.
        faults = snapshot.counters.get("faults") if how.mechanism == "background" else None
        return dataclasses.replace(verdict, faults=faults, stuck=watch.finding, watched=watch.sees)
    finally:
        dump_path.unlink(missing_ok=True)
        if keep is None:
            image.unlink(missing_ok=True)
            sidecar_path(image).unlink(missing_ok=True)


def _chunks(pid: int, block: RamBlock) -> Iterator[tuple[int, Octets]]:
    """Give the used part of a block of a process, in chunks that are valid until the next."""
    for start in range(0, block.used_bytes, CHUNK_BYTES):
        length = min(CHUNK_BYTES, block.used_bytes - start)
        window = RemoteWindow(pid, block.host_address + start, length)
        window.read()
        yield start, np.frombuffer(window.buffer, np.uint8)


def _pages(octets: Octets) -> npt.NDArray[np.uint64]:
    """Give a chunk as rows of one page, a last partial page filled up with zeros."""
    rest = -octets.size % PAGE_BYTES
    if rest:
        octets = np.concatenate([octets, np.zeros(rest, np.uint8)])
    return octets.view(np.uint64).reshape(-1, PAGE_BYTES // 8)


def _write_dump(pid: int, dump: _Dump) -> None:
    """Copy every block into a sparse file, leaving holes where pages are zero."""
    remedy = "free some disk space, or use another folder"
    descriptor = os.open(dump.path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o600)
    with contextlib.closing(os.fdopen(descriptor, "r+b", buffering=0)) as file:
        end = 0
        for block, offset in dump.offsets():
            for start, octets in _chunks(pid, block):
                rows = _pages(octets)
                base = offset + start
                require_room(dump.path.parent, rows.nbytes, "a copy of the guest's memory", remedy)
                with _writing(dump.path):
                    for first, last in _runs(_any_by_row(rows)):
                        _pwrite_all(file.fileno(), rows[first:last], base + first * PAGE_BYTES)
            end = offset + -(-block.used_bytes // PAGE_BYTES) * PAGE_BYTES
        with _writing(dump.path):
            file.truncate(end)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SnapshotError(
            f"the guest's memory cannot be written to {path}: {error.strerror}",
            "use another folder, or a smaller guest",
        ) from error


def _pwrite_all(descriptor: int, rows: npt.NDArray[np.uint64], offset: int) -> None:
    data = rows.data.cast("B")
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def _any_by_row(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    together: npt.NDArray[np.uint64] = np.bitwise_or.reduce(rows, axis=1)
    found: npt.NDArray[np.bool_] = together != np.uint64(0)
    return found


def _runs(flags: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Give the ranges in which `flags` is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    for first, last in edges.reshape(-1, 2):
        yield int(first), int(last)


def _judge(
    vm: VM, dump: _Dump, restored_pid: int, found: dict[str, RamBlock], method: str
) -> Verification:
    comparisons = []
    problems = []
    missing = {block.name for block in dump.blocks} ^ found.keys()
    if missing:
        problems.append(f"block {', '.join(sorted(missing))} is on one side only")
    with dump.path.open("rb") as file:
        for block, offset in dump.offsets():
            other = found.get(block.name)
            if other is None:
                continue
            if other.used_bytes != block.used_bytes:
                problems.append(
                    f"block {block.name} has {other.used_bytes} bytes, had {block.used_bytes}"
                )
                continue
            comparisons.append(_compare(file.fileno(), offset, block, restored_pid, other))
    for comparison in comparisons:
        if comparison.pages_differing:
            first = ", ".join(f"{at:#x}" for at in comparison.first_differing)
            problems.append(
                f"{comparison.pages_differing} of {comparison.pages} pages of {comparison.name} "
                f"differ, at {first}"
            )
    replay, operations = None, 0
    if dump.nonce is not None:
        try:
            progress = find_progress_page(_data(dump.path), dump.nonce)
            operations = progress.total_ops
            problems += _own_findings(progress)
            if vm.workload.kind in REPLAYED_KINDS:
                replay = check_working_set(_data(dump.path), progress)
                if not replay.ok:
                    problems.append(f"the working set is not what a replay gives: {replay}")
        except GuestError as error:
            problems.append(error.cause)
    return Verification(
        method=method,
        equal=not problems,
        blocks=comparisons,
        pages_compared=sum(c.pages for c in comparisons),
        pages_differing=sum(c.pages_differing for c in comparisons),
        operations=operations,
        replay=replay,
        detail="; ".join(problems),
    )


def _own_findings(progress: ProgressPage) -> list[str]:
    """Return what the guest found wrong itself."""
    found = []
    if progress.page_errors:
        found.append(f"the guest found {progress.page_errors} damaged pages itself")
    if progress.device_errors:
        found.append(f"the guest found {progress.device_errors} errors of its devices")
    return found


def _compare(
    descriptor: int, offset: int, block: RamBlock, restored_pid: int, other: RamBlock
) -> BlockComparison:
    differing = 0
    first: list[int] = []
    for start, octets in _chunks(restored_pid, other):
        now = _pages(octets)
        then = _dumped(descriptor, offset + start, now.nbytes).reshape(now.shape)
        # One look tells that nothing differs, which is what there is nearly always.
        if np.array_equal(now, then):
            continue
        wrong = np.flatnonzero(_any_by_row(now ^ then))
        differing += wrong.size
        first += [start + int(row) * PAGE_BYTES for row in wrong[: 4 - len(first)]]
    return BlockComparison(
        name=block.name,
        pages=-(-block.used_bytes // PAGE_BYTES),
        pages_differing=differing,
        first_differing=tuple(first),
    )


_NOTHING = np.zeros(CHUNK_BYTES // 8, np.uint64)


def _dumped(descriptor: int, offset: int, length: int) -> npt.NDArray[np.uint64]:
    """Read a chunk of a dump.

    A hole is zeros without being read, which would fill the page cache with them.
    """
    try:
        data = os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        data = offset + length  # nothing but a hole to the end
    if data >= offset + length:
        return _NOTHING[: length // 8]
    return np.frombuffer(os.pread(descriptor, length, offset), np.uint64)


def _data(path: Path) -> Iterator[Octets]:
    """Give those chunks of a sparse file that are not all hole."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // PAGE_BYTES * PAGE_BYTES
            except OSError:
                return  # ENXIO: nothing but a hole to the end
            chunk = os.pread(file.fileno(), CHUNK_BYTES, at)
            yield np.frombuffer(chunk, np.uint8)
            at += len(chunk)
