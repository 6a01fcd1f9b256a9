"""A guest of the user's: disk images, and what boots them.

It is not the lab's: it has no workload, does not say when it is ready, and counts nothing that the
lab could read.  What there is to see of it is its console, and what it answers on its ports.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import GuestError, HostError, UsageError
from lab.guests.debian.build import find_debian
from lab.guests.guest import BuiltGuest, Running
from lab.guests.protocol import ReadyRecord
from lab.host.files import sha256_of
from lab.scenario.machine import DEBIAN, Machine
from lab.scenario.workload import Workload

UEFI_CODE = (
    Path("/usr/share/OVMF/OVMF_CODE_4M.fd"),
    Path("/usr/share/OVMF/OVMF_CODE.fd"),
    Path("/usr/share/edk2/ovmf/OVMF_CODE.fd"),
    Path("/usr/share/edk2/x64/OVMF_CODE.4m.fd"),
)
"""Where distributions put UEFI for virtual machines; its variables lie beside it."""


@dataclass(frozen=True, kw_only=True)
class UsersImage(BuiltGuest):
    """What boots the images of a machine.

    :param kernel_version: empty: the lab does not know what is installed.
    :param kernel_sha256: hash of the kernel that QEMU is given, empty where the image has its own.
    """

    def write_firmware(self, path: Path, machine: Machine, workload: Workload) -> None:
        """Write the variables that UEFI begins with; they are the guest's own from then on."""
        if machine.firmware == "uefi":
            source = Path(machine.uefi_vars) if machine.uefi_vars else _variables(uefi_code())
            try:
                path.write_bytes(source.read_bytes())
            except OSError as error:
                raise UsageError(
                    f"{source} cannot be read: {error.strerror}",
                    "name a file with UEFI variables in uefi_vars",
                ) from error

    def arguments(self, machine: Machine, workload: Workload, firmware: Path) -> list[str]:
        """Return QEMU's arguments that boot it; the disks are devices."""
        # What a distribution may ask of a CPU, as some do not boot on QEMU's default.
        arguments = ["-cpu", "host" if machine.accel == "kvm" else "max"]
        if machine.firmware == "uefi":
            code = f"if=pflash,unit=0,format=raw,readonly=on,file={_escaped(uefi_code())}"
            variables = f"if=pflash,unit=1,format=raw,file={_escaped(firmware)}"
            arguments += ["-drive", code, "-drive", variables]
        for name in ("kernel", "initrd", "append"):
            if value := getattr(machine, name):
                arguments += [f"-{name}", value]
        return arguments

    async def wait_ready(self, vm: Running, not_nonce: int | None, timeout_s: float) -> ReadyRecord:
        """Raise: it says nothing that the lab would know."""
        raise GuestError(
            "a user's guest does not say when it is ready",
            "wait for its console with vm.console.wait_text(), or for a port of its",
        )

    async def count_bad_pages(self, vm: Running) -> int:
        """Raise: it has no working set of the lab's."""
        raise GuestError("a user's guest has no pages to compare", "use a guest of the lab's")


def users_image(machine: Machine) -> UsersImage:
    """Return what boots the images of a machine that `resolved` has returned."""
    digest = sha256_of(Path(machine.kernel)) if machine.kernel else ""
    return UsersImage(kernel_version="", kernel_sha256=digest)


def resolved(machine: Machine) -> Machine:
    """Return the machine with full paths, and with what `debian` stands for.

    :raise HostError: when the lab's Debian is not built, or UEFI is not installed.
    :raise UsageError: when a file is not there.
    """
    if not machine.is_users:
        return machine
    if machine.firmware == "uefi":
        uefi_code()
    if DEBIAN in machine.image:
        machine = _with_debian(machine)
    changes: dict[str, Any] = {
        name: str(Path(value).absolute())
        for name in ("kernel", "initrd", "uefi_vars")
        if (value := getattr(machine, name))
    }
    for name, path in changes.items():
        if not os.access(path, os.R_OK):
            raise UsageError(f"there is no {path} to read", f"check the path of {name}")
    images = tuple(str(Path(image).absolute()) for image in machine.image)
    return dataclasses.replace(machine, image=images, **changes)


def _with_debian(machine: Machine) -> Machine:
    if machine.image[0] != DEBIAN or DEBIAN in machine.image[1:]:
        raise UsageError(f"{DEBIAN} is one disk among others", f"name {DEBIAN} once, and first")
    found = find_debian()
    own: dict[str, Any] = {}
    if not machine.kernel:
        own = {"kernel": str(found.kernel), "initrd": str(found.initrd), "append": found.append}
    forward = machine.forward
    if not any(one.endswith(":22") for one in forward):
        forward = (*forward, "0:22")  # for `VM.shell`
    return dataclasses.replace(
        machine, image=(str(found.disk), *machine.image[1:]), forward=forward, **own
    )


def uefi_code() -> Path:
    """Return the file of UEFI's code.

    :raise HostError: when it is not installed.
    """
    for path in UEFI_CODE:
        if path.is_file():
            return path
    raise HostError("UEFI for virtual machines is not installed", "install ovmf, or use bios")


def _variables(code: Path) -> Path:
    return code.with_name(code.name.replace("CODE", "VARS"))


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")
