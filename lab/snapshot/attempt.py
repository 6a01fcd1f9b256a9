"""One migration to a file, from the request until QEMU could do another."""

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from lab.errors import LabError, QmpError, SnapshotError
from lab.guests.protocol import ReadyRecord
from lab.host.limits import process_limit
from lab.host.needs import may_write
from lab.host.room import room_bytes
from lab.host.room import said as room_said
from lab.instruments.faultlog import FaultLog, read_fault_log
from lab.instruments.instrument import Moment, Watch
from lab.instruments.phases import counters
from lab.marks import Marks
from lab.scenario.methods import Method
from lab.snapshot.disks import DiskSwitch
from lab.snapshot.image import file_channel
from lab.snapshot.mechanisms import mechanism_of
from lab.snapshot.mechanisms.base import ENDED, LIVE_STATES, Course, Hold, until
from lab.snapshot.result import Snapshot
from lab.snapshot.room import FSIZE_REMEDY
from lab.snapshot.throttle import LimitedStorage
from lab.vm.qmp import Event
from lab.vm.vm import RunningVM

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

IMAGE_DESCRIPTOR = "lab-image"
"""What QEMU calls the socket that it writes an image to, where it is not given a file."""

SIZE_POLL_S = 0.1

# What an earlier snapshot, or the restore of this guest, may have left switched on.
_CLEARED = dict.fromkeys(
    ("background-snapshot", "mapped-ram", "multifd", "pause-before-switchover"), False
)


