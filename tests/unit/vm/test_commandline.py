"""The same machine gives the same command line; what cannot work is refused before."""

import shutil
from pathlib import Path

import pytest

from lab.errors import HostError, UsageError
from lab.guests.linux.guest import BuiltLinux
from lab.host import needs
from lab.host.limits import Room
from lab.qemu.build import QemuBinary
from lab.scenario.machine import Machine, RamKind
from lab.scenario.workload import Workload
from lab.vm import ram
from lab.vm.commandline import Channels, Launch, check_host, qemu_command
from lab.vm.devices import DeviceFiles

GUEST = BuiltLinux(
    kernel=Path("/k"),
    initramfs=Path("/i"),
    kernel_version="6",
    kernel_sha256="0" * 64,
    initramfs_sha256="0" * 64,
)


BINARY = QemuBinary(
    path=Path("/qemu"),
    variant="patched",
    version="10",
    build_id="x",
    series_sha256=None,
    sha256="0" * 64,
)


def command_for(
    machine: Machine, machine_type: str = "pc-i440fx-10.0", *, restored: bool = False
) -> list[str]:
    launch = Launch(
        binary=BINARY,
        machine=machine,
        workload=Workload("random", wss_mib=64),
        machine_type=machine_type,
        incoming=restored,
        paused=restored,
    )
    files = DeviceFiles(Path("/files"))
    return qemu_command(launch, GUEST, Channels(qmp=5, serial=6), files, name="lab-x")


def test_a_restore_differs_from_a_boot_only_in_where_it_starts() -> None:
    machine = Machine(ram_mib=512, vcpus=2, extra_args=("-device", "virtio-rng-pci"))
    booted = command_for(machine)
    restored = command_for(machine, restored=True)
    assert [arg for arg in restored if arg not in ("-incoming", "defer", "-S")] == booted
    assert booted[-2:] == ["-device", "virtio-rng-pci"]


def only(mib: int) -> Room:
    """So much memory, and no more."""
    return Room(available=mib << 20, limit=4096 << 20, owner="the cgroup /a", remedy="raise it")


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_chipset_is_the_machine_type_unless_a_version_is_asked_for() -> None:
    machine = Machine(chipset="q35")
    assert option(command_for(machine, ""), "-M").startswith("q35,")
    assert option(command_for(machine, "pc-q35-9.0"), "-M").startswith("pc-q35-9.0,")


def test_anonymous_ram_is_qemus_own() -> None:
    command = command_for(Machine(ram_mib=512))
    assert option(command, "-M") == "pc-i440fx-10.0,mem-merge=off"
    assert option(command, "-m") == "512M"
    assert "-object" not in command


