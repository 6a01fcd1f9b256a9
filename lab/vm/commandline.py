"""QEMU's command line for a machine, the same for a boot and for a restore."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.errors import UsageError
from lab.guests.guest import BuiltGuest
from lab.host.limits import (
    QEMU_DESCRIPTORS,
    QEMU_DISK_THREADS,
    QEMU_THREADS,
    require_limit,
    require_lockable,
    require_threads,
)
from lab.host.needs import require_kvm
from lab.qemu.build import QemuBinary
from lab.scenario.machine import Machine
from lab.scenario.methods import Variant
from lab.scenario.workload import Workload
from lab.vm.argv import CommandLine, for_restore
from lab.vm.devices import DeviceFiles, device_arguments
from lab.vm.ram import QEMU_OVERHEAD_MIB, machine_option, ram_arguments, require_ram

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""What QEMU's own filter of system calls refuses.  No engine needs any of it: userfaultfd is a
device, or a call that is in none of these sets."""


@dataclass(frozen=True, kw_only=True)
class Channels:
    """File descriptors that QEMU inherits: one end of a socket pair each."""

    qmp: int
    serial: int


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a QEMU is started for.

    :param machine_type: the versioned type an image was taken on, for a restore; QEMU refuses a
        stream of another one.  Empty for the newest of the machine's chipset.
    :param bases: what the disks of a user's machine go on from; empty: its images.
    :param line: how a VM that the lab did not start was started; None for a machine of the lab's.
    :param named: by what file `line` names each of the disks in `bases`.
    :param drops_forwards: whether ports of the host that `line` forwards are left alone, as they
        are for the guest that has them.
    :param socket: where QEMU's monitor is served as well, for others.
    :param incoming: wait for `migrate-incoming` instead of booting.
    :param paused: do not run the vCPUs until told to.
    """

    binary: QemuBinary
    machine: Machine
    workload: Workload
    machine_type: str = ""
    bases: tuple[Path, ...] = ()
    line: CommandLine | None = None
    named: tuple[Path, ...] = ()
    drops_forwards: bool = False
    socket: Path | None = None
    incoming: bool = False
    paused: bool = False


def qemu_command(
    launch: Launch, guest: BuiltGuest, channels: Channels, files: DeviceFiles, *, name: str
) -> list[str]:
    """Return the argument vector."""
    machine = launch.machine
    # Without the multi-threaded generator several vCPUs would take turns in one thread.
    threads = ",thread=multi" if machine.accel == "tcg" and machine.vcpus > 1 else ""
    # Threads carry names, so that the time of each can be told; it costs them a system call each.
    command = [str(launch.binary.path), "-name", f"{name},debug-threads=on"]
    # Nothing in the machine that the scenario does not name, and nothing from the user's files.
    command += ["-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-sandbox", SANDBOX]
    board = (launch.machine_type or machine.chipset) + machine_option(machine)
    command += ["-M", board, "-accel", machine.accel + threads]
    command += [*ram_arguments(machine), "-smp", str(machine.vcpus)]
    # With the guest's panic=-1 a panic ends QEMU instead of booting again without end.  VM.reset()
    # lifts that until the guest is ready again.  A user's guest may boot again at any time.
    command += [] if machine.is_users else ["-no-reboot"]
    command += ["-chardev", f"socket,id=qmp,fd={channels.qmp}", "-mon", "chardev=qmp,mode=control"]
    if launch.socket is not None:
        command += ["-qmp", f"unix:{str(launch.socket).replace(',', ',,')},server=on,wait=off"]
    command += ["-chardev", f"socket,id=serial,fd={channels.serial}", "-serial", "chardev:serial"]
    command += guest.arguments(machine, launch.workload, files.firmware)
    command += device_arguments(machine, files)
    command += _engine_sizes(machine)
    # `defer`: the stream is named over QMP, so that its errors come back as QMP errors.
    command += ["-incoming", "defer"] if launch.incoming else []
    command += ["-S"] if launch.paused else []
    return command + list(machine.extra_args)


def foreign_command(
    launch: Launch, channels: Channels, files: DeviceFiles, *, name: str
) -> list[str]:
    """Return the argument vector that restores a VM which the lab did not start.

    :raise UsageError: it has what cannot be restored; see `lab.vm.argv`.
    """
    assert launch.line is not None
    overlays = {disk.named: disk.layer.path for disk in files.disks if disk.named is not None}
    line = for_restore(
        launch.line,
        disks=overlays,
        machine_type=launch.machine_type,
        folder=files.folder,
        qmp=channels.qmp,
        forward=None if launch.drops_forwards else {},
        name=name,
        program=launch.binary.path,
    )
    return [str(line.program), *line.arguments]


def _engine_sizes(machine: Machine) -> list[str]:
    # Experimental, and so properties of the migration and not parameters: they are set at start.
    if not machine.sets_sizes:
        return []
    return [
        *("-global", f"migration.x-snapshot-fault-around={machine.fault_around_pages}"),
        *("-global", f"migration.x-snapshot-chunk-size={machine.chunk_kib << 10}"),
    ]


def check_host(machine: Machine, variant: Variant = "patched") -> None:
    """Refuse early what would fail late.  Under KVM it takes a moment, which it is tried out in.

    :raise HostError: when there is not the memory of the kind that is asked for, or no KVM that
        runs a guest for an accelerator that needs it, or a limit of this process is too low for
        QEMU.
    """
    require_ram(machine, variant)
    require_limit("NOFILE", QEMU_DESCRIPTORS + machine.vcpus, "the files that QEMU opens")
    disk_threads = 0 if machine.disk == "none" else QEMU_DISK_THREADS
    require_threads(QEMU_THREADS + machine.vcpus + disk_threads, "QEMU")
    if any("mem-lock=on" in argument for argument in machine.extra_args):
        locked = machine.ram_mib + QEMU_OVERHEAD_MIB << 20
        require_lockable(
            locked, f"{machine.ram_mib} MiB of guest RAM and QEMU's own, with mem-lock"
        )
    if machine.accel == "kvm":
        require_kvm(machine.guest)
    check_arguments(machine.extra_args)


# What the lab itself passes or relies on; a second one would win over it silently.
_RESERVED = ("S", "incoming", "daemonize", "name", "m", "smp", "accel", "M", "machine")


def check_arguments(extra: Sequence[str]) -> None:
    """Raise `UsageError` for extra arguments that would undo what the lab relies on."""
    for argument in extra:
        # QEMU takes an option with one dash or two.
        if argument.startswith("-") and argument.lstrip("-") in _RESERVED:
            raise UsageError(
                f"{argument} is not for extra_args",
                "the lab sets it itself; use the parameters of Machine, boot() and restore()",
            )
