"""A running guest and its QEMU: the monitor, the memory, its life."""

import contextlib
import re
from collections.abc import Awaitable, Iterator, Mapping
from typing import Any, TypeVar

from lab.display import html_row
from lab.errors import GuestError, GuestSilentError, LabError, QmpError, SnapshotError, UsageError
from lab.guests.console import Console
from lab.guests.guest import BuiltGuest
from lab.guests.protocol import PAGE_BYTES, ProgressPage, ReadyRecord
from lab.host.memory import read_process
from lab.host.process import QUIT_GRACE_S, Process
from lab.vm.commandline import Launch
from lab.vm.devices import DeviceFiles
from lab.vm.guard import Guard
from lab.vm.loops import OwnLoop, close_unawaited
from lab.vm.memory import RamBlock, parse_ram_blocks
from lab.vm.qmp import COMMAND_TIMEOUT_S, Qmp

BOOT_TIMEOUT_S = 120.0
"""A guest boots in seconds; a busy host makes that many more."""

_T = TypeVar("_T")


class RunningVM:
    """A guest and its QEMU.  Made by `boot` and `restore`, valid inside their context."""

    def __init__(
        self,
        launch: Launch,
        *,
        process: Process,
        qmp: Qmp,
        console: Console,
        guest: BuiltGuest,
        files: DeviceFiles,
    ) -> None:
        self.process = process
        self.qmp = qmp
        self.console = console
        self.machine = launch.machine
        self.workload = launch.workload
        self.binary = launch.binary
        self.line = launch.line
        """How a VM that the lab did not start was started; None for one of the lab's."""
        self.guard: Guard | None = None
        """What lets somebody else's VM run on if the lab is killed; None of the lab's own."""
        self.disk_problem: LabError | None = None
        """Why the disks of somebody else's VM cannot be frozen; None where they can."""
        self.guest = guest
        self.files = files
        """What the devices stand on: disks, ports, the socket of VNC."""
        self.machine_type = ""
        """The versioned name of the machine type, such as pc-i440fx-10.0."""
        self.fallback = ""
        """Why accelerator "auto" is not KVM; empty when it is, or was not asked for."""
        self._ready: ReadyRecord | None = None
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

    async def taken_over(self, ready: ReadyRecord | None, boot_before: str | None) -> None:
        """Take note of what the guest had said in the image that it was restored from.

        :param ready: None: it was booting, and may reset its machine.
        :param boot_before: see `boot_before`.
        """
        self._ready = ready
        if boot_before is not None:
            self._nonce_before_boot = int(boot_before, 16)
        if ready is None:
            await self._permit_reboot(True)

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
            self._ready = await self.guest.wait_ready(self, self._nonce_before_boot, timeout_s)
        except GuestSilentError as error:
            where = await self._vcpu_places()
            raise GuestSilentError(f"{error.cause} ({where})", error.remedy) from error
        await self._permit_reboot(False)

    @property
    def is_attached(self) -> bool:
        """Whether QEMU is somebody else's, who does not want it ended."""
        return self.process.is_others

    @property
    def ports(self) -> Mapping[int, int]:
        """The host's port for each port of the guest that one leads to."""
        return self.files.ports

    async def verify_working_set(self) -> int:
        """Have the guest compare every word of its working set, and return how many of its pages
        were wrong.  Its writers stand still meanwhile, for as long as a second a GiB or two.

        :raise GuestSilentError: when the guest does not answer.
        """
        return await self.guest.count_bad_pages(self)

    async def _vcpu_places(self) -> str:
        """Say where each vCPU is, for a guest that nobody can ask."""
        try:
            return vcpu_places(await self.hmp("info registers -a"))
        except LabError as error:
            return f"its vCPUs cannot be looked at: {error.cause}"

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

    # Snapshots

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

    async def find_machine_type(self) -> None:
        for machine in await self.execute("query-machines"):
            if machine.get("alias") == self.machine.chipset:
                self.machine_type = str(machine["name"])
                return
        raise QmpError(
            f"this QEMU has no machine type {self.machine.chipset}", "build it with `lab build`"
        )

    async def quit(self) -> None:
        """Have QEMU end, if it still answers; what does not is ended with its process."""
        if self.process.exit_code is None and not self.qmp.is_lost:
            with contextlib.suppress(QmpError):
                await self.qmp.execute("quit", timeout_s=QUIT_GRACE_S)
            await self.process.wait(QUIT_GRACE_S)


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
