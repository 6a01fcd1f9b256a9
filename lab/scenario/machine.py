"""The virtual machine."""

import os
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lab.scenario.engines import DEFAULT_CHUNK_KIB, Sizes
from lab.scenario.guests import GUEST_LIMITS, LAB_GUESTS
from lab.scenario.guests import GuestKind as GuestKind
from lab.scenario.require import (
    require,
    require_bool,
    require_choice,
    require_int,
    require_string,
    require_strings,
)

Accel = Literal["tcg", "kvm", "auto"]
RamKind = Literal["anon", "memfd", "memfd-private", "file", "file-private", "hugetlb"]
Chipset = Literal["pc", "q35"]
DiskKind = Literal["none", "ide", "virtio", "scsi"]
DiskCache = Literal["writeback", "none"]
DiskAio = Literal["threads", "native"]
Firmware = Literal["bios", "uefi"]

RAM_RESERVE_MIB: Mapping[GuestKind, int] = types.MappingProxyType(
    {kind: GUEST_LIMITS[kind].ram_reserve_mib for kind in LAB_GUESTS}
)
"""By guest, what a working set cannot have."""

HUGE_PAGE_MIB = 2
"""What guest RAM of the kind `hugetlb` consists of."""

MAX_VCPUS = 255
"""The limit of QEMU's `pc` machine type."""

DEBIAN = "debian"
"""The image that is the lab's own Debian, which `lab build --guest debian` makes."""

MAX_PORT = 65535

THREADED_DISKS: tuple[DiskKind, ...] = ("virtio", "scsi")
"""Disks that may be served in a thread of their own."""

GUEST_DEVICES = ("disk", "net", "vnc", "balloon")
"""Devices that the guest uses, for which it needs a driver."""

