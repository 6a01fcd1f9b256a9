"""What is measured: the machine, the workload in it, the method that takes the snapshot, the
storage that it goes to, and the instruments that watch it.

Each class below is the only place where its parameters are spelled.  The command line's flags
(`add_arguments`, `from_arguments`), the JSON of run files and sidecars (`to_json`, `from_json`)
and the dimension columns of tables (`dimensions`) are all derived from the fields, so a parameter
can not exist in one of them and be missing in another.

A field's metadata holds `help` (its command line help) and, where the bare name would be
ambiguous in a table or on a command line, `dimension`: `Workload.kind` is the dimension
`workload` and the flag `--workload`.  `earlier` is what was the case before there was the field,
where that is not its default: a recording that does not name it is read so.

Tables and figures use `unit`, `title` (what an axis is called), `doc` (what a recorded value means,
where that is not what the flag asks for) and `zero` (what 0 stands for, where it is not a number).
`DIMENSIONS` has all of it, as one record for each parameter.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from lab.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    _T = TypeVar("_T", bound=DataclassInstance)
else:
    _T = TypeVar("_T")

Accel = Literal["tcg", "kvm", "auto"]
GuestKind = Literal["linux", "micro"]
RamKind = Literal["anon", "memfd", "memfd-private", "file", "file-private", "hugetlb"]
Chipset = Literal["pc", "q35"]
DiskKind = Literal["none", "ide", "virtio", "scsi"]
DiskCache = Literal["writeback", "none"]
DiskAio = Literal["threads", "native"]
WorkloadKind = Literal[
    "idle",
    "sequential",
    "random",
    "scattered",
    "zipf",
    "hotcold",
    "readmostly",
    "allocate",
]
Variant = Literal["patched", "unpatched"]
Sanitizer = Literal["address", "thread"]
"""What the compiler checks while QEMU runs: addresses and undefined behaviour, or data races."""
Mechanism = Literal["background", "precopy", "stopped"]
Zero = Literal["unlimited", "automatic", "none"]
"""What the 0 of a parameter stands for, where it is not a number."""

MIN_RAM_MIB: Mapping[str, int] = types.MappingProxyType({"linux": 128, "micro": 16})
"""By guest.  Linux unpacks its initramfs in this much; less ends in a panic at boot."""

RAM_RESERVE_MIB: Mapping[str, int] = types.MappingProxyType({"linux": 96, "micro": 8})
"""By guest, what a working set can not have: the kernel, its page tables and the initramfs."""

MICRO_TABLES_SHARE = 64
"""A MiB of so much of the microguest's working set goes to page tables and versions, and more."""

PAGE_KIB = (4, 2048)
"""Sizes of the pages that the microguest can map its working set by."""

HUGE_PAGE_MIB = 2
"""What guest RAM of the kind `hugetlb` consists of."""

DEFAULT_CHUNK_KIB = 2048
"""What the engine `copy` releases at a time by default."""

MAX_VCPUS = 255
"""The limit of QEMU's `pc` machine type."""

THREADED_DISKS: tuple[DiskKind, ...] = ("virtio", "scsi")
"""Disks that may be served in a thread of their own."""

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


def _require(condition: bool, cause: str, remedy: str) -> None:
    if not condition:
        raise UsageError(cause, remedy)


def _require_choice(name: str, value: str, choices: object) -> None:
    allowed = typing.get_args(choices)
    _require(value in allowed, f"unknown {name} {value!r}", f"choose from: {', '.join(allowed)}")


def _require_int(name: str, value: object, low: int, high: int) -> None:
    # bool is an int, and True would pass for 1.
    good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _require(good, f"{name} is {value!r}", f"give a whole number from {low} to {high}")


def _require_bool(name: str, value: object) -> None:
    _require(isinstance(value, bool), f"{name} is {value!r}", "give True or False")


