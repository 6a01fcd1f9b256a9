"""What watches a measured snapshot is asked in one order, at the same moments, whoever is there.

The whole of a sample runs here on a QEMU that only answers its monitor; the instruments are the
true ones, and what they read with notes that it was asked.  Time is the test's own, so that nobody
sleeps.
"""

import asyncio
import contextlib
import dataclasses
import gc
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from lab.guests.protocol import ReadyRecord
from lab.host.limits import ThrottleCount
from lab.host.neighbours import Neighbours
from lab.instruments.faultlog import FaultLog
from lab.instruments.hostmemory import HostMemory
from lab.instruments.hugepages import Rebuilt
from lab.instruments.knownfaults import KnownFaults
from lab.instruments.progress import ProgressSampler
from lab.instruments.threads import ThreadTimes
from lab.instruments.writelatency import WriteLatency
from lab.measure import sample as sample_module
from lab.measure.hostwarm import WarmMemory
from lab.measure.sample import Sample, take_sample
from lab.qemu.build import QemuBinary
from lab.runs.columns import COLUMNS
from lab.scenario.instruments import Instruments
from lab.scenario.machine import Machine
from lab.scenario.scenario import Scenario
from lab.scenario.workload import Workload
from lab.session import VM
from lab.vm.commandline import Launch
from lab.vm.devices import DeviceFiles
from lab.vm.memory import RamBlock
from lab.vm.qmp import Event

READY = ReadyRecord(nonce=1, progress_gpa=4096, wss_pages=1, threads=1, seed=0, kind="idle")
DURATIONS = pd.DataFrame({"window": ["during"], "low_ns": [8000], "high_ns": [8064], "ops": 1})
SLOW = pd.DataFrame({"thread": [0], "op": [1]})
PROGRESS = ProgressSampler(os.getpid(), 0)
THREADS = ThreadTimes(os.getpid())
NOBODY = KnownFaults(os.getpid(), [])
REBUILT = Rebuilt(start_ns=1, end_ns=2, before_bytes=0, after_bytes=0)
_FAULTS = pd.DataFrame({name: [] for name in COLUMNS["faults"]})
FAULTS = FaultLog(df=_FAULTS, blocks=_FAULTS, engine="copy", start_ns=0, dropped=0)

GUEST = Machine(guest="micro", ram_mib=64)
WRITING = Scenario(
    machine=GUEST,
    workload=Workload("random", wss_mib=8, time_writes=True),
    instruments=Instruments(rebuild_huge_pages=True),
)
IDLE = Scenario(
    machine=GUEST,
    workload=Workload("idle", wss_mib=8),
    instruments=Instruments(known_faults=1),
)
ORDINARY = dataclasses.replace(WRITING, method="migrate-to-file")


class Diary:
    """What happened, oldest first, each with whether the garbage collector was on."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, bool]] = []

    def note(self, what: str) -> None:
        self.lines.append((what, gc.isenabled()))

    def noting(self, what: str, result: Any = None) -> Callable[..., Any]:
        def call(*_: object, **__: object) -> Any:
            self.note(what)
            return result

        return call

    def noting_async(self, what: str, result: Any = None) -> Callable[..., Any]:
        async def call(*_: object, **__: object) -> Any:
            self.note(what)
            return result

        return call


class Clock:
    """Goes on by itself, and at once when somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, diary: Diary) -> None:
        self.skew_ns = 0
        true_sleep, true_ns, true_clock = asyncio.sleep, time.monotonic_ns, time.clock_gettime_ns

        async def sleep(seconds: float, result: Any = None) -> Any:
            if seconds >= 1:
                diary.note(f"sleep {seconds:g} s")
            self.skew_ns += round(seconds * 1e9)
            return await true_sleep(0, result)

        monkeypatch.setattr(asyncio, "sleep", sleep)
        monkeypatch.setattr(time, "monotonic_ns", lambda: true_ns() + self.skew_ns)
        monkeypatch.setattr(
            time, "clock_gettime_ns", lambda clock: true_clock(clock) + self.skew_ns
        )


