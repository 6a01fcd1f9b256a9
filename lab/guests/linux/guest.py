"""The Linux guest: a distribution's kernel, and the workload as its only program."""

import logging
from dataclasses import dataclass
from pathlib import Path

from lab.errors import GuestError, HostError
from lab.guests.guest import VERIFY_TIMEOUT_S, BuiltGuest, Guest, Progress, Running
from lab.guests.linux import initramfs, kernel
from lab.guests.protocol import ReadyRecord, Record, kernel_command_line
from lab.host.files import sha256_of
from lab.scenario.guests import GuestKind
from lab.scenario.machine import Machine
from lab.scenario.workload import Workload

_log = logging.getLogger(__name__)

_FIND_REMEDY = "run `lab build`"


@dataclass(frozen=True, kw_only=True)
class BuiltLinux(BuiltGuest):
    """A kernel and an initramfs that QEMU can boot.

    :param kernel_version: what the guest's `uname -r` says.
    :param kernel: the bzImage.
    :param initramfs: an uncompressed newc archive whose /init is made of `initramfs.WORKLOAD`.
    """

    kernel: Path
    initramfs: Path
    initramfs_sha256: str

    def write_firmware(self, path: Path, machine: Machine, workload: Workload) -> None:
        """Write nothing: QEMU's own firmware boots it."""

    def arguments(self, machine: Machine, workload: Workload, firmware: Path) -> list[str]:
        """Return QEMU's arguments that boot it into a workload."""
        append = kernel_command_line(
            kind=workload.kind,
            wss_mib=workload.wss_mib,
            threads=workload.threads,
            seed=workload.seed,
            time_writes=workload.time_writes,
            rate_ops_per_s=workload.rate_ops_per_s,
            disk=machine.disk,
            net=machine.net,
            display=machine.vnc,
            balloon=machine.balloon,
        )
        return [
            *("-kernel", str(self.kernel), "-initrd", str(self.initramfs)),
            *("-append", append),
        ]

    async def wait_ready(self, vm: Running, not_nonce: int | None, timeout_s: float) -> ReadyRecord:
        """Wait for what it says on its console; see `BuiltGuest.wait_ready`."""
        said = vm.console.wait_record(
            lambda record: record.kind in ("ready", "error"),
            since=vm.console.since_boot,
            timeout_s=timeout_s,
        )
        record = await vm.watched(said, "the guest booted")
        if record.kind == "error":
            raise _refusal(record)
        return ReadyRecord.from_record(record)

    async def count_bad_pages(self, vm: Running) -> int:
        """Type to it to compare its working set; see `BuiltGuest.count_bad_pages`."""
        since = len(vm.console.records)
        await vm.console.type("verify")
        said = vm.console.wait_record(
            lambda record: record.kind == "verify", since=since, timeout_s=VERIFY_TIMEOUT_S
        )
        record = await vm.watched(said, "its guest verified its pages")
        return int(record.fields["bad"])


def _refusal(record: Record) -> GuestError:
    details = " ".join(f"{key}={value}" for key, value in record.fields.items())
    return GuestError(f"the guest refused the workload: {details}", "change the workload or RAM")


class LinuxGuest(Guest):
    """The Linux guest, which `lab/guests/README.md` describes."""

    name: GuestKind = "linux"
    # There was no other at first.
    recorded_as = "guest"
    probe = Machine(ram_mib=192, accel="kvm", guest="linux")

    def find(self) -> BuiltLinux:
        """Return the one in the cache; see `Guest.find`."""
        found = kernel.find_kernel()
        if found is None:
            raise HostError("the guest's kernel is not in the cache", _FIND_REMEDY)
        archive = initramfs.archive_path(found.read_modules())
        if not archive.is_file():
            raise HostError("the guest's initramfs is not built", _FIND_REMEDY)
        return _built(found, archive)

    async def ensure(self, progress: Progress | None = None) -> BuiltLinux:
        """Return it, after downloading its kernel and compiling its program; see `Guest.ensure`."""
        say = progress or _log.info
        found = kernel.find_kernel() or await kernel.fetch_kernel(say)
        drivers = found.read_modules()
        archive = initramfs.archive_path(drivers)
        if not archive.is_file():
            say("guest: compiling the workload")
            await initramfs.build_archive(drivers, archive)
        return _built(found, archive)


def _built(found: kernel.Kernel, archive: Path) -> BuiltLinux:
    return BuiltLinux(
        kernel=found.path,
        initramfs=archive,
        kernel_version=found.version,
        kernel_sha256=found.sha256,
        initramfs_sha256=sha256_of(archive),
    )
