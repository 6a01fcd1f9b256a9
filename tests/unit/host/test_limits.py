"""Limits of control groups are found in trees of version 1, version 2 and both, wherever they are
mounted, and those of the process are refused by name.
"""

import os
import resource
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import psutil
import pytest

from lab.errors import HostError
from lab.host.limits import (
    KilledForMemory,
    LimitName,
    Limits,
    ThrottleCount,
    cpu_quota,
    groups,
    memory_room,
    process_limit,
    require_limit,
    require_lockable,
    require_threads,
    swap_bytes,
    usable_cpus,
)

MIB = 1 << 20
NONE = str((1 << 63) - 4096)


class Tree:
    """A made-up host: its procfs, and where its control groups are mounted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.proc = root / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.mounts: list[str] = []

    def mount(self, place: str, kind: str, options: str = "rw", at: str = "/") -> Path:
        folder = self.root / place
        folder.mkdir(parents=True, exist_ok=True)
        escaped = str(folder).replace(" ", r"\040")
        number = len(self.mounts) + 30
        self.mounts.append(
            f"{number} 23 0:{number} {at} {escaped} rw shared:9 - {kind} x {options}"
        )
        (self.proc / "self" / "mountinfo").write_text("\n".join(self.mounts) + "\n")
        return folder

    def process(self, *lines: str) -> None:
        (self.proc / "self" / "cgroup").write_text("\n".join(lines) + "\n")

    def groups(self, controller: str) -> list[tuple[Path, str]]:
        return [(g.folder, g.name) for g in groups(controller, proc=self.proc)]


def write(folder: Path, files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "a host")


def test_a_group_of_version_1_is_within_all_its_parents(tree: Tree) -> None:
    memory = tree.mount("cgroup/memory", "cgroup", "rw,memory")
    cpu = tree.mount("cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct")
    write(memory / "a" / "b", {})
    write(cpu / "c", {})
    tree.process("4:memory:/a/b", "2:cpu,cpuacct:/c", "1:name=systemd:/")
    assert tree.groups("memory") == [
        (memory / "a" / "b", "/a/b"),
        (memory / "a", "/a"),
        (memory, "/"),
    ]
    assert tree.groups("cpu") == [(cpu / "c", "/c"), (cpu, "/")]
    assert tree.groups("pids") == []


def test_a_group_of_version_2_has_every_controller(tree: Tree) -> None:
    unified = tree.mount("cgroup", "cgroup2")
    write(unified / "user.slice" / "x", {})
    tree.process("0::/user.slice/x")
    for controller in ("memory", "cpu", "pids"):
        assert [name for _, name in tree.groups(controller)] == [
            "/user.slice/x",
            "/user.slice",
            "/",
        ]


def test_a_host_with_both_has_a_controller_in_one_of_them(tree: Tree) -> None:
    memory = tree.mount("cgroup/memory", "cgroup", "rw,memory")
    unified = tree.mount("cgroup/unified", "cgroup2")
    write(memory / "a", {})
    write(unified / "b", {})
    tree.process("4:memory:/a", "0::/b")
    assert tree.groups("memory") == [
        (memory / "a", "/a"),
        (memory, "/"),
        (unified / "b", "/b"),
        (unified, "/"),
    ]
    assert tree.groups("cpu") == [(unified / "b", "/b"), (unified, "/")]


def test_a_container_sees_its_own_part_of_the_tree(tree: Tree) -> None:
    memory = tree.mount("cgroup/memory", "cgroup", "rw,memory", at="/docker/0a1b")
    write(memory / "inner", {})
    tree.process("4:memory:/docker/0a1b/inner")
    assert tree.groups("memory") == [(memory / "inner", "/inner"), (memory, "/")]
    # The path is of a namespace whose groups are not mounted here.
    for path in ("/kubepods/pod1", "/../other", "/docker/0a1bc"):
        tree.process(f"4:memory:{path}")
        assert tree.groups("memory") == [(memory, "/")]


def test_no_procfs_and_no_mount_are_no_groups(tree: Tree) -> None:
    assert tree.groups("memory") == []
    tree.process("4:memory:/a")
    (tree.proc / "self" / "mountinfo").write_text("36 35 98:0 / / rw - ext4 /dev/root rw\n")
    assert tree.groups("memory") == []


def memory_v2(
    tree: Tree, limit: str, use: int, cache: int = 0, more: Mapping[str, str] = {}
) -> None:
    unified = tree.mount("cgroup", "cgroup2")
    files = {
        "memory.max": limit,
        "memory.current": str(use),
        "memory.stat": f"anon 1\ninactive_file {cache}\nfile 99999999",
    }
    write(unified / "a" / "b", {"memory.max": "max", "memory.current": "1"})
    write(unified / "a", files | dict(more))
    tree.process("0::/a/b")


def test_memory_is_what_the_tightest_parent_leaves(tree: Tree) -> None:
    """Field report F9."""
    memory_v2(tree, str(700 * MIB), 100 * MIB, 30 * MIB)
    room = memory_room(groups("memory", proc=tree.proc))
    assert (room.available, room.limit) == (630 * MIB, 700 * MIB)
    assert room.owner == "the cgroup /a (memory.max)"
    assert str(tree.root / "cgroup" / "a" / "memory.max") in room.remedy


def test_memory_high_is_a_limit_as_well(tree: Tree) -> None:
    memory_v2(tree, "max", 0, more={"memory.high": str(50 * MIB)})
    room = memory_room(groups("memory", proc=tree.proc))
    assert (room.limit, room.owner) == (50 * MIB, "the cgroup /a (memory.high)")


def test_a_group_that_has_more_than_its_limit_leaves_nothing(tree: Tree) -> None:
    memory_v2(tree, str(10 * MIB), 11 * MIB)
    assert memory_room(groups("memory", proc=tree.proc)).available == 0


def test_where_no_group_limits_memory_the_host_does(tree: Tree) -> None:
    memory_v2(tree, "max", 5 * MIB)
    room = memory_room(groups("memory", proc=tree.proc))
    assert (room.owner, room.limit) == ("this host", psutil.virtual_memory().total)


def test_memory_of_version_1(tree: Tree) -> None:
    memory = tree.mount("cgroup/memory", "cgroup", "rw,memory")
    write(memory, {"memory.limit_in_bytes": NONE, "memory.usage_in_bytes": str(900 * MIB)})
    write(
        memory / "a",
        {
            "memory.limit_in_bytes": str(200 * MIB),
            "memory.memsw.limit_in_bytes": str(260 * MIB),
            "memory.usage_in_bytes": str(50 * MIB),
            "memory.stat": f"inactive_file 5\ntotal_inactive_file {10 * MIB}",
        },
    )
    tree.process("4:memory:/a")
    within = groups("memory", proc=tree.proc)
    room = memory_room(within)
    assert (room.available, room.limit) == (160 * MIB, 200 * MIB)
    assert room.owner == "the cgroup /a (memory.limit_in_bytes)"
    assert swap_bytes(within) <= 60 * MIB


def test_swap_of_version_2_has_a_limit_of_its_own(tree: Tree) -> None:
    memory_v2(tree, "max", 0, more={"memory.swap.max": "0"})
    assert swap_bytes(groups("memory", proc=tree.proc)) == 0


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("memory.events", "oom 3\noom_kill 1", "oom 4\noom_kill 2"),
        ("memory.oom_control", "under_oom 0\noom_kill 1", "under_oom 0\noom_kill 2"),
    ],
)
def test_who_was_killed_for_memory_is_known_by_his_groups_count(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, file: str, before: str, after: str
) -> None:
    memory_v2(tree, str(700 * MIB), 0, more={file: before})
    within = groups("memory", proc=tree.proc)
    monkeypatch.setattr("lab.host.limits.groups", lambda *args: within)
    killed = KilledForMemory(1)
    assert killed.why() == ""
    write(tree.root / "cgroup" / "a", {file: after})
    assert killed.why() == "700 MiB of the cgroup /a (memory.max) were used up"


@pytest.mark.parametrize(
    ("inner", "outer", "cpus"),
    [
        ({"cpu.max": "50000 100000"}, {"cpu.max": "max 100000"}, 0.5),
        ({"cpu.max": "max 100000"}, {"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "300000 100000"}, {"cpu.max": "20000 10000"}, 2.0),
        ({"cpu.max": "max 100000"}, {}, None),
    ],
)
def test_the_tightest_quota_of_cpu_time_counts(
    tree: Tree, inner: dict[str, str], outer: dict[str, str], cpus: float | None
) -> None:
    unified = tree.mount("cgroup", "cgroup2")
    write(unified / "a", outer)
    write(unified / "a" / "b", inner)
    tree.process("0::/a/b")
    quota = cpu_quota(groups("cpu", proc=tree.proc))
    assert (None if quota is None else quota.cpus) == cpus


def test_a_quota_of_version_1(tree: Tree) -> None:
    cpu = tree.mount("cgroup/cpu", "cgroup", "rw,cpu")
    write(cpu, {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"})
    write(cpu / "a", {"cpu.cfs_quota_us": "25000", "cpu.cfs_period_us": "50000"})
    tree.process("2:cpu:/a")
    quota = cpu_quota(groups("cpu", proc=tree.proc))
    assert quota is not None
    assert (quota.cpus, quota.name, quota.file) == (0.5, "/a", "cpu.cfs_quota_us")


@pytest.mark.parametrize(
    ("limit", "time", "unit"),
    [
        ({"cpu.max": "50000 100000"}, "throttled_usec", 1_000),
        ({"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}, "throttled_time", 1_000_000),
    ],
)
def test_throttling_is_counted_from_when_one_begins(
    tree: Tree, limit: dict[str, str], time: str, unit: int
) -> None:
    cpu = tree.mount("cgroup", "cgroup" if time == "throttled_time" else "cgroup2", "rw,cpu")
    tree.process("2:cpu:/a" if time == "throttled_time" else "0::/a")

    def count(periods: int, throttled: int, ms: int) -> None:
        text = f"nr_periods {periods}\nnr_throttled {throttled}\n{time} {ms * unit}"
        write(cpu / "a", limit | {"cpu.stat": text})

    count(100, 10, 300)
    counted = ThrottleCount(within=groups("cpu", proc=tree.proc))
    count(130, 25, 425)
    found = counted.so_far()
    assert found is not None
    assert (found.periods, found.throttled_periods, found.throttled_ms) == (30, 15, 125)


def test_without_a_quota_nobody_is_throttled(tree: Tree) -> None:
    unified = tree.mount("cgroup", "cgroup2")
    write(unified, {"cpu.stat": "usage_usec 5"})
    tree.process("0::/")
    assert ThrottleCount(within=groups("cpu", proc=tree.proc)).so_far() is None


# Limits of the process


@contextmanager
def lowered(name: LimitName, soft: int) -> Iterator[None]:
    number = getattr(resource, f"RLIMIT_{name}")
    before = resource.getrlimit(number)
    resource.setrlimit(number, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(number, before)


def test_a_limit_that_is_too_low_is_named_with_the_remedy() -> None:
    """Field report F19."""
    with lowered("FSIZE", MIB):
        require_limit("FSIZE", MIB, "files")
        with pytest.raises(HostError) as caught:
            require_limit("FSIZE", MIB + 1, "files")
    assert str(caught.value) == (
        "files need RLIMIT_FSIZE to be 1048577 bytes or more, and it is 1048576 bytes; "
        "raise it first, such as by `ulimit -f 1025`"
    )


def test_a_number_of_files_has_no_unit() -> None:
    now = process_limit("NOFILE")
    assert now is not None
    with pytest.raises(HostError, match=rf"be {now + 1} or more, and it is {now}; .*-n {now + 1}`"):
        require_limit("NOFILE", now + 1, "files")


def test_locked_memory_has_a_limit_unless_one_may_lock_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with lowered("MEMLOCK", 4096):
        monkeypatch.setattr("lab.host.limits.capability", lambda number: True)
        require_lockable(MIB, "it")
        monkeypatch.setattr("lab.host.limits.capability", lambda number: False)
        with pytest.raises(HostError, match="RLIMIT_MEMLOCK"):
            require_lockable(MIB, "it")


def test_threads_are_limited_by_the_groups(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    unified = tree.mount("cgroup", "cgroup2")
    write(unified / "a", {"pids.max": "100", "pids.current": "90"})
    write(unified, {"pids.current": "500"})
    tree.process("0::/a")
    within = groups("pids", proc=tree.proc)
    monkeypatch.setattr("lab.host.limits.groups", lambda controller: within)
    require_threads(10, "QEMU")
    with pytest.raises(HostError, match=r"QEMU needs 11 threads, and 10 .* /a \(pids.max\); "):
        require_threads(11, "QEMU")


def test_threads_are_limited_by_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.host.limits.groups", lambda controller: [])
    monkeypatch.setattr("lab.host.limits._threads_of", lambda user: 45)
    monkeypatch.setattr("lab.host.limits.process_limit", lambda name: 50)
    monkeypatch.setattr("lab.host.limits.capability", lambda number: False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    require_threads(5, "QEMU")
    with pytest.raises(HostError, match=r"5 are left of RLIMIT_NPROC, which is 50; .*-u 51`"):
        require_threads(6, "QEMU")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    require_threads(6, "QEMU")


def test_what_is_in_force_here_can_be_read() -> None:
    limits = Limits.collect()
    assert 0 < limits.cpus <= len(os.sched_getaffinity(0))
    assert limits.cpus == usable_cpus()
    assert limits.process["NOFILE"] == process_limit("NOFILE")


def test_a_process_that_has_ended_has_no_limit() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert process_limit("FSIZE", child.pid) is None


@pytest.mark.parametrize("name", get_args(LimitName))
def test_every_limit_is_the_one_that_is_set(name: LimitName) -> None:
    soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
    assert process_limit(name) == (None if soft == resource.RLIM_INFINITY else soft)
