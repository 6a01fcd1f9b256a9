"""This host: what a run records about it, and whether it can do what the lab needs."""

import importlib.metadata
import itertools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import psutil

from lab.cache import cache_dir
from lab.errors import HostError, LabError
from lab.ksm import KSM, ksm_runs, merges_everything
from lab.limits import Limits, cpu_quota, memory_room, memory_rooms, process_limit
from lab.probe import KVM_DEVICE, UffdProbe, kvm_is_pvm, probe_kvm, probe_uffd
from lab.room import room_bytes
from lab.scenario import HUGE_PAGE_MIB, GuestKind

Status = Literal["ok", "warn", "fail"]

NAME_PREFIX = "lab-"
"""QEMU's `-name` begins with this, so that `lab doctor` can list a stray guest."""

_MARKER = re.compile(rf"^(?:guest=)?{NAME_PREFIX}[0-9a-f]{{8}}")
_RECORDED_LIBRARIES = (
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "matplotlib",
    "msgspec",
    "psutil",
    "qemu.qmp",
)
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_HUGE_PAGES = Path(f"/sys/kernel/mm/hugepages/hugepages-{HUGE_PAGE_MIB * 1024}kB")
# Write protection of anonymous memory came with Linux 5.7, of unpopulated pages with 6.4.
_OLDEST_KERNEL = (5, 7)
_COMFORTABLE_KERNEL = (6, 4)
# Since "mm: remap unused subpages to shared zeropage when splitting isolated thp", until "mm/rmap:
# fix soft-dirty and uffd-wp bit loss when remapping zero-filled mTHP subpage to shared zeropage".
# That went to stable kernels too, so between these versions it is not known.
_ZERO_PAGES_LOSE_PROTECTION = ((6, 12), (6, 18))
_MIB = 1 << 20


# --- What a run records ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HostInfo:
    """The host a measurement was made on, without what names it or its owner.

    ``virtualisation``: ``none``, ``vm``, ``container`` or ``vm+container``. ``kvm``: ``none``,
    ``pvm`` or ``present`` (a usable device node; see `lab.probe.probe_kvm` for whether it runs).
    ``governor``: the CPU frequency governors in use, empty where the kernel has none.
    ``thp``: files of ``/sys/kernel/mm/transparent_hugepage`` and the value selected in each.
    """

    cpu_model: str
    cpu_count: int
    numa_nodes: int
    memory_bytes: int
    swap_bytes: int
    page_size_bytes: int
    architecture: str
    kernel: str
    distribution: str
    virtualisation: str
    kvm: str
    governor: str
    clocksource: str
    thp: dict[str, str]
    python: str
    libraries: dict[str, str]
    limits: Limits | None = None
    """What the measuring process could use of it; None in sets that are older than this."""

    @classmethod
    def collect(cls) -> "HostInfo":
        """Read this host. Takes milliseconds and starts no process."""
        cpuinfo = _read("/proc/cpuinfo")
        model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
        return cls(
            cpu_model=model[1].strip() if model else platform.machine(),
            cpu_count=os.cpu_count() or 1,
            numa_nodes=len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
            memory_bytes=psutil.virtual_memory().total,
            swap_bytes=psutil.swap_memory().total,
            page_size_bytes=os.sysconf("SC_PAGESIZE"),
            architecture=platform.machine(),
            kernel=platform.release(),
            distribution=platform.freedesktop_os_release().get("PRETTY_NAME", ""),
            virtualisation=_virtualisation(cpuinfo),
            kvm=_kvm(),
            governor=_governor(),
            clocksource=_read(
                "/sys/devices/system/clocksource/clocksource0/current_clocksource"
            ).strip(),
            thp=thp_settings(),
            python=platform.python_version(),
            libraries=_libraries(),
            limits=Limits.collect(),
        )


def _read(path: str | Path) -> str:
    """A file of /proc or /sys, empty where this kernel has none."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def selected(setting: str) -> str:
    """The choice in brackets of a line such as ``always [madvise] never``, else the line."""
    match = re.search(r"\[([^\]]+)\]", setting)
    return match[1] if match else setting.strip()


def thp_settings() -> dict[str, str]:
    """The kernel's settings for transparent huge pages; empty where it has none."""
    names = ("enabled", "defrag", "shmem_enabled")
    return {name: selected(text) for name in names if (text := _read(_THP / name))}


