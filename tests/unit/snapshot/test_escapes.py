"""What writes to guest memory unnoticed is found by what QEMU says of itself, and named."""

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from lab.errors import SnapshotError
from lab.scenario.methods import METHODS
from lab.session import VM
from lab.snapshot.escapes import processes_that_share, require_none
from lab.snapshot.mechanisms import mechanism_of
from lab.vm.memory import RamBlock

QUIET_NETWORK = "net: index=0,type=user,net=10.0.2.0,restrict=on\r\n"


class FakeVM:
    """A QEMU that has nothing but what it is told."""

    pid = os.getpid()

    def __init__(
        self,
        children: Mapping[str, Mapping[str, str]] | None = None,
        *,
        network: str = QUIET_NETWORK,
        drivers: tuple[str, ...] = (),
        share: bool | None = None,
    ) -> None:
        self.children = children or {}
        self.network = network
        self.drivers = drivers
        self.share = share

    async def hmp(self, command: str) -> str:
        assert command == "info network"
        return self.network

    async def ram_blocks(self) -> list[RamBlock]:
        return []

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        if command == "query-named-block-nodes":
            return [{"node-name": f"node{n}", "drv": drv} for n, drv in enumerate(self.drivers)]
        if command == "qom-get":
            return "/objects/peers" if arguments["property"] == "memdev" else self.share
        assert command == "qom-list"
        path = arguments["path"]
        if path.startswith("/machine/peripheral/"):
            return [] if self.share is None else [{"name": "memdev", "type": "link<x>"}]
        found = self.children.get(path, {})
        # A container has properties of its own, too.
        listed = [{"name": name, "type": f"child<{kind}>"} for name, kind in found.items()]
        return [{"name": "type", "type": "string"}, *listed]


async def found_in(vm: FakeVM) -> str:
    """Why a snapshot is refused, in one line; empty when it is not."""
    try:
        await require_none(cast(VM, vm), "background")
    except SnapshotError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("container", "kind"),
    [
        ("/machine/peripheral", "vhost-user-blk-pci"),
        ("/machine/peripheral-anon", "vhost-user-fs-pci"),
        ("/machine/peripheral", "vhost-user-vga"),
        ("/machine/peripheral", "vhost-vdpa-device-pci"),
        ("/objects", "cryptodev-vhost-user"),
        ("/objects", "vhost-user-backend"),
    ],
)
async def test_every_device_that_another_process_serves_is_named(container: str, kind: str) -> None:
    """Field report F1."""
    said = await found_in(FakeVM({container: {"it": kind}}))
    assert said.startswith(f"background would not notice what the device it ({kind}) writes")


async def test_devices_of_qemu_and_of_the_kernel_are_right() -> None:
    devices = {"a": "virtio-blk-pci", "b": "vhost-vsock-pci", "c": "virtio-net-pci"}
    vm = FakeVM({"/machine/peripheral": devices, "/objects": {"ram": "memory-backend-memfd"}})
    assert await found_in(vm) == ""


@pytest.mark.parametrize("kind", ["vhost-user", "vhost-vdpa"])
async def test_a_network_that_another_process_serves_is_named(kind: str) -> None:
    """Field report F22."""
    network = (
        f"virtio.0: index=0,type=nic,model=virtio-net-pci\r\n \\ wire: index=0,type={kind},x\r\n"
    )
    assert f"the network wire ({kind})" in await found_in(FakeVM(network=network))


@pytest.mark.parametrize("driver", ["nvme", "nvme-io_uring", "virtio-blk-vhost-user"])
async def test_a_drive_that_has_guest_memory_pinned_is_named(driver: str) -> None:
    """Field report F1."""
    assert f"the drive node1 ({driver})" in await found_in(FakeVM(drivers=("raw", driver)))


@pytest.mark.parametrize(
    ("kind", "share", "refused"),
    [
        ("ivshmem-plain", True, True),
        ("ivshmem-plain", False, False),
        ("ivshmem-doorbell", None, True),
    ],
)
async def test_memory_between_guests_is_named_unless_it_is_private(
    kind: str, share: bool | None, refused: bool
) -> None:
    vm = FakeVM({"/machine/peripheral": {"inter": kind}}, share=share)
    assert (f"the device inter ({kind})" in await found_in(vm)) == refused


def test_a_process_that_has_mapped_the_same_memory_is_found() -> None:
    program = (
        "import mmap, sys\n"
        "with open(sys.argv[1], 'r+b') as file, mmap.mmap(file.fileno(), 4096, access=ACCESS):\n"
        "    print(flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096):
            lines = Path("/proc/self/maps").read_text().splitlines()
            (own,) = [line for line in lines if file.name in line]
            address = int(own.split("-")[0], 16)
            for access, is_found in (("mmap.ACCESS_WRITE", True), ("mmap.ACCESS_COPY", False)):
                with subprocess.Popen(
                    [sys.executable, "-c", program.replace("ACCESS", access, 1), file.name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                ) as other:
                    assert other.stdout is not None
                    assert other.stdout.readline() == b"\n"
                    found = processes_that_share(os.getpid(), [address])
                    other.communicate()
                assert found == ([other.pid] if is_found else [])
    assert processes_that_share(os.getpid(), []) == []


@pytest.mark.parametrize(
    ("method", "variant", "state", "refused"),
    [
        ("background", "unpatched", "running", False),
        ("background", "unpatched", "paused", False),
        ("background", "unpatched", "suspended", False),
        ("background", "unpatched", "prelaunch", True),
        ("background", "unpatched", "io-error", True),
        ("background", "unpatched", "shutdown", True),
        ("stop-and-copy", "unpatched", "io-error", False),
        ("stop-and-copy", "unpatched", "debug", True),
        ("migrate-to-file", "unpatched", "suspended", True),
        ("migrate-to-file", "unpatched", "restore-vm", True),
        ("live", "patched", "io-error", False),
        ("live", "patched", "debug", False),
        ("live", "patched", "postmigrate", True),
    ],
)
def test_the_unpatched_qemu_is_not_asked_for_what_would_end_it(
    method: str, variant: str, state: str, refused: bool
) -> None:
    """Field report F3."""
    if not refused:
        mechanism_of(METHODS[method], variant).check_state(state)
        return
    with pytest.raises(SnapshotError, match=f"{state}|twice") as caught:
        mechanism_of(METHODS[method], variant).check_state(state)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
