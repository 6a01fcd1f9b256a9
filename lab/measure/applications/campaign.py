"""Rounds of ways to save a state, under the load of an application, into a run set that can be
resumed.

A *round* boots the lab's Debian once for each QEMU that is needed, and takes every method once, in
an order drawn anew.  A run of the set is one of these samples; those of one boot share its memory
and its layers, so a sample is (round, method), and rounds are what is independent.  A sample that
fails is recorded as failed, and what is left of its boot's samples is taken after another boot.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lab.errors import HostError, LabError, UsageError
from lab.guests.debian.build import find_debian, recipe_key
from lab.guests.debian.shell import require_ssh
from lab.host.cache import cache_dir
from lab.host.compiled import ensure_compiled
from lab.host.info import HostInfo
from lab.host.needs import require_uffd
from lab.host.workdir import private_folder
from lab.loads.load import CFLAGS, SOURCE
from lab.loads.pgbench import find_pgbench
from lab.measure.applications.bench import Bench, booted_bench
from lab.measure.applications.sample import take_sample
from lab.measure.campaign import open_recording
from lab.measure.ground import Ground
from lab.measure.hostwarm import WarmMemory
from lab.measure.sample import Sample, check_room
from lab.qemu.build import find_qemu
from lab.runs.columns import APPLICATION_FIELDS
from lab.runs.records import RUN_SCHEMA, RunRecord, jsonable, utc_now
from lab.runs.run import Run
from lab.runs.sets import RunSet, load_set
from lab.scenario.applications import (
    TYPICAL_SAMPLE_S,
    ApplicationsPlan,
    Turn,
    turns,
    variant_of,
)
from lab.scenario.document import to_json
from lab.scenario.methods import Variant

logger = logging.getLogger(__name__)

KIND = "applications"
VARIANTS: tuple[Variant, ...] = ("patched", "unpatched")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a recording stands, for a progress line."""

    turn: Turn
    done: int
    total: int
    remaining_s: float


OnStart = Callable[[Progress], None]


async def survey(plan: ApplicationsPlan) -> Ground:
    """Look at this host and at the builds that a plan needs, and refuse early what would fail late.

    :raise HostError: a build, Debian, a load generator or a permission is missing.
    """
    require_uffd()
    require_ssh()
    debian = find_debian()
    binaries: dict[str, Any] = {}
    for variant in plan.variants:
        found = msgspec.to_builtins(find_qemu(variant), enc_hook=str)
        binaries[variant] = {k: v for k, v in found.items() if k not in ("path", "variant")}
    binaries["debian"] = {"recipe": recipe_key(), "packages": debian.packages}
    if plan.served.server == "redis":
        built = msgspec.to_builtins(
            await ensure_compiled(SOURCE, CFLAGS, "the load generator"), enc_hook=str
        )
        binaries["load"] = {k: v for k, v in built.items() if k != "path"}
    elif plan.served.server == "postgresql":
        find_pgbench()
    return Ground(host=msgspec.to_builtins(HostInfo.collect()), binaries=binaries)


async def measure_applications(
    plan: ApplicationsPlan,
    out: Path,
    *,
    image_dir: Path,
    ground: Ground,
    note: str = "",
    on_start: OnStart | None = None,
    on_run: Callable[[Run], None] | None = None,
) -> RunSet:
    """Take the samples that are missing and return the complete set.

    :param out: folder of the run set; an unfinished set of the same plan is continued.
    :param image_dir: where images are written: its disk is part of what is measured.
    :param on_start: called before each sample; `on_run` after each, with the sealed run.

    :raise HostError: this host cannot do it: the set stays, unfinished.
    :raise RunError: `out` holds something else.
    """
    document = jsonable(to_json(plan)) | {"kind": KIND}
    run_set = open_recording(out, document, ground, note)
    with run_set.lock(), WarmMemory() as warm, private_folder("lab-apps-", image_dir) as folder:
        taken = {run.record.order for run in run_set}
        missing = [turn for turn in turns(plan) if turn.order not in taken]
        recording = _Recording(
            plan=plan,
            run_set=run_set,
            ground=ground,
            note=note,
            folder=folder,
            warm=warm,
            clock=_Clock(len(taken), len(missing), on_start),
            on_run=on_run,
        )
        for (_, variant), boot in itertools.groupby(
            missing, lambda turn: (turn.round, variant_of(turn.method))
        ):
            left = list(boot)
            while left:
                check_room(image_dir, plan.ram_mib)
                warm.make_room(plan.ram_mib)
                left = await recording.boot(variant, left)
        run_set.finish()
    return run_set


