"""The devices of a machine: QEMU's arguments, and the files they stand on.

A restore gets the same devices as the boot did, on files of its own.  The disk is one of them, and
empty: an image holds memory and the devices' state, and not what was on a disk.  The guest's load
is made so that it does not mind.
"""

from dataclasses import dataclass
from pathlib import Path

from lab.scenario import Machine

DISK_MIB = 64
"""The scratch disk; as a file it takes only what the guest has written."""


@dataclass(frozen=True)
class DeviceFiles:
    """Where the files of one guest's devices are, in a folder that goes with the guest."""

    folder: Path

    @property
    def rom(self) -> Path:
        """The ROM that the microguest boots from."""
        return self.folder / "rom"

    @property
    def disk(self) -> Path:
        """The scratch disk, raw."""
        return self.folder / "disk"

    @property
    def vnc(self) -> Path:
        """The socket on which QEMU serves VNC."""
        return self.folder / "vnc"

    def create(self, machine: Machine) -> None:
        """Create what QEMU does not create itself."""
        if machine.disk != "none":
            with self.disk.open("xb") as file:
                file.truncate(DISK_MIB << 20)


def device_arguments(machine: Machine, files: DeviceFiles) -> list[str]:
    """Return QEMU's arguments for the devices of `machine`, always in the same order.

    The order gives each its place on the bus, and a restore has to find it there.
    """
    arguments = _disk(machine, files)
    if machine.net:
        # `restrict`: the guest reaches QEMU's end of the network and nothing behind it.
        arguments += ["-netdev", "user,id=net,restrict=on"]
        # No firmware to boot from the network: it would take a second.
        arguments += ["-device", "virtio-net-pci,netdev=net,romfile="]
    if machine.vnc:
        arguments += ["-device", "VGA", "-vnc", f"unix:{_escaped(files.vnc)}"]
    if machine.balloon:
        arguments += ["-device", "virtio-balloon-pci"]
    return arguments


def _disk(machine: Machine, files: DeviceFiles) -> list[str]:
    if machine.disk == "none":
        return []
    drive = f"if=none,id=disk,format=raw,file={_escaped(files.disk)}"
    drive += f",cache={machine.disk_cache},aio={machine.disk_aio}"
    arguments = ["-drive", drive]
    if machine.disk == "ide":
        return [*arguments, "-device", "ide-hd,drive=disk"]
    device = "virtio-blk-pci,drive=disk"
    if machine.disk_iothread:
        arguments += ["-object", "iothread,id=disk-thread"]
        device += ",iothread=disk-thread"
    return [*arguments, "-device", device]


def _escaped(path: Path) -> str:
    """Return a path as part of an option, in which QEMU takes one comma for the next part."""
    return str(path).replace(",", ",,")
