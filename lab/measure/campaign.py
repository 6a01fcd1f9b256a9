"""Campaigns: cases times repeats, interleaved, into a run set that can be resumed.

A *case* is a method with one value of each parameter that is varied; mostly none is, and cases are
methods.  Every run is a fresh boot (`lab.measure.sample`).  A *round* holds each case once, in an
order drawn anew from the plan's seed, so that drift of the host (caches, memory, clock speed,
neighbours) reaches all cases alike and no case always comes first.  A run that fails is recorded as
failed, with its reason and without figures, and the campaign goes on; only what will fail again
(`HostError`, `UsageError`) ends it.  Interrupted, it leaves a set that the same plan continues.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lab
from lab.errors import HostError, LabError, RunError, UsageError
from lab.guests.registry import GUESTS
from lab.host.cache import cache_dir
from lab.host.needs import kvm_problem
from lab.instruments.hugepages import require_rebuild
from lab.measure.ground import Ground, survey
from lab.measure.hostwarm import WarmMemory
from lab.measure.sample import Sample, take_sample
from lab.runs.columns import METRICS, SUMMARY_FIELDS
from lab.runs.records import RUN_SCHEMA, RunRecord, jsonable, utc_now
from lab.runs.run import Run
from lab.runs.sets import RunSet, create_set, load_set
from lab.scenario.dimensions import dimensions
from lab.scenario.document import to_json
from lab.scenario.machine import Machine
from lab.scenario.plan import TYPICAL_RUN_S, Plan, Slot, slots
from lab.scenario.scenario import Scenario
from lab.vm.ram import require_ram

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a campaign stands, for a progress line."""

    slot: Slot
    done: int
    total: int
    remaining_s: float


Sampler = Callable[..., Awaitable[Sample]]


def open_set(path: Path, plan: Plan, ground: Ground, note: str = "") -> RunSet:
    """Make the run set for a plan, or open the one that is there to continue it.

    Raises RunError when it is complete, was recorded with another plan, or with other builds.
    """
    document = jsonable(to_json(plan))
    if not plan.vary:
        # As it was recorded before there was anything to vary.
        del document["vary"]
    document |= {"order": [slot.case.name for slot in slots(plan)]}
    return open_recording(path, document, ground, note)


def open_recording(
    path: Path, document: Mapping[str, Any], ground: Ground, note: str = ""
) -> RunSet:
    """Make the run set for the plan that `document` holds, or open the one that is there.

    Raises RunError when it is complete, was recorded with another plan, or with other builds.
    """
    if not (path / "set.json").exists():
        return create_set(
            path, plan=document, host=ground.host, binaries=ground.binaries, lab=_lab(), note=note
        )
    found = load_set(path)
    if found.complete:
        raise RunError(
            f"{path} is complete", "name another --out; recorded runs are never replaced"
        )
    different = sorted(k for k in document if found.record.plan.get(k) != document[k])
    if different:
        # --seed once set the order of a campaign too.
        order = "kind" not in document and "seed" in different
        again = f" with --order-seed {found.record.plan['seed']}" if order else ""
        raise RunError(
            f"{path} was begun with another plan ({', '.join(different)} differ)",
            f"name another --out, or give the same arguments{again}",
        )
    if found.record.binaries != jsonable(ground.binaries):
        raise RunError(f"{path} was begun with other builds", "name another --out")
    return found


def _lab() -> dict[str, Any]:
    return {"version": lab.__version__}


def plan_of(run_set: RunSet) -> Plan:
    """The plan that a set of snapshots was recorded by.

    Raises RunError for a floor, and when this version of the lab cannot read the plan.
    """
    if isinstance(plan := run_set.plan, Plan):
        return plan
    raise RunError(
        f"{run_set.name} is a floor, which boots no guest"
        if run_set.kind == "floor"
        else f"{run_set.name} holds no snapshots that `lab measure` takes",
        f"use `lab {run_set.kind}`",
    )


async def measure(
    plan: Plan,
    out: Path,
    *,
    image_dir: Path,
    ground: Ground,
    note: str = "",
    keep_images: bool = False,
    on_start: Callable[[Progress], None] | None = None,
    on_run: Callable[[Run], None] | None = None,
    sampler: Sampler = take_sample,
) -> RunSet:
    """Measure what is missing of a plan and return the complete set.

    :param out: folder of the run set; an unfinished set of the same plan is continued.
    :param image_dir: where snapshot images are written: its disk is part of what is measured.
    :param on_start: called before each run; `on_run` after each, with the sealed run.
    :param sampler: what takes one sample; tests pass their own.

    :raise HostError: this host cannot do it: the set stays, unfinished.
    :raise RunError: `out` holds something else.
    """
    run_set = open_set(out, plan, ground, note)
    with run_set.lock(), WarmMemory() as warm:
        taken = {r.record.order for r in run_set}
        missing = [slot for slot in slots(plan) if slot.order not in taken]
        started = time.monotonic()
        for count, slot in enumerate(missing):
            each_s = (time.monotonic() - started) / count if count else TYPICAL_RUN_S
            if on_start is not None:
                left_s = each_s * (len(missing) - count)
                on_start(
                    Progress(
                        slot=slot,
                        done=len(taken) + count,
                        total=len(taken) + len(missing),
                        remaining_s=left_s,
                    )
                )
            recorded = await _one(
                run_set, plan, slot, image_dir, ground, note, keep_images, sampler, warm
            )
            if on_run is not None:
                on_run(recorded)
        run_set.finish()
    return run_set


