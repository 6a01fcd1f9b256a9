"""The same machine gives the same command line; what can not work is refused before."""

from pathlib import Path

import pytest

from lab import commandline, host
from lab.commandline import Channels, check_host, qemu_command
from lab.errors import HostError, UsageError
from lab.guest.build import Guest
from lab.scenario import Machine, Workload

GUEST = Guest(
    kernel=Path("/k"),
    initramfs=Path("/i"),
    kernel_version="6",
    kernel_sha256="0" * 64,
    initramfs_sha256="0" * 64,
)


def command_for(machine: Machine, *, incoming: bool = False, paused: bool = False) -> list[str]:
    return qemu_command(
        Path("/qemu"),
        machine,
        Workload("random", wss_mib=64),
        GUEST,
        Channels(qmp=5, serial=6),
        name="lab-x",
        machine_type="pc-i440fx-10.0",
        incoming=incoming,
        paused=paused,
    )


def test_a_restore_differs_from_a_boot_only_in_where_it_starts() -> None:
    machine = Machine(ram_mib=512, vcpus=2, extra_args=("-device", "virtio-rng-pci"))
    booted = command_for(machine)
    restored = command_for(machine, incoming=True, paused=True)
    assert [arg for arg in restored if arg not in ("-incoming", "defer", "-S")] == booted
    assert booted[-2:] == ["-device", "virtio-rng-pci"]


def test_several_vcpus_get_a_thread_each() -> None:
    assert "tcg,thread=multi" in command_for(Machine(vcpus=2))
    assert "tcg" in command_for(Machine(vcpus=1))


@pytest.mark.parametrize("argument", ["-S", "--incoming", "-daemonize", "-m", "-accel"])
def test_arguments_that_undo_what_the_lab_relies_on_are_refused(argument: str) -> None:
    with pytest.raises(UsageError, match="extra_args"):
        check_host(Machine(extra_args=(argument,)))


def test_more_ram_than_the_host_has_is_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "available_memory_mib", lambda: 700)
    check_host(Machine(ram_mib=512))
    with pytest.raises(HostError, match=r"1024 MiB of guest RAM need .* and 700 MiB"):
        check_host(Machine(ram_mib=1024))


def test_huge_pages_that_the_host_forbids_can_not_be_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commandline, "thp_settings", lambda: {"enabled": "never"})
    check_host(Machine(ram_mib=128))
    with pytest.raises(HostError, match="transparent huge pages"):
        check_host(Machine(ram_mib=128, thp=True))


@pytest.mark.parametrize(
    ("problem", "pvm", "said"),
    [("a vCPU does not run", False, "a vCPU does not run"), ("", True, "is PVM"), ("", False, "")],
)
def test_kvm_is_refused_where_a_linux_guest_does_not_run_under_it(
    problem: str, pvm: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "probe_kvm", lambda: problem)
    monkeypatch.setattr(host, "kvm_is_pvm", lambda: pvm)
    check_host(Machine(ram_mib=128))
    if not said:
        check_host(Machine(ram_mib=128, accel="kvm"))
        return
    with pytest.raises(HostError, match=rf"{said}.*; use accel=\"tcg\""):
        check_host(Machine(ram_mib=128, accel="kvm"))
