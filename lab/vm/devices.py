"""The devices of a machine: QEMU's arguments, and the files they stand on.

A restore gets the same devices as the boot did, on files of its own.  The scratch disk is one of
them, and empty: what is on it is in no snapshot, and the guest's load is made so that it does not
mind.  The disks of a user's machine have layers instead (`lab.vm.disks`).
"""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.errors import HostError
from lab.qemu.build import FIRMWARE_DIRS
from lab.scenario.machine import Machine
from lab.vm.disks import Disk

DISK_MIB = 64
"""The scratch disk; as a file it takes only what the guest has written."""

FLASH_BYTES = 128 << 10
"""The flash that is written to, below that of the firmware."""

_SOCKET_PATH_BYTES = 108
"""What the kernel has room for in the address of a UNIX socket, with the null byte at its end."""

_FIRMWARE = "bios-256k.bin"


@dataclass(frozen=True)
class DeviceFiles:
    """What one guest's devices stand on.

    :param folder: of the files that go with the guest.
    :param disks: those of a user's machine.
    :param ports: of the host, by the port of the guest that each leads to.
    """

    folder: Path
    disks: Sequence[Disk] = ()
    ports: Mapping[int, int] = field(default_factory=dict)

    @property
    def disk(self) -> Path:
        """The scratch disk, raw."""
        return self.folder / "disk"

    @property
    def vnc(self) -> Path:
        """The socket on which QEMU serves VNC."""
        return self.folder / "vnc"

    @property
    def firmware(self) -> Path:
        """What the machine boots from, where that is not what QEMU has."""
        return self.folder / "firmware"

    @property
    def flash(self) -> Path:
        """The flash that is written to."""
        return self.folder / "flash"

    @property
    def flash_port(self) -> Path:
        """The socket by which QEMU is told to write to the flash."""
        return self.folder / "flash-port"

    def create(self, machine: Machine) -> None:
        """Create what QEMU does not create itself; a guest that is firmware is there before.

        :raise HostError: when the firmware is nowhere that QEMU looks for it, or the path of a
            socket is longer than such a path can be.
        """
        sockets = [self.vnc] * machine.vnc + [self.flash_port] * machine.flash
        for path in sockets:
            if len(os.fsencode(path)) >= _SOCKET_PATH_BYTES:
                raise HostError(
                    f"{path} is too long for a socket, which has to have fewer than "
                    f"{_SOCKET_PATH_BYTES} bytes",
                    "set TMPDIR to a folder with a shorter path",
                )
        if machine.disk != "none" and not machine.is_users:
            with self.disk.open("xb") as file:
                file.truncate(DISK_MIB << 20)
        if machine.flash:
            if not self.firmware.exists():
                self.firmware.write_bytes(find_firmware().read_bytes())
            self.flash.write_bytes(b"\xff" * FLASH_BYTES)


def find_firmware(folders: Sequence[Path] = FIRMWARE_DIRS) -> Path:
    """Return the firmware that a machine boots from which has it in flash.

    :raise HostError: when it is nowhere that QEMU looks for it.
    """
    for folder in folders:
        path = folder / _FIRMWARE
        if path.is_file():
            return path
    raise HostError(f"there is no {_FIRMWARE} to put into flash", "install seabios")