def _require_strings(name: str, value: object) -> None:
    good = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    _require(good, f"{name} is {value!r}", "give a tuple of strings")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The virtual machine: RAM, vCPUs, a serial port, and the devices named here.

    `chipset` is QEMU's machine type, `pc` (i440FX) or `q35`, of whose versions QEMU takes its
    newest.

    `guest` is what runs in it: a Linux that runs the workload as a program, or the microguest,
    which is the workload and nothing else: no kernel, no devices, and a vCPU for each writer.  It
    boots in 30 to 70 ms, and is the one guest that runs under a KVM that is PVM.

    `accel` "auto" is KVM where a guest of this kind is seen to run under it, and TCG elsewhere;
    `lab.accelerator` finds out, and a machine that runs has the one or the other.

    `ram_kind` is what backs guest RAM; `lab.ram` says what each kind is.
    `thp` False forbids transparent huge pages to the QEMU process, True asks for them (QEMU asks
    by itself, so True only states what is expected) and None leaves the host's policy as it is.

    A device that is there is also used: the guest reads and writes its disk past its own cache,
    exchanges packets with QEMU's user network (which leads nowhere else), and draws on the
    screen that `vnc` shows; a balloon is moved from outside, and told of free pages by the guest
    itself with `balloon_reporting`.  `lab.devices` builds them.  The disk is a scratch disk: empty
    at every boot, and at every restore, because an image is of memory.

    Two are not the guest's to use, so the microguest may have them as well: `flash`, which the
    machine then boots its firmware from, and a second one that the lab writes to (`lab.flash`);
    and with `undriven` a random number generator and a serial port of virtio, which no guest of
    the lab has a driver for.

    `fault_around_pages` and `chunk_kib` are sizes of the engine `copy`, which only the patched QEMU
    has: how many pages a fault takes along (0: the engine chooses by how densely the guest writes),
    and how much memory the sweep releases at a time.  Both are powers of two.

    `extra_args` go to the end of QEMU's command line, for what has no parameter here.

    Raises `UsageError` for values that can not work.
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
    extra_args: tuple[str, ...] = field(
        default=(), metadata={"help": "one more QEMU argument; repeatable", "flag": "extra-arg"}
    )

    def __post_init__(self) -> None:
        _require_choice("guest", self.guest, GuestKind)
        _require_int("ram_mib", self.ram_mib, MIN_RAM_MIB[self.guest], 1024 * 1024)
        _require_int("vcpus", self.vcpus, 1, MAX_VCPUS)
        _require_choice("accel", self.accel, Accel)
        _require_choice("ram_kind", self.ram_kind, RamKind)
        huge = self.ram_kind == "hugetlb"
        _require(
            not huge or self.ram_mib % HUGE_PAGE_MIB == 0,
            f"{self.ram_mib} MiB of RAM can not be made of huge pages of {HUGE_PAGE_MIB} MiB",
            f"use a multiple of {HUGE_PAGE_MIB}, or another ram_kind",
        )
        _require(
            not (huge and self.thp),
            "RAM of huge pages can not have transparent ones",
            "leave thp unset, or use another ram_kind",
        )
        _require_choice("chipset", self.chipset, Chipset)
        for name in BOOLEAN_DEVICES:
            _require_bool(name, getattr(self, name))
        self._check_guest()
        self._check_disk()
        self._check_sizes()
        _require_strings("extra_args", self.extra_args)

    @property
    def sets_sizes(self) -> bool:
        """Whether sizes of the engine `copy` are asked for that are not the engine's own."""
        return (self.fault_around_pages, self.chunk_kib) != (0, DEFAULT_CHUNK_KIB)

    def _check_sizes(self) -> None:
        _require_int("fault_around_pages", self.fault_around_pages, 0, 1 << 20)
        _require_int("chunk_kib", self.chunk_kib, 64 * 4, 1 << 20)
        for name in ("fault_around_pages", "chunk_kib"):
            value = getattr(self, name)
            _require(value & (value - 1) == 0, f"{name} is {value}", "give a power of two")
        _require(
            self.fault_around_pages * 4 <= self.chunk_kib,
            f"{self.fault_around_pages} pages are more than a chunk of {self.chunk_kib} KiB",
            "use fewer fault_around_pages, or a larger chunk_kib",
        )

    def _check_guest(self) -> None:
        devices = {name: getattr(self, name) for name in ("disk", "net", "vnc", "balloon")}
        used = [name for name, value in devices.items() if value not in ("none", False)]
        _require(
            self.guest == "linux" or not used,
            f"the microguest has no driver for {', '.join(used)}",
            "use guest linux, or leave devices unset",
        )
        _require(
            self.balloon or not self.balloon_reporting,
            "free pages are to be reported and there is no balloon",
            "ask for a balloon as well, or leave balloon_reporting unset",
        )

    def _check_disk(self) -> None:
        _require_choice("disk", self.disk, DiskKind)
        _require(
            self.disk != "ide" or self.chipset == "pc",
            "a q35 has no IDE disk but an AHCI one, which the guest's kernel has no driver for",
            "choose disk virtio or scsi, or chipset pc",
        )
        _require_choice("disk_cache", self.disk_cache, DiskCache)
        _require_choice("disk_aio", self.disk_aio, DiskAio)
        described = (self.disk_cache, self.disk_aio, self.disk_iothread)
        _require(
            self.disk != "none" or described == ("writeback", "threads", False),
            "disk_cache, disk_aio or disk_iothread is given and there is no disk",
            "choose disk ide, virtio or scsi as well",
        )
        _require(
            self.disk_aio != "native" or self.disk_cache == "none",
            f"disk_aio native does not work with disk_cache {self.disk_cache}",
            "use disk_cache none, or disk_aio threads",
        )
        _require(
            not self.disk_iothread or self.disk in THREADED_DISKS,
            f"an {self.disk} disk can not have an I/O thread",
            f"choose disk {' or '.join(THREADED_DISKS)}, or leave disk_iothread unset",
        )


