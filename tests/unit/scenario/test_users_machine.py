"""A machine of the user's: images or a kernel in place of a guest of the lab's."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from lab.errors import UsageError
from lab.scenario.document import from_json, to_json
from lab.scenario.flags import add_arguments, from_arguments, to_arguments
from lab.scenario.machine import Machine
from lab.scenario.scenario import check_fit
from lab.scenario.workload import Workload


def machine(**values: Any) -> Machine:
    return Machine(**values)


def test_a_machine_with_an_image_is_the_users() -> None:
    made = machine(image="disk.qcow2")
    assert (made.image, made.guest, made.disk) == (("disk.qcow2",), "image", "virtio")
    assert made.is_users
    assert machine(image=Path("disk.qcow2")) == made
    assert not machine().is_users


def test_a_kernel_needs_no_image() -> None:
    made = machine(kernel="vmlinuz", initrd="initrd", append="quiet")
    assert (made.is_users, made.disk) == (True, "none")


def test_sata_is_an_ide_disk_of_a_q35() -> None:
    assert machine(image="a", chipset="q35", disk="ide").disk == "ide"


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"forward": ("2222:22",)}, "forward is of a machine with an image"),
        ({"firmware": "uefi"}, "firmware is of a machine with an image"),
        ({"append": "quiet"}, "append is of a machine with an image"),
        ({"image": ("a", ""), "disk": "ide"}, "an image has no name"),
        ({"image": 7}, "image is 7"),
        ({"image": "a", "guest": "micro"}, "in place of the microguest"),
        ({"image": "a", "uefi_vars": "v"}, "firmware is bios"),
        ({"image": "a", "kernel": "k", "firmware": "uefi"}, "booted by BIOS"),
        ({"image": "a", "append": "quiet"}, "there is no kernel"),
        ({"image": "a", "flash": True}, "the lab's own guests"),
        ({"image": "a", "forward": ("22",)}, "not HOST:GUEST"),
        ({"image": "a", "forward": ("0:0",)}, "not HOST:GUEST"),
        ({"image": "a", "forward": ("1:65536",)}, "not HOST:GUEST"),
        ({"image": "a", "forward": ("-1:22",)}, "not HOST:GUEST"),
        ({"image": "a", "forward": ("0:22", "1:22")}, "a port of the guest twice"),
        ({"kernel": "k", "disk": "virtio"}, "a scratch disk is for the lab's own guests"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(values: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        machine(**values)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_a_users_guest_does_no_workload_of_the_labs() -> None:
    check_fit(machine(image="a"), Workload("idle"))
    with pytest.raises(UsageError, match="does what is installed"):
        check_fit(machine(image="a"), Workload("random"))


def test_it_survives_json_and_the_command_line() -> None:
    made = machine(
        image=("a.raw", "-b,.qcow2"), chipset="q35", disk="scsi", firmware="uefi", uefi_vars="v",
        forward=("0:22", "5432:5432"),
    )  # fmt: skip
    assert from_json(Machine, to_json(made)) == made
    parser = argparse.ArgumentParser()
    add_arguments(parser, Machine)
    assert from_arguments(Machine, parser.parse_args(to_arguments(made))) == made