async def measure_again(recorded: RunSet, folder: Path, *, repeats: int = 1) -> RunSet:
    """Measure the plan of a set on this machine, with `repeats` boots per case; return the new set.

    :param folder: an existing folder, for the set and for images.

    :raise RunError: the set's plan cannot be read by this version of the lab.
    :raise HostError: this host cannot do it.
    """
    plan = dataclasses.replace(plan_here(plan_of(recorded)), repeats=repeats, warmups=0)
    out = folder / recorded.name
    return await measure(plan, out, image_dir=folder, ground=survey(plan))


async def recorded(folder: Path | str, *, live: bool = False, repeats: int = 1) -> RunSet:
    """Load a run set; or measure its plan on this machine, into a folder of the cache, and return
    that.

    :param live: measure.  A set of another kind is loaded all the same: `lab floor` and `lab
        applications` measure those.
    :param repeats: boots per case, where it is measured.

    :raise RunError: there is no such set, it is damaged, or its plan cannot be read any more.
    :raise HostError: this host cannot measure it.
    """
    found = load_set(folder)
    if not live or found.kind != "snapshot":
        return found
    kept = cache_dir() / "live"
    kept.mkdir(exist_ok=True)
    private = Path(tempfile.mkdtemp(prefix=f"{found.name}-", dir=kept))
    return await measure_again(found, private, repeats=repeats)


def plan_here(plan: Plan) -> Plan:
    """A plan without the kinds of RAM and the accelerators that it varies and that this host cannot
    give, and without rebuilding huge pages where that is not permitted.
    """
    checks = {"ram_kind": _has_ram, "accel": _has_accelerator}
    here = {
        name: tuple(value for value in plan.vary[name] if has(plan.machine, value))
        for name, has in checks.items()
        if name in plan.vary
    }
    rebuilds = plan.instruments.rebuild_huge_pages and _may_rebuild()
    instruments = dataclasses.replace(plan.instruments, rebuild_huge_pages=rebuilds)
    return dataclasses.replace(plan, vary=plan.vary | here, instruments=instruments)


def _may_rebuild() -> bool:
    try:
        require_rebuild()
    except HostError:
        return False
    return True


def _has_accelerator(machine: Machine, accel: Any) -> bool:
    return accel != "kvm" or not kvm_problem(machine.guest)


def _has_ram(machine: Machine, kind: Any) -> bool:
    try:
        require_ram(dataclasses.replace(machine, ram_kind=kind))
    except HostError:
        return False
    return True


async def _one(
    run_set: RunSet,
    plan: Plan,
    slot: Slot,
    image_dir: Path,
    ground: Ground,
    note: str,
    keep_images: bool,
    sampler: Sampler,
    warm: WarmMemory,
) -> Run:
    scenario = slot.case.scenario
    created = utc_now()
    image = image_dir / f"{run_set.name}-{slot.order:03d}-{scenario.method}.snap"
    try:
        sample = await sampler(
            scenario, image, verify=plan.verify, keep_image=keep_images, warm=warm
        )
    except (HostError, UsageError):
        # The next run would fail in the same way.
        raise
    except LabError as error:
        log.info("run %d (%s) failed: %s", slot.order, slot.case.name, error)
        sample = Sample(outcome="failed", reason=str(error), logs=_logs_of(error))
    variant = str(scenario.variant)
    binaries = {
        "qemu": dict(ground.binaries.get(variant, {})) | {"variant": variant},
        "guest": dict(ground.binaries.get(GUESTS[scenario.machine.guest].recorded_as, {})),
    }
    record = RunRecord(
        schema=RUN_SCHEMA,
        id=uuid.uuid4().hex,
        kind="snapshot",
        created_utc=created,
        outcome=sample.outcome,
        reason=_scrub(sample.reason, image_dir),
        method=scenario.method,
        order=slot.order,
        round=slot.round,
        warmup=slot.warmup,
        scenario=jsonable(to_json(scenario)),
        host=jsonable(ground.host) | jsonable(sample.host),
        binaries=jsonable(binaries),
        clocks={"t_ns, *_ns": "CLOCK_MONOTONIC of the host, ns"},
        marks=sample.marks,
        summary=summarise(scenario, sample) | {"reason": _scrub(sample.reason, image_dir)},
        tables={},
        files=[],
        note=note,
        warnings=list(sample.warnings),
    )
    logs = {name: text for name, text in sample.logs.items() if text.strip()}
    return run_set.append(record, sample.tables, logs)


def summarise(scenario: Scenario, sample: Sample) -> dict[str, Any]:
    """The summary line: what was asked for and what came of it.

    A failed run has null for every figure, also where something was measured before it failed.
    """
    values: dict[str, Any] = dict.fromkeys(SUMMARY_FIELDS)
    asked = dimensions(scenario) | {"outcome": sample.outcome}
    values |= {name: value for name, value in asked.items() if name in SUMMARY_FIELDS}
    if scenario.machine.disk == "none":
        values |= dict.fromkeys(("disk_cache", "disk_aio", "disk_iothread"))
    if scenario.workload.kind == "idle":
        values["wss_mib"] = None
    values |= {k: v for k, v in sample.figures.items() if k in SUMMARY_FIELDS}
    if sample.outcome == "failed":
        values |= dict.fromkeys([*METRICS, "back_capped"])
    result: dict[str, Any] = jsonable(values)
    return result


def _scrub(text: str | None, image_dir: Path) -> str | None:
    # A recorded run is published: it names the image, not the folder of images.
    return (
        text
        if text is None
        else text.replace(f"{image_dir}/", "").replace(str(image_dir), "the image folder")
    )


def _logs_of(error: LabError) -> dict[str, bytes]:
    tail = getattr(error, "log_tail", "")
    return {"qemu.log": str(tail).encode()} if tail else {}
