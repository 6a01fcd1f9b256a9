"""A device's arguments are the same for a boot and a restore, but for where its files are."""

from pathlib import Path

import pytest

from lab.devices import DISK_MIB, DeviceFiles, device_arguments
from lab.scenario import Machine

ALL = Machine(disk="virtio", disk_cache="none", disk_aio="native", disk_iothread=True, net=True,
              vnc=True, balloon=True)  # fmt: skip


def arguments_for(machine: Machine, folder: str = "/f") -> list[str]:
    return device_arguments(machine, DeviceFiles(Path(folder)))


def test_a_machine_without_devices_has_none_and_no_file(tmp_path: Path) -> None:
    assert arguments_for(Machine()) == []
    DeviceFiles(tmp_path).create(Machine())
    assert list(tmp_path.iterdir()) == []


def test_only_the_files_differ_from_one_process_to_the_next() -> None:
    one, other = arguments_for(ALL, "/one"), arguments_for(ALL, "/other")
    assert [argument.replace("/one", "/other") for argument in one] == other
    assert one != other


def test_the_disk_is_as_asked_for() -> None:
    drive = "if=none,id=disk,format=raw,file=/f/disk"
    assert arguments_for(Machine(disk="ide")) == [
        *("-drive", f"{drive},cache=writeback,aio=threads"),
        *("-device", "ide-hd,drive=disk"),
    ]
    threaded = Machine(disk="virtio", disk_cache="none", disk_aio="native", disk_iothread=True)
    assert arguments_for(threaded) == [
        *("-drive", f"{drive},cache=none,aio=native"),
        *("-object", "iothread,id=disk-thread"),
        *("-device", "virtio-blk-pci,drive=disk,iothread=disk-thread"),
    ]


def test_the_network_leads_nowhere() -> None:
    assert "user,id=net,restrict=on" in arguments_for(Machine(net=True))


def test_a_comma_in_a_path_is_not_the_end_of_an_option() -> None:
    arguments = arguments_for(Machine(disk="ide", vnc=True), "/a,b")
    assert any("file=/a,,b/disk,cache" in argument for argument in arguments)
    assert "unix:/a,,b/vnc" in arguments


def test_the_disk_is_empty_and_never_an_older_one(tmp_path: Path) -> None:
    files = DeviceFiles(tmp_path)
    files.create(ALL)
    assert files.disk.stat().st_size == DISK_MIB << 20
    assert files.disk.stat().st_blocks == 0
    with pytest.raises(FileExistsError):
        files.create(ALL)