def device_arguments(machine: Machine, files: DeviceFiles) -> list[str]:
    """Return QEMU's arguments for the devices of `machine`, always in the same order.

    The order gives each its place on the bus, and a restore has to find it there.
    """
    arguments = _users_disks(machine, files) if machine.is_users else _disk(machine, files)
    if machine.net or machine.forward:
        # `restrict`: the guest reaches QEMU's end of the network and nothing behind it.
        network = "user,id=net" if machine.is_users else "user,id=net,restrict=on"
        for guest, host in files.ports.items():
            network += f",hostfwd=tcp:127.0.0.1:{host}-:{guest}"
        arguments += ["-netdev", network]
        # No firmware to boot from the network: it would take a second.
        arguments += ["-device", "virtio-net-pci,netdev=net,romfile="]
    if machine.vnc:
        arguments += ["-device", "VGA", "-vnc", f"unix:{_escaped(files.vnc)}"]
    if machine.balloon:
        reporting = ",free-page-reporting=on" if machine.balloon_reporting else ""
        arguments += ["-device", f"virtio-balloon-pci{reporting}"]
    if machine.undriven:
        arguments += ["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
    if machine.flash:
        arguments += _flash(files)
    return arguments


def _flash(files: DeviceFiles) -> list[str]:
    arguments = []
    for unit, path in enumerate((files.firmware, files.flash)):
        arguments += ["-drive", f"if=pflash,unit={unit},format=raw,file={_escaped(path)}"]
    # By this QEMU writes to guest memory itself when it is told to; the accelerator is not changed.
    port = f"socket,id=flash-port,path={_escaped(files.flash_port)},server=on,wait=off"
    return [*arguments, "-chardev", port, "-qtest", "chardev:flash-port"]


def _disk(machine: Machine, files: DeviceFiles) -> list[str]:
    if machine.disk == "none":
        return []
    drive = f"if=none,id=disk,format=raw,file={_escaped(files.disk)}"
    drive += f",cache={machine.disk_cache},aio={machine.disk_aio}"
    arguments = ["-drive", drive]
    if machine.disk == "ide":
        return [*arguments, "-device", "ide-hd,drive=disk"]
    thread = ""
    if machine.disk_iothread:
        arguments += ["-object", "iothread,id=disk-thread"]
        thread = ",iothread=disk-thread"
    if machine.disk == "scsi":
        return [*arguments, "-device", f"virtio-scsi-pci{thread}", "-device", "scsi-hd,drive=disk"]
    return [*arguments, "-device", f"virtio-blk-pci,drive=disk{thread}"]


_MODELS = {"ide": "ide-hd", "virtio": "virtio-blk-pci", "scsi": "scsi-hd"}


def _users_disks(machine: Machine, files: DeviceFiles) -> list[str]:
    arguments = []
    if machine.disk_iothread:
        arguments += ["-object", "iothread,id=disk-thread"]
    thread = ",iothread=disk-thread" * machine.disk_iothread
    if machine.disk == "scsi":
        arguments += ["-device", f"virtio-scsi-pci{thread}"]
        thread = ""
    for number, disk in enumerate(files.disks):
        node = disk.blockdev(disk.node, disk.layer.path)
        arguments += ["-blockdev", json.dumps(node)]
        device = f"{_MODELS[machine.disk]},drive={disk.node},id=drive{number}{thread}"
        if machine.disk == "ide" and machine.chipset == "pc":
            # Two channels of two; left alone QEMU puts all on the first one.
            device += f",bus=ide.{number // 2},unit={number % 2}"
        # A kernel of the user's has the first place itself.
        arguments += ["-device", device if machine.kernel else f"{device},bootindex={number}"]
    return arguments


def free_ports(forward: Sequence[str]) -> dict[int, int]:
    """Return the host's port for each port of the guest; one that is 0 is any that is free now.

    :raise HostError: when a port of the host is in use.
    """
    ports = {}
    # All are held until all are found, so that none is found twice.
    held = []
    try:
        for one in forward:
            host, _, guest = one.partition(":")
            listener = socket.socket()
            held.append(listener)
            # As QEMU does: a port that another connection has just left is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", int(host)))
            except OSError as error:
                raise HostError(
                    f"port {host} of this host cannot be forwarded: {error.strerror}",
                    f"choose another, or 0:{guest} for any that is free",
                ) from error
            ports[int(guest)] = listener.getsockname()[1]
    finally:
        for listener in held:
            listener.close()
    return ports


def _escaped(path: Path) -> str:
    """Return a path as part of an option, in which QEMU takes one comma for the next part."""
    return str(path).replace(",", ",,")
