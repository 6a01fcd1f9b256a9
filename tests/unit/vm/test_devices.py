"""A device's arguments are the same for a boot and a restore, but for where its files are."""

import socket
from pathlib import Path

import pytest

from lab.errors import HostError
from lab.scenario.machine import Machine
from lab.vm.devices import DISK_MIB, FLASH_BYTES, DeviceFiles, device_arguments, find_firmware

ALL = Machine(disk="virtio", disk_cache="none", disk_aio="native", disk_iothread=True, net=True,
              vnc=True, balloon=True, balloon_reporting=True, flash=True,
              undriven=True)  # fmt: skip


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


def test_a_scsi_disk_is_behind_a_controller_which_may_have_a_thread() -> None:
    assert arguments_for(Machine(disk="scsi"))[2:] == [
        *("-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk"),
    ]
    assert arguments_for(Machine(disk="scsi", disk_iothread=True))[2:] == [
        *("-object", "iothread,id=disk-thread"),
        *("-device", "virtio-scsi-pci,iothread=disk-thread", "-device", "scsi-hd,drive=disk"),
    ]


def test_a_balloon_is_told_of_free_pages_where_that_is_asked_for() -> None:
    assert arguments_for(Machine(balloon=True))[-1] == "virtio-balloon-pci"
    told = Machine(balloon=True, balloon_reporting=True)
    assert arguments_for(told)[-1] == "virtio-balloon-pci,free-page-reporting=on"


def test_the_firmware_is_in_flash_and_below_it_is_what_is_written_to(tmp_path: Path) -> None:
    arguments = arguments_for(Machine(flash=True))
    assert arguments[:4] == [
        *("-drive", "if=pflash,unit=0,format=raw,file=/f/firmware"),
        *("-drive", "if=pflash,unit=1,format=raw,file=/f/flash"),
    ]
    # The microguest's ROM is its firmware.
    files = DeviceFiles(tmp_path)
    files.firmware.write_bytes(b"rom")
    files.create(Machine(guest="micro", flash=True))
    assert files.firmware.read_bytes() == b"rom"
    assert files.flash.stat().st_size == FLASH_BYTES
    with pytest.raises(HostError, match="install seabios"):
        find_firmware([tmp_path])


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


@pytest.mark.parametrize("machine", [Machine(vnc=True), Machine(flash=True, guest="micro")])
def test_a_folder_whose_path_is_too_long_for_a_socket_is_refused(
    machine: Machine, tmp_path: Path
) -> None:
    """Field report F16."""
    for length in (90, 100, 150):
        folder = tmp_path / str(length).ljust(length, "x") / "lab-devices-12345678"
        folder.mkdir(parents=True)
        files = DeviceFiles(folder)
        files.firmware.touch()
        with pytest.raises(HostError, match="is too long for a socket") as caught:
            files.create(machine)
        assert "TMPDIR" in caught.value.remedy
    # Without a socket any path will do.
    files.create(Machine(disk="ide"))


def test_a_path_that_just_fits_is_one_of_a_socket(tmp_path: Path) -> None:
    """Field report F16."""
    for room, fits in ((107, True), (108, False)):
        folder = tmp_path / ("y" * (room - len(str(tmp_path / "y")) - len("/vnc") + 1))
        folder.mkdir()
        files = DeviceFiles(folder)
        assert len(str(files.vnc)) == room
        with socket.socket(socket.AF_UNIX) as server:
            try:
                server.bind(str(files.vnc))
                bound = True
            except OSError:
                bound = False
        assert bound == fits
        files.vnc.unlink(missing_ok=True)
        if fits:
            files.create(Machine(vnc=True))
        else:
            with pytest.raises(HostError, match="is too long for a socket"):
                files.create(Machine(vnc=True))