CAPABILITIES = ["events", "background-snapshot", "mapped-ram", "multifd", "pause-before-switchover"]


class Monitor:
    """A QEMU that takes a snapshot at once, of the one kind or the other."""

    is_lost = False

    def __init__(self, diary: Diary) -> None:
        self.diary = diary
        self.events: list[Event] = []
        self.running = True
        self.background = False

    def _happen(self, name: str, **data: str) -> None:
        time_us = time.clock_gettime_ns(time.CLOCK_REALTIME) // 1000
        self.events.append(Event(name, data, time_us))

    async def wait_event(
        self, wanted: Callable[[Event], bool], *, since: int = 0, timeout_s: float
    ) -> Event:
        while True:
            for event in self.events[since:]:
                if wanted(event):
                    return event
            await asyncio.sleep(0)

    async def execute(self, command: str, arguments: Any = None, *, timeout_s: float = 0) -> Any:
        match command:
            case "migrate-set-capabilities":
                states = {one["capability"]: one["state"] for one in arguments["capabilities"]}
                self.background = states["background-snapshot"]
            case "migrate":
                self.diary.note("migrate")
                self._happen("STOP")
                if self.background:
                    self._happen("RESUME")
                else:
                    self.running = False
                self._happen("MIGRATION", status="completed")
            case "cont":
                self.diary.note("cont")
                self.running = True
                self._happen("RESUME")
            case "query-status":
                return {"status": "running" if self.running else "postmigrate"}
            case "query-migrate-capabilities":
                return [{"capability": name, "state": False} for name in CAPABILITIES]
            case "query-yank" | "query-cpus-fast":
                return []
        return {}


class Process:
    pid = os.getpid()
    exit_code = None
    is_others = False

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir

    def find_groups(self) -> None:
        pass

    def log_text(self) -> str:
        return ""


class FakeVM(VM):
    def __init__(self, scenario: Scenario, workdir: Path, diary: Diary) -> None:
        binary = QemuBinary(
            path=Path("/qemu"),
            variant=scenario.variant,
            version="1",
            build_id="1",
            series_sha256=None,
            sha256="1",
        )
        super().__init__(
            Launch(binary=binary, machine=scenario.machine, workload=scenario.workload),
            process=cast(Any, Process(workdir)),
            qmp=cast(Any, Monitor(diary)),
            console=cast(Any, None),
            guest=cast(Any, type("Guest", (), {"kernel_sha256": "1"})),
            files=DeviceFiles(workdir),
        )
        self._ready = READY

    async def host_address(self, gpa: int) -> int:
        return 0

    async def ram_blocks(self) -> list[RamBlock]:
        return []


