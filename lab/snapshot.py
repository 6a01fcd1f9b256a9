"""Take a snapshot: the methods, what is seen while they run, and the result.

What the times of a `Snapshot` are:

`setup_ms`
    request until QEMU stops the vCPUs: preparation while the guest runs.  For ordinary migration
    that is the whole copy until the last round.
`pause_ms`
    vCPUs stopped: QEMU's STOP event until its RESUME event.  An ordinary migration leaves the
    vCPUs stopped; the lab lets them go on as soon as it sees the migration completed, and that is
    the RESUME which counts.
`duration_ms`
    request until QEMU reports the migration completed, when it has handed everything over.  Not in
    it: closing the image, renaming it, writing the sidecar; and, with storage of a limited rate,
    writing what is on its way to the file then, which is a fraction of a MiB (`lab.storage`).

The request is the moment before the first command is sent that affects the guest: `migrate`, or
`stop` for `stop-and-copy`.  What is not measured here: what the guest lost in speed, which is what
`df_progress()` is for.
"""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from lab.checksums import Checksums, checksums_of
from lab.display import html_row
from lab.errors import LabError, QmpError, SnapshotError, UsageError
from lab.guest.protocol import ReadyRecord
from lab.imagefile import partial_image
from lab.instruments.faultlog import FaultLog, read_fault_log
from lab.instruments.phases import buffer_summary, counters, df_phases
from lab.instruments.progress import ProgressSampler
from lab.instruments.threads import ThreadTimes
from lab.instruments.writelatency import WriteLatency, stall_summary
from lab.limits import process_limit
from lab.mechanisms import mechanism_of
from lab.mechanisms.base import ENDED, LIVE_STATES, Hold, until
from lab.qemu.build import QemuBinary
from lab.qmp import Event
from lab.ram import QEMU_OVERHEAD_MIB
from lab.room import room_bytes
from lab.room import said as room_said
from lab.scenario import (
    MAPPED_RAM,
    METHODS,
    Machine,
    Method,
    Storage,
    Workload,
    check_storage,
    dimensions,
)
from lab.scenario import method as method_of
from lab.sidecar import Sidecar
from lab.storage import LimitedStorage, limited
from lab.tables import fault_summary, with_marks
from lab.vm import VM, file_channel

log = logging.getLogger(__name__)

DOWNTIME_LIMIT_MS = 300
"""QEMU's default: an ordinary migration stops the guest for its last round when it expects that
round to take this long.  Set and recorded rather than relied upon."""

MIN_BYTES_PER_S = 5_000_000
"""A snapshot slower than this is taken to hang; at full speed it is a hundred times faster."""

MAX_PRECOPY_RAM_SIZES = 8
"""A precopy whose image has grown to so many times the guest's RAM is given up: the guest writes
faster than the disk, and QEMU would go on until the disk is full.  At a limited rate that takes so
many times as long as writing the guest's RAM once: 82 s for 1 GiB at 100 MiB/s."""

_FSIZE_REMEDY = "boot the guest under a higher limit, such as `ulimit -f unlimited`"

IMAGE_DESCRIPTOR = "lab-image"
"""What QEMU calls the socket that it writes an image to, where it is not given a file."""

SIZE_POLL_S = 0.1
QEMU_STATE_BYTES = 64 << 20
"""Room on the disk for what is in an image besides pages: headers and the devices' state."""

# What an earlier snapshot, or the restore of this guest, may have left switched on.
_CLEARED = dict.fromkeys(
    ("background-snapshot", "mapped-ram", "multifd", "pause-before-switchover"), False
)