@dataclass(frozen=True, kw_only=True)
class _Recording:
    plan: ApplicationsPlan
    run_set: RunSet
    ground: Ground
    note: str
    folder: Path
    warm: WarmMemory
    clock: _Clock
    on_run: Callable[[Run], None] | None

    async def boot(self, variant: Variant, wanted: Sequence[Turn]) -> list[Turn]:
        """Boot once and take samples until one of them fails; return those that are left."""
        left = list(wanted)
        self.clock.begin(left[0])
        try:
            async with booted_bench(self.plan, variant) as bench:
                while left:
                    if left[0] is not wanted[0]:
                        self.clock.begin(left[0])
                    if not await self.take(bench, left.pop(0)):
                        break
                log = bench.vm.process.log_text()
        except (HostError, UsageError):
            # The next boot would fail in the same way.
            raise
        except LabError as error:
            if left != list(wanted):
                raise
            # There was no guest to take it of.
            self.record(left.pop(0), utc_now(), Sample(outcome="failed", reason=str(error)))
            return left
        if log.strip():
            logger.info("QEMU said: %s", log)
        return left

    async def take(self, bench: Bench, turn: Turn) -> bool:
        """Take a sample and record it, also that it failed; return whether it was taken."""
        created = utc_now()
        image = self.folder / f"{turn.order:03d}-{turn.method}.snap"
        try:
            sample = await take_sample(bench, turn, image, self.warm)
        except (HostError, UsageError):
            raise
        except LabError as error:
            said = {"qemu.log": bench.vm.process.log_text().encode()}
            sample = Sample(outcome="failed", reason=str(error), logs=said)
        self.record(turn, created, sample)
        return sample.outcome == "ok"

    def record(self, turn: Turn, created: str, sample: Sample) -> None:
        """Add a sample to the set."""
        variant = variant_of(turn.method)
        reason = sample.reason and sample.reason.replace(f"{self.folder}/", "")
        summary = dict.fromkeys(APPLICATION_FIELDS) | dict(sample.figures)
        summary |= {
            "method": turn.method,
            "application": self.plan.application,
            "outcome": sample.outcome,
            "reason": reason,
        }
        binaries = dict(self.ground.binaries)
        record = RunRecord(
            schema=RUN_SCHEMA,
            id=uuid.uuid4().hex,
            kind=KIND,
            created_utc=created,
            outcome=sample.outcome,
            reason=reason,
            method=turn.method,
            order=turn.order,
            round=turn.round,
            warmup=False,
            scenario=jsonable(to_json(self.plan)) | {"method": turn.method},
            host=jsonable(self.ground.host) | jsonable(sample.host),
            binaries=jsonable(
                {
                    "qemu": dict(binaries[variant]) | {"variant": variant},
                    **{name: one for name, one in binaries.items() if name not in VARIANTS},
                }
            ),
            clocks={"*_ns": "CLOCK_MONOTONIC of the host, ns"},
            marks=sample.marks,
            summary=jsonable(summary),
            tables={},
            files=[],
            note=self.note,
            warnings=list(sample.warnings),
        )
        logs = {name: text for name, text in sample.logs.items() if text.strip()}
        recorded = self.run_set.append(record, sample.tables, logs)
        if self.on_run is not None:
            self.on_run(recorded)


async def recorded_applications(
    folder: Path | str,
    *,
    live: bool = False,
    methods: Sequence[str] = (),
    rounds: int = 1,
) -> RunSet:
    """Load a set that `lab applications` recorded; or measure its plan on this machine, into a
    folder of the cache, and return that.

    :param live: measure.
    :param methods: where it is measured, only these.
    :param rounds: where it is measured, so many.

    :raise RunError: there is no such set, it is damaged, or its plan cannot be read any more.
    :raise HostError: this host cannot measure it.
    """
    found = load_set(folder)
    if not live or not isinstance(found.plan, ApplicationsPlan):
        return found
    plan = dataclasses.replace(
        found.plan, methods=tuple(methods) or found.plan.methods, rounds=rounds
    )
    kept = cache_dir() / "live"
    kept.mkdir(exist_ok=True)
    private = Path(tempfile.mkdtemp(prefix=f"{found.name}-", dir=kept))
    return await measure_applications(
        plan, private / found.name, image_dir=private, ground=await survey(plan)
    )


class _Clock:
    """Tells the caller about each sample that begins, with an estimate of what is left."""

    def __init__(self, taken: int, missing: int, on_start: OnStart | None) -> None:
        self._taken = taken
        self._missing = missing
        self._on_start = on_start
        self._begun = 0
        self._started = time.monotonic()

    def begin(self, turn: Turn) -> None:
        each_s = TYPICAL_SAMPLE_S
        if self._begun:
            each_s = (time.monotonic() - self._started) / self._begun
        if self._on_start is not None:
            self._on_start(
                Progress(
                    turn=turn,
                    done=self._taken + self._begun,
                    total=self._taken + self._missing,
                    remaining_s=each_s * (self._missing - self._begun),
                )
            )
        self._begun += 1
