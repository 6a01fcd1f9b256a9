"""A running guest: boot or restore it, talk to its QEMU, and be sure that it ends.

>>> import lab
>>> async def main() -> None:
...     async with lab.boot(lab.Machine(ram_mib=512), lab.Workload("random", wss_mib=64)) as vm:
...         live = await vm.snapshot("live.snap")
...     async with lab.restore("live.snap") as again:
...         print(again.ready.nonce)
"""

import asyncio
import contextlib
import dataclasses
import os
import re
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lab import mailbox
from lab.accelerator import settled
from lab.commandline import Channels, check_host, qemu_command
from lab.console import Console, attached
from lab.devices import DeviceFiles
from lab.display import html_row
from lab.errors import (
    GuestError,
    GuestSilentError,
    LabError,
    LaunchError,
    QmpError,
    RestoreError,
    SnapshotError,
    UsageError,
)
from lab.guest import micro
from lab.guest.build import Guest, find_guest
from lab.guest.protocol import PAGE_BYTES, LatencyPage, ProgressPage, ReadyRecord, Record
from lab.host import NAME_PREFIX
from lab.hostmem import read_process
from lab.imagefile import OpenImage, check_image, open_image
from lab.loops import OwnLoop, OwnTask, close_unawaited
from lab.process import QUIT_GRACE_S, Process, running
from lab.qemu.build import QemuBinary, find_qemu
from lab.qmp import COMMAND_TIMEOUT_S, Event, Qmp, connected
from lab.scenario import MAPPED_RAM, Accel, Machine, Variant, Workload, check_fit, method
from lab.workdir import private_folder

if TYPE_CHECKING:
    import pandas as pd

    from lab.instruments.progress import ProgressSampler
    from lab.instruments.threads import ThreadTimes
    from lab.instruments.writelatency import WriteLatency
    from lab.snapshot import Snapshot

BOOT_TIMEOUT_S = 120.0
"""A guest boots in seconds; a busy host makes that many more."""

RESTORE_BYTES_PER_S = 10_000_000
"""A restore slower than this is taken to hang."""

NEEDS_RESET = ("shutdown", "internal-error")
"""Run states in which QEMU refuses to let the guest run before it is reset."""