WINDOWS = ("before", "during")
"""What lies between the readings of an instrument: until the request, until completion."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot that was taken, and how that went.  See the module for what the times are.

    The tables name the snapshot in their `attrs` (`case`, `request_ns`, `stop_ns`, `resume_ns`,
    `end_ns`), so that `lab.plot_*` draw them as they are.

    `request_ns`, `stop_ns`, `resume_ns` and `end_ns` are CLOCK_MONOTONIC; `stop_ns` and
    `resume_ns` are None when the guest was stopped before and stayed so.
    """

    path: Path
    method: str
    engine: str | None
    outcome: str
    machine: Machine
    workload: Workload
    binary: QemuBinary
    request_ns: int
    stop_ns: int | None
    resume_ns: int | None
    end_ns: int
    image_bytes: int
    counters: dict[str, int]
    migration: dict[str, Any] = dataclasses.field(repr=False)
    """QEMU's last reply to `query-migrate`."""
    fault_log: FaultLog | None = dataclasses.field(repr=False)
    sampler: ProgressSampler | None = dataclasses.field(repr=False)
    write_latency: pd.DataFrame | None = dataclasses.field(default=None, repr=False)
    storage_mib_per_s: int = 0
    """The image was written no faster than this; 0: as fast as the disk went."""

    @property
    def setup_ms(self) -> float | None:
        """Request until the vCPUs were stopped."""
        return None if self.stop_ns is None else (self.stop_ns - self.request_ns) / 1e6

    @property
    def pause_ms(self) -> float | None:
        """How long the vCPUs were stopped."""
        if self.stop_ns is None or self.resume_ns is None:
            return None
        return (self.resume_ns - self.stop_ns) / 1e6

    @property
    def duration_ms(self) -> float:
        """Request until the migration was completed."""
        return (self.end_ns - self.request_ns) / 1e6

    def df_phases(self) -> pd.DataFrame:
        """Return the engine's phases: `phase`, `start_ns`, `end_ns`, `duration_ns`.

        Empty where QEMU does not tell: only the patched one does, for live methods.
        """
        return self._marked(df_phases(self.migration))

    def df_faults(self) -> pd.DataFrame:
        """Return one row for each write fault; `FaultLog` lists the columns.

        :raise UsageError: when there is no fault log.
        """
        if self.fault_log is None:
            raise UsageError(
                f"there is no fault log of a {self.method} snapshot",
                "use a live method of the patched QEMU, with fault_log=True",
            )
        return self._marked(self.fault_log.df)

    def df_progress(self) -> pd.DataFrame:
        """Return the samples of the guest's progress: `t_ns`, `ops`, `read_ns`.

        :raise UsageError: when progress was not sampled.
        """
        if self.sampler is None:
            raise UsageError("progress was not sampled", "use progress=True")
        return self._marked(self.sampler.df())

    def df_write_latency(self) -> pd.DataFrame:
        """Return how long the guest's operations took, as a histogram.

        Columns: `window` (`during`: request until completion; `before`: until the request),
        `low_ns`, `high_ns`, `ops`; see `lab.instruments.writelatency`.

        :raise UsageError: when the guest did not time them.
        """
        if self.write_latency is None:
            raise UsageError("the guest did not time its operations", "boot with time_writes=True")
        return self._marked(self.write_latency)

    def _marked(self, table: pd.DataFrame) -> pd.DataFrame:
        return with_marks(
            table,
            case={"method": self.method},
            request_ns=self.request_ns,
            stop_ns=self.stop_ns,
            resume_ns=self.resume_ns,
            end_ns=self.end_ns,
        )

    def summary(self) -> dict[str, Any]:
        """Return one flat row: the scenario's dimensions, times in ms, size and fault counts."""
        return {
            "method": self.method,
            "engine": self.engine,
            "outcome": self.outcome,
            **dimensions(self.machine),
            **dimensions(self.workload),
            "storage_mib_per_s": self.storage_mib_per_s,
            "setup_ms": self.setup_ms,
            "pause_ms": self.pause_ms,
            "duration_ms": self.duration_ms,
            "image_bytes": self.image_bytes,
            **fault_summary(None if self.fault_log is None else self.fault_log.df),
            **buffer_summary(self.counters),
            **stall_summary(self.write_latency),
        }

    def __repr__(self) -> str:
        pause = "not paused" if self.pause_ms is None else f"pause {self.pause_ms:.2f} ms"
        return (
            f"Snapshot({self.method!r}, {self.path.name!r}, {pause}, "
            f"duration {self.duration_ms:.0f} ms, {self.image_bytes / (1 << 20):.0f} MiB)"
        )

    def _repr_html_(self) -> str:
        cells = {
            "method": self.method,
            "image": self.path.name,
            "set-up": _ms(self.setup_ms),
            "pause": _ms(self.pause_ms),
            "duration": _ms(self.duration_ms),
            "size": f"{self.image_bytes / (1 << 20):.0f} MiB",
            "faults": "-" if self.fault_log is None else str(len(self.fault_log.df)),
        }
        return html_row(cells)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ms"


