"""Every guest is in the registry, and a set records what it is and not where it lies."""

from pathlib import Path

from lab.guests.linux.guest import BuiltLinux
from lab.guests.micro.guest import BuiltMicroguest
from lab.guests.registry import GUESTS
from lab.scenario.guests import LAB_GUESTS
from lab.scenario.machine import Machine
from lab.scenario.scenario import check_fit
from lab.scenario.workload import Workload


def test_every_guest_that_the_lab_makes_is_there() -> None:
    assert tuple(GUESTS) == LAB_GUESTS
    for kind, guest in GUESTS.items():
        assert (guest.name, guest.probe.guest, guest.probe.accel) == (kind, kind, "kvm")
        check_fit(guest.probe, Workload("sequential", wss_mib=8))


def test_sets_name_the_software_of_guests_as_they_always_did() -> None:
    assert {kind: guest.recorded_as for kind, guest in GUESTS.items()} == {
        "linux": "guest",
        "micro": "microguest",
    }


def test_a_set_records_what_a_guest_is_and_not_where_it_lies() -> None:
    linux = BuiltLinux(
        kernel=Path("/k"),
        initramfs=Path("/i"),
        kernel_version="6",
        kernel_sha256="a",
        initramfs_sha256="b",
    )
    assert linux.recorded() == {
        "kernel_version": "6",
        "kernel_sha256": "a",
        "initramfs_sha256": "b",
    }
    micro = BuiltMicroguest(rom=Path("/r"), kernel_version="microguest", kernel_sha256="c")
    assert micro.recorded() == {"kernel_version": "microguest", "kernel_sha256": "c"}


def test_a_rom_in_flash_is_not_given_to_qemu_twice() -> None:
    micro = BuiltMicroguest(rom=Path("/r"), kernel_version="microguest", kernel_sha256="c")
    workload = Workload(wss_mib=8)
    for flash in (False, True):
        machine = Machine(guest="micro", ram_mib=64, flash=flash)
        assert ("-bios" in micro.arguments(machine, workload, Path("/firmware"))) != flash