HEARTBEAT_S = 0.1
"""A notebook's interrupt takes effect when the event loop wakes next; a quiet one sleeps on."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class RamBlock:
    """One RAM block of QEMU, as `info ramblock` shows it.

    `host_address` is where it is mapped in the QEMU process; only `used_bytes` of it are migrated.
    """

    name: str
    host_address: int
    used_bytes: int
    total_bytes: int
    page_bytes: int
    read_only: bool


class VM:
    """A guest and its QEMU.  Made by `boot` and `restore`, valid inside their context."""

    def __init__(
        self,
        *,
        process: Process,
        qmp: Qmp,
        console: Console,
        machine: Machine,
        workload: Workload,
        binary: QemuBinary,
        guest: Guest | micro.Microguest,
        files: DeviceFiles,
        name: str,
    ) -> None:
        self.process = process
        self.qmp = qmp
        self.console = console
        self.machine = machine
        self.workload = workload
        self.binary = binary
        self.guest = guest
        self.files = files
        """Where the files of the devices are: the disk, the socket of VNC."""
        self.name = name
        self.machine_type = ""
        """The versioned name of the machine type, such as pc-i440fx-10.0."""
        self.fallback = ""
        """Why accelerator "auto" is not KVM; empty when it is, or was not asked for."""
        self._ready: ReadyRecord | None = None
        self._records_before_boot = 0
        self._nonce_before_boot: int | None = None
        self._busy_with: str | None = None
        self._loop = OwnLoop()

    def __repr__(self) -> str:
        return (
            f"VM(pid={self.pid}, {self.machine.ram_mib} MiB {self.machine.ram_kind}, "
            f"{self.machine.vcpus} vCPU, {self.machine.accel}, {self.workload.kind}, "
            f"QEMU {self.binary.version} {self.binary.variant})"
        )

    def _repr_html_(self) -> str:
        ended = self.process.exit_code is not None
        return html_row(
            {
                "guest": "ended" if ended else f"process {self.pid}",
                "RAM": f"{self.machine.ram_mib} MiB {self.machine.ram_kind}",
                "vCPUs": str(self.machine.vcpus),
                "accelerator": self.machine.accel,
                "workload": self.workload.kind,
                "working set": f"{self.workload.wss_mib} MiB",
                "QEMU": f"{self.binary.version} {self.binary.variant}",
            }
        )

    @property
    def pid(self) -> int:
        """Process id of QEMU."""
        return self.process.pid

    @property
    def ready(self) -> ReadyRecord:
        """What the guest said when its writers started; after a restore, said before it."""
        if self._ready is None:
            raise GuestError("the guest is not ready yet", "await vm.wait_ready()")
        return self._ready

    @property
    def is_ready(self) -> bool:
        """Whether the writers are known to run: not while the guest boots again after a reset."""
        return self._ready is not None

    # Monitor

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> Any:
        """Run a QMP command and return what QEMU returns.

        :raise LaunchError: when QEMU has died; the error carries its log.
        :raise QmpError: when it refuses the command or does not answer in time.
        """
        return await self.watched(
            self.qmp.execute(command, arguments, timeout_s=timeout_s), f"asked to {command}"
        )

    async def watched(self, work: Awaitable[_T], doing: str) -> _T:
        """Await `work`; when it fails because QEMU died, raise the `LaunchError` that says why.

        :raise UsageError: in another event loop than the one that the guest was booted in.
        """
        try:
            self._check_loop()
        except UsageError:
            close_unawaited(work)
            raise
        try:
            return await work
        except (QmpError, GuestError) as error:
            # A link that is lost before the process has ended means it is about to.
            if self.qmp.is_lost and await self.process.wait(QUIT_GRACE_S):
                raise self.process.died(doing) from error
            raise

    def _check_loop(self) -> None:
        try:
            self._loop.check()
        except UsageError:
            if self._loop.has_ended:
                self.process.kill()
            raise

    async def hmp(self, command: str) -> str:
        """Run a human monitor command and return its text, in which QEMU reports errors too.

        :raise LaunchError: when QEMU has died.
        """
        return await self.watched(self.qmp.hmp(command), f"asked to {command}")

    async def status(self) -> str:
        """Return QEMU's run state: `running`, `paused`, `postmigrate`, ..."""
        return str((await self.execute("query-status"))["status"])

    async def is_running(self) -> bool:
        """Return whether the vCPUs run."""
        return bool((await self.execute("query-status"))["running"])

    async def stop(self) -> None:
        """Stop the vCPUs."""
        await self.execute("stop")

    async def cont(self) -> None:
        """Let the vCPUs run."""
        await self.execute("cont")

    @property
    def boot_before(self) -> str | None:
        """The nonce, in hexadecimal, of the boot that ended with the last reset; None if none."""
        return None if self._nonce_before_boot is None else f"{self._nonce_before_boot:016x}"

    async def reset(self) -> None:
        """Press the reset button: the machine starts over, and the guest boots again.

        The guest is not ready afterwards; `wait_ready` waits until it is.

        :raise QmpError: when QEMU does not reset the machine.
        """
        self._check_loop()
        self._nonce_before_boot = None if self._ready is None else self._ready.nonce
        self._ready = None
        self._records_before_boot = len(self.console.records)
        self.console.restarted()
        since = len(self.qmp.events)
        await self._permit_reboot(True)
        await self.execute("system_reset")
        await self.watched(
            self.qmp.wait_event(
                lambda event: event.name == "RESET", since=since, timeout_s=COMMAND_TIMEOUT_S
            ),
            "it was reset",
        )

    async def _permit_reboot(self, permitted: bool) -> None:
        """Let a reset start the machine over, or end QEMU, as -no-reboot has it.

        The firmware resets the machine once more when it finds that it ran before.
        """
        await self.execute("set-action", {"reboot": "reset" if permitted else "shutdown"})

    async def wait_ready(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until a guest that boots runs its writers; return at once when it does.

        :raise GuestError: when it refuses the workload.
        :raise GuestSilentError: when it says nothing in time; the cause names what its vCPUs do.
        """
        if self._ready is not None:
            return
        try:
            self._ready = await self._wait_writers(timeout_s)
        except GuestSilentError as error:
            where = await self._vcpu_places()
            raise GuestSilentError(f"{error.cause} ({where})", error.remedy) from error
        await self._permit_reboot(False)

    async def _wait_writers(self, timeout_s: float) -> ReadyRecord:
        if self.machine.guest == "micro":
            return await mailbox.wait_running(self, self._nonce_before_boot, timeout_s)
        record = await self.watched(
            self.console.wait_record(
                _is_verdict, since=self._records_before_boot, timeout_s=timeout_s
            ),
            "the guest booted",
        )
        if record.kind == "error":
            raise guest_refusal(record)
        return ReadyRecord.from_record(record)

    async def verify_working_set(self) -> int:
        """Have the guest compare every word of its working set, and return how many of its pages
        were wrong.  Its writers stand still meanwhile, for as long as a second a GiB or two.

        :raise GuestSilentError: when the guest does not answer.
        """
        if self.machine.guest == "micro":
            return await mailbox.count_bad_pages(self)
        since = len(self.console.records)
        await self.console.type("verify")
        record = await self.watched(
            self.console.wait_record(
                lambda record: record.kind == "verify",
                since=since,
                timeout_s=mailbox.VERIFY_TIMEOUT_S,
            ),
            "its guest verified its pages",
        )
        return int(record.fields["bad"])

    async def _vcpu_places(self) -> str:
        """Say where each vCPU is, for a guest that nobody can ask."""
        try:
            return vcpu_places(await self.hmp("info registers -a"))
        except LabError as error:
            return f"its vCPUs can not be looked at: {error.cause}"

    async def vcpu_threads(self) -> dict[int, int]:
        """Return the index of the vCPU for each host thread that runs one."""
        cpus = await self.execute("query-cpus-fast")
        return {int(cpu["thread-id"]): int(cpu["cpu-index"]) for cpu in cpus}

    # Memory

    async def ram_blocks(self) -> list[RamBlock]:
        """Return every RAM block of the machine, ROMs and device memory included."""
        return parse_ram_blocks(await self.hmp("info ramblock"))

    async def host_address(self, gpa: int) -> int:
        """Return where guest physical address `gpa` is mapped in the QEMU process.

        :raise QmpError: when there is no RAM at that address.
        """
        text = await self.hmp(f"gpa2hva {gpa:#x}")
        match = re.search(r"is (0x[0-9a-f]+)\s*$", text.strip())
        if match is None:
            raise QmpError(f"no host address for guest address {gpa:#x}: {text.strip()}")
        return int(match[1], 16)

    def read_host(self, address: int, length: int) -> bytes:
        """Return `length` bytes of the QEMU process's memory, without stopping the guest.

        :raise HostError: when this process may not read that one.
        :raise LaunchError: when QEMU has died.
        :raise OSError: when the range is not mapped.
        """
        try:
            return read_process(self.pid, address, length)
        except ProcessLookupError as error:
            raise self.process.died("its memory was read") from error

    async def progress_page(self) -> ProgressPage:
        """Return the guest's progress page, decoded, as it is now."""
        address = await self.host_address(self.ready.progress_gpa)
        return ProgressPage.decode(self.read_host(address, PAGE_BYTES))

    @contextlib.asynccontextmanager
    async def sampling(self, interval_us: int = 1000) -> AsyncIterator["ProgressSampler"]:
        """Sample the guest's progress every `interval_us` while the context lasts.

        :raise HostError: when this process may not read QEMU's memory.
        """
        from lab.instruments.progress import ProgressSampler  # pandas is slow to import

        address = await self.host_address(self.ready.progress_gpa)
        threads, interval_ns = self.ready.threads, interval_us * 1000
        with ProgressSampler(
            self.pid, address, threads=threads, interval_ns=interval_ns
        ) as sampler:
            yield sampler

    @contextlib.asynccontextmanager
    async def timing_threads(self) -> AsyncIterator["ThreadTimes"]:
        """Look at the times of QEMU's threads while the context lasts."""
        from lab.instruments.threads import ThreadTimes  # pandas is slow to import

        with ThreadTimes(self.pid, await self.vcpu_threads()) as times:
            yield times

    async def write_latency(self) -> "WriteLatency":
        """Return the reader of how long the guest's operations take.

        :raise UsageError: when the guest was not asked to time them.
        """
        from lab.instruments.writelatency import WriteLatency  # pandas is slow to import

        progress = await self.progress_page()
        if not progress.latency_gpa:
            raise UsageError("the guest does not time its operations", "boot with time_writes=True")
        address = await self.host_address(progress.latency_gpa)
        page = LatencyPage.decode(self.read_host(address, PAGE_BYTES), progress.threads)
        buckets = [[await self.host_address(gpa) for gpa in of_thread] for of_thread in page.gpas]
        return WriteLatency(self.pid, address, buckets)

    async def slow_writes(self) -> "pd.DataFrame":
        """Return those of the guest's operations that were slow, each with its page.

        `lab.instruments.slowwrites.read_slow_writes` says what there is of each.

        :raise UsageError: when the guest was not asked to time them, or is none that notes them.
        """
        from lab.instruments.slowwrites import read_slow_writes  # pandas is slow to import

        return await read_slow_writes(self)

    # Snapshots

    async def snapshot(
        self,
        path: str | Path,
        method: str = "live",
        *,
        fault_log: bool = True,
        progress: bool = True,
        before_s: float = 1.0,
        after_s: float = 1.0,
        storage_mib_per_s: int = 0,
        checksums: bool = True,
    ) -> "Snapshot":
        """Take a snapshot into the file `path`; the guest runs on afterwards.

        `path` appears, with a sidecar `path.json` beside it, when the snapshot is complete and
        not before; an older snapshot of the same name is replaced.  Both are private (0600),
        because they hold guest memory.  Cancelling takes the snapshot back.

        :param method: one of `lab.METHODS`.
        :param fault_log: log every write fault, where QEMU can (the patched one, live methods).
        :param progress: sample the guest's progress, from `before_s` before the request to
            `after_s` after the end.
        :param storage_mib_per_s: write the image no faster than that, as if to a slower disk; 0 is
            no limit.  Only for methods that write one byte after the other.
        :param checksums: write checksums of the image into the sidecar, for `restore` to check.
            They are made after all that is measured, while the guest runs: all CPUs of the host
            read the image for a second or less a GiB.
        :raise UsageError: when the method does not exist, needs the other QEMU, or can not write
            to storage of a limited rate.
        :raise SnapshotError: when one is running already or it can not be completed.
        :raise HostError: when this host does not permit the method.
        """
        from lab.snapshot import take

        return await take(
            self,
            path,
            method,
            fault_log=fault_log,
            progress=progress,
            before_s=before_s,
            after_s=after_s,
            storage_mib_per_s=storage_mib_per_s,
            checksums=checksums,
        )

    @contextlib.contextmanager
    def busy_with(self, what: str) -> Iterator[None]:
        """Hold the one outgoing migration that QEMU can do at a time."""
        if self._busy_with is not None:
            raise SnapshotError(
                f"{self._busy_with} is still running", "await it before you start another"
            )
        self._busy_with = what
        try:
            yield
        finally:
            self._busy_with = None

    # Life

    async def _find_machine_type(self) -> None:
        for machine in await self.execute("query-machines"):
            if machine.get("alias") == self.machine.chipset:
                self.machine_type = str(machine["name"])
                return
        raise QmpError(
            f"this QEMU has no machine type {self.machine.chipset}", "build it with `lab build`"
        )

    async def _quit(self) -> None:
        if self.process.exit_code is None and not self.qmp.is_lost:
            with contextlib.suppress(QmpError):
                await self.qmp.execute("quit", timeout_s=QUIT_GRACE_S)
            await self.process.wait(QUIT_GRACE_S)


def _is_verdict(record: Record) -> bool:
    return record.kind in ("ready", "error")


def guest_refusal(record: Record) -> GuestError:
    """Return the error for a guest that says it can not run the workload."""
    details = " ".join(f"{key}={value}" for key, value in record.fields.items())
    return GuestError(f"the guest refused the workload: {details}", "change the workload or RAM")


_VCPU = re.compile(
    r"^CPU#(?P<index>\d+)$.*?\bRIP=(?P<rip>[0-9a-f]+).*?\bHLT=(?P<halted>\d)", re.M | re.S
)


def vcpu_places(registers: str) -> str:
    """Condense the monitor's `info registers -a`: where each vCPU is, and whether it is halted."""
    found = [
        f"vCPU {vcpu['index']} {'halted' if vcpu['halted'] == '1' else 'runs'} at {vcpu['rip']}"
        for vcpu in _VCPU.finditer(registers.replace("\r", ""))
    ]
    return ", ".join(found) or "QEMU does not say where its vCPUs are"


_RAM_BLOCK = re.compile(
    r"^\s*(?P<name>(?:\S.*?)?)\s+(?P<page>\d+) (?P<unit>[KMG]iB)"
    r"\s+0x[0-9a-f]+\s+0x(?P<used>[0-9a-f]+)\s+0x(?P<total>[0-9a-f]+)"
    r"\s+0x(?P<host>[0-9a-f]+)\s+(?P<access>ro|rw)\s*$"
)
_UNIT_BYTES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_ram_blocks(text: str) -> list[RamBlock]:
    """Read the table that HMP's `info ramblock` prints.

    A block without a name is of no device yet, and in no image: it is left out.

    :raise QmpError: when a line after the heading is no RAM block.
    """
    blocks = []
    for line in text.replace("\r", "").splitlines()[1:]:
        if not line.strip():
            continue
        match = _RAM_BLOCK.match(line)
        if match is None:
            raise QmpError(f"not a RAM block: {line.strip()!r}")
        if not match["name"]:
            continue
        blocks.append(
            RamBlock(
                name=match["name"],
                host_address=int(match["host"], 16),
                used_bytes=int(match["used"], 16),
                total_bytes=int(match["total"], 16),
                page_bytes=int(match["page"]) * _UNIT_BYTES[match["unit"]],
                read_only=match["access"] == "ro",
            )
        )
    return blocks


async def _heartbeat() -> None:
    while True:  # noqa: ASYNC110 - nothing is awaited here; the wake-ups themselves are the purpose
        await asyncio.sleep(HEARTBEAT_S)


def _launched(
    binary: QemuBinary,
    machine: Machine,
    workload: Workload,
    *,
    machine_type: str = "",
    incoming: bool = False,
    paused: bool = False,
) -> OwnTask[VM]:
    """Start a QEMU and connect to it; see `OwnTask` for whose it is.

    :raise LaunchError: when it dies first.
    """
    started = _started(
        binary,
        machine,
        workload,
        machine_type=machine_type,
        incoming=incoming,
        paused=paused,
    )
    return OwnTask(started, "guest", lambda vm: vm.process.kill())


@contextlib.asynccontextmanager
async def _started(
    binary: QemuBinary,
    machine: Machine,
    workload: Workload,
    *,
    machine_type: str = "",
    incoming: bool = False,
    paused: bool = False,
) -> AsyncIterator[VM]:
    """Start a QEMU and connect to it.

    :raise LaunchError: when it dies first.
    """
    guest = micro.find_microguest() if machine.guest == "micro" else find_guest()
    await asyncio.to_thread(check_host, machine, binary.variant)
    name = f"{NAME_PREFIX}{uuid.uuid4()}"
    qmp_socket, qmp_child = socket.socketpair()
    serial_socket, serial_child = socket.socketpair()
    async with contextlib.AsyncExitStack() as stack:
        for sock in (qmp_socket, serial_socket, qmp_child, serial_child):
            stack.callback(sock.close)
        files = DeviceFiles(stack.enter_context(private_folder("lab-devices-")))
        if isinstance(guest, micro.Microguest):
            files.rom.write_bytes(micro.rom_for(guest.rom.read_bytes(), machine, workload))
        files.create(machine)
        command = qemu_command(
            binary.path,
            machine,
            workload,
            guest,
            Channels(qmp=qmp_child.fileno(), serial=serial_child.fileno()),
            files,
            name=name,
            machine_type=machine_type,
            incoming=incoming,
            paused=paused,
        )
        process = await stack.enter_async_context(
            running(command, pass_sockets=(qmp_child, serial_child), thp=machine.thp)
        )
        heart = asyncio.create_task(_heartbeat(), name="heartbeat")
        stack.callback(heart.cancel)
        console = await stack.enter_async_context(attached(serial_socket))
        try:
            qmp = await stack.enter_async_context(connected(qmp_socket))
        except QmpError as error:
            await process.wait(QUIT_GRACE_S)
            raise process.died("starting") from error
        vm = VM(
            process=process,
            qmp=qmp,
            console=console,
            machine=machine,
            workload=workload,
            binary=binary,
            guest=guest,
            files=files,
            name=name,
        )
        stack.push_async_callback(vm._quit)
        yield vm


@contextlib.asynccontextmanager
async def boot(
    machine: Machine,
    workload: Workload,
    *,
    binary: Variant = "patched",
    timeout_s: float = BOOT_TIMEOUT_S,
) -> AsyncIterator[VM]:
    """Boot a guest; inside the context its workload runs, after it QEMU is gone.

    :param binary: which QEMU; `live-*` methods need the patched one, `background` the other.
    :param timeout_s: how long the guest may take until its writers run.
    :raise UsageError: when machine and workload do not fit.
    :raise HostError: when the host lacks memory, a build or an accelerator.
    :raise LaunchError: when QEMU does not start or dies; carries command and log.
    :raise GuestError: when the guest refuses the workload.
    :raise GuestSilentError: when it says nothing in time.
    """
    check_fit(machine, workload)
    choice = await settled(machine)
    async with _launched(find_qemu(binary), choice.machine, workload) as vm:
        vm.fallback = choice.fallback
        await vm._find_machine_type()
        await vm.wait_ready(timeout_s)
        yield vm


@contextlib.asynccontextmanager
async def restore(
    path: str | Path,
    *,
    paused: bool = False,
    binary: Variant | None = None,
    channels: int = 1,
    accel: Accel | None = None,
    check: bool = True,
) -> AsyncIterator[VM]:
    """Restore the guest from the snapshot `path`; it runs unless `paused`.

    The image is opened once, and what is published under its name while it is checked and loaded
    does not matter.  The machine is built as the sidecar describes it; its disk, if it has one, is
    an empty one.  That the image holds the guest that the sidecar names is checked in the restored
    memory before the guest runs.  A guest that was taken while it booted has no name yet: it is
    restored unchecked, and `wait_ready` waits for it.

    :param binary: which QEMU; None is the kind that took the snapshot.
    :param channels: how many threads read the image; more than one takes an image in which each
        page has its place, such as `live-mapped` makes.
    :param accel: None is the one that it was taken under.  An image taken under TCG can be
        restored under KVM; one taken under KVM holds the state of KVM's clock, which TCG has not.
    :param check: read the image against the sidecar's checksums first; of an image without them
        the log warns.  QEMU itself finds no damage in a page: without the check the guest may be
        silently another one.
    :raise UsageError: when the image can not be read by more than one thread.
    :raise RestoreError: when the image or its sidecar is missing, cut short, damaged, of another
        machine type or another format, or does not restore; or its guest can not run before it is
        reset, and is not to be `paused`.
    :raise HostError: when the host lacks memory, a build or an accelerator.
    """
    async with contextlib.AsyncExitStack() as stack:
        # Closed once QEMU has read it.  What is published under its name meanwhile is another one.
        with open_image(Path(path).absolute()) as image:
            vm = await _restored(image, stack, binary, channels, accel, check=check)
        if not paused:
            await _run(vm, image.path.name)
        yield vm


async def _restored(
    image: OpenImage,
    stack: contextlib.AsyncExitStack,
    binary: Variant | None,
    channels: int,
    accel: Accel | None,
    *,
    check: bool,
) -> VM:
    """Check an image and load it into a QEMU that ends with `stack`; see `restore`."""
    name, sidecar = image.path.name, image.sidecar
    mapped = MAPPED_RAM in method(sidecar.method).capabilities
    if channels < 1 or (channels > 1 and not mapped):
        raise UsageError(
            f"{channels} channels can not read {name}, a {sidecar.method} snapshot",
            "use channels=1, or take the snapshot with method live-mapped",
        )
    qemu = find_qemu(binary or sidecar.binary.variant)
    wanted = dataclasses.replace(sidecar.machine, accel=accel or sidecar.machine.accel)
    choice = await settled(wanted)
    if sidecar.machine.accel == "kvm" and choice.machine.accel == "tcg":
        raise RestoreError(
            f"{name} was taken under KVM and holds the state of KVM's clock, which TCG can "
            "not load",
            'restore it with accel="kvm"',
        )
    if check:
        await check_image(image)
    try:
        launched = _launched(
            qemu,
            choice.machine,
            sidecar.workload,
            machine_type=sidecar.machine_type,
            incoming=True,
            paused=True,
        )
        vm = await stack.enter_async_context(launched)
    except LaunchError as error:
        raise RestoreError(
            f"no QEMU for {name}, a {sidecar.machine_type}: {error.cause}",
            "restore with the QEMU version that took the snapshot",
        ) from error
    vm.fallback = choice.fallback
    vm.machine_type = sidecar.machine_type
    await _load(vm, image, mapped=mapped, channels=channels)
    vm._ready = sidecar.ready
    if sidecar.boot_before is not None:
        vm._nonce_before_boot = int(sidecar.boot_before, 16)
    if vm.is_ready:
        await _check_identity(vm, name)
    else:
        await vm._permit_reboot(True)
    return vm


async def _run(vm: VM, name: str) -> None:
    state = await vm.status()
    if state in NEEDS_RESET:
        raise RestoreError(
            f"{name} is of a guest that can not run on: its state is {state}",
            "restore it with paused=True, and then use vm.reset() and vm.cont()",
        )
    await vm.cont()


def _has_loaded(event: Event) -> bool:
    return event.name == "MIGRATION" and event.data.get("status") in ("completed", "failed")


async def _load(vm: VM, image: OpenImage, *, mapped: bool, channels: int) -> None:
    since = len(vm.qmp.events)
    timeout_s = COMMAND_TIMEOUT_S + image.sidecar.image_bytes / RESTORE_BYTES_PER_S
    needed = {"events": True, MAPPED_RAM: mapped, "multifd": channels > 1}
    log_chars = len(vm.process.log_text())
    try:
        await vm.execute(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": name, "state": on} for name, on in needed.items()]},
        )
        if channels > 1:
            await vm.execute("migrate-set-parameters", {"multifd-channels": channels})
        # Whoever looked for holes in it has moved its position, which QEMU takes for the beginning.
        os.lseek(image.descriptor, 0, os.SEEK_SET)
        async with vm.qmp.lent(image.descriptor) as lent:
            await vm.execute(
                "migrate-incoming", {"channels": file_channel(lent), "exit-on-error": False}
            )
            event = await vm.watched(
                vm.qmp.wait_event(_has_loaded, since=since, timeout_s=timeout_s),
                "loading the image",
            )
        if event.data["status"] == "completed":
            return
        why = (await vm.execute("query-migrate")).get("error-desc", "QEMU gives no reason")
        # What was wrong with the image, of which the reason says only where it is.
        if said := vm.process.messages(log_chars):
            why = f"{said[0]} ({why})"
    except LaunchError as error:
        why = error.cause
    except QmpError as error:
        why = error.cause
    raise RestoreError(
        f"{image.path.name} can not be restored: {why}", "take the snapshot again"
    ) from None


async def _check_identity(vm: VM, name: str) -> None:
    try:
        found = await vm.progress_page()
    except GuestError as error:
        raise RestoreError(
            f"{name} restored, but the guest's memory is not in it: {error.cause}",
            "take the snapshot again",
        ) from error
    if found.nonce != vm.ready.nonce:
        raise RestoreError(
            f"{name} holds boot {found.nonce:016x}, its sidecar names {vm.ready.nonce:016x}",
            "keep image and sidecar together",
        )


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