BOOLEAN_DEVICES = (
    "disk_iothread",
    "net",
    "vnc",
    "balloon",
    "balloon_reporting",
    "flash",
    "undriven",
)
"""Parameters of a machine that say whether there is something or not."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The virtual machine: RAM, vCPUs, a serial port, and the devices named here.

    `chipset` is QEMU's machine type, `pc` (i440FX) or `q35`, of whose versions QEMU takes its
    newest.

    `guest` is what runs in it: a Linux that runs the workload as a program, or the microguest,
    which is the workload and nothing else: no kernel, no devices, and a vCPU for each writer.  It
    boots in 30 to 70 ms, and is the one guest that runs under a KVM that is PVM.

    `accel` "auto" is KVM where a guest of this kind is seen to run under it, and TCG elsewhere;
    `lab.vm.accelerator` finds out, and a machine that runs has the one or the other.

    `ram_kind` is what backs guest RAM; `lab.vm.ram` says what each kind is.
    `thp` False forbids transparent huge pages to the QEMU process, True asks for them (QEMU asks
    by itself, so True only states what is expected) and None leaves the host's policy as it is.

    A device that is there is also used: the guest reads and writes its disk past its own cache,
    exchanges packets with QEMU's user network (which leads nowhere else), and draws on the
    screen that `vnc` shows; a balloon is moved from outside, and told of free pages by the guest
    itself with `balloon_reporting`.  `lab.vm.devices` builds them.  The disk is a scratch disk:
    empty at every boot, and at every restore, because an image is of memory.

    Two are not the guest's to use, so the microguest may have them as well: `flash`, which the
    machine then boots its firmware from, and a second one that the lab writes to (`lab.vm.flash`);
    and with `undriven` a random number generator and a serial port of virtio, which no guest of
    the lab has a driver for.

    With `image` it is a machine of the user's: one or more disk images, of which the first is
    booted from, or `"debian"`, the lab's own Debian with its kernel.  `guest` is "image" then, and
    runs what is installed there.  The images are never written to: what the guest writes goes to
    overlays of the lab's (`lab.disks`), which a snapshot freezes and a restore goes on from.
    `disk` and what begins with it say how the images are attached, by default as virtio disks; on
    a q35 `ide` is SATA.  `firmware` "uefi" boots by UEFI, with variables of its own that begin as a
    copy of the file `uefi_vars`; `kernel`, `initrd` and `append` boot a kernel without firmware's
    help.  `net` is a network card in QEMU's user network, by which such a guest reaches what the
    host reaches; each of `forward`, HOST:GUEST, leads a TCP port of the host's loopback to one of
    the guest's, and HOST 0 is any that is free.

    `fault_around_pages` and `chunk_kib` are sizes of the engine `copy`, which only the patched QEMU
    has: how many pages a fault takes along (0: the engine chooses by how densely the guest writes),
    and how much memory the sweep releases at a time.  Both are powers of two.

    `extra_args` go to the end of QEMU's command line, for what has no parameter here.

    Raises `UsageError` for values that cannot work.
    """

    ram_mib: int = field(
        default=1024, metadata={"help": "guest RAM in MiB", "unit": "MiB", "title": "guest RAM"}
    )
    vcpus: int = field(
        default=1, metadata={"help": "number of vCPUs", "unit": "1", "title": "vCPUs"}
    )
    accel: Accel = field(
        default="tcg",
        metadata={
            "help": "QEMU's accelerator; auto: kvm where the guest runs on it",
            "title": "accelerator",
            "doc": "accelerator that ran the guest",
        },
    )
    guest: GuestKind = field(
        default="linux",
        metadata={
            "help": "what runs in it: Linux, or the microguest",
            "doc": "what ran in it: linux, or micro, the microguest",
        },
    )
    ram_kind: RamKind = field(
        default="anon", metadata={"help": "what backs guest RAM", "title": "kind of RAM"}
    )
    thp: bool | None = field(
        default=None,
        metadata={
            "help": "transparent huge pages for guest RAM (host's policy)",
            "title": "huge pages",
        },
    )
    chipset: Chipset = field(default="pc", metadata={"help": "QEMU's machine type"})
    disk: DiskKind = field(
        default="none",
        metadata={
            "help": "a scratch disk that the guest uses",
            "doc": "scratch disk that the guest uses: none, ide, virtio or scsi",
        },
    )
    disk_cache: DiskCache = field(
        default="writeback",
        metadata={
            "help": "the disk's cache mode; none bypasses the host's",
            "doc": "the disk's cache mode in QEMU; null without a disk",
        },
    )
    disk_aio: DiskAio = field(
        default="threads",
        metadata={
            "help": "who does the disk's I/O",
            "doc": "who does the disk's I/O: QEMU's threads, or the kernel (native); null "
            "without a disk",
        },
    )
    disk_iothread: bool = field(
        default=False,
        metadata={
            "help": "serve the virtio or scsi disk in a thread of its own",
            "doc": "whether a thread of its own serves the disk; null without a disk",
        },
    )
    net: bool = field(
        default=False,
        metadata={
            "help": "a virtio network card that the guest uses",
            "doc": "whether the guest exchanges packets over a virtio network card",
        },
    )
    vnc: bool = field(
        default=False,
        metadata={
            "help": "a screen that the guest draws on, served by VNC",
            "doc": "whether the guest draws on a screen that is served by VNC",
        },
    )
    balloon: bool = field(
        default=False,
        metadata={"help": "a virtio balloon", "doc": "whether the guest has a virtio balloon"},
    )
    balloon_reporting: bool = field(
        default=False, metadata={"help": "have the guest report free pages to the balloon"}
    )
    flash: bool = field(default=False, metadata={"help": "boot from flash, with more beside it"})
    undriven: bool = field(
        default=False, metadata={"help": "virtio devices that the guest has no driver for"}
    )
    fault_around_pages: int = field(
        default=0,
        metadata={
            "help": "pages that a fault takes along, engine copy; 0: it chooses",
            "unit": "pages",
            "title": "taken along with a fault",
            "zero": "automatic",
        },
    )
    chunk_kib: int = field(
        default=DEFAULT_CHUNK_KIB,
        metadata={
            "help": "memory that the sweep releases at a time, engine copy",
            "unit": "KiB",
            "title": "released at a time",
        },
    )
    image: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "a disk image of yours to boot, or debian, the lab's own; repeatable",
            "varies": False,
        },
    )
    firmware: Firmware = field(
        default="bios", metadata={"help": "what boots an image", "varies": False}
    )
    uefi_vars: str = field(
        default="",
        metadata={"help": "the variables that UEFI begins with: a file", "varies": False},
    )
    kernel: str = field(
        default="", metadata={"help": "the kernel to boot an image with", "varies": False}
    )
    initrd: str = field(
        default="", metadata={"help": "the initial RAM disk of --kernel", "varies": False}
    )
    append: str = field(
        default="", metadata={"help": "the command line of --kernel", "varies": False}
    )
    forward: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "HOST:GUEST, a TCP port of this host's loopback that leads to one of the "
            "guest's; HOST 0: any; repeatable",
            "varies": False,
        },
    )
    extra_args: tuple[str, ...] = field(
        default=(), metadata={"help": "one more QEMU argument; repeatable", "flag": "extra-arg"}
    )

    def __post_init__(self) -> None:
        require_choice("guest", self.guest, GuestKind)
        self._take_images()
        require_int("ram_mib", self.ram_mib, GUEST_LIMITS[self.guest].min_ram_mib, 1024 * 1024)
        require_int("vcpus", self.vcpus, 1, MAX_VCPUS)
        require_choice("accel", self.accel, Accel)
        require_choice("ram_kind", self.ram_kind, RamKind)
        huge = self.ram_kind == "hugetlb"
        require(
            not huge or self.ram_mib % HUGE_PAGE_MIB == 0,
            f"{self.ram_mib} MiB of RAM cannot be made of huge pages of {HUGE_PAGE_MIB} MiB",
            f"use a multiple of {HUGE_PAGE_MIB}, or another ram_kind",
        )
        require(
            not (huge and self.thp),
            "RAM of huge pages cannot have transparent ones",
            "leave thp unset, or use another ram_kind",
        )
        require_choice("chipset", self.chipset, Chipset)
        for name in BOOLEAN_DEVICES:
            require_bool(name, getattr(self, name))
        self._check_guest()
        self._check_disk()
        _ = self.sizes  # raises for what cannot work
        require_strings("extra_args", self.extra_args)

    @property
    def sizes(self) -> Sizes:
        """The sizes of the engine `copy`; raises `UsageError` where they cannot work."""
        return Sizes(fault_around_pages=self.fault_around_pages, chunk_kib=self.chunk_kib)

    @property
    def is_users(self) -> bool:
        """Whether the user's own system runs in it, of which the lab knows nothing."""
        return GUEST_LIMITS[self.guest].is_users

    @property
    def sets_sizes(self) -> bool:
        """Whether sizes of the engine `copy` are asked for that are not the engine's own."""
        return self.sizes != Sizes()

    def _take_images(self) -> None:
        """Make it a machine of the user's where it has images, and check what only such has."""
        for name in ("image", "forward"):
            value = getattr(self, name)
            # One is as good as a tuple of one.
            if isinstance(value, str | os.PathLike):
                object.__setattr__(self, name, (os.fspath(value),) if value else ())
            require_strings(name, getattr(self, name))
        require_choice("firmware", self.firmware, Firmware)
        for name in ("uefi_vars", "kernel", "initrd", "append"):
            require_string(name, getattr(self, name))
        if not (self.image or self.kernel or self.guest == "image"):
            only = ("firmware", "uefi_vars", "initrd", "append", "forward")
            given = [name for name in only if getattr(self, name) not in ("", (), "bios")]
            require(
                not given,
                f"{given[0] if given else ''} is of a machine with an image, and there is none",
                "name a disk image with image=, or a kernel with kernel=",
            )
            return
        require(
            self.guest in ("linux", "image"),
            f"a machine with an image or a kernel has that in place of the "
            f"{GUEST_LIMITS[self.guest].title}",
            "leave guest unset",
        )
        object.__setattr__(self, "guest", "image")
        if self.image and self.disk == "none":
            object.__setattr__(self, "disk", "virtio")
        require(
            bool(self.image) or self.disk == "none",
            "a scratch disk is for the lab's own guests",
            "name a disk image with image=",
        )
        require(all(self.image), "an image has no name", "name a file")
        require(
            not (self.firmware == "bios" and self.uefi_vars),
            "uefi_vars are of UEFI, and firmware is bios",
            "use firmware uefi",
        )
        require(
            not (self.kernel and self.firmware == "uefi"),
            "a kernel of yours is booted by BIOS here",
            "use firmware bios, or let UEFI boot the image's own kernel",
        )
        for name in ("initrd", "append"):
            require(
                bool(self.kernel) or not getattr(self, name) or self.image == (DEBIAN,),
                f"{name} is given and there is no kernel",
                "name a kernel as well",
            )
        require(
            not self.flash and not self.undriven,
            "flash and undriven are for the lab's own guests",
            "leave them unset",
        )
        for one in self.forward:
            require(
                _is_forward(one),
                f"forward {one!r} is not HOST:GUEST, two ports",
                "give it as 2222:22, or 0:22 for any port of the host",
            )
        require(
            len({one.partition(":")[2] for one in self.forward}) == len(self.forward),
            "forward names a port of the guest twice",
            "name each once",
        )

    def _check_guest(self) -> None:
        limits = GUEST_LIMITS[self.guest]
        devices = {name: getattr(self, name) for name in GUEST_DEVICES}
        used = {name for name, value in devices.items() if value not in ("none", False)}
        undriven = [name for name in devices if name in used - limits.drivers]
        able = [kind for kind in LAB_GUESTS if used <= GUEST_LIMITS[kind].drivers]
        require(
            not undriven,
            f"the {limits.title} has no driver for {', '.join(undriven)}",
            f"use guest {' or '.join(able)}, or leave devices unset",
        )
        require(
            self.balloon or not self.balloon_reporting,
            "free pages are to be reported and there is no balloon",
            "ask for a balloon as well, or leave balloon_reporting unset",
        )

    def _check_disk(self) -> None:
        require_choice("disk", self.disk, DiskKind)
        require(
            self.disk != "ide" or self.chipset == "pc" or self.is_users,
            "a q35 has no IDE disk but an AHCI one, which the guest's kernel has no driver for",
            "choose disk virtio or scsi, or chipset pc",
        )
        require_choice("disk_cache", self.disk_cache, DiskCache)
        require_choice("disk_aio", self.disk_aio, DiskAio)
        described = (self.disk_cache, self.disk_aio, self.disk_iothread)
        require(
            self.disk != "none" or described == ("writeback", "threads", False),
            "disk_cache, disk_aio or disk_iothread is given and there is no disk",
            "choose disk ide, virtio or scsi as well",
        )
        require(
            self.disk_aio != "native" or self.disk_cache == "none",
            f"disk_aio native does not work with disk_cache {self.disk_cache}",
            "use disk_cache none, or disk_aio threads",
        )
        require(
            not self.disk_iothread or self.disk in THREADED_DISKS,
            f"an {self.disk} disk cannot have an I/O thread",
            f"choose disk {' or '.join(THREADED_DISKS)}, or leave disk_iothread unset",
        )


def _is_forward(text: str) -> bool:
    host, colon, guest = text.partition(":")
    ports = [int(port) for port in (host, guest) if port.isascii() and port.isdecimal()]
    return bool(colon) and len(ports) == 2 and ports[1] > 0 and max(ports) <= MAX_PORT
