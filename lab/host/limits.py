"""What this process, and a QEMU that it starts, may use: less than the host has, in many places.

Limits come from control groups (cgroups, version 1 and 2, each group within its parents), from the
process itself (`RLIMIT_*`, the CPUs that it may run on) and from the host.  What counts is the
tightest.  Groups are found by what the kernel says in /proc/self/cgroup and /proc/self/mountinfo:
a container may have its own at any place, and see only some of its parents; the others bind it
as well, but nobody in it can know.

Not looked at: limits of a file system's quota, and how much time other groups leave of a CPU.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from lab.errors import HostError

_MIB = 1 << 20
# Version 1 says "no limit" by a number that no host has as memory.
_NO_LIMIT_BYTES = 1 << 60
_CAP_IPC_LOCK = 14
_CAP_SYS_ADMIN = 21
_CAP_SYS_RESOURCE = 24

QEMU_DESCRIPTORS = 64
"""Files that QEMU has open at most, besides one for each vCPU: some 25 while it takes a snapshot,
and what it opens for a moment."""

QEMU_THREADS = 16
"""Threads that QEMU has at most while it takes a snapshot, besides its vCPUs: some 8, and what
begins before another has ended.  QEMU aborts when it cannot start one."""

QEMU_DISK_THREADS = 64
"""What a disk may have besides, for requests that are on their way at once."""


# --- Control groups --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Group:
    """One control group that a process is in, by its place among the others.

    `name` is the path in its hierarchy, as far as this process can see it.
    """

    folder: Path
    name: str

    def text(self, file: str) -> str:
        """The contents of a file of the group, empty where there is none."""
        try:
            return (self.folder / file).read_text().strip()
        except OSError:
            return ""

    def number(self, file: str) -> int | None:
        """A file that holds one number; None where there is none, or it says that there is none."""
        text = self.text(file)
        return int(text) if re.fullmatch(r"-?\d+", text) else None

    def table(self, file: str) -> dict[str, int]:
        """A file with a name and a number in each line."""
        pairs = (line.split() for line in self.text(file).splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


@dataclass(frozen=True)
class _Mount:
    root: str
    place: Path
    controllers: frozenset[str]
    """Empty for version 2."""


def _unescaped(text: str) -> str:
    # A space, a tabulator, a line end and a backslash are written as octal numbers.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _mounts(mountinfo: str) -> Iterator[_Mount]:
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) < 5 or len(rest) < 3 or rest[0] not in ("cgroup", "cgroup2"):
            continue
        options = frozenset(rest[2].split(",")) if rest[0] == "cgroup" else frozenset[str]()
        yield _Mount(_unescaped(fields[3]), Path(_unescaped(fields[4])), options)


def groups(controller: str, pid: int | str = "self", proc: Path = Path("/proc")) -> list[Group]:
    """The groups of a process that may limit what `controller` controls, innermost first.

    Of either version: on a host that has both, a controller is in one of them, and the files of a
    group in which it is not are not there.

    :param controller: a name of version 1, such as `memory`, `cpu` or `pids`.
    :param proc: where procfs is.
    """
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
        mounts = list(_mounts((proc / "self" / "mountinfo").read_text()))
    except OSError:
        return []
    found: list[Group] = []
    for line in lines:
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        for mount in mounts:
            if controller in mount.controllers if names else not mount.controllers:
                found += _chain(mount, path)
                break
    return found


def _chain(mount: _Mount, path: str) -> Iterator[Group]:
    """The group of a path, and those around it up to the mount."""
    parts = Path(path).parts[1:]
    root = Path(mount.root).parts[1:]
    if parts[: len(root)] == root:
        parts = parts[len(root) :]
    if ".." in parts or not mount.place.joinpath(*parts).is_dir():
        # The path is one of another namespace: what can be seen is what is mounted.
        parts = ()
    for depth in range(len(parts), -1, -1):
        yield Group(folder=mount.place.joinpath(*parts[:depth]), name=f"/{'/'.join(parts[:depth])}")


# --- Memory ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much of something is to be had, and what keeps it from being more.

    `limit` is in the same unit; `owner` names who has the limit and where it is set.
    """

    available: int
    limit: int
    owner: str
    remedy: str


