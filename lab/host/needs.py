"""What boot and snapshot ask of this host: each is there, or is an error with a remedy."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from lab.errors import HostError
from lab.host.files import kernel_text
from lab.host.limits import memory_room
from lab.host.probe import UffdProbe, kvm_is_pvm, probe_kvm, probe_uffd
from lab.scenario.guests import GUEST_LIMITS, GuestKind
from lab.scenario.machine import HUGE_PAGE_MIB

_MIB = 1 << 20
_HUGE_PAGES = Path(f"/sys/kernel/mm/hugepages/hugepages-{HUGE_PAGE_MIB * 1024}kB")
COMFORTABLE_KERNEL = (6, 4)


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

    :param features: names out of `lab.host.probe.UFFD_FEATURES` that must be there.
    :raise HostError: with cause and remedy.
    """
    probe = probe_uffd()
    if not probe.usable:
        raise HostError(f"userfaultfd cannot be used: {probe.problem}", uffd_remedy(probe))
    missing = [name for name in features if name not in probe.features]
    if missing:
        raise HostError(
            f"this kernel's userfaultfd has no {', '.join(missing)}",
            f"run on Linux {COMFORTABLE_KERNEL[0]}.{COMFORTABLE_KERNEL[1]} or newer",
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
        name: int(kernel_text(_HUGE_PAGES / f"{name}_hugepages") or 0)
        for name in ("nr", "free", "resv")
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
    """Why a guest of this kind cannot run under KVM here; empty when nothing is known that keeps
    it from that. Takes a moment: it runs an instruction.
    """
    if problem := probe_kvm():
        return problem
    limits = GUEST_LIMITS[guest]
    if not limits.runs_under_pvm and kvm_is_pvm():
        return f"KVM runs, but it is PVM: a {limits.title} does not boot under it"
    return ""


def require_kvm(guest: GuestKind) -> None:
    """Check that nothing is known that keeps such a guest from running under KVM here.

    :raise HostError: when something does.
    """
    if problem := kvm_problem(guest):
        choices = ['accel="tcg"']
        if not GUEST_LIMITS[guest].runs_under_pvm and kvm_is_pvm():
            able = [kind for kind, limits in GUEST_LIMITS.items() if limits.runs_under_pvm]
            choices += [f'guest="{kind}"' for kind in able]
        raise HostError(problem, f"use {' or '.join(choices)}; see `lab doctor`")


def may_write(pid: int, folder: Path) -> bool:
    """Whether a process may create files in a folder of this user's, which only it may enter."""
    try:
        uid = Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return False
    return uid in (0, folder.stat().st_uid)