def _virtualisation(cpuinfo: str) -> str:
    kinds = []
    if re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE):
        kinds.append("vm")
    markers = (Path("/.dockerenv"), Path("/run/.containerenv"), Path("/run/systemd/container"))
    if any(marker.exists() for marker in markers):
        kinds.append("container")
    return "+".join(kinds) or "none"


def _kvm() -> str:
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return "none"
    return "pvm" if kvm_is_pvm() else "present"


def _governor() -> str:
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return ",".join(sorted({_read(file).strip() for file in files}))


def _libraries() -> dict[str, str]:
    versions = {}
    for name in _RECORDED_LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


# --- What boot and snapshot ask for ----------------------------------------------------------


def uffd_remedy(probe: UffdProbe) -> str:
    """What to do about a userfaultfd that does not report all faults."""
    if probe.access == "user-mode-only" or "permitted" in probe.problem:
        return (
            "run as root, or give access: `sudo setfacl -m u:$USER:rw /dev/userfaultfd`,"
            " or `sudo sysctl vm.unprivileged_userfaultfd=1`"
        )
    return "run on a Linux kernel built with CONFIG_USERFAULTFD"


def require_uffd(features: Sequence[str] = ("wp",)) -> UffdProbe:
    """Check that live snapshots can protect memory here.

    :param features: names out of `lab.probe.UFFD_FEATURES` that must be there.
    :raise HostError: with cause and remedy.
    """
    probe = probe_uffd()
    if not probe.usable:
        raise HostError(f"userfaultfd cannot be used: {probe.problem}", uffd_remedy(probe))
    missing = [name for name in features if name not in probe.features]
    if missing:
        raise HostError(
            f"this kernel's userfaultfd has no {', '.join(missing)}",
            f"run on Linux {_COMFORTABLE_KERNEL[0]}.{_COMFORTABLE_KERNEL[1]} or newer",
        )
    return probe


def require_setpriv() -> str:
    """Return the path of the program that ties a guest's life to the lab's.

    :raise HostError: when it is missing.
    """
    path = shutil.which("setpriv")
    if path is None:
        raise HostError("the program setpriv is missing", "install the package util-linux")
    return path


def available_memory_mib() -> int:
    """What this process can allocate without swapping, and without being killed for it."""
    return memory_room().available // _MIB


def require_memory(needed_mib: int, what: str) -> None:
    """Check that so much memory can be had without swapping.

    :param what: what needs it, such as "1024 MiB of guest RAM".
    :raise HostError: when it cannot.
    """
    room = memory_room()
    if room.available < needed_mib * _MIB:
        raise HostError(
            f"{what} need {needed_mib} MiB of memory and {room.available // _MIB} MiB are available"
            f" of the {room.limit // _MIB} MiB of {room.owner}",
            room.remedy,
        )


def huge_pages() -> tuple[int, int]:
    """Return how many huge pages of 2 MiB the host has reserved, and how many of them are to be
    had.  Both are zero on a host without any.
    """
    counts = {
        name: int(_read(_HUGE_PAGES / f"{name}_hugepages") or 0) for name in ("nr", "free", "resv")
    }
    # Of the free ones some are promised to processes that have not touched them yet.
    return counts["nr"], max(counts["free"] - counts["resv"], 0)


