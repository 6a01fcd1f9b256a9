"""The command line of a QEMU that somebody else started restores its snapshot, beside it."""

import json
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.qemu.build import find_qemu
from lab.vm.argv import disks, for_restore, read_command_line
from lab.vm.peer import describe, find_process
from lab.vm.qmp import Qmp
from tests.support import foreign
from tests.support.bench import until
from tests.support.foreign import Foreign, boot_disk, counted, qemu_img, started, status

pytestmark = [pytest.mark.vm, pytest.mark.platforms("micro-tcg")]


@pytest.fixture
def img() -> Path:
    return find_qemu("patched").path.with_name("qemu-img")


@dataclass(frozen=True)
class Layout:
    """How a line has its disks; each function gets the folder with `disk.raw` and `disk.qcow2`."""

    arguments: Callable[[Path], list[str]]
    disk: str = "disk.raw"
    node: str = ""
    """The node that the overlay goes on, where it has a name."""
    machine: str = "pc"


def _json(**values: object) -> str:
    return json.dumps({key.replace("_", "-"): value for key, value in values.items()})


def _libvirt(folder: Path) -> list[str]:
    file = {"driver": "file", "auto-read-only": True, "discard": "unmap"}
    cache = {"direct": False, "no-flush": False}
    base, top = (str(folder / name) for name in ("disk.raw", "disk.qcow2"))
    return [
        *("-object", _json(**{"qom-type": "iothread", "id": "iothread1"})),
        *("-blockdev", _json(**file, filename=base, **{"node-name": "libvirt-2-storage"})),
        *(
            "-blockdev",
            json.dumps(
                {
                    "node-name": "libvirt-2-format",
                    "read-only": True,
                    "driver": "raw",
                    "file": "libvirt-2-storage",
                }
            ),
        ),
        *("-blockdev", _json(**file, filename=top, **{"node-name": "libvirt-1-storage"})),
        *(
            "-blockdev",
            json.dumps(
                {
                    "node-name": "libvirt-1-format",
                    "read-only": False,
                    "cache": cache,
                    "driver": "qcow2",
                    "file": "libvirt-1-storage",
                    "backing": "libvirt-2-format",
                }
            ),
        ),
        *(
            "-device",
            json.dumps(
                {
                    "driver": "virtio-blk-pci",
                    "iothread": "iothread1",
                    "bus": "pcie.0",
                    "addr": "0x10",
                    "drive": "libvirt-1-format",
                    "id": "virtio-disk0",
                    "bootindex": 1,
                    "write-cache": "on",
                }
            ),
        ),
    ]


LAYOUTS: Mapping[str, Layout] = {
    "hda": Layout(lambda folder: ["-hda", "disk.raw"]),
    "alone": Layout(lambda folder: ["disk.qcow2"], disk="disk.qcow2"),
    "drive-ide": Layout(
        lambda folder: ["-drive", f"file={folder}/disk.raw,format=raw,if=ide,cache=writeback"]
    ),
    "drive-virtio": Layout(
        lambda folder: ["-drive", "file=disk.qcow2,if=virtio,discard=unmap"], disk="disk.qcow2"
    ),
    "drive-nested": Layout(
        lambda folder: ["-drive", "driver=raw,file.filename=disk.raw,if=virtio,file.locking=on"]
    ),
    "drive-iothread": Layout(
        lambda folder: [
            *("-object", "iothread,id=one"),
            *("-drive", "file=disk.raw,format=raw,if=none,id=d"),
            *("-device", "virtio-blk-pci,drive=d,iothread=one,id=disk"),
        ]
    ),
    "drive-scsi-iothread": Layout(
        lambda folder: [
            *("-object", "iothread,id=one"),
            *("-drive", "file=disk.qcow2,format=qcow2,if=none,id=d"),
            *("-device", "virtio-scsi-pci,iothread=one,id=bus"),
            *("-device", "scsi-hd,drive=d"),
        ],
        disk="disk.qcow2",
    ),
    "blockdev-dotted": Layout(
        lambda folder: [
            *("-blockdev", f"qcow2,node-name=d,file.driver=file,file.filename={folder}/disk.qcow2"),
            *("-device", "virtio-blk-pci,drive=d"),
        ],
        disk="disk.qcow2",
        node="d",
    ),
    "blockdev-file": Layout(
        lambda folder: [
            *("-blockdev", "driver=file,node-name=d,filename=disk.raw,aio=threads"),
            *("-device", "ide-hd,drive=d,id=disk"),
        ],
        node="d",
    ),
    "blockdev-json": Layout(
        lambda folder: [
            "-blockdev",
            json.dumps(
                {
                    "driver": "raw",
                    "node-name": "d",
                    "file": {"driver": "file", "filename": str(folder / "disk.raw")},
                }
            ),
            *("-device", '{"driver":"ide-hd","drive":"d","id":"disk"}'),
        ],
        node="d",
    ),
    "blockdev-scsi": Layout(
        lambda folder: [
            *("-blockdev", '{"driver":"file","node-name":"f","filename":"disk.raw"}'),
            *("-blockdev", '{"driver":"raw","node-name":"d","file":"f"}'),
            *("-device", "virtio-scsi-pci"),
            *("-device", "scsi-hd,drive=d"),
        ],
        node="d",
    ),
    "libvirt": Layout(_libvirt, disk="disk.qcow2", node="libvirt-1-format", machine="q35"),
}

