"""The checks of `lab doctor`: can this host do what the lab needs, and what if not."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lab.errors import HostError, LabError
from lab.guests.registry import GUESTS
from lab.host.cache import cache_dir
from lab.host.debian import missing_packages
from lab.host.info import cpu_governor, thp_settings
from lab.host.ksm import KSM, ksm_runs, merges_everything
from lab.host.limits import Limits, cpu_quota, memory_room, memory_rooms, process_limit
from lab.host.needs import COMFORTABLE_KERNEL, huge_pages, require_setpriv, uffd_remedy
from lab.host.probe import probe_uffd
from lab.host.room import room_bytes
from lab.host.running import running_qemus
from lab.qemu.build import VARIANTS, find_qemu
from lab.scenario.machine import HUGE_PAGE_MIB
from lab.vm.accelerator import kvm_guest_problem

Status = Literal["ok", "warn", "fail"]
# Write protection of anonymous memory came with Linux 5.7, of unpopulated pages with 6.4.
_OLDEST_KERNEL = (5, 7)
# Since "mm: remap unused subpages to shared zeropage when splitting isolated thp", until "mm/rmap:
# fix soft-dirty and uffd-wp bit loss when remapping zero-filled mTHP subpage to shared zeropage".
# That went to stable kernels too, so between these versions it is not known.
_ZERO_PAGES_LOSE_PROTECTION = ((6, 12), (6, 18))
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Check:
    """One answer of ``lab doctor``. ``fail``: the lab cannot take a live snapshot here."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


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
    newer = f"run on Linux {COMFORTABLE_KERNEL[0]}.{COMFORTABLE_KERNEL[1]} or newer"
    if version < _OLDEST_KERNEL:
        detail = f"{release} has no write protection by userfaultfd"
        return [Check(name="kernel", status="fail", detail=detail, remedy=newer)]
    if version < COMFORTABLE_KERNEL:
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
    governor = cpu_governor()
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
    checks = []
    for variant in VARIANTS:
        name = f"qemu {variant}"
        try:
            binary = find_qemu(variant)
            detail = f"{binary.version}, {binary.build_id}"
            checks.append(Check(name=name, status="ok", detail=detail))
        except LabError as error:
            checks.append(Check(name=name, status="warn", detail=error.cause, remedy=error.remedy))

    for guest in GUESTS.values():
        name = guest.limits.title
        try:
            found = guest.find()
            detail = f"{found.kernel_version}, {found.kernel_sha256[:16]}"
            checks.append(Check(name=name, status="ok", detail=detail))
        except LabError as error:
            checks.append(Check(name=name, status="warn", detail=error.cause, remedy=error.remedy))
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


async def kvm_checks() -> list[Check]:
    """Return what `lab doctor` says about KVM, by guest: each is booted, for a moment."""
    checks = []
    for kind, guest in GUESTS.items():
        name = f"kvm, {guest.limits.title}"
        try:
            problem = await kvm_guest_problem(kind)
        except HostError as error:
            checks.append(
                Check(
                    name=name,
                    status="warn",
                    detail=f"not tried: {error.cause}",
                    remedy=error.remedy,
                )
            )
            continue
        if problem:
            remedy = "it runs under TCG; for KVM use a host with hardware virtualisation"
            checks.append(Check(name=name, status="warn", detail=problem, remedy=remedy))
        else:
            checks.append(Check(name=name, status="ok", detail="a guest booted and worked"))
    return checks
