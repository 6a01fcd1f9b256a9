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
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from lab.analysis.faults import fault_summary
from lab.analysis.slowdown import BASELINE_NS, slowdown
from lab.errors import LabError
from lab.host.limits import Limits, ThrottleCount, Throttled
from lab.host.neighbours import Neighbours, neighbours
from lab.host.room import require_room
from lab.host.workdir import private_folder
from lab.instruments.hostmemory import df_host_memory, memory_summary, read_host_memory
from lab.instruments.hugepages import (
    RATE_WINDOW_NS,
    rebuild_huge_pages,
    rebuild_summary,
    require_rebuild,
)
from lab.instruments.knownfaults import KnownFaults
from lab.instruments.phases import buffer_summary
from lab.instruments.slowwrites import noted_since
from lab.instruments.threads import thread_summary
from lab.instruments.writelatency import stall_summary
from lab.measure.hostwarm import WarmMemory
from lab.measure.settle import POLL_S, record_tail, settle
from lab.runs.records import Marks, Outcome
from lab.scenario.scenario import Scenario
from lab.session import VM, boot
from lab.snapshot.result import WINDOWS
from lab.snapshot.sidecar import sidecar_path
from lab.snapshot.take import take
from lab.units import NS_PER_MS, NS_PER_S
from lab.verify.oracle import verify_method
from lab.vm.ram import mount_of

log = logging.getLogger(__name__)

# Recorded before the baseline's second, so that it lies within the samples.
BASELINE_MARGIN_S = 0.1

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

    Measured: `lab.runs.columns.SUMMARY_FIELDS`.  Not measured: the boot, and anything `verify`
    does.

    :param verify: afterwards, take another snapshot of the same guest, restore it and compare all
        of RAM.
    :param keep_image: leave the image of the timed snapshot behind.
    :param warm: holds host memory from one sample of a campaign to the next.

    :raise LabError: anything that kept the snapshot from being taken; nothing is left running.
    """
    # Both are heavy, and tests of campaigns boot nothing.

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

    warnings = []
    instruments = scenario.instruments
    async with contextlib.AsyncExitStack() as stack:
        beside = stack.enter_context(neighbours(vm.pid))
        sampling = vm.sampling(instruments.sample_interval_us)
        sampler = await stack.enter_async_context(sampling)
        threads = None
        if instruments.time_threads:
            threads = await stack.enter_async_context(vm.timing_threads())
        unsettled = await settle(sampler)
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
            await record_tail(sampler, snapshot.request_ns, snapshot.end_ns)
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