# The firmware may wait half a minute for the empty CD drive that a q35 has by itself.
MACHINES: Mapping[str, tuple[str, ...]] = {"pc": (), "q35": ("-nodefaults",)}

COMMON = (
    *("-accel", "tcg", "-m", "32", "-display", "none", "-boot", "c"),
    *("-serial", "unix:serial,server=on,wait=off", "-netdev", "user,id=n"),
    *("-device", "virtio-net-pci,netdev=n,romfile=", "-device", "virtio-rng-pci"),
    *("-qmp", "unix:qmp,server=on,wait=off"),
)


async def make_disks(folder: Path, img: Path) -> None:
    (folder / "disk.raw").write_bytes(boot_disk())
    await qemu_img(
        img, "create", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", folder / "disk.qcow2"
    )


async def device_tree(qmp: Qmp) -> str:
    # What nobody gave a name has one with a number that was drawn.
    return re.sub(r"#\w+", "#", await qmp.hmp("info qtree"))


async def freeze_disk(first: Foreign, layout: Layout, overlay: Path) -> None:
    """Have the machine write into an overlay from now on."""
    blocks = await first.qmp.execute("query-block")
    inserted = [each["inserted"] for each in blocks if "inserted" in each]
    node = layout.node or inserted[0]["node-name"]
    await first.qmp.execute(
        "blockdev-snapshot-sync",
        {
            "node-name": node,
            "snapshot-file": str(overlay),
            "snapshot-node-name": "overlay",
            "format": "qcow2",
        },
    )