async def take(
    vm: VM,
    path: str | Path,
    method: str,
    *,
    fault_log: bool = True,
    progress: bool = True,
    before_s: float = 1.0,
    after_s: float = 1.0,
    storage_mib_per_s: int = 0,
    sampler: ProgressSampler | None = None,
    latency: WriteLatency | None = None,
    threads: ThreadTimes | None = None,
    hold: Hold | None = None,
    checksums: bool = False,
) -> Snapshot:
    """Take a snapshot of `vm`; `VM.snapshot` says more.

    :param sampler: one that runs already; then none is started, and there is no waiting before
        and after.
    :param latency: a reader of a guest that times its operations, with one reading at the
        beginning of what is to be compared with; by default one that begins now.
    :param threads: a reader of the times of QEMU's threads, likewise.  After an ordinary migration
        it is read when the guest goes on, so as not to make the pause longer.
    :param hold: called at the instant that the image shows, while the guest is stopped there.
        On the patched QEMU's live methods that is the engine's pre-switchover hold; for ordinary
        migration, completion.  The unpatched `background` can not be held: the guest is stopped
        and held before the request, and goes on when QEMU has transferred the first pages.
    :param checksums: read the image again for the checksums of its sidecar.  It takes the host's
        CPUs from the guest, so measurements do without.
    """
    how = method_of(method)
    if not how.runs_on(vm.binary.variant):
        raise UsageError(
            f"{method} needs the {how.binary} QEMU and this guest runs on the {vm.binary.variant}",
            f'boot with binary="{how.binary}", or choose from: {_possible(vm.binary.variant)}',
        )
    check_storage(how, Storage(storage_mib_per_s=storage_mib_per_s))
    with vm.busy_with(f"a {method} snapshot"):
        image = Path(path).absolute()
        async with contextlib.AsyncExitStack() as stack:
            writing = stack.enter_context(partial_image(image))
            partial = writing.path
            _check_disk(vm, how, image)
            storage = None
            if storage_mib_per_s:
                storage = await stack.enter_async_context(limited(partial, storage_mib_per_s))
            if latency is None and vm.workload.time_writes and vm.is_ready:
                latency = await vm.write_latency()
                latency.read()
            if sampler is None and progress:
                sampler = await stack.enter_async_context(vm.sampling())
                await asyncio.sleep(before_s)
            else:
                after_s = 0.0
            attempt = _Attempt(
                vm,
                how,
                partial,
                storage=storage,
                storage_mib_per_s=storage_mib_per_s,
                hold=hold,
                log_faults=fault_log,
                latency=latency,
                threads=threads,
            )
            await attempt.run()
            ready = attempt.ready_at_pause()
            # Before the checksums are made, so that what they take from the guest is not shown.
            await asyncio.sleep(after_s)
            mark = writing.add_mark()
            size = partial.stat().st_size
            sums = await _checksums(partial, size) if checksums else None
            writing.publish(_sidecar(vm, how, ready, size, mark, sums))
        return attempt.result(image, size, sampler)


def _possible(variant: str) -> str:
    return ", ".join(name for name, how in METHODS.items() if how.runs_on(variant))