_MEMORY_FILES = (
    # limit, use, and in memory.stat what can be taken back at once: pages of files that nobody
    # has used twice, with what is in the groups below.
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.high", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def memory_rooms(within: Iterable[Group] | None = None) -> list[Room]:
    """Memory in bytes that can be had without swapping, by everything that limits it."""
    host = psutil.virtual_memory()
    rooms = [
        Room(
            available=host.available,
            limit=host.total,
            owner="this host",
            remedy="choose a smaller ram_mib, or stop other programs",
        )
    ]
    for group in groups("memory") if within is None else within:
        for limit_file, use_file, reclaimable in _MEMORY_FILES:
            limit, use = group.number(limit_file), group.number(use_file)
            if limit is None or use is None or limit >= _NO_LIMIT_BYTES:
                continue
            cache = min(group.table("memory.stat").get(reclaimable, 0), use)
            rooms.append(
                Room(
                    available=max(limit - use + cache, 0),
                    limit=limit,
                    owner=f"the cgroup {group.name} ({limit_file})",
                    remedy=f"choose a smaller ram_mib, or raise {group.folder / limit_file}",
                )
            )
    return rooms


def memory_room(within: Iterable[Group] | None = None) -> Room:
    """The tightest of `memory_rooms`."""
    return min(memory_rooms(within), key=lambda room: room.available)


def swap_bytes(within: Iterable[Group] | None = None) -> int:
    """Swap that this process may use, whether it is in use or not."""
    found = [psutil.swap_memory().total]
    for group in groups("memory") if within is None else within:
        limit = group.number("memory.swap.max")
        both, memory = (
            group.number("memory.memsw.limit_in_bytes"),
            group.number("memory.limit_in_bytes"),
        )
        if limit is not None:
            found.append(limit)
        elif both is not None and memory is not None and both < _NO_LIMIT_BYTES:
            found.append(max(both - memory, 0))
    return min(found)


class KilledForMemory:
    """Whether the kernel killed a process because its group was out of memory.

    Made while the process lives: nobody knows its groups afterwards.
    """

    def __init__(self, pid: int | str) -> None:
        self._groups = [(group, _kills(group)) for group in groups("memory", pid)]

    def why(self) -> str:
        """The group that was out of memory, as part of a sentence; empty when none was."""
        for group, before in self._groups:
            now = _kills(group)
            if before is not None and now is not None and now > before:
                rooms = memory_rooms([group])[1:]
                limit = f"{rooms[0].limit // _MIB} MiB of " if rooms else ""
                owner = rooms[0].owner if rooms else f"the cgroup {group.name}"
                return f"{limit}{owner} were used up"
        return ""


def _kills(group: Group) -> int | None:
    for file in ("memory.events", "memory.oom_control"):
        if (count := group.table(file).get("oom_kill")) is not None:
            return count
    return None


# --- CPUs ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Quota:
    """So many CPUs' time a group may have; `name` is the group's."""

    cpus: float
    name: str
    file: str


def _quota(group: Group) -> Quota | None:
    match = re.fullmatch(r"(\d+) (\d+)", group.text("cpu.max"))
    if match:
        return Quota(cpus=int(match[1]) / int(match[2]), name=group.name, file="cpu.max")
    quota, period = group.number("cpu.cfs_quota_us"), group.number("cpu.cfs_period_us")
    if quota is None or not period or quota <= 0:
        return None
    return Quota(cpus=quota / period, name=group.name, file="cpu.cfs_quota_us")


def cpu_quota(within: Iterable[Group] | None = None) -> Quota | None:
    """The tightest quota of CPU time, None where there is none."""
    found = [_quota(group) for group in (groups("cpu") if within is None else within)]
    return min((one for one in found if one), key=lambda quota: quota.cpus, default=None)


@dataclass(frozen=True, kw_only=True)
class Throttled:
    """How often, in how many of its periods, and for how long a group had no CPU time left."""

    periods: int = 0
    throttled_periods: int = 0
    throttled_ms: float = 0.0


class ThrottleCount:
    """Counts from now on how often a process's groups are kept from their CPUs by a quota."""

    def __init__(self, pid: int | str = "self", within: Iterable[Group] | None = None) -> None:
        found = groups("cpu", pid) if within is None else within
        self._before = [(group, _throttled(group)) for group in found if _quota(group)]

    def so_far(self) -> Throttled | None:
        """What it was of the group that was kept longest; None where there is no quota."""
        since = []
        for group, before in self._before:
            now = _throttled(group)
            since.append(
                Throttled(
                    periods=now.periods - before.periods,
                    throttled_periods=now.throttled_periods - before.throttled_periods,
                    throttled_ms=now.throttled_ms - before.throttled_ms,
                )
            )
        return max(since, key=lambda one: one.throttled_ms, default=None)


def _throttled(group: Group) -> Throttled:
    count = group.table("cpu.stat")
    # Version 2 counts in microseconds, version 1 in nanoseconds.
    time_ms = count.get("throttled_usec", 0) / 1e3 + count.get("throttled_time", 0) / 1e6
    return Throttled(
        periods=count.get("nr_periods", 0),
        throttled_periods=count.get("nr_throttled", 0),
        throttled_ms=time_ms,
    )


def usable_cpus() -> float:
    """How many CPUs this process may keep busy: those it may run on, and what it has time for."""
    quota = cpu_quota()
    allowed = float(len(os.sched_getaffinity(0)))
    return allowed if quota is None else min(allowed, quota.cpus)


# --- Limits of the process -------------------------------------------------------------------

LimitName = Literal["AS", "DATA", "FSIZE", "MEMLOCK", "NOFILE", "NPROC"]
# With what `ulimit` sets each of them, in which unit, and what the kernel calls it.
_ULIMIT: Mapping[LimitName, tuple[str, int, str]] = {
    "AS": ("v", 1024, "Max address space"),
    "DATA": ("d", 1024, "Max data size"),
    "FSIZE": ("f", 1024, "Max file size"),
    "MEMLOCK": ("l", 1024, "Max locked memory"),
    "NOFILE": ("n", 1, "Max open files"),
    "NPROC": ("u", 1, "Max processes"),
}


def process_limit(name: LimitName, pid: int | None = None) -> int | None:
    """A limit that a process has set for itself, or was started with; None: there is none, or
    the process has ended.

    :param pid: the process, of whatever user; by default this one.
    """
    said = _ULIMIT[name][2]
    try:
        # Everybody may read that, while prlimit() is for processes of the same user.
        text = Path(f"/proc/{pid or 'self'}/limits").read_text()
    except (FileNotFoundError, ProcessLookupError):
        # Whoever asks it for something next is told how it ended.
        return None
    soft = next(line[len(said) :].split()[0] for line in text.splitlines() if line.startswith(said))
    return None if soft == "unlimited" else int(soft)


def _remedy(name: LimitName, needed: int) -> str:
    option, unit, _ = _ULIMIT[name]
    return f"raise it first, such as by `ulimit -{option} {-(-needed // unit)}`"


def require_limit(name: LimitName, needed: int, what: str) -> None:
    """Check that a limit of the process, which QEMU inherits, is not lower than what is needed.

    :param needed: in bytes, except for NOFILE and NPROC.
    :param what: what needs it, such as "1024 MiB of guest RAM in a file".
    :raise HostError: naming the limit.
    """
    limit = process_limit(name)
    if limit is not None and limit < needed:
        unit = "" if name in ("NOFILE", "NPROC") else " bytes"
        raise HostError(
            f"{what} need RLIMIT_{name} to be {needed}{unit} or more, and it is {limit}{unit}",
            _remedy(name, needed),
        )


def capability(number: int) -> bool:
    """Whether this process has a capability."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> number & 1)


def require_lockable(needed_bytes: int, what: str) -> None:
    """Check that QEMU may lock so much memory.

    :raise HostError: naming the limit.
    """
    if not capability(_CAP_IPC_LOCK):
        require_limit("MEMLOCK", needed_bytes, what)


def require_threads(needed: int, what: str) -> None:
    """Check that so many more threads can be started, by this user and in the process's groups.

    :raise HostError: naming the limit.
    """
    for group in groups("pids"):
        limit, use = group.number("pids.max"), group.number("pids.current")
        if limit is not None and use is not None and limit - use < needed:
            raise HostError(
                f"{what} needs {needed} threads, and {max(limit - use, 0)} are left of the "
                f"{limit} of the cgroup {group.name} (pids.max)",
                f"stop other programs, or raise {group.folder / 'pids.max'}",
            )
    limit = process_limit("NPROC")
    # For these the kernel does not look at the limit.
    if limit is None or os.geteuid() == 0:
        return
    if capability(_CAP_SYS_RESOURCE) or capability(_CAP_SYS_ADMIN):
        return
    use = _threads_of(os.getuid())
    if limit - use < needed:
        raise HostError(
            f"{what} needs {needed} threads, and {max(limit - use, 0)} are left of RLIMIT_NPROC, "
            f"which is {limit}",
            f"stop other programs, or {_remedy('NPROC', use + needed)}",
        )


def _threads_of(user: int) -> int:
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:  # it has just ended
            continue
        owner = re.search(r"^Uid:\s*(\d+)", text, re.MULTILINE)
        count = re.search(r"^Threads:\s*(\d+)", text, re.MULTILINE)
        if owner and count and int(owner[1]) == user:
            total += int(count[1])
    return total


# --- What a run records, and `lab doctor` shows ----------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this process may use of the host; None: as much as there is.

    `memory_bytes`: the lowest limit of a control group, not what is free of it.
    """

    cpus: float
    cpu_quota: float | None
    memory_bytes: int | None
    swap_bytes: int
    process: dict[str, int]
    """Limits of the process by name, in bytes or numbers; what has no limit is not in it."""
    threads: int | None

    @classmethod
    def collect(cls) -> "Limits":
        """Read what is in force for this process."""
        quota = cpu_quota()
        memory = [room.limit for room in memory_rooms()[1:]]
        threads = [group.number("pids.max") for group in groups("pids")]
        limits = {name: process_limit(name) for name in _ULIMIT}
        return cls(
            cpus=usable_cpus(),
            cpu_quota=None if quota is None else quota.cpus,
            memory_bytes=min(memory, default=None),
            swap_bytes=swap_bytes(),
            process={name: limit for name, limit in limits.items() if limit is not None},
            threads=min((limit for limit in threads if limit is not None), default=None),
        )
