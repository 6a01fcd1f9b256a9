"""One sample: a fresh boot, one timed snapshot under load, and what it cost.

The timed part runs undisturbed: host memory has been touched before, the guest's rate has
settled, the interpreter's garbage collector is off, and whatever is checked afterwards (`verify`)
uses a second, untimed snapshot of the same boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pandas as pd

from lab.errors import LabError
from lab.hugepages import RATE_WINDOW_NS, rebuild_huge_pages, rebuild_summary, require_rebuild
from lab.instruments.hostmemory import df_host_memory, memory_summary, read_host_memory
from lab.instruments.knownfaults import KnownFaults
from lab.instruments.phases import buffer_summary
from lab.instruments.slowwrites import noted_since
from lab.instruments.threads import thread_summary
from lab.instruments.writelatency import stall_summary
from lab.limits import Limits, ThrottleCount, Throttled
from lab.neighbours import Neighbours, neighbours
from lab.ram import mount_of
from lab.room import require_room
from lab.run import Marks, Outcome
from lab.scenario import Scenario
from lab.tables import BASELINE_NS, NS_PER_MS, NS_PER_S, fault_summary, find_back, slowdown
from lab.warmth import WarmMemory
from lab.workdir import private_folder

if TYPE_CHECKING:
    from lab.instruments.progress import ProgressSampler
    from lab.vm import VM

log = logging.getLogger(__name__)

# The guest's rate has settled when so many windows in a row lie within this share of each other.
SETTLE_WINDOW_S = 0.25
SETTLE_WINDOWS = 3
SETTLE_SHARE = 0.05
SETTLE_LIMIT_S = 8.0

# Recorded before the baseline's second, so that it lies within the samples.
BASELINE_MARGIN_S = 0.1

# How long to wait for the old rate after completion, and how much to record of it once it is there.
TAIL_LIMIT_S = 5.0
TAIL_AFTER_BACK_S = 0.3
POLL_S = 0.1

# A sampler that slept longer than this has not seen a shorter stall inside it.
SAMPLER_GAP_NS = 10 * NS_PER_MS


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one boot gave.  `figures` are fields of the summary line; `tables` and `logs` are
    stored as they are.
    """

    outcome: Outcome
    reason: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    marks: Marks = field(default_factory=Marks)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    logs: Mapping[str, bytes] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def check_room(image_dir: Path, ram_mib: int) -> None:
    """Raise HostError unless the folder can hold an image of a guest this large, with a margin."""
    remedy = "free some space or name another --image-dir"
    require_room(image_dir, ram_mib + ram_mib // 4 + 64 << 20, "an image", remedy)


def filesystem_of(path: Path) -> str:
    """Type of the file system that holds `path`, such as ext4 or tmpfs: it is part of what is
    measured.
    """
    mount = mount_of(path)
    return "unknown" if mount is None else mount.type


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the collector from stopping the sampler: one pass over a notebook's heap takes tens
    of milliseconds.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def is_settled(t_ns: np.ndarray[Any, Any], ops: np.ndarray[Any, Any]) -> bool:
    """Whether the last windows of progress ran at one rate, within `SETTLE_SHARE` of the
    fastest.
    """
    width = round(SETTLE_WINDOW_S * NS_PER_S)
    if len(t_ns) < 2 or t_ns[-1] - t_ns[0] < SETTLE_WINDOWS * width:
        return False
    edges = t_ns[-1] - np.arange(SETTLE_WINDOWS, -1, -1) * width
    done = np.diff(np.interp(edges, t_ns, ops))
    return bool(done.min() > 0 and done.min() >= (1 - SETTLE_SHARE) * done.max())


async def _settle(sampler: ProgressSampler) -> str | None:
    """Wait until the guest runs evenly; return a warning when it never does."""
    waited = 0.0
    while waited < SETTLE_LIMIT_S:
        await asyncio.sleep(POLL_S)
        waited += POLL_S
        df = sampler.df()
        if is_settled(df["t_ns"].to_numpy(), df["ops"].to_numpy()):
            return None
    return (
        f"the guest's rate had not settled to within {SETTLE_SHARE:.0%} after {SETTLE_LIMIT_S:g} s"
    )


async def _tail(sampler: ProgressSampler, request_ns: int, end_ns: int) -> None:
    """Record on until the guest's old rate is back, or for `TAIL_LIMIT_S`."""
    waited = 0.0
    while waited < TAIL_LIMIT_S:
        await asyncio.sleep(POLL_S)
        waited += POLL_S
        df = sampler.df()
        baseline = slowdown(df, request_ns=request_ns, end_ns=end_ns).baseline_ops_per_s
        late = df[df["t_ns"] >= end_ns - 2 * NS_PER_MS]
        if baseline is None or len(late) < 2:
            continue
        capped = find_back(late["t_ns"].to_numpy(), late["ops"].to_numpy(), end_ns, baseline)[1]
        if not capped:
            await asyncio.sleep(TAIL_AFTER_BACK_S)
            return


def sampler_warnings(
    progress: pd.DataFrame, request_ns: int, end_ns: int, gap_ns: int = SAMPLER_GAP_NS
) -> list[str]:
    """What the sampler did not see: where two samples are more than `gap_ns` apart."""
    inside = progress[(progress["t_ns"] >= request_ns) & (progress["t_ns"] <= end_ns)]
    gaps = np.diff(inside["t_ns"].to_numpy())
    slept = int((gaps > gap_ns).sum())
    if not slept:
        return []
    longest_ms = gaps.max() / NS_PER_MS
    limit_ms = gap_ns / NS_PER_MS
    return [
        f"the progress sampler slept {slept} times over {limit_ms:g} ms, "
        f"{longest_ms:.0f} ms at most"
    ]


def held_back(throttled: Throttled | None, beside: Neighbours) -> dict[str, Any]:
    """What a run records of what held it back: the limits in force, how often it had no CPU time
    left (None: it has no quota), and who measured beside it.
    """
    return {
        "limits": msgspec.to_builtins(Limits.collect()),
        "throttled": msgspec.to_builtins(throttled),
        "beside": beside.found,
    }


def held_back_warnings(throttled: Throttled | None, beside: Neighbours) -> list[str]:
    """The same as warnings of the run, one sentence each."""
    found = []
    if throttled is not None and throttled.throttled_periods:
        found.append(
            f"a CPU quota held it back in {throttled.throttled_periods} of {throttled.periods} "
            f"periods, for {throttled.throttled_ms:.0f} ms"
        )
    if beside.found:
        found.append(f"it was measured beside {' and '.join(beside.found)}")
    return found


async def take_sample(
    scenario: Scenario,
    image: Path,
    *,
    verify: bool = False,
    keep_image: bool = False,
    warm: WarmMemory | None = None,
) -> Sample:
    """Boot, settle, record a baseline, take the snapshot into `image`, record until the old rate
    is back.

    Measured: `lab.columns.SUMMARY_FIELDS`.  Not measured: the boot, and anything `verify` does.

    :param verify: afterwards, take another snapshot of the same guest, restore it and compare all
        of RAM.
    :param keep_image: leave the image of the timed snapshot behind.
    :param warm: holds host memory from one sample of a campaign to the next.

    :raise LabError: anything that kept the snapshot from being taken; nothing is left running.
    """
    # Both are heavy, and tests of campaigns boot nothing.
    from lab.sidecar import sidecar_path
    from lab.vm import boot

    machine, workload = scenario.machine, scenario.workload
    check_room(image.parent, machine.ram_mib)
    if scenario.instruments.rebuild_huge_pages:
        require_rebuild()
    host = {"image_filesystem": filesystem_of(image.parent)}
    if warm is not None:
        warm.make_room(machine.ram_mib)
    async with boot(machine, workload, binary=scenario.variant) as vm:
        try:
            with WarmMemory() as own:
                sample = await _timed(vm, scenario, image, warm or own)
        finally:
            if not keep_image:
                image.unlink(missing_ok=True)
                sidecar_path(image).unlink(missing_ok=True)
        if verify:
            # The restored guest needs memory of its own, so nothing is held meanwhile.
            sample = await _verified(vm, scenario, image.parent, sample)
        elif warm is not None:
            await warm.hold_again(machine.ram_mib)
        logs = {"qemu.log": vm.process.log_text().encode()}
    return dataclasses.replace(sample, host=host | dict(sample.host), logs=logs)


async def _timed(vm: VM, scenario: Scenario, image: Path, warm: WarmMemory) -> Sample:
    from lab.snapshot import WINDOWS, take

    warnings = []
    instruments = scenario.instruments
    async with contextlib.AsyncExitStack() as stack:
        beside = stack.enter_context(neighbours(vm.pid))
        sampling = vm.sampling(instruments.sample_interval_us)
        sampler = await stack.enter_async_context(sampling)
        threads = None
        if instruments.time_threads:
            threads = await stack.enter_async_context(vm.timing_threads())
        unsettled = await _settle(sampler)
        if unsettled:
            warnings.append(unsettled)
        known = None
        if instruments.known_faults:
            known = await KnownFaults.find(vm, instruments.known_faults)
        memory = read_host_memory(vm.pid) if instruments.read_host_memory else None
        latency = await vm.write_latency() if scenario.workload.time_writes else None
        notes = latency is not None and scenario.machine.guest == "micro"
        slow_before = await vm.slow_writes() if notes else None
        throttle = ThrottleCount(vm.pid)
        with no_garbage_collection():
            await warm.hold(scenario.machine.ram_mib)
            if latency is not None:
                latency.read()
            if threads is not None:
                threads.read()
            await asyncio.sleep(BASELINE_NS / NS_PER_S + BASELINE_MARGIN_S)
            warm.release()
            if known is not None:
                await stack.enter_async_context(known.written_on_resume(vm))
            snapshot = await take(
                vm,
                image,
                scenario.method,
                fault_log=instruments.log_faults,
                storage_mib_per_s=scenario.storage.storage_mib_per_s,
                sampler=sampler,
                latency=latency,
                threads=threads,
            )
            slow = await vm.slow_writes() if notes else None
            await _tail(sampler, snapshot.request_ns, snapshot.end_ns)
        throttled = throttle.so_far()
        progress = sampler.df()
        after = read_host_memory(vm.pid) if memory is not None else None
        rebuilt = None
        if instruments.rebuild_huge_pages:
            await asyncio.sleep(RATE_WINDOW_NS / NS_PER_S + POLL_S)
            rebuilt = await rebuild_huge_pages(vm)
            await asyncio.sleep(RATE_WINDOW_NS / NS_PER_S + POLL_S)
        whole = sampler.df()
    first = snapshot.request_ns - BASELINE_NS - round(BASELINE_MARGIN_S / 2 * NS_PER_S)
    progress = progress[progress["t_ns"] >= first].reset_index(drop=True)
    cost = slowdown(progress, request_ns=snapshot.request_ns, end_ns=snapshot.end_ns)
    gap_ns = max(SAMPLER_GAP_NS, 3000 * instruments.sample_interval_us)
    last_ns = cost.back_ns or snapshot.end_ns
    warnings += sampler_warnings(progress, snapshot.request_ns, last_ns, gap_ns)
    tables = {"progress": progress}
    phases = snapshot.df_phases()
    if len(phases):
        tables["phases"] = phases
    if snapshot.write_latency is not None:
        tables["write_latency"] = snapshot.write_latency
    if slow is not None and slow_before is not None:
        tables["slow_writes"] = noted_since(slow_before, slow)
    thread_times = None if threads is None else threads.df(WINDOWS)
    if thread_times is not None:
        tables["threads"] = thread_times
    elif threads is not None:
        warnings.append("the times of QEMU's threads are unknown: the kernel does not count them")
    if memory is not None and after is not None:
        tables["host_memory"] = df_host_memory(memory, after)
    log_ = snapshot.fault_log
    if log_ is not None:
        tables["faults"] = log_.df
        if log_.dropped:
            warnings.append(f"the fault log dropped {log_.dropped} faults")
        if known is not None and (spoilt := known.by_others(log_.df)):
            warnings.append(f"the guest wrote to {spoilt} of the pages of the known faults itself")
    figures = {
        "setup_ms": snapshot.setup_ms,
        "pause_ms": snapshot.pause_ms,
        "duration_ms": snapshot.duration_ms,
        "image_bytes": snapshot.image_bytes,
        "baseline_ops_per_s": cost.baseline_ops_per_s,
        "lost_work_ms": cost.lost_work_ms,
        "min_rate_50ms": cost.min_rate_50ms,
        "max_gap_ms": cost.max_gap_ms,
        "recovery_ms": cost.recovery_ms,
        "back_capped": cost.back_capped,
    }
    figures |= fault_summary(None if log_ is None else log_.df)
    if known is not None and log_ is not None:
        figures["known_faults_logged"] = known.logged(log_.df)
    figures |= buffer_summary(snapshot.counters) | stall_summary(snapshot.write_latency)
    figures |= thread_summary(thread_times) | memory_summary(tables.get("host_memory"))
    figures |= rebuild_summary(rebuilt, whole, cost.baseline_ops_per_s)
    return Sample(
        outcome="ok",
        figures=figures,
        marks=Marks(
            request_ns=snapshot.request_ns,
            stop_ns=snapshot.stop_ns,
            resume_ns=snapshot.resume_ns,
            end_ns=snapshot.end_ns,
            back_ns=cost.back_ns,
        ),
        tables=tables,
        host=held_back(throttled, beside),
        warnings=(*warnings, *held_back_warnings(throttled, beside)),
    )


async def _verified(vm: VM, scenario: Scenario, image_dir: Path, sample: Sample) -> Sample:
    """Add what the oracle says.  An image that differs makes the run failed, whatever it cost."""
    from lab.oracle import verify_method

    # Images and dumps are as large as the guest: a campaign that is killed must not leave them.
    with private_folder("lab-verify-", image_dir) as folder:
        try:
            verdict = await verify_method(
                vm,
                scenario.method,
                folder,
                storage_mib_per_s=scenario.storage.storage_mib_per_s,
            )
        except LabError as error:
            reason = f"could not be verified: {error}"
            return dataclasses.replace(sample, outcome="undecided", reason=reason)
    figures = {**sample.figures, "verified": verdict.equal}
    if verdict.equal:
        return dataclasses.replace(sample, figures=figures)
    reason = f"the restored guest differs from the pause instant: {verdict.detail}"
    return dataclasses.replace(sample, outcome="failed", reason=reason, figures=figures)
