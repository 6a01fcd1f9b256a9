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
import pandas as pd

from lab.analysis.slowdown import BASELINE_NS, slowdown
from lab.errors import LabError
from lab.host.limits import Limits, ThrottleCount, Throttled
from lab.host.neighbours import Neighbours, neighbours
from lab.host.room import require_room
from lab.host.workdir import private_folder
from lab.instruments import INSTRUMENTS
from lab.instruments.instrument import Moment, Taken, watching
from lab.instruments.progress import ProgressInstrument
from lab.marks import Marks
from lab.measure.hostwarm import WarmMemory
from lab.measure.settle import record_tail, settle
from lab.runs.records import Outcome
from lab.scenario.scenario import Scenario
from lab.session import VM, boot
from lab.snapshot.sidecar import sidecar_path
from lab.snapshot.take import take
from lab.units import NS_PER_S
from lab.verify.oracle import verify_method
from lab.vm.ram import mount_of

log = logging.getLogger(__name__)

# Recorded before the baseline's second, so that it lies within the samples.
BASELINE_MARGIN_S = 0.1


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
    machine, workload = scenario.machine, scenario.workload
    check_room(image.parent, machine.ram_mib)
    for instrument in INSTRUMENTS:
        if instrument.is_asked(scenario):
            instrument.require()
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
    progress = ProgressInstrument(vm, scenario)
    others = [one for one in INSTRUMENTS if one is not ProgressInstrument]
    instruments = [progress, *(one(vm, scenario) for one in others if one.is_asked(scenario))]
    async with contextlib.AsyncExitStack() as stack:
        beside = stack.enter_context(neighbours(vm.pid))
        watch = await stack.enter_async_context(watching(instruments))
        unsettled = await settle(progress.sampler)
        await watch.at(Moment.SETTLED)
        await watch.at(Moment.READY)
        throttle = ThrottleCount(vm.pid)
        with no_garbage_collection():
            await warm.hold(scenario.machine.ram_mib)
            await watch.at(Moment.BASELINE)
            await asyncio.sleep(BASELINE_NS / NS_PER_S + BASELINE_MARGIN_S)
            warm.release()
            await watch.at(Moment.ARMED)
            snapshot = await take(
                vm,
                image,
                scenario.method,
                watch=watch,
                fault_log=scenario.instruments.log_faults,
                storage_mib_per_s=scenario.storage.storage_mib_per_s,
            )
            await watch.at(Moment.TAKEN)
            await record_tail(progress.sampler, snapshot.request_ns, snapshot.end_ns)
        throttled = throttle.so_far()
        await watch.at(Moment.BACK)
        await watch.at(Moment.LAST)
        whole = progress.sampler.df()
    first_ns = snapshot.request_ns - BASELINE_NS - round(BASELINE_MARGIN_S / 2 * NS_PER_S)
    cost = slowdown(
        progress.since(first_ns), request_ns=snapshot.request_ns, end_ns=snapshot.end_ns
    )
    log_ = snapshot.fault_log
    taken = Taken(
        marks=msgspec.structs.replace(snapshot.marks, back_ns=cost.back_ns),
        migration=snapshot.migration,
        faults=None if log_ is None else log_.df,
        faults_dropped=0 if log_ is None else log_.dropped,
        baseline_ops_per_s=cost.baseline_ops_per_s,
        progress=whole,
    )
    figures: dict[str, Any] = {
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
    figures |= {metric.name: None for one in INSTRUMENTS for metric in one.metrics}
    tables: dict[str, pd.DataFrame] = {}
    warnings = [unsettled] if unsettled else []
    for found in [one.found(taken) for one in instruments]:
        figures |= found.figures
        tables |= found.tables
        warnings += found.warnings
    return Sample(
        outcome="ok",
        figures=figures,
        marks=taken.marks,
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
