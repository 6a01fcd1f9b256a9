"""The microguest: a workload without a kernel, in a ROM that a machine boots from."""

from dataclasses import dataclass
from pathlib import Path

from lab.errors import HostError
from lab.guests.guest import BuiltGuest, Guest, Progress, Running
from lab.guests.micro import build, mailbox
from lab.guests.protocol import ReadyRecord
from lab.host.files import sha256_of
from lab.scenario.guests import GuestKind
from lab.scenario.machine import Machine
from lab.scenario.workload import Workload

CPU_MODEL = "qemu64,-pni"
"""PVM's KVM refuses a model with more; the guest has no use for more under any accelerator."""


@dataclass(frozen=True, kw_only=True)
class BuiltMicroguest(BuiltGuest):
    """A ROM that QEMU can boot once parameters are written into it.

    :param kernel_version: what stands for it where the Linux guest has its kernel's version.
    :param kernel_sha256: hash of the ROM, which is all the software that the guest has.
    :param rom: the file, without parameters.
    """

    rom: Path

    def write_firmware(self, path: Path, machine: Machine, workload: Workload) -> None:
        """Write the ROM, which tells the guest what it is to do."""
        path.write_bytes(build.rom_for(self.rom.read_bytes(), machine, workload))

    def arguments(self, machine: Machine, workload: Workload, firmware: Path) -> list[str]:
        """Return QEMU's arguments that boot it into what its ROM says."""
        # In flash otherwise.
        bios = [] if machine.flash else ["-bios", str(firmware)]
        return ["-cpu", CPU_MODEL, *bios]

    async def wait_ready(self, vm: Running, not_nonce: int | None, timeout_s: float) -> ReadyRecord:
        """Wait until its writers run; see `BuiltGuest.wait_ready`."""
        return await mailbox.wait_running(vm, not_nonce, timeout_s)

    async def count_bad_pages(self, vm: Running) -> int:
        """Have it compare its working set; see `BuiltGuest.count_bad_pages`."""
        return await mailbox.count_bad_pages(vm)


class Microguest(Guest):
    """The microguest, which `lab/guests/micro/README.md` describes."""

    name: GuestKind = "micro"
    recorded_as = "microguest"
    probe = Machine(ram_mib=32, accel="kvm", guest="micro")

    def find(self) -> BuiltMicroguest:
        """Return the one in the cache; see `Guest.find`."""
        path = build.rom_path()
        if not path.is_file():
            raise HostError("the microguest is not built", "run `lab build`")
        return BuiltMicroguest(rom=path, kernel_version="microguest", kernel_sha256=sha256_of(path))

    async def ensure(self, progress: Progress | None = None) -> BuiltMicroguest:
        """Return it, after compiling it if it is not in the cache; see `Guest.ensure`."""
        path = build.rom_path()
        if not path.is_file():
            if progress is not None:
                progress("guest: compiling the microguest")
            await build.compile_rom(path)
        return self.find()
