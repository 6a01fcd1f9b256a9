"""The times of threads are what the threads themselves say, also of those that have ended."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lab.instruments.threads import (
    COLUMNS,
    ENDED,
    ThreadTimes,
    parse_schedstat,
    process_cpu_ns,
    thread_summary,
)

# A line "NAME MS stays|ends" on stdin starts a thread that computes for so long; the answer is its
# id and the CPU time that it has by its own clock.  It stays until a line "go", computes for as
# long once more, answers and ends, or ends at once.
_CHILD = """
import ctypes, sys, threading, time

go = threading.Event()

def burn(ms):
    while time.thread_time_ns() < ms * 1_000_000:
        pass
    print(threading.get_native_id(), time.thread_time_ns(), flush=True)

def work(name, ms, stays):
    ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)
    burn(ms)
    if stays:
        go.wait()
        burn(2 * ms)

for line in sys.stdin:
    if line == "go\\n":
        go.set()
        continue
    name, ms, stays = line.split()
    threading.Thread(target=work, args=(name, int(ms), stays == "stays"), daemon=True).start()
"""
BOUND_S = 60.0

# What a thread uses to begin, to answer and to end.
SLACK_NS = 20_000_000
NEVER_NS = 3600 * 10**9


class Child:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.pid = process.pid

    def burn(self, name: str, ms: int, *, stays: bool) -> tuple[int, int]:
        """Let a thread compute; return its id and time when it sleeps or is gone."""
        return self._told(f"{name} {ms} {'stays' if stays else 'ends'}", "S" if stays else "")

    def go(self) -> int:
        """Let the thread that stayed go on; return its time when it is gone."""
        return self._told("go", "")[1]

    def _told(self, line: str, state: str) -> tuple[int, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        tid, told_ns = (int(word) for word in self.process.stdout.readline().split())
        wait_until(lambda: self.state(tid) == state)
        wait_until(lambda: self.state(self.pid) == "S")
        return tid, told_ns

    def state(self, tid: int) -> str:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self.pid}/task/{tid}/stat").read_text()
            return text.rpartition(")")[2].split()[0]
        return ""


@pytest.fixture
def child() -> Iterator[Child]:
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Child(process)
        process.kill()


def wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + BOUND_S
    while not reached():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.001)


def table_of(times: ThreadTimes) -> Any:
    table = times.df(["during"])
    assert table is not None
    assert list(table.columns) == list(COLUMNS)
    total_ns = times.readings[1].total_ns - times.readings[0].total_ns
    assert table["cpu_ns"].sum() == total_ns
    return table.set_index("thread")


def test_a_living_thread_has_the_time_that_its_own_clock_says(child: Child) -> None:
    with ThreadTimes(child.pid) as times:
        times.read()
        tid, told_ns = child.burn("mig/snapshot", 100, stays=True)
        times.read()
        # What was used before the first reading does not count.
        child.burn("other", 50, stays=True)
        times.read()
    table: Any = times.df(["first", "second"])
    of_thread = table[table["tid"] == tid].set_index("window")
    assert set(of_thread["thread"]) == {"snapshot thread"}
    assert told_ns <= of_thread.loc["first", "cpu_ns"] <= told_ns + SLACK_NS
    assert of_thread.loc["second", "cpu_ns"] <= SLACK_NS
    main = table[table["tid"] == child.pid]
    assert set(main["thread"]) == {"main loop"}


def test_the_time_of_a_thread_that_has_ended_is_not_lost(child: Child) -> None:
    with ThreadTimes(child.pid) as times:
        times.read()
        _, first_ns = child.burn("snapshot-fault", 50, stays=True)
        seen = times.looks
        wait_until(lambda: times.looks > seen + 1)
        told_ns = child.go()
        times.read()
    table = table_of(times)
    seen_ns = table.loc["fault thread", "cpu_ns"]
    assert seen_ns >= first_ns
    assert told_ns <= seen_ns + table.loc[ENDED, "cpu_ns"] <= told_ns + SLACK_NS
    assert pd.isna(table.loc[ENDED, "tid"])
    assert pd.isna(table.loc[ENDED, "wait_ns"])


def test_the_time_of_a_thread_that_nobody_saw_is_not_lost(child: Child) -> None:
    with ThreadTimes(child.pid, interval_ns=NEVER_NS) as times:
        wait_until(lambda: times.looks == 1)
        times.read()
        _, told_ns = child.burn("worker", 50, stays=False)
        times.read()
    table = table_of(times)
    assert "worker" not in table.index
    assert told_ns <= table.loc[ENDED, "cpu_ns"] <= told_ns + SLACK_NS
    assert process_cpu_ns(child.pid) >= told_ns


def test_a_thread_that_shares_its_cpu_waits(child: Child) -> None:
    cpu = {min(os.sched_getaffinity(0))}
    spinning = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(spinning) as other:
        try:
            for pid in (other.pid, child.pid):
                os.sched_setaffinity(pid, cpu)
            wait_until(lambda: process_cpu_ns(other.pid) > 50_000_000)
            with ThreadTimes(child.pid) as times:
                times.read()
                tid, told_ns = child.burn("worker", 200, stays=True)
                times.read()
        finally:
            other.kill()
    row = table_of(times).reset_index().set_index("tid").loc[tid]
    # The scheduler is fair: the other one had about as much, and this one waited for it.
    assert row["wait_ns"] > told_ns / 4
    assert row["cpu_ns"] + row["wait_ns"] <= row["window_ns"]


def test_vcpus_are_named_by_their_index(child: Child) -> None:
    with ThreadTimes(child.pid, {child.pid: 3}) as times:
        times.read()
        times.read()
    assert list(table_of(times).index) == ["vCPU 3"]


@pytest.mark.parametrize("content", [None, "0 0 0\n"])
def test_a_kernel_that_does_not_count_gives_nothing_and_not_zero(
    content: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / str(os.getpid()) / "task" / str(os.getpid())
    folder.mkdir(parents=True)
    (folder / "comm").write_text("qemu\n")
    if content is not None:
        (folder / "schedstat").write_text(content)
    with ThreadTimes(os.getpid(), proc=tmp_path) as times:
        times.read()
        times.read()
    assert not times.is_counted
    assert times.df(["during"]) is None
    assert thread_summary(None) == {"qemu_cpu_ms": None, "vcpu_wait_ms": None}


def test_what_the_kernel_says_is_read_as_it_is() -> None:
    assert parse_schedstat("123 45 6\n") == (123, 45)
    assert parse_schedstat("0 78687 1\n") == (0, 78687)
    assert parse_schedstat("0 0 0\n") is None


def test_a_process_that_has_ended_gives_no_table(child: Child) -> None:
    with ThreadTimes(child.pid) as times:
        times.read()
        child.process.kill()
        child.process.wait()
        seen = times.looks
        wait_until(lambda: times.looks > seen + 1)
        times.read()
    assert times.df(["during"]) is None


def test_the_summary_is_of_the_snapshot_and_adds_up_what_are_no_vcpus() -> None:
    rows = [
        ("before", "vCPU 0", 5, 900, 90, 1000),
        ("before", "main loop", 4, 800, 80, 1000),
        ("during", "vCPU 0", 5, 1_000_000, 250_000, 2_000_000),
        ("during", "vCPU 1", 6, 1_000_000, 500_000, 2_000_000),
        ("during", "main loop", 4, 2_000_000, 1, 2_000_000),
        ("during", "snapshot thread", 7, 3_000_000, 1, 2_000_000),
        ("during", ENDED, None, 500_000, None, 2_000_000),
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"tid": "Int64", "wait_ns": "Int64"})
    assert thread_summary(table) == {"qemu_cpu_ms": 5.5, "vcpu_wait_ms": 0.75}
