"""Campaigns: cases times repeats, interleaved, into a run set that can be resumed.

A *case* is a method with one value of each parameter that is varied; mostly none is, and cases are
methods.  Every run is a fresh boot (`lab.sample`).  A *round* holds each case once, in an order
drawn anew from the plan's seed, so that drift of the host (caches, memory, clock speed, neighbours)
reaches all cases alike and no case always comes first.  A run that fails is recorded as failed,
with its reason and without figures, and the campaign goes on; only what will fail again
(`HostError`, `UsageError`) ends it.  Interrupted, it leaves a set that the same plan continues.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

import lab
from lab import run
from lab.columns import METRICS, SUMMARY_FIELDS
from lab.errors import HostError, LabError, RunError, UsageError
from lab.sample import Sample, take_sample
from lab.scenario import (
    GuestKind,
    Instruments,
    Machine,
    Scenario,
    Storage,
    Variant,
    Workload,
    case_name,
    dimensions,
    from_json,
    replace_dimensions,
    to_json,
)
from lab.warmth import WarmMemory

log = logging.getLogger(__name__)

# Shown before the first run has been timed: boot, settle, baseline, snapshot, tail at 1 GiB.
TYPICAL_RUN_S = 11.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """What samples are taken of, and what it is called."""

    name: str
    scenario: Scenario


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure: every method with every combination of the values in `vary`.

    `vary` names parameters of `Machine`, `Workload`, `Storage` and `Instruments` as tables do, with
    the values to measure instead of the one given here.  `seed` fixes the order of cases inside the
    rounds.  `warmups` rounds come first and are marked: they are recorded but
    never counted.  `verify` adds an untimed snapshot to every boot, restores it and compares every
    byte of RAM.
    """

    methods: tuple[str, ...]
    machine: Machine = field(default_factory=Machine)
    workload: Workload = field(default_factory=Workload)
    storage: Storage = field(default_factory=Storage)
    instruments: Instruments = field(default_factory=Instruments)
    repeats: int = 5
    warmups: int = 0
    seed: int = 1
    verify: bool = False
    vary: dict[str, tuple[int | str | bool | None, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.methods:
            raise UsageError("no method to measure", "give --method")
        if len(set(self.methods)) != len(self.methods):
            raise UsageError("a method is named twice", "use --repeats for more boots of a method")
        if self.repeats < 1 or self.warmups < 0:
            raise UsageError(
                "fewer than one repeat, or a negative number of warm-ups",
                "give --repeats 1 or more",
            )
        for name, values in self.vary.items():
            if not values or len(set(values)) != len(values):
                raise UsageError(
                    f"{name} is varied over {len(values)} values, some of them twice"
                    if values
                    else f"{name} is varied over no value",
                    "name each value once",
                )
        if any(case.scenario.machine.accel == "auto" for case in self.cases()):
            raise UsageError(
                "what is measured runs under the one accelerator or the other, not under auto",
                "see lab.accelerator.settled, or name tcg or kvm",
            )

    def cases(self) -> list[Case]:
        """Every case, methods outermost.  Raises UsageError when one can not be measured."""
        found = []
        for name in self.methods:
            # Sorted, because JSON does not keep an order of keys.
            names = sorted(self.vary)
            for combination in itertools.product(*(self.vary[key] for key in names)):
                values = dict(zip(names, combination, strict=True))
                machine, workload, storage, instruments = replace_dimensions(
                    self.machine, self.workload, self.storage, self.instruments, values
                )
                scenario = Scenario(
                    machine=machine,
                    workload=workload,
                    method=name,
                    storage=storage,
                    instruments=instruments,
                )
                found.append(Case(name=case_name(name, values), scenario=scenario))
        return found

    @property
    def variants(self) -> list[Variant]:
        """QEMU binaries that the plan needs."""
        return sorted({case.scenario.variant for case in self.cases()})

    @property
    def guests(self) -> list[GuestKind]:
        """Guests that the plan boots."""
        return sorted({case.scenario.machine.guest for case in self.cases()})


# What a set calls the software of a guest.  There was no other than Linux at first.
_GUEST_BINARY: Mapping[GuestKind, str] = {"linux": "guest", "micro": "microguest"}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One run to come: its place in the campaign, its round and its case."""

    order: int
    round: int
    case: Case
    warmup: bool


def slots(plan: Plan) -> list[Slot]:
    """Every run of a plan in the order of measurement: the same plan gives the same order.

    Rounds count from 0; warm-up rounds come first and count from -warmups.
    """
    rng = random.Random(plan.seed)
    planned: list[Slot] = []
    for round_ in range(-plan.warmups, plan.repeats):
        cases = plan.cases()
        rng.shuffle(cases)
        for case in cases:
            planned.append(Slot(order=len(planned), round=round_, case=case, warmup=round_ < 0))
    return planned


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a campaign stands, for a progress line."""

    slot: Slot
    done: int
    total: int
    remaining_s: float


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a campaign stands on: host and builds, as they go into the set.  A resumed set must
    stand on the same.
    """

    host: Mapping[str, Any]
    binaries: Mapping[str, Any]


Sampler = Callable[..., Awaitable[Sample]]


def survey(plan: Plan, fallback: str = "") -> Ground:
    """Look at this host and at the builds that a plan needs.

    :param fallback: why accelerator "auto" is not KVM, to be kept with what is known of the host.
    :raise HostError: when a build is missing.
    """
    from lab.guest.build import find_guest
    from lab.guest.micro import find_microguest
    from lab.host import HostInfo
    from lab.qemu.build import find_qemu

    binaries: dict[str, Any] = {}
    for variant in plan.variants:
        # Where a binary lies is this machine's business; what it is, is in its hash.
        found = msgspec.to_builtins(find_qemu(variant), enc_hook=str)
        binaries[str(variant)] = {k: v for k, v in found.items() if k not in ("path", "variant")}
    for kind in plan.guests:
        found = msgspec.to_builtins(
            find_microguest() if kind == "micro" else find_guest(), enc_hook=str
        )
        # Where its files lie is this machine's business, too.
        files = ("kernel", "initramfs", "rom")
        binaries[_GUEST_BINARY[kind]] = {k: v for k, v in found.items() if k not in files}
    host = msgspec.to_builtins(HostInfo.collect())
    if fallback:
        host["accel_fallback"] = fallback
    return Ground(host=host, binaries=binaries)


def open_set(path: Path, plan: Plan, ground: Ground, note: str = "") -> run.RunSet:
    """Make the run set for a plan, or open the one that is there to continue it.

    Raises RunError when it is complete, was recorded with another plan, or with other builds.
    """
    document = run.jsonable(to_json(plan))
    if not plan.vary:
        # As it was recorded before there was anything to vary.
        del document["vary"]
    document |= {"order": [slot.case.name for slot in slots(plan)]}
    return open_recording(path, document, ground, note)


def open_recording(
    path: Path, document: Mapping[str, Any], ground: Ground, note: str = ""
) -> run.RunSet:
    """Make the run set for the plan that `document` holds, or open the one that is there.

    Raises RunError when it is complete, was recorded with another plan, or with other builds.
    """
    if not (path / "set.json").exists():
        return run.create_set(
            path, plan=document, host=ground.host, binaries=ground.binaries, lab=_lab(), note=note
        )
    found = run.load_set(path)
    if found.complete:
        raise RunError(
            f"{path} is complete", "name another --out; recorded runs are never replaced"
        )
    different = sorted(k for k in document if found.record.plan.get(k) != document[k])
    if different:
        # --seed once set the order of a campaign too.
        order = document.get("kind") != "floor" and "seed" in different
        again = f" with --order-seed {found.record.plan['seed']}" if order else ""
        raise RunError(
            f"{path} was begun with another plan ({', '.join(different)} differ)",
            f"name another --out, or give the same arguments{again}",
        )
    if found.record.binaries != run.jsonable(ground.binaries):
        raise RunError(f"{path} was begun with other builds", "name another --out")
    return found


def _lab() -> dict[str, Any]:
    return {"version": lab.__version__}


def plan_of(run_set: run.RunSet) -> Plan:
    """The plan a set was recorded with, to measure the same again.

    Raises RunError when this version of the lab cannot read it.
    """
    document = {k: v for k, v in run_set.record.plan.items() if k != "order"}
    try:
        return from_json(Plan, document)
    except UsageError as error:
        raise RunError(
            f"the plan of {run_set.path} is not one of this version: {error.cause}", error.remedy
        ) from error


async def measure(
    plan: Plan,
    out: Path,
    *,
    image_dir: Path,
    ground: Ground,
    note: str = "",
    keep_images: bool = False,
    on_start: Callable[[Progress], None] | None = None,
    on_run: Callable[[run.Run], None] | None = None,
    sampler: Sampler = take_sample,
) -> run.RunSet:
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


async def measure_again(recorded: run.RunSet, folder: Path, *, repeats: int = 1) -> run.RunSet:
    """Measure the plan of a set on this machine, with so many boots a case; return the new set.

    :param folder: an existing folder, for the set and for images.

    :raise RunError: the set's plan can not be read by this version of the lab.
    :raise HostError: this host can not do it.
    """
    plan = dataclasses.replace(plan_here(recorded), repeats=repeats, warmups=0)
    out = folder / recorded.name
    return await measure(plan, out, image_dir=folder, ground=survey(plan))


def plan_here(recorded: run.RunSet) -> Plan:
    """The plan a set was recorded with, without the kinds of RAM and the accelerators that it
    varied and that this host can not give, and without rebuilding huge pages where that is not
    permitted.

    Raises RunError when this version of the lab cannot read it.
    """
    plan = plan_of(recorded)
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
    from lab.hugepages import require_rebuild

    try:
        require_rebuild()
    except HostError:
        return False
    return True


def _has_accelerator(machine: Machine, accel: Any) -> bool:
    from lab.host import kvm_problem

    return accel != "kvm" or not kvm_problem(machine.guest)


def _has_ram(machine: Machine, kind: Any) -> bool:
    from lab.ram import require_ram

    try:
        require_ram(dataclasses.replace(machine, ram_kind=kind))
    except HostError:
        return False
    return True


async def _one(
    run_set: run.RunSet,
    plan: Plan,
    slot: Slot,
    image_dir: Path,
    ground: Ground,
    note: str,
    keep_images: bool,
    sampler: Sampler,
    warm: WarmMemory,
) -> run.Run:
    scenario = slot.case.scenario
    created = run.utc_now()
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
        "guest": dict(ground.binaries.get(_GUEST_BINARY[scenario.machine.guest], {})),
    }
    record = run.RunRecord(
        schema=run.RUN_SCHEMA,
        id=uuid.uuid4().hex,
        kind="snapshot",
        created_utc=created,
        outcome=sample.outcome,
        reason=_scrub(sample.reason, image_dir),
        method=scenario.method,
        order=slot.order,
        round=slot.round,
        warmup=slot.warmup,
        scenario=run.jsonable(to_json(scenario)),
        host=run.jsonable(ground.host) | run.jsonable(sample.host),
        binaries=run.jsonable(binaries),
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
    result: dict[str, Any] = run.jsonable(values)
    return result


def _scrub(text: str | None, image_dir: Path) -> str | None:
    # A recorded run is published: it names the image, not where somebody keeps images.
    return (
        text
        if text is None
        else text.replace(f"{image_dir}/", "").replace(str(image_dir), "the image folder")
    )


def _logs_of(error: LabError) -> dict[str, bytes]:
    tail = getattr(error, "log_tail", "")
    return {"qemu.log": str(tail).encode()} if tail else {}


def estimate_text(remaining_s: float) -> str:
    """Seconds as people say them."""
    if remaining_s < 90:
        return f"{remaining_s:.0f} s"
    return f"{remaining_s / 60:.0f} min"


def describe(plan: Plan) -> Sequence[str]:
    """The plan as lines for `--dry-run`."""
    machine, workload = plan.machine, plan.workload
    planned = slots(plan)
    left_out = [name for name, on in to_json(plan.instruments).items() if on is False]
    paced = 0 if "rate_ops_per_s" in plan.vary else workload.rate_ops_per_s
    rate = 0 if "storage_mib_per_s" in plan.vary else plan.storage.storage_mib_per_s
    head = "; ".join(
        [
            f"{len(planned)} runs: {plan.repeats} x {len(plan.cases())} "
            + ("cases" if plan.vary else "methods")
            + (f" after {plan.warmups} warm-up rounds" if plan.warmups else ""),
            f"{machine.ram_mib} MiB RAM, {machine.vcpus} vCPU, {machine.accel}"
            + (", microguest" if machine.guest == "micro" else ""),
            f"{workload.kind} {workload.wss_mib} MiB",
            *([f"{paced} operations/s"] if paced else []),
            *([f"image at {rate} MiB/s"] if rate else []),
            *(f"not {name}" for name in left_out if name not in plan.vary),
            *(f"{key} varied" for key in sorted(plan.vary)),
            f"about {estimate_text(TYPICAL_RUN_S * len(planned))}",
        ]
    )
    return [
        head,
        *(
            f"{s.order:03d}  round {s.round}  {s.case.name}{'  (warm-up)' if s.warmup else ''}"
            for s in planned
        ),
    ]