class _Attempt:
    """One migration to a file, from the request until QEMU could do another."""

    def __init__(
        self,
        vm: VM,
        how: Method,
        partial: Path,
        *,
        storage: LimitedStorage | None,
        storage_mib_per_s: int,
        hold: Hold | None,
        log_faults: bool,
        latency: WriteLatency | None,
        threads: ThreadTimes | None,
    ) -> None:
        self.vm = vm
        self.how = how
        self.partial = partial
        self.storage = storage
        self.storage_mib_per_s = storage_mib_per_s
        self.hold = hold
        self.latency = latency
        self.threads = threads
        self.mechanism = mechanism_of(how, vm.binary.variant)
        self.fault_log_path = (
            vm.process.workdir / "faults.bin" if log_faults and self.mechanism.logs_faults else None
        )
        # Where something is written: a disk that is full is nobody's to use any more.
        self.folders = [partial.parent, *([vm.process.workdir] if self.fault_log_path else [])]
        self.was_running = False
        self.since = 0
        self.request_ns = 0
        self.ready_at_request: ReadyRecord | None = None
        self.completed: Event | None = None
        self.clock_offset_ns = 0
        self.migration: dict[str, Any] = {}
        self.fault_log: FaultLog | None = None

    async def run(self) -> None:
        vm = self.vm
        state = await vm.status()
        self.was_running = state in LIVE_STATES
        await self.mechanism.check(vm, state)
        vm.process.find_groups()
        try:
            await self._prepare()
            self.since = len(vm.qmp.events)
            self._read_latency()
            self._read_threads()
            self.ready_at_request = vm.ready if vm.is_ready else None
            self.request_ns = time.monotonic_ns()
            await self.mechanism.request(vm, self._migrate, self.hold, self.was_running)
            self.completed = await self._await_bounded_end()
            self._read_latency()
            await self.mechanism.finish(vm, self.hold, self.was_running)
            self._read_threads()
            await self._settle()
            if self.storage is not None:
                await self.storage.finish()
            self.migration = await vm.execute("query-migrate")
            if why := self.migration.get("error-desc"):
                # Some file systems tell only at the end that the image is not all there.
                raise SnapshotError(f"{self.how.name} failed at its very end: {why}")
            self.clock_offset_ns = time.clock_gettime_ns(time.CLOCK_REALTIME) - time.monotonic_ns()
            if self.fault_log_path is not None:
                self.fault_log = read_fault_log(self.fault_log_path, await vm.vcpu_threads())
            await self._reset()
        except BaseException as error:
            # Cancelled as well as failed: the guest has to go on before anything else is told.
            await _to_the_end(self._abort())
            if isinstance(error, QmpError):
                raise SnapshotError(f"{self.how.name}: {error.cause}", error.remedy) from error
            raise

    def _read_latency(self) -> None:
        if self.latency is not None:
            self.latency.read()

    def _read_threads(self) -> None:
        if self.threads is not None:
            self.threads.read()

    async def _migrate(self) -> None:
        channels = file_channel(self.partial) if self.storage is None else _IMAGE_CHANNEL
        await self.vm.execute("migrate", {"channels": channels})

    async def _prepare(self) -> None:
        vm = self.vm
        # One command: QEMU checks what is incompatible for the set as a whole.
        capabilities = {"events": True, **_CLEARED}
        capabilities |= self.mechanism.capabilities(hold=self.hold is not None)
        try:
            await vm.execute("migrate-set-capabilities", {"capabilities": _states(capabilities)})
        except QmpError as error:
            if explained := self.mechanism.explain(vm, error):
                raise explained from error
            raise
        parameters: dict[str, object] = {
            # 0 is no limit; the default of 128 MiB/s would not let a busy guest converge.
            "max-bandwidth": 0,
            "downtime-limit": DOWNTIME_LIMIT_MS,
            "direct-io": self.how.direct_io,
        }
        parameters |= self.mechanism.parameters(str(self.fault_log_path or ""))
        await vm.execute("migrate-set-parameters", parameters)
        if self.storage is not None:
            # QEMU has a duplicate then.  With another one the end of the stream would not be seen.
            with self.storage.sender as sender:
                await vm.qmp.send_descriptor(IMAGE_DESCRIPTOR, sender.fileno())

    async def _await_bounded_end(self) -> Event:
        end = asyncio.ensure_future(self._await_end())
        bound = asyncio.ensure_future(self._await_too_large())
        try:
            await asyncio.wait({end, bound}, return_when=asyncio.FIRST_COMPLETED)
            if not end.done():
                raise bound.result()
            return end.result()
        finally:
            end.cancel()
            bound.cancel()
            await asyncio.gather(end, bound, return_exceptions=True)

    async def _await_too_large(self) -> LabError:
        """Return why the image may not grow any more, once that is so, which may be never."""
        while True:
            # In a thread: a disk that does not answer would stop everything else.
            if problem := await asyncio.to_thread(self._too_large):
                return problem
            await asyncio.sleep(SIZE_POLL_S)

    def _too_large(self) -> LabError | None:
        size = self.partial.stat().st_size
        if size > MAX_PRECOPY_RAM_SIZES * self.vm.machine.ram_mib << 20:
            return SnapshotError(
                f"{self.how.name} does not converge: its image has {size >> 20} MiB, "
                f"{MAX_PRECOPY_RAM_SIZES} times the guest's RAM",
                "take a live snapshot, or let the guest write less",
            )
        for folder in self.folders:
            if room_bytes(folder) < 0:
                return SnapshotError(
                    f"{self.how.name} was given up at {size >> 20} MiB of image, before it took the"
                    f" last of the disk: {room_said(0)} in {folder}",
                    "free some disk space or choose another path",
                )
        return None

    async def _await_end(self) -> Event:
        timeout_s = 60.0 + self.vm.machine.ram_mib * (1 << 20) / MIN_BYTES_PER_S
        if self.storage_mib_per_s:
            sizes = MAX_PRECOPY_RAM_SIZES if self.mechanism.writes_again else 1
            timeout_s += sizes * self.vm.machine.ram_mib / self.storage_mib_per_s
        since = self.since
        while True:
            event = await self.vm.watched(
                self.vm.qmp.wait_event(_is_progress, since=since, timeout_s=timeout_s),
                f"it took a {self.how.name} snapshot",
            )
            status = event.data["status"]
            if status == "completed":
                return event
            if status in ENDED:
                raise SnapshotError(f"{self.how.name} {status}: {await self._why()}")
            since = self.vm.qmp.events.index(event, since) + 1
            if self.hold is not None:
                await self.hold()
            await self.vm.execute("migrate-continue", {"state": "pre-switchover"})

    async def _why(self) -> str:
        if self.storage is not None and (reason := await self.storage.reason()):
            # QEMU knows only that nobody reads any more.
            return reason
        reply = await self.vm.execute("query-migrate")
        said = reply.get("error-desc")
        limit = process_limit("FSIZE", self.vm.pid)
        if said and limit is not None:
            # Of a page that has its place beyond the limit QEMU does not say what is wrong.
            beyond = limit < self.vm.machine.ram_mib << 20
            if os.strerror(errno.EFBIG) in said or (beyond and MAPPED_RAM in self.how.capabilities):
                return f"{said} (RLIMIT_FSIZE); {_FSIZE_REMEDY}"
        if said:
            return str(said)
        return next(reversed(self.vm.process.messages()), "QEMU gives no reason")

    async def _settle(self) -> None:
        """Wait until QEMU has closed the image and could do another migration.

        It reports a migration completed before it has cleaned up; the yank instance of the
        migration goes away last.
        """
        await until(self._is_idle, "clean up after a migration")

    async def _is_idle(self) -> bool:
        instances = await self.vm.execute("query-yank")
        return all(instance["type"] != "migration" for instance in instances)

    async def _reset(self) -> None:
        """Leave QEMU as a guest that was never snapshotted would have it."""
        await self.vm.execute("migrate-set-capabilities", {"capabilities": _states(_CLEARED)})
        await self.mechanism.reset(self.vm)

    async def _abort(self) -> None:
        """Take back what was begun; what fails here is logged, because an error is on its way."""
        if self.vm.qmp.is_lost:
            return
        try:
            await self.mechanism.free_guest(self.vm)
            if not await self._is_idle():
                await self.vm.execute("migrate_cancel")
                await self._settle()
            await self._reset()
            if self.was_running and not await self.vm.is_running():
                await self.vm.cont()
            if self.storage is not None:
                with contextlib.suppress(QmpError):  # a migration has taken it
                    await self.vm.execute("closefd", {"fdname": IMAGE_DESCRIPTOR})
        except LabError as error:
            log.error("taking back a %s snapshot: %s", self.how.name, error)

    def ready_at_pause(self) -> ReadyRecord | None:
        """Return what the guest in the image has said: nothing if it was reset meanwhile."""
        for event in self.vm.qmp.events[self.since :]:
            if event.name == "STOP":
                break
            if event.name == "RESET":
                return None
        return self.ready_at_request

    def result(self, image: Path, size: int, sampler: ProgressSampler | None) -> Snapshot:
        assert self.completed is not None
        events = self.vm.qmp.events[self.since :]
        stop = next((e for e in events if e.name == "STOP"), None)
        resume = next((e for e in events if e.name == "RESUME"), None)
        return Snapshot(
            path=image,
            method=self.how.name,
            engine=self.how.engine,
            outcome="ok",
            machine=self.vm.machine,
            workload=self.vm.workload,
            binary=self.vm.binary,
            request_ns=self.request_ns,
            stop_ns=self._monotonic_ns(stop),
            resume_ns=self._monotonic_ns(resume),
            end_ns=self.completed.time_us * 1000 - self.clock_offset_ns,
            image_bytes=size,
            counters=counters(self.migration),
            write_latency=None if self.latency is None else self.latency.df(WINDOWS),
            storage_mib_per_s=self.storage_mib_per_s,
            migration=self.migration,
            fault_log=self.fault_log,
            sampler=sampler,
        )

    def _monotonic_ns(self, event: Event | None) -> int | None:
        return None if event is None else event.time_us * 1000 - self.clock_offset_ns