def require_huge_pages(needed_mib: int, what: str) -> None:
    """Check that so much memory can be had in huge pages of 2 MiB.

    :param what: what needs it, such as "1024 MiB of guest RAM".
    :raise HostError: when it cannot.
    """
    needed = -(-needed_mib // HUGE_PAGE_MIB)
    reserved, available = huge_pages()
    if available < needed:
        raise HostError(
            f"{what} need {needed} huge pages and {available} of {reserved} are available",
            f"`sudo sysctl vm.nr_hugepages={reserved - available + needed}`, and as many again for"
            " a second guest; or use another ram_kind",
        )


def kvm_problem(guest: GuestKind) -> str:
    """Why a guest of this kind can not run under KVM here; empty when nothing is known that keeps
    it from that. Takes a moment: it runs an instruction.
    """
    if problem := probe_kvm():
        return problem
    if guest == "linux" and kvm_is_pvm():
        return "KVM runs, but it is PVM: a Linux guest does not boot under it"
    return ""


def require_kvm(guest: GuestKind) -> None:
    """Check that nothing is known that keeps such a guest from running under KVM here.

    :raise HostError: when something does.
    """
    if problem := kvm_problem(guest):
        other = ' or guest="micro"' if guest == "linux" and kvm_is_pvm() else ""
        raise HostError(problem, f'use accel="tcg"{other}; see `lab doctor`')


# --- The checks of `lab doctor` --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Check:
    """One answer of ``lab doctor``. ``fail``: the lab cannot take a live snapshot here."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class StrayQemu:
    """A running QEMU that carries the lab's marker, and whether whoever started it is gone."""

    pid: int
    name: str
    parent_pid: int
    orphaned: bool


def is_lab_command(command: Sequence[str]) -> str:
    """The name of a QEMU the lab started, empty for any other command."""
    for option, value in itertools.pairwise(command):
        if option == "-name" and _MARKER.match(value):
            return value.split(",")[0]
    return ""


def running_qemus() -> list[StrayQemu]:
    """List the QEMUs with the lab's marker. Only lists: they may belong to another session."""
    found = []
    for process in psutil.process_iter():
        try:
            name = is_lab_command(process.cmdline())
            if not name or process.status() == psutil.STATUS_ZOMBIE:
                continue
            parent = process.parent()
            orphaned = parent is None or parent.pid == 1 or parent.name() == "systemd"
            pid = 0 if parent is None else parent.pid
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        found.append(StrayQemu(pid=process.pid, name=name, parent_pid=pid, orphaned=orphaned))
    return found


def debian_packages() -> list[str]:
    """The Debian packages the lab needs, from ``debian-packages.txt``."""
    text = resources.files("lab").joinpath("debian-packages.txt").read_text(encoding="utf-8")
    return [name for line in text.splitlines() if (name := line.partition("#")[0].strip())]


def missing_packages() -> list[str]:
    """Those of `debian_packages` that are not installed; empty where there is no dpkg."""
    wanted = debian_packages()
    if shutil.which("dpkg-query") is None:
        return []
    done = subprocess.run(
        ["dpkg-query", "-W", "-f=${db:Status-Status} ${Package}\n", *wanted],
        capture_output=True,
        text=True,
        timeout=20,
    )
    installed = {
        line.removeprefix("installed ")
        for line in done.stdout.splitlines()
        if line.startswith("installed ")
    }
    return [name for name in wanted if name not in installed]


def kernel_version(release: str) -> tuple[int, int]:
    """The first two numbers of a kernel release such as ``6.1.0-18-cloud-amd64``."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _check_uffd() -> list[Check]:
    probe = probe_uffd()
    if not probe.usable:
        remedy = uffd_remedy(probe)
        return [Check(name="userfaultfd", status="fail", detail=probe.problem, remedy=remedy)]
    wanted: tuple[tuple[str, Status, str], ...] = (
        ("wp", "fail", "no live snapshot without write protection"),
        ("thread-id", "warn", "faults cannot be told apart by vCPU"),
        ("wp-unpopulated", "warn", "unpopulated pages have to be populated before each snapshot"),
        ("wp-hugetlbfs-shmem", "warn", "guest RAM in shared memory or huge pages is out of reach"),
        ("wp-async", "warn", "no asynchronous write tracking to compare with"),
    )
    checks = [Check(name="userfaultfd", status="ok", detail=f"by {probe.access}")]
    for feature, status, loss in wanted:
        name = f"userfaultfd {feature}"
        if feature in probe.features:
            checks.append(Check(name=name, status="ok", detail="supported"))
        else:
            newer = "run on a newer kernel"
            checks.append(Check(name=name, status=status, detail=loss, remedy=newer))
    return checks


def _check_kernel() -> list[Check]:
    release = platform.release()
    version = kernel_version(release)
    newer = f"run on Linux {_COMFORTABLE_KERNEL[0]}.{_COMFORTABLE_KERNEL[1]} or newer"
    if version < _OLDEST_KERNEL:
        detail = f"{release} has no write protection by userfaultfd"
        return [Check(name="kernel", status="fail", detail=detail, remedy=newer)]
    if version < _COMFORTABLE_KERNEL:
        detail = f"{release} cannot protect unpopulated pages"
        return [Check(name="kernel", status="warn", detail=detail, remedy=newer)]
    since, until = _ZERO_PAGES_LOSE_PROTECTION
    if since <= version < until:
        detail = (
            f"{release} may be one that takes the protection off pages full of zeros when memory is"
            " short and it splits a huge page: the image gets what is written there later"
        )
        remedy = (
            f'run on Linux {until[0]}.{until[1]} or newer, or on one with "mm/rmap: fix soft-dirty'
            ' and uffd-wp bit loss" in its list of changes; or use thp=False'
        )
        return [Check(name="kernel", status="warn", detail=detail, remedy=remedy)]
    return [Check(name="kernel", status="ok", detail=release)]


def _check_ksm() -> list[Check]:
    if not KSM.is_dir():
        return [Check(name="ksm", status="ok", detail="not in this kernel")]
    if not ksm_runs() and not merges_everything():
        return [Check(name="ksm", status="ok", detail="off")]
    detail = (
        "the kernel merges equal pages, which takes write protection off them: a live snapshot of a"
        " QEMU started by hand is silently wrong (the lab starts its own so that none is merged)"
    )
    remedy = (
        "start QEMU by hand with `-machine ...,mem-merge=off` and not in a unit with MemoryKSM=yes,"
        f" or `echo 2 | sudo tee {KSM / 'run'}`"
    )
    return [Check(name="ksm", status="warn", detail=detail, remedy=remedy)]


def _check_cpu() -> list[Check]:
    count = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    governor = _governor()
    here = f"{count} CPUs" if allowed == count else f"{allowed} of {count} CPUs, by affinity"
    if quota is not None and quota.cpus < allowed:
        detail = (
            f"{here}, of which the cgroup {quota.name} may use {quota.cpus:g} ({quota.file}): what"
            " is measured stands still when that is used up"
        )
        remedy = f"measure without {quota.file}, or give it to as many CPUs as there are"
        checks = [Check(name="cpu", status="warn", detail=detail, remedy=remedy)]
    elif allowed < 2:
        detail = f"{here}: guest, snapshot and sampler take turns, so latencies mean little"
        checks = [Check(name="cpu", status="warn", detail=detail, remedy="use two CPUs or more")]
    else:
        checks = [Check(name="cpu", status="ok", detail=here)]
    if governor and governor != "performance":
        remedy = "`sudo cpupower frequency-set -g performance` while measuring"
        checks.append(Check(name="governor", status="warn", detail=governor, remedy=remedy))
    else:
        checks.append(Check(name="governor", status="ok", detail=governor or "not ours to set"))
    return checks


def _check_thp() -> list[Check]:
    settings = thp_settings()
    detail = ", ".join(f"{key} {value}" for key, value in settings.items()) or "not in this kernel"
    return [Check(name="thp", status="ok", detail=detail)]


def _check_huge_pages() -> list[Check]:
    reserved, available = huge_pages()
    if not reserved:
        detail = f"no huge pages of {HUGE_PAGE_MIB} MiB reserved: no guest RAM of kind hugetlb"
        remedy = f"`sudo sysctl vm.nr_hugepages=N`, one for each {HUGE_PAGE_MIB} MiB of guest RAM"
        return [Check(name="huge pages", status="warn", detail=detail, remedy=remedy)]
    detail = f"{available} of {reserved} of {HUGE_PAGE_MIB} MiB available"
    return [Check(name="huge pages", status="ok", detail=detail)]


def _room(
    name: str, free_mib: int, low_mib: int, too_low_mib: int, remedy: str, of: str = ""
) -> Check:
    detail = f"{free_mib} MiB available{of}"
    if free_mib < too_low_mib:
        return Check(name=name, status="fail", detail=detail, remedy=remedy)
    if free_mib < low_mib:
        return Check(name=name, status="warn", detail=detail, remedy=remedy)
    return Check(name=name, status="ok", detail=detail)


def _check_room() -> list[Check]:
    memory = memory_room()
    of = f" of the {memory.limit // _MIB} MiB of {memory.owner}"
    disk_mib = max(room_bytes(cache_dir()), 0) // _MIB
    return [
        _room("memory", memory.available // _MIB, 3072, 768, memory.remedy, of),
        _room("disk", disk_mib, 6144, 1024, f"make room in {cache_dir()}, or set LAB_CACHE"),
        _check_limits(),
    ]


def _check_limits() -> Check:
    """Show what binds this process, besides CPUs; what is too low for a guest is said at its
    boot.
    """
    found = Limits.collect()
    binding = [f"{room.limit // _MIB} MiB of {room.owner}" for room in memory_rooms()[1:]]
    binding += [f"RLIMIT_{name} {value}" for name, value in found.process.items()]
    binding += [] if found.threads is None else [f"pids.max {found.threads}"]
    size = process_limit("FSIZE")
    if size is not None:
        detail = f"a file may not be larger than {size // _MIB} MiB (RLIMIT_FSIZE); " + "; ".join(
            binding
        )
        remedy = "`ulimit -f unlimited` before, or smaller guests: their images are as large as RAM"
        return Check(name="limits", status="warn", detail=detail, remedy=remedy)
    return Check(name="limits", status="ok", detail="; ".join(binding) or "none")


def _check_programs() -> list[Check]:
    checks = []
    try:
        require_setpriv()
        checks.append(Check(name="setpriv", status="ok", detail="there"))
    except HostError as error:
        checks.append(Check(name="setpriv", status="fail", detail=error.cause, remedy=error.remedy))
    missing = missing_packages()
    if missing:
        remedy = f"sudo apt-get install --no-install-recommends {' '.join(missing)}"
        detail = f"{len(missing)} of the Debian packages to build with are missing"
        checks.append(Check(name="packages", status="warn", detail=detail, remedy=remedy))
    elif shutil.which("dpkg-query") is None:
        detail = "not a Debian system; see lab/debian-packages.txt for what is needed"
        checks.append(Check(name="packages", status="warn", detail=detail))
    else:
        checks.append(Check(name="packages", status="ok", detail="all installed"))
    return checks


def _check_built() -> list[Check]:
    from lab.qemu.build import VARIANTS, find_qemu

    checks = []
    for variant in VARIANTS:
        name = f"qemu {variant}"
        try:
            binary = find_qemu(variant)
            detail = f"{binary.version}, {binary.build_id}"
            checks.append(Check(name=name, status="ok", detail=detail))
        except LabError as error:
            checks.append(Check(name=name, status="warn", detail=error.cause, remedy=error.remedy))
    from lab.guest.build import find_guest

    try:
        guest = find_guest()
        checks.append(Check(name="guest", status="ok", detail=f"Linux {guest.kernel_version}"))
    except LabError as error:
        checks.append(Check(name="guest", status="warn", detail=error.cause, remedy=error.remedy))
    return checks


def _check_strays() -> list[Check]:
    found = running_qemus()
    orphans = [qemu for qemu in found if qemu.orphaned]
    if orphans:
        pids = " ".join(str(qemu.pid) for qemu in orphans)
        detail = f"{len(orphans)} guests whose session is gone: {pids}"
        remedy = f"look at them, then `kill {pids}`"
        return [Check(name="stray guests", status="warn", detail=detail, remedy=remedy)]
    detail = f"none ({len(found)} guests of running sessions)" if found else "none"
    return [Check(name="stray guests", status="ok", detail=detail)]


_CHECKS: tuple[Callable[[], list[Check]], ...] = (
    _check_uffd,
    _check_kernel,
    _check_ksm,
    _check_cpu,
    _check_thp,
    _check_huge_pages,
    _check_room,
    _check_programs,
    _check_built,
    _check_strays,
)


def run_checks() -> list[Check]:
    """Run every check, which changes nothing on the host."""
    return [check for run in _CHECKS for check in run()]