@dataclass(frozen=True)
class Workload:
    """What the guest does: `threads` writers, each over its share of a working set of `wss_mib`.

    An operation checks one page and writes three words of it, except where the table says more;
    `lab/guest/README.md` defines each kind to the bit.

    ============  =====================================================  ===========================
    kind          pages                                                  stands for
    ============  =====================================================  ===========================
    `idle`        none                                                   a standby
    `sequential`  one after the other, over and over                     a log writer, a stream
    `random`      any, uniformly: nothing to foresee or cache            the worst case
    `scattered`   one in 64, uniformly                                   a hash index, large records
    `zipf`        the page of rank r in proportion to 1/r, ranks spread  a key-value cache
    `hotcold`     9 of 10 to a tenth that moves on, uniformly            a database's buffer pool
    `readmostly`  any, uniformly; 9 of 10 operations only read           a web server, its cache
    `allocate`    given back to the guest's kernel and touched anew      compilers, a collected heap
    ============  =====================================================  ===========================

    `seed` fixes the sequence of pages, so that a host can replay it (`allocate` takes no part in
    that).  With `time_writes` the guest times each operation, which makes all of them slower.

    Writers work as fast as they can, or all together at `rate_ops_per_s`.  That is a program which
    has so much to do and is idle otherwise: a delay of up to 10 ms is made up for, and what a
    longer one cost is lost.

    The microguest can map its working set by pages of 2 MiB (`page_kib` 2048), as a guest with
    transparent huge pages of its own does.  It does not allocate, has no more writers than vCPUs,
    and does not sleep: a paced or an idle one keeps its vCPUs busy with waiting.

    Raises `UsageError` for values that can not work.
    """

    kind: WorkloadKind = field(
        default="random",
        metadata={
            "help": "what the guest writes",
            "dimension": "workload",
            "doc": "what the guest runs",
        },
    )
    _: dataclasses.KW_ONLY
    wss_mib: int = field(
        default=256,
        metadata={
            "help": "working set in MiB",
            "unit": "MiB",
            "title": "working set",
            "doc": "working set the guest writes to",
        },
    )
    threads: int = field(
        default=1, metadata={"help": "writer threads in the guest", "unit": "1", "title": "writers"}
    )
    seed: int = field(default=1, metadata={"help": "seed of the page sequence"})
    time_writes: bool = field(
        default=False, metadata={"help": "have the guest time each operation, which slows it down"}
    )
    rate_ops_per_s: int = field(
        default=0,
        metadata={
            "help": "operations of all writers in a second; 0: as many as they can do",
            "unit": "1/s",
            "title": "rate asked of the guest",
            "zero": "unlimited",
            "doc": "operations that the guest was to do in a second; 0: as many as it could",
        },
    )
    page_kib: int = field(
        default=4,
        metadata={
            "help": "guest pages that map the working set: 4, or 2048 in the microguest",
            "unit": "KiB",
            "title": "guest page",
        },
    )

    def __post_init__(self) -> None:
        _require_choice("workload", self.kind, WorkloadKind)
        _require_int("wss_mib", self.wss_mib, 1, 1024 * 1024)
        _require_int("threads", self.threads, 1, 62)  # counters that fit into the progress page
        _require_int("seed", self.seed, 0, 2**63 - 1)
        _require(
            not (self.time_writes and self.kind == "idle"),
            "an idle guest has no writes to time",
            "choose another workload, or time_writes=False",
        )
        _require_int("rate_ops_per_s", self.rate_ops_per_s, 0, 1_000_000_000)
        _require(
            not (self.rate_ops_per_s and self.kind == "idle"),
            "an idle guest has no rate of writes",
            "choose another workload, or rate_ops_per_s=0",
        )
        _require(
            self.page_kib in PAGE_KIB,
            f"page_kib is {self.page_kib!r}",
            f"choose from: {', '.join(map(str, PAGE_KIB))}",
        )


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """What watches a measured snapshot, besides the guest's progress, which is always sampled
    because cost is computed from it.

    Each can be left out, to see what it costs itself.  What an instrument that is left out would
    have found is unknown.  A guest that times its operations is another workload
    (`Workload.time_writes`).

    `sample_interval_us` is the distance of the samples of progress.  With `known_faults` the lab
    itself writes to so many protected pages while the snapshot is taken, and counts them in the
    fault log: `lab.instruments.knownfaults`.  With `rebuild_huge_pages`, once all else has been
    recorded, what the snapshot split is put together again: `lab.hugepages`.
    """

    log_faults: bool = field(
        default=True, metadata={"help": "log every write fault, where QEMU can; on by default"}
    )
    time_threads: bool = field(
        default=True,
        metadata={"help": "record the CPU time of QEMU's threads; on by default", "earlier": False},
    )
    read_host_memory: bool = field(
        default=True,
        metadata={
            "help": "record what is left behind in the host's memory; on by default",
            "earlier": False,
        },
    )

    sample_interval_us: int = field(
        default=1000,
        metadata={
            "help": "distance of the samples of the guest's progress",
            "unit": "us",
            "title": "between samples",
        },
    )
    known_faults: int = field(
        default=0,
        metadata={
            "help": "protected pages that the lab itself writes to, to check the fault log",
            "unit": "1",
            "zero": "none",
        },
    )

    rebuild_huge_pages: bool = field(
        default=False,
        metadata={
            "help": "afterwards put guest RAM into huge pages again, and see what that is worth"
        },
    )

    def __post_init__(self) -> None:
        for name in ("log_faults", "time_threads", "read_host_memory", "rebuild_huge_pages"):
            _require_bool(name, getattr(self, name))
        # More than a second apart there may be no two samples before the request.
        _require_int("sample_interval_us", self.sample_interval_us, 100, 100_000)
        _require_int("known_faults", self.known_faults, 0, 4096)
        _require(
            self.log_faults or not self.known_faults,
            "known_faults are to be counted in the fault log, which is left out",
            "leave known_faults at 0, or log faults",
        )


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What the image is written to.

    With `storage_mib_per_s`, a disk of that rate is put between QEMU and the file (`lab.storage`):
    no MiB of the image is written sooner, and QEMU waits for it.  That is a rate alone; nothing is
    done to how long a single write takes, nor to the page cache that the file is written to.

    Raises `UsageError` for values that can not work.
    """

    storage_mib_per_s: int = field(
        default=0,
        metadata={
            "help": "write the image no faster than this; 0: as fast as the disk goes",
            "unit": "MiB/s",
            "title": "rate of the storage",
            "zero": "unlimited",
            "doc": "the image was written no faster than this; 0: as fast as the disk went",
        },
    )

    def __post_init__(self) -> None:
        _require_int("storage_mib_per_s", self.storage_mib_per_s, 0, 1024 * 1024)


MAPPED_RAM = "mapped-ram"
"""The capability that changes the image's format, and so is needed to restore it as well."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to take a snapshot.

    `binary` is the QEMU it needs (`any`: either), `engine` the patched binary's
    `x-snapshot-engine` or None, `mechanism` what QEMU does:
    `background` saves RAM while the guest runs, in the state of one instant; `precopy` copies
    RAM while the guest runs until little is left and stops it for the rest; `stopped` stops the
    guest for all of it.  `live` is whether the image shows the instant of the request, and
    `direct_io` whether pages are written past the host's page cache, which the file system of the
    image has to permit.
    """

    name: str
    title: str
    binary: Literal["patched", "unpatched", "any"]
    mechanism: Mechanism
    live: bool
    engine: str | None = None
    capabilities: tuple[str, ...] = ()
    direct_io: bool = False

    @property
    def is_stream(self) -> bool:
        """Whether its image is written from the first byte to the last, so that a pipe would do."""
        return MAPPED_RAM not in self.capabilities and not self.direct_io

    def runs_on(self, variant: str) -> bool:
        """Return whether the QEMU `variant` (`patched` or `unpatched`) can do this method."""
        return self.binary in ("any", variant)

    @property
    def preferred_variant(self) -> Variant:
        """The QEMU to measure this method with: the unpatched one wherever that can do it."""
        return "patched" if self.binary == "patched" else "unpatched"


def _methods() -> Iterator[Method]:
    background = ("background-snapshot",)
    yield Method(
        name="live",
        title="live, a fault thread copies pages aside, a sweep releases memory in chunks",
        binary="patched",
        mechanism="background",
        live=True,
        engine="copy",
        capabilities=background,
    )
    yield Method(
        name="live-rfc",
        title="live, a fault thread hands pages to the snapshot thread (the RFC's design)",
        binary="patched",
        mechanism="background",
        live=True,
        engine="rfc",
        capabilities=background,
    )
    yield Method(
        name="live-inline",
        title="live, one thread for faults and sweep (upstream's engine in the patched QEMU)",
        binary="patched",
        mechanism="background",
        live=True,
        engine="inline",
        capabilities=background,
    )
    yield Method(
        name="live-mapped",
        title="live, into a file where each page has its place (mapped-ram)",
        binary="patched",
        mechanism="background",
        live=True,
        engine="copy",
        capabilities=(*background, MAPPED_RAM),
    )
    yield Method(
        name="live-direct",
        title="live, into a file where each page has its place, past the host's page cache",
        binary="patched",
        mechanism="background",
        live=True,
        engine="copy",
        capabilities=(*background, MAPPED_RAM),
        direct_io=True,
    )
    yield Method(
        name="live-inline-mapped",
        title="live, upstream's engine, into a file where each page has its place",
        binary="patched",
        mechanism="background",
        live=True,
        engine="inline",
        capabilities=(*background, MAPPED_RAM),
    )
    yield Method(
        name="background",
        title="live, unpatched QEMU's own background-snapshot",
        binary="unpatched",
        mechanism="background",
        live=True,
        capabilities=background,
    )
    yield Method(
        name="migrate-to-file",
        title="ordinary precopy migration to a file, then continue",
        binary="any",
        mechanism="precopy",
        live=False,
    )
    yield Method(
        name="stop-and-copy",
        title="stop, migrate to a file, continue",
        binary="any",
        mechanism="stopped",
        live=True,
    )


METHODS: Mapping[str, Method] = types.MappingProxyType({m.name: m for m in _methods()})
"""Every method by name, in the order in which tables and figures show them."""


def method(name: str) -> Method:
    """Return the method called `name`; raise `UsageError` when there is none."""
    found = METHODS.get(name)
    if found is None:
        raise UsageError(f"unknown method {name!r}", f"choose from: {', '.join(METHODS)}")
    return found


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One thing to measure: a machine, its workload, the method, by name, the storage that the
    image goes to, and what watches it.

    Raises `UsageError` when they can not go together.
    """

    machine: Machine = field(default_factory=Machine)
    workload: Workload = field(default_factory=Workload)
    method: str = "live"
    storage: Storage = field(default_factory=Storage)
    instruments: Instruments = field(default_factory=Instruments)

    def __post_init__(self) -> None:
        check_storage(method(self.method), self.storage)
        check_fit(self.machine, self.workload)
        _require(
            not self.machine.sets_sizes or method(self.method).runs_on("patched"),
            f"{self.method} is of the unpatched QEMU, which has no engine copy to give sizes to",
            "leave fault_around_pages and chunk_kib unset, or choose another method",
        )
        if self.instruments.known_faults:
            _require(
                method(self.method).engine is not None,
                f"{self.method} has no fault log to count known_faults in",
                "choose a live method, or leave known_faults at 0",
            )
            _require(
                self.workload.kind == "idle",
                f"a guest with the workload {self.workload.kind} writes to the pages of "
                "known_faults itself",
                "use the workload idle",
            )

    @property
    def variant(self) -> Variant:
        """The QEMU binary that this scenario is measured with."""
        return "patched" if self.machine.sets_sizes else method(self.method).preferred_variant