@pytest.mark.parametrize(
    ("kind", "backend", "share", "more"),
    [
        ("memfd", "memory-backend-memfd", "share=on", set()),
        ("memfd-private", "memory-backend-memfd", "share=off", set()),
        ("file", "memory-backend-file", "share=on", {"mem-path=/dev/shm"}),
        ("file-private", "memory-backend-file", "share=off", {"mem-path=/dev/shm"}),
        ("hugetlb", "memory-backend-memfd", "share=on", {"hugetlb=on", "hugetlbsize=2M"}),
    ],
)
def test_other_ram_is_a_backend_of_the_same_name_and_size(
    kind: RamKind, backend: str, share: str, more: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LAB_RAM_DIR", raising=False)
    command = command_for(Machine(ram_mib=512, ram_kind=kind))
    assert option(command, "-M") == "pc-i440fx-10.0,mem-merge=off,memory-backend=pc.ram"
    assert option(command, "-m") == "512M"
    found, *properties = option(command, "-object").split(",")
    assert found == backend
    named = {"id=pc.ram", "x-use-canonical-path-for-ramblock-id=off", "size=512M"}
    assert set(properties) == named | {share} | more


def test_ram_in_files_is_where_the_environment_says_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_RAM_DIR", str(tmp_path / "a,share=on"))
    command = command_for(Machine(ram_kind="file-private"))
    assert option(command, "-object").endswith(f"mem-path={tmp_path}/a,,share=on")
    with pytest.raises(HostError, match="name a folder that exists"):
        check_host(Machine(ram_mib=128, ram_kind="file"))
    monkeypatch.setenv("LAB_RAM_DIR", str(tmp_path))
    check_host(Machine(ram_mib=128, ram_kind="file"))
    # The last 2 GiB of a disk of this size are not to be had.
    usage = shutil._ntuple_diskusage(20 << 30, 18 << 30, (2 << 30) + (64 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(HostError, match=r"128 MiB in .* 64 MiB are free .*LAB_RAM_DIR"):
        check_host(Machine(ram_mib=128, ram_kind="file"))


def test_huge_pages_that_are_not_reserved_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(ram_mib=128, ram_kind="hugetlb")
    monkeypatch.setattr(needs, "huge_pages", lambda: (70, 64))
    check_host(machine)
    monkeypatch.setattr(needs, "huge_pages", lambda: (70, 60))
    with pytest.raises(HostError, match=r"need 64 .* 60 of 70 .*nr_hugepages=74") as caught:
        check_host(machine)
    assert "\n" not in str(caught.value)


def test_memory_that_is_there_twice_is_asked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "memory_room", lambda: only(1000))
    check_host(Machine(ram_mib=512, ram_kind="memfd"))
    with pytest.raises(HostError, match="need 1120 MiB"):
        check_host(Machine(ram_mib=512, ram_kind="memfd-private"))


def test_several_vcpus_get_a_thread_each() -> None:
    assert "tcg,thread=multi" in command_for(Machine(vcpus=2))
    assert "tcg" in command_for(Machine(vcpus=1))


def test_the_guest_is_told_which_devices_to_use() -> None:
    command = command_for(Machine(disk="ide", net=True, vnc=True, balloon=True))
    told = command[command.index("-append") + 1].split()
    assert {"lab.disk=ide", "lab.net=1", "lab.display=1", "lab.balloon=1"} < set(told)
    without = command_for(Machine())
    assert not any(
        word.startswith(("lab.disk", "lab.net", "lab.display", "lab.balloon"))
        for word in without[without.index("-append") + 1].split()
    )


@pytest.mark.parametrize("argument", ["-S", "--incoming", "-daemonize", "-m", "-accel"])
def test_arguments_that_undo_what_the_lab_relies_on_are_refused(argument: str) -> None:
    with pytest.raises(UsageError, match="extra_args"):
        check_host(Machine(extra_args=(argument,)))


def test_more_ram_than_the_host_has_is_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(needs, "memory_room", lambda: only(700))
    check_host(Machine(ram_mib=512))
    with pytest.raises(
        HostError, match=r"1024 MiB of guest RAM need .* and 700 MiB .* cgroup /a; raise it"
    ):
        check_host(Machine(ram_mib=1024))


def test_huge_pages_that_the_host_forbids_can_not_be_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"enabled": "never", "shmem_enabled": "advise"}
    monkeypatch.setattr(ram, "thp_settings", lambda: settings)
    check_host(Machine(ram_mib=128))
    check_host(Machine(ram_mib=128, ram_kind="memfd", thp=True))
    with pytest.raises(HostError, match=r"transparent huge pages.*madvise .*/enabled"):
        check_host(Machine(ram_mib=128, thp=True))
    settings |= {"enabled": "madvise", "shmem_enabled": "never"}
    check_host(Machine(ram_mib=128, thp=True))
    with pytest.raises(HostError, match=r"transparent huge pages.*advise .*/shmem_enabled"):
        check_host(Machine(ram_mib=128, ram_kind="memfd", thp=True))


def test_huge_pages_that_can_not_arise_can_not_be_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Field report F13."""
    mount = ram.Mount("tmpfs", ("rw", "huge=never"))
    settings = {"enabled": "always", "shmem_enabled": "always"}
    monkeypatch.setattr(ram, "thp_settings", lambda: settings)
    monkeypatch.setattr(ram, "mount_of", lambda _: mount)
    shared = Machine(ram_mib=128, ram_kind="memfd", thp=True)
    check_host(shared)
    with pytest.raises(HostError, match=r"unpatched QEMU.*2 MiB; use the patched"):
        check_host(shared, "unpatched")
    with pytest.raises(HostError, match=r"memfd-private cannot.*; use ram_kind memfd"):
        check_host(Machine(ram_mib=128, ram_kind="memfd-private", thp=True))
    in_file = Machine(ram_mib=128, ram_kind="file", thp=True)
    with pytest.raises(HostError, match=r"switched off for files.*LAB_RAM_DIR.*huge=advise"):
        check_host(in_file)
    mount = ram.Mount("ext4", ("rw", "huge=always"))
    with pytest.raises(HostError, match=r"switched off for files"):
        check_host(in_file)
    mount = ram.Mount("tmpfs", ("rw", "huge=within_size"))
    check_host(in_file)
    settings["shmem_enabled"] = "deny"
    with pytest.raises(HostError, match=r"switched off on this host"):
        check_host(in_file)


@pytest.mark.parametrize(
    ("problem", "pvm", "said"),
    [("a vCPU does not run", False, "a vCPU does not run"), ("", True, "is PVM"), ("", False, "")],
)
def test_kvm_is_refused_where_a_linux_guest_does_not_run_under_it(
    problem: str, pvm: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "probe_kvm", lambda: problem)
    monkeypatch.setattr(needs, "kvm_is_pvm", lambda: pvm)
    check_host(Machine(ram_mib=128))
    if not said:
        check_host(Machine(ram_mib=128, accel="kvm"))
        return
    with pytest.raises(HostError, match=rf"{said}.*; use accel=\"tcg\"") as caught:
        check_host(Machine(ram_mib=128, accel="kvm"))
    assert ('or guest="micro"' in caught.value.remedy) == pvm


def test_sizes_of_the_engine_are_named_only_where_they_differ_from_its_own() -> None:
    """The unpatched QEMU does not know the properties, and refuses to start with them."""
    assert "-global" not in command_for(Machine())
    command = command_for(Machine(fault_around_pages=16))
    assert "migration.x-snapshot-fault-around=16" in command
    assert "migration.x-snapshot-chunk-size=2097152" in command