_IMAGE_CHANNEL = [
    {
        "channel-type": "main",
        "addr": {"transport": "socket", "type": "fd", "str": IMAGE_DESCRIPTOR},
    }
]


def _states(capabilities: dict[str, bool]) -> list[dict[str, object]]:
    return [{"capability": name, "state": state} for name, state in capabilities.items()]


def _is_progress(event: Event) -> bool:
    return event.name == "MIGRATION" and event.data.get("status") in (*ENDED, "pre-switchover")


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, which bounds itself; a cancellation meanwhile takes effect after it."""
    task = asyncio.create_task(work, name="taking back a snapshot")
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    await task
    if cancelled is not None:
        raise cancelled


# Files


def _check_disk(vm: VM, how: Method, image: Path) -> None:
    """Refuse a snapshot for which there is clearly no room; a disk that fills up later fails it."""
    guest_bytes = vm.machine.ram_mib << 20
    # Pages that were never written are not in the image, and not resident in QEMU either.
    resident = min(guest_bytes, resident_bytes(vm.pid))
    expected = mechanism_of(how, vm.binary.variant).expected_bytes(resident) + QEMU_STATE_BYTES
    room = room_bytes(image.parent)
    if room < expected:
        raise SnapshotError(
            f"the image needs about {expected >> 20} MiB and {room_said(room)} in {image.parent}",
            "free some disk space or choose another path",
        )
    limit = process_limit("FSIZE", vm.pid)
    if limit is None:
        return
    # The least that it can be: what QEMU has besides guest RAM is not in it, and where each page
    # has its place, the last one's is beyond all others.
    least = max(resident - (QEMU_OVERHEAD_MIB << 20), 0)
    if MAPPED_RAM in how.capabilities:
        least = guest_bytes
    if limit < least:
        raise SnapshotError(
            f"the image needs {least >> 20} MiB or more and a file of QEMU's may have "
            f"{limit >> 20} MiB (RLIMIT_FSIZE)",
            _FSIZE_REMEDY,
        )


def resident_bytes(pid: int) -> int:
    """Return how much memory a process has, of whatever kind; 0 when it has ended."""
    total_kib = 0
    # No file, or none of the lines: the process has just ended, and the next command tells why.
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            # Guest RAM is one of the four, according to its kind.
            if line.startswith(("RssAnon:", "RssShmem:", "RssFile:", "HugetlbPages:")):
                total_kib += int(line.split()[1])
    return total_kib * 1024


async def _checksums(partial: Path, size: int) -> Checksums:
    try:
        return await checksums_of(partial, size)
    except OSError as error:
        raise SnapshotError(
            f"{partial} can not be read for its checksums: {error.strerror}",
            "take the snapshot again, on another disk",
        ) from error


def _sidecar(
    vm: VM,
    how: Method,
    ready: ReadyRecord | None,
    size: int,
    mark: str,
    sums: Checksums | None,
) -> Sidecar:
    return Sidecar(
        method=how.name,
        engine=how.engine,
        machine=vm.machine,
        workload=vm.workload,
        machine_type=vm.machine_type,
        image_bytes=size,
        mark=mark,
        checksums=sums,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        ready=ready,
        boot_before=vm.boot_before if ready is None else None,
        binary=vm.binary,
        kernel_sha256=vm.guest.kernel_sha256,
    )