@pytest.mark.parametrize("name", LAYOUTS)
async def test_a_machine_is_restored_beside_the_one_that_runs(
    name: str, qemu: Path, img: Path, folder: Path, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    await make_disks(folder, img)
    machine = ("-M", layout.machine, *MACHINES[layout.machine])
    command: list[str | Path] = [qemu, *machine, *COMMON, *layout.arguments(folder)]
    scratch = tmp_path / "scratch"
    async with started(command, folder / "qmp") as first:
        pid = await find_process(first.qmp)
        assert pid == first.pid
        line = read_command_line(pid)
        assert line.arguments == tuple(map(str, command[1:]))
        peer = await describe(first.qmp, pid)
        (disk,) = [each for each in disks(line) if not each.read_only]
        assert disk.path == folder / layout.disk
        await until(lambda: has_counted(first.qmp))
        before = await device_tree(first.qmp)
        await first.qmp.execute("stop")
        await freeze_disk(first, layout, folder / "active.qcow2")
        await foreign.save(first.qmp, folder / "image")
        frozen = await counted(img, disk.path, scratch)
        await first.qmp.execute("cont")

        backing = ("-b", disk.path, "-F", disk.path.suffix[1:])
        await qemu_img(img, "create", "-f", "qcow2", *backing, folder / "layer.qcow2")
        own, child = socket.socketpair()
        with own, child:
            rewritten = for_restore(
                line,
                disks={disk.path: folder / "layer.qcow2"},
                machine_type=peer.machine_type,
                folder=folder / "r",
                qmp=child.fileno(),
                name="lab-restored",
            )
            (folder / "r").mkdir()
            async with foreign.restoring(rewritten, child, own) as second:
                await foreign.load(second.qmp, folder / "image")
                assert await device_tree(second.qmp) == before
                again = await describe(second.qmp, second.pid)
                assert (again.machine_type, again.devices) == (peer.machine_type, peer.devices)
                await second.qmp.execute("cont")
                await until(lambda: writes_on(second.qmp))
                assert await status(second.qmp) == "running"
                await second.qmp.execute("quit")
        # Neither took anything from the other.
        assert await status(first.qmp) == "running"
        assert (folder / "serial").is_socket()
        assert rewritten.channels.keys() == {
            "-serial unix:serial,server=on,wait=off",
            "-qmp unix:qmp,server=on,wait=off",
        }
    assert await counted(img, folder / "layer.qcow2", scratch) > frozen > 0
    assert await counted(img, folder / "active.qcow2", scratch) > frozen
    assert await counted(img, disk.path, scratch) == frozen


async def has_counted(qmp: Qmp) -> bool:
    return await _writes(qmp) > 3


async def writes_on(qmp: Qmp) -> bool:
    return await _writes(qmp) > 0


async def _writes(qmp: Qmp) -> int:
    stats = await qmp.execute("query-blockstats")
    return sum(int(each["stats"]["wr_operations"]) for each in stats)


CHANNELS: Mapping[str, tuple[str, ...]] = {
    "terminal": ("-nographic",),
    "terminal-nodefaults": ("-nodefaults", "-nographic", "-serial", "mon:stdio", "-s"),
    "sockets": (
        *("-vnc", "127.0.0.1:0,to=99,share=force-shared"),
        *("-monitor", "telnet:127.0.0.1:0,server,nowait"),
        *("-serial", "tcp:127.0.0.1:0,server=on,wait=off"),
        *("-gdb", "tcp:127.0.0.1:0"),
        *("-device", "virtio-serial", "-chardev", "pty,id=agent,logfile=agent.log"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ),
    "files": (
        *("-serial", "file:serial.log", "-D", "qemu.log", "-trace", "enable=vm_state_notify"),
        *("-chardev", "file,id=out,path=out.log", "-device", "isa-debugcon,chardev=out"),
        *(
            "-chardev",
            "ringbuf,id=ring",
            "-chardev",
            "vc,id=vc",
            "-device",
            "isa-serial,chardev=vc",
        ),
    ),
    "devices": (
        *("-nic", "user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:0-:22"),
        *("-object", "memory-backend-ram,id=ram,size=32M", "-machine", "memory-backend=ram"),
        *("-cdrom", "disk.iso", "-usb", "-rtc", "base=localtime", "-name", "mine,process=qemu"),
        *("-device", "virtio-balloon", "-pidfile", "pid"),
    ),
    "old": ("-parallel", "pty", "-fda", "floppy.img"),
}
"""What a line may have beside disks."""


@pytest.mark.parametrize("name", CHANNELS)
async def test_what_the_first_has_on_its_host_is_not_taken(
    name: str, qemu: Path, img: Path, folder: Path
) -> None:
    """Its ports, sockets, terminal and logs; and the machine is the same."""
    if name == "old" and str(qemu) != shutil.which(qemu.name):
        pytest.skip("the lab builds no such devices")
    for image in ("disk.iso", "floppy.img"):
        (folder / image).write_bytes(bytes(1440 << 10))
    arguments = CHANNELS[name]
    monitor = ("-qmp", "unix:qmp,server=on,wait=off")
    display = () if {"-vnc", "-nographic"} & set(arguments) else ("-display", "none")
    command: list[str | Path] = [qemu, "-accel", "tcg", "-m", "32", *display, *arguments, *monitor]
    async with started(command, folder / "qmp") as first:
        line = read_command_line(first.pid)
        peer = await describe(first.qmp, first.pid)
        await first.qmp.execute("stop")
        before = await device_tree(first.qmp)
        await foreign.save(first.qmp, folder / "image")
        await first.qmp.execute("cont")
        logs = {path: path.read_bytes() for path in folder.glob("*.log")}
        overlays = {}
        for disk in disks(line):
            if not disk.read_only and disk.path:
                overlays[disk.path] = folder / "layer.qcow2"
                await qemu_img(img, "create", "-f", "qcow2", folder / "layer.qcow2", "1440k")
        own, child = socket.socketpair()
        with own, child:
            rewritten = for_restore(
                line,
                disks=overlays,
                machine_type=peer.machine_type,
                folder=folder / "r",
                qmp=child.fileno(),
                forward=None,
                name="lab-restored",
            )
            (folder / "r").mkdir()
            async with foreign.restoring(rewritten, child, own) as second:
                await foreign.load(second.qmp, folder / "image")
                assert await device_tree(second.qmp) == before
                await second.qmp.execute("cont")
                assert await status(second.qmp) == "running"
                for what, path in rewritten.channels.items():
                    assert path.is_socket() or path.is_file(), what
                assert set((folder / "r").iterdir()) == set(rewritten.channels.values())
                await second.qmp.execute("quit")
        assert await status(first.qmp) == "running"
        for path, content in logs.items():
            assert path.read_bytes().startswith(content)