class Attempt:
    """One migration to a file, from the request until QEMU could do another."""

    def __init__(
        self,
        vm: RunningVM,
        how: Method,
        partial: Path,
        *,
        storage: LimitedStorage | None,
        storage_mib_per_s: int,
        hold: Hold | None,
        disks: DiskSwitch,
        log_faults: bool,
    ) -> None:
        self.vm = vm
        self.how = how
        self.partial = partial
        self.storage = storage
        self.storage_mib_per_s = storage_mib_per_s
        self.disks = disks
        self.mechanism = mechanism_of(how, vm.binary.variant)
        self.hold = hold
        self.qemu_switches_disks = False
        self.fault_log_path = (
            vm.process.workdir / "faults.bin" if log_faults and self.mechanism.logs_faults else None
        )
        if vm.is_attached and not may_write(vm.pid, vm.process.workdir):
            self.fault_log_path = None
        # Where something is written: a disk that is full is nobody's to use any more.
        self.folders = [partial.parent, *([vm.process.workdir] if self.fault_log_path else [])]
        self.cleared: dict[str, bool] = {}
        self.was_running = False
        self.since = 0
        self.request_ns = 0
        self.ready_at_request: ReadyRecord | None = None
        self.completed: Event | None = None
        self.clock_offset_ns = 0
        self.migration: dict[str, Any] = {}
        self.fault_log: FaultLog | None = None

    async def run(self, watch: Watch) -> None:
        vm = self.vm
        state = await vm.status()
        self.was_running = state in LIVE_STATES
        await self.mechanism.check(vm, state)
        vm.process.find_groups()
        guarded = contextlib.nullcontext() if vm.guard is None else vm.guard.armed(self.was_running)
        with guarded:
            await self._run(watch)

    async def _run(self, watch: Watch) -> None:
        vm = self.vm
        try:
            await self._prepare_disks()
            await self._prepare()
            self.since = len(vm.qmp.events)
            course = Course(
                vm=vm, migrate=self._migrate, hold=self.hold, was_running=self.was_running
            )
            await watch.at(Moment.REQUEST)
            self.ready_at_request = vm.ready if vm.is_ready else None
            self.request_ns = time.monotonic_ns()
            await self.mechanism.request(course)
            self.completed = await self._await_bounded_end()
            if self.qemu_switches_disks:
                self.disks.note_switched()
            await watch.at(Moment.COMPLETED)
            await self.mechanism.finish(course)
            await watch.at(Moment.RUNNING)
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
            await to_the_end(self._abort())
            if isinstance(error, QmpError):
                raise SnapshotError(f"{self.how.name}: {error.cause}", error.remedy) from error
            raise

    async def _migrate(self) -> None:
        if self.storage is not None:
            where: dict[str, object] = {"channels": _IMAGE_CHANNEL}
        elif self.has_descriptor:
            where = {"uri": f"fd:{IMAGE_DESCRIPTOR}"}
        else:
            where = {"channels": file_channel(self.partial)}
        await self.vm.execute("migrate", where)

    async def _prepare_disks(self) -> None:
        """Have overlays ready, and whoever is to put them on top at the instant."""
        if not self.disks.has_disks:
            return
        await self.disks.prepare()
        # The guest does not wait for the lab where QEMU does it.
        known = await self.vm.execute("query-migrate-parameters")
        self.qemu_switches_disks = self.mechanism.overlays in known
        if not self.qemu_switches_disks:
            self.hold = _one_after_the_other(self.disks.switch, self.hold)

    async def _prepare(self) -> None:
        vm = self.vm
        # One command: QEMU checks what is incompatible for the set as a whole.
        known = {one["capability"] for one in await vm.execute("query-migrate-capabilities")}
        # An older QEMU does not know all of what may be left on.
        self.cleared = {name: False for name in _CLEARED if name in known}
        capabilities = {"events": True, **self.cleared}
        capabilities |= self.mechanism.capabilities(hold=self.hold is not None)
        if lacking := sorted(set(capabilities) - known):
            raise SnapshotError(
                f"QEMU {vm.binary.version} does not have {lacking[0]}, which {self.how.name} needs",
                "choose another method, or run the VM on a newer QEMU",
            )
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
        }
        if self.how.direct_io or "direct-io" in await vm.execute("query-migrate-parameters"):
            parameters["direct-io"] = self.how.direct_io
        parameters |= self.mechanism.parameters(str(self.fault_log_path or ""))
        if self.qemu_switches_disks:
            parameters[self.mechanism.overlays] = self.disks.overlays
        await vm.execute("migrate-set-parameters", parameters)
        if self.storage is not None:
            # QEMU has a duplicate then.  With another one the end of the stream would not be seen.
            with self.storage.sender as sender:
                await vm.qmp.send_descriptor(IMAGE_DESCRIPTOR, sender.fileno())
        elif self.has_descriptor:
            descriptor = os.open(self.partial, os.O_WRONLY | os.O_CLOEXEC)
            try:
                await vm.qmp.send_descriptor(IMAGE_DESCRIPTOR, descriptor)
            finally:
                os.close(descriptor)

    @property
    def has_descriptor(self) -> bool:
        """Whether QEMU is given the image open.

        A QEMU of another user's may not open it, and one before 8.2 cannot write to a file.
        """
        return self.vm.is_attached and not self.how.has_places and self.storage is None

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
            if os.strerror(errno.EFBIG) in said or (beyond and self.how.has_places):
                return f"{said} (RLIMIT_FSIZE); {FSIZE_REMEDY}"
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
        await self.vm.execute("migrate-set-capabilities", {"capabilities": _states(self.cleared)})
        await self.mechanism.reset(self.vm)
        if self.qemu_switches_disks:
            await self.vm.execute("migrate-set-parameters", {self.mechanism.overlays: []})

    async def _abort(self) -> None:
        """Take back what was begun; what fails here is logged, because an error is on its way."""
        try:
            if self.vm.qmp.is_lost:
                return
            await self.mechanism.free_guest(self.vm)
            if not await self._is_idle():
                await self.vm.execute("migrate_cancel")
                await self._settle()
            await self._reset()
            if self.was_running and not await self.vm.is_running():
                await self.vm.cont()
            if self.storage is not None or self.has_descriptor:
                with contextlib.suppress(QmpError):  # a migration has taken it
                    await self.vm.execute("closefd", {"fdname": IMAGE_DESCRIPTOR})
        except LabError as error:
            log.error("taking back a %s snapshot: %s", self.how.name, error)
        finally:
            await self.disks.undo()

    def ready_at_pause(self) -> ReadyRecord | None:
        """Return what the guest in the image has said: nothing if it was reset meanwhile."""
        for event in self.vm.qmp.events[self.since :]:
            if event.name == "STOP":
                break
            if event.name == "RESET":
                return None
        return self.ready_at_request

    def result(self, image: Path, size: int) -> Snapshot:
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
            marks=Marks(
                request_ns=self.request_ns,
                stop_ns=self._monotonic_ns(stop),
                resume_ns=self._monotonic_ns(resume),
                end_ns=self._monotonic_ns(self.completed),
            ),
            image_bytes=size,
            counters=counters(self.migration),
            storage_mib_per_s=self.storage_mib_per_s,
            migration=self.migration,
            fault_log=self.fault_log,
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


def _one_after_the_other(first: Hold, second: Hold | None) -> Hold:
    async def both() -> None:
        await first()
        if second is not None:
            await second()

    return both


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
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