def check_fit(machine: Machine, workload: Workload) -> None:
    """Raise `UsageError` unless the machine's guest can do this: the working set fits into its RAM,
    and it is not the microguest that is asked for what that can not.
    """
    room_mib = machine.ram_mib - RAM_RESERVE_MIB[machine.guest]
    if machine.guest == "micro":
        room_mib -= -(-workload.wss_mib // MICRO_TABLES_SHARE)
        _check_micro(machine, workload)
    else:
        _require(
            workload.page_kib == PAGE_KIB[0],
            "the Linux guest maps its working set by pages of 4 KiB",
            "leave page_kib unset, or use guest micro",
        )
    _require(
        # The working set of an idle microguest is there all the same.
        (workload.kind == "idle" and machine.guest == "linux") or workload.wss_mib <= room_mib,
        f"a working set of {workload.wss_mib} MiB does not fit into {machine.ram_mib} MiB of RAM",
        f"use wss_mib={max(room_mib, 1)} or less, or more RAM",
    )


def _check_micro(machine: Machine, workload: Workload) -> None:
    _require(
        workload.kind != "allocate",
        "the microguest has no kernel that it could give memory back to",
        "choose another workload, or guest linux",
    )
    _require(
        workload.kind == "idle" or workload.threads <= machine.vcpus,
        f"{workload.threads} writers of the microguest need as many vCPUs",
        f"use vcpus={workload.threads} or more, or fewer threads",
    )


def check_storage(how: Method, storage: Storage) -> None:
    """Raise `UsageError` unless the method can write to the storage."""
    _require(
        not storage.storage_mib_per_s or how.is_stream,
        f"{how.name} writes here and there in a file, which storage of a limited rate is not",
        "leave storage_mib_per_s at 0, or choose from: "
        + ", ".join(m.name for m in METHODS.values() if m.is_stream),
    )


# Derived: command line flags, JSON, dimensions


def _flag(f: "dataclasses.Field[Any]") -> str:
    name: str = f.metadata.get("flag", f.metadata.get("dimension", f.name))
    return "--" + name.replace("_", "-")


def _destination(f: "dataclasses.Field[Any]") -> str:
    return str(f.metadata.get("dimension", f.name))


def add_arguments(parser: argparse._ActionsContainer, cls: "type[DataclassInstance]") -> None:
    """Add one flag to `parser` for each field of `cls`, which is a part of a scenario."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint, help_text = hints[f.name], f.metadata.get("help", "")
        common: dict[str, Any] = {"dest": _destination(f), "default": f.default}
        if hint is int:
            parser.add_argument(
                _flag(f), type=int, metavar="N", help=f"{help_text} (default {f.default})", **common
            )
        elif typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            parser.add_argument(
                _flag(f), choices=choices, help=f"{help_text} (default {f.default})", **common
            )
        elif hint in (bool, bool | None):
            parser.add_argument(
                _flag(f), action=argparse.BooleanOptionalAction, help=help_text, **common
            )
        elif hint == tuple[str, ...]:
            parser.add_argument(
                _flag(f), action="append", metavar="ARG", help=help_text, **common | {"default": []}
            )
        else:
            raise TypeError(f"no command line form for {cls.__name__}.{f.name}: {hint}")


def from_arguments(cls: type[_T], namespace: argparse.Namespace) -> _T:
    """Build a `cls` from the flags that `add_arguments` added."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        value = getattr(namespace, _destination(f))
        values[f.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def dimensions(value: "DataclassInstance") -> dict[str, Any]:
    """Return the parameters of `value` as one flat dictionary of table columns.

    A scenario gives the parameters of all its parts, `method`, `engine` and `variant` together.
    """
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            flat |= dimensions(item)
        else:
            flat[_destination(f)] = item
    if isinstance(value, Scenario):
        flat |= {"engine": method(value.method).engine, "variant": value.variant}
    return flat


def parse_dimension(name: str, text: str) -> Any:
    """Return the value that `text` means for the parameter of a part of a scenario called `name`,
    with dashes or underscores, as a flag of the command line would have it.

    :raise UsageError: there is no such parameter, or `text` is no value of its type.
    """
    cls, f = _parameter(name)
    hint = typing.get_type_hints(cls)[f.name]
    if typing.get_origin(hint) is Literal:
        _require_choice(_destination(f), text, hint)
        return text
    if hint in (bool, bool | None):
        names = {"yes": True, "no": False} | ({} if hint is bool else {"default": None})
        _require(text in names, f"{name} is {text!r}", f"choose from: {', '.join(names)}")
        return names[text]
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r}", "give a whole number") from None


# The parts of a scenario that have parameters, and what its JSON calls them.
_PARTS: Mapping[type[Any], str] = {
    Machine: "machine",
    Workload: "workload",
    Storage: "storage",
    Instruments: "instruments",
}


def replace_dimensions(
    machine: Machine,
    workload: Workload,
    storage: Storage,
    instruments: Instruments,
    changes: Mapping[str, Any],
) -> tuple[Machine, Workload, Storage, Instruments]:
    """Return all with the parameters in `changes` replaced, which are named as in tables.

    :raise UsageError: there is no such parameter, or a value that can not work.
    """
    of: dict[type[Any], dict[str, Any]] = {cls: {} for cls in _PARTS}
    for name, value in changes.items():
        cls, f = _parameter(name)
        of[cls][f.name] = value
    return (
        dataclasses.replace(machine, **of[Machine]),
        dataclasses.replace(workload, **of[Workload]),
        dataclasses.replace(storage, **of[Storage]),
        dataclasses.replace(instruments, **of[Instruments]),
    )


_PARAMETERS: "Mapping[str, tuple[type[Any], dataclasses.Field[Any]]]" = {
    _destination(f): (cls, f)
    for cls in _PARTS
    for f in dataclasses.fields(cls)
    if f.name != "extra_args"
}


def _parameter(name: str) -> "tuple[type[Any], dataclasses.Field[Any]]":
    found = _PARAMETERS.get(name.replace("-", "_"))
    if found is None:
        known = ", ".join(_PARAMETERS)
        raise UsageError(f"there is no parameter {name!r}", f"choose from: {known}")
    return found


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """Something in which scenarios differ: the method, or a parameter of one of their parts.

    `unit` is empty for what is no number.  `title` names it on an axis.  `order` is the order of
    its values in tables and figures; where it is empty they are numbers and go up.  `zero` is what
    0 stands for, where it is not a number of the unit: `unlimited` comes after every number,
    `automatic` and `none` before.
    """

    name: str
    unit: str = ""
    doc: str
    title: str
    order: tuple[Any, ...] = ()
    zero: Zero | None = None

    @property
    def heading(self) -> str:
        """Its title with its unit."""
        return self.title if self.unit in ("", "1") else f"{self.title}, {self.unit}"

    def is_number(self, value: object) -> bool:
        """Whether a value has a place among numbers: a line may lead from it to the next."""
        return not self.order and not (self.zero and value == 0)

    def place(self, value: Any) -> tuple[int, Any]:
        """A key that sorts its values; those that the lab does not know any more come last."""
        if self.order:
            known = value in self.order
            return (0, self.order.index(value)) if known else (1, str(value))
        if not isinstance(value, int | float):
            return (3, str(value))
        if self.is_number(value):
            return (1, value)
        return (2 if self.zero == "unlimited" else 0, 0)

    def shown(self, value: object) -> str:
        """A value for people."""
        return self.zero if self.zero and value == 0 else _shown(value)


def _dimension(name: str) -> Dimension:
    cls, f = _parameter(name)
    hint = typing.get_type_hints(cls)[f.name]
    orders = {bool: (False, True), bool | None: (None, False, True)}
    order = typing.get_args(hint) if typing.get_origin(hint) is Literal else orders.get(hint, ())
    return Dimension(
        name=name,
        unit=f.metadata.get("unit", ""),
        doc=f.metadata.get("doc", f.metadata["help"]),
        title=f.metadata.get("title", name.replace("_", " ")),
        order=order,
        zero=f.metadata.get("zero"),
    )


DIMENSIONS: Mapping[str, Dimension] = types.MappingProxyType(
    {
        "method": Dimension(
            name="method", doc="how the snapshot was taken", title="method", order=tuple(METHODS)
        )
    }
    | {name: _dimension(name) for name in _PARAMETERS}
)
"""Everything in which scenarios can differ, by name; the method is one of them."""


def recorded_dimension(scenario: Mapping[str, Any], name: str) -> Any:
    """Return the parameter called `name` of a scenario's JSON; when it is not there, what it was.

    A recording of an older version of the lab does not name what did not exist then.
    """
    cls, f = _parameter(name)
    return scenario.get(_PARTS[cls], {}).get(f.name, f.metadata.get("earlier", f.default))


def case_name(method: str, values: Mapping[str, Any]) -> str:
    """Return what a table calls a method measured with these values of what is varied."""
    return ", ".join([method, *(f"{name}={_shown(value)}" for name, value in values.items())])


def _shown(value: Any) -> str:
    names = {True: "yes", False: "no", None: "default"}
    return names[value] if value is None or isinstance(value, bool) else str(value)


def to_json(value: "DataclassInstance") -> dict[str, Any]:
    """Return `value` as what JSON can hold."""
    # Not `value` itself: of a field that `from_json` left at its default nothing would be written.
    result: dict[str, Any] = msgspec.to_builtins(dataclasses.asdict(value))
    return result


def from_json(cls: type[_T], data: object) -> _T:
    """Build a `cls` from parsed JSON.

    Types are not coerced, and a key that no field has is an error, so that a file of a newer
    version is never read in part.  What did not exist when it was written is as it was then.
    Raises `UsageError`.
    """
    _reject_unknown_keys(cls, data, "$")
    try:
        return msgspec.convert(_with_earlier(cls, data), cls)
    except msgspec.ValidationError as err:
        # A UsageError of __post_init__ arrives as the cause, already in one line.
        if isinstance(err.__cause__, UsageError):
            raise err.__cause__ from None
        raise UsageError(f"not a {cls.__name__.lower()}: {err}", "check the file") from err


def _with_earlier(cls: "type[DataclassInstance]", data: object) -> object:
    if not isinstance(data, dict):
        return data
    hints = typing.get_type_hints(cls)
    filled = dict(data)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            if part := _with_earlier(hints[f.name], data.get(f.name, {})):
                filled[f.name] = part
        elif "earlier" in f.metadata:
            filled.setdefault(f.name, f.metadata["earlier"])
    return filled


def _reject_unknown_keys(cls: "type[DataclassInstance]", data: object, where: str) -> None:
    if not isinstance(data, dict):
        return
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - {f.name for f in dataclasses.fields(cls)})
    _require(
        not unknown,
        f"unknown {cls.__name__.lower()} parameter {', '.join(map(str, unknown))} at {where}",
        "use the version of the lab that wrote it",
    )
    for name, item in data.items():
        if dataclasses.is_dataclass(hints[name]):
            _reject_unknown_keys(hints[name], item, f"{where}.{name}")