def even_progress(_: object) -> pd.DataFrame:
    """A guest that does an operation a microsecond, for the last ten seconds."""
    t_ns = np.arange(time.monotonic_ns() - 10_000_000_000, time.monotonic_ns(), 1_000_000)
    return pd.DataFrame({"t_ns": t_ns, "ops": t_ns // 1000, "read_ns": 1})


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> Diary:
    diary = Diary()
    Clock(monkeypatch, diary)

    @contextlib.asynccontextmanager
    async def armed(*_: object) -> AsyncIterator[None]:
        diary.note("known faults: armed")
        yield

    methods: list[tuple[type, str, Any]] = [
        (ProgressSampler, "__enter__", diary.noting("progress begins", PROGRESS)),
        (ProgressSampler, "__exit__", diary.noting("progress ends")),
        (ProgressSampler, "df", even_progress),
        (ThreadTimes, "__enter__", diary.noting("threads begin", THREADS)),
        (ThreadTimes, "__exit__", diary.noting("threads end")),
        (ThreadTimes, "read", diary.noting("threads")),
        (WriteLatency, "read", diary.noting("write latency")),
        (WriteLatency, "df", lambda *_: DURATIONS),
        (KnownFaults, "find", diary.noting_async("known faults: found", NOBODY)),
        (KnownFaults, "written_on_resume", armed),
        (WarmMemory, "hold", diary.noting_async("memory held")),
        (WarmMemory, "release", diary.noting("memory released")),
        (ThrottleCount, "so_far", diary.noting("CPU quota")),
    ]
    for target, name, fake in methods:
        monkeypatch.setattr(target, name, fake)
    latency = WriteLatency(os.getpid(), 0, [])
    functions: dict[str, Any] = {
        "settle": diary.noting_async("settled"),
        "record_tail": diary.noting_async("the old rate is back"),
        "read_host_memory": diary.noting("host memory", HostMemory(t_ns=1)),
        "write_latency": diary.noting_async("write latency: attached", latency),
        "read_slow_writes": diary.noting_async("slow writes", SLOW),
        "rebuild_huge_pages": diary.noting_async("huge pages rebuilt", REBUILT),
        "require_rebuild": lambda: None,
        "read_fault_log": diary.noting("fault log", FAULTS),
        "neighbours": lambda _: contextlib.nullcontext(Neighbours()),
    }
    for name, fake in functions.items():
        # Wherever it is known by that name.
        for module in [m for key, m in sys.modules.items() if key.startswith("lab.")]:
            if name in vars(module):
                monkeypatch.setattr(module, name, fake)
    return diary


async def sample_of(
    scenario: Scenario, diary: Diary, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Sample:
    @contextlib.asynccontextmanager
    async def boot(*_: object, **__: object) -> AsyncIterator[VM]:
        yield FakeVM(scenario, folder, diary)

    monkeypatch.setattr(sample_module, "boot", boot)
    return await take_sample(scenario, folder / "image")


BEGIN = ["progress begins", "threads begin", "settled"]
UNTIMED_BEFORE = ["host memory", "write latency: attached", "slow writes"]
BASELINE = ["memory held", "write latency", "threads", "sleep 1.1 s", "memory released"]
REQUEST = ["write latency", "threads", "migrate"]
TAIL = ["slow writes", "the old rate is back"]
UNTIMED_AFTER = ["CPU quota", "host memory"]
REBUILD = ["sleep 1.1 s", "huge pages rebuilt", "sleep 1.1 s"]
END = {"threads end", "progress ends", "memory released"}
"""In any order: nothing is read any more."""

LIVE_TIMED = [*BASELINE, *REQUEST, "write latency", "threads", "fault log", *TAIL]
# The guest goes on before the threads are read, so that the pause is no longer.
ORDINARY_TIMED = [*BASELINE, *REQUEST, "write latency", "cont", "threads", *TAIL]
IDLE_TIMED = [what for what in LIVE_TIMED if what not in ("write latency", "slow writes")]
IDLE_TIMED.insert(IDLE_TIMED.index("memory released") + 1, "known faults: armed")


@pytest.mark.parametrize(
    ("scenario", "before", "timed", "after"),
    [
        pytest.param(WRITING, UNTIMED_BEFORE, LIVE_TIMED, [*UNTIMED_AFTER, *REBUILD], id="live"),
        pytest.param(
            ORDINARY, UNTIMED_BEFORE, ORDINARY_TIMED, [*UNTIMED_AFTER, *REBUILD], id="ordinary"
        ),
        pytest.param(
            IDLE, ["known faults: found", "host memory"], IDLE_TIMED, UNTIMED_AFTER, id="idle"
        ),
    ],
)
async def test_readings_have_one_order_and_the_collector_is_off_while_it_is_timed(
    scenario: Scenario,
    before: list[str],
    timed: list[str],
    after: list[str],
    diary: Diary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = await sample_of(scenario, diary, tmp_path, monkeypatch)
    on = [(what, True) for what in (*BEGIN, *before)]
    off = [(what, False) for what in timed]
    on_again = [(what, True) for what in after]
    end = len(on + off + on_again)
    assert diary.lines[:end] == on + off + on_again
    assert {what for what, _ in diary.lines[end:]} == END
    assert sample.outcome == "ok"
