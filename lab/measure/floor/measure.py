"""Record rounds of blocks into a run set: a run of kind `floor` is one round.

A round holds every block once, in an order drawn anew, each in a process of its own.  So drift of
the host reaches all blocks alike, and rounds are samples as boots are: what repeats inside a block
shares its memory and its moment, and is not independent.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pandas as pd

from lab.errors import HostError, LabError
from lab.host.compiled import Program
from lab.host.info import HostInfo
from lab.host.limits import ThrottleCount
from lab.host.needs import require_memory, require_uffd
from lab.host.neighbours import neighbours
from lab.host.room import require_room
from lab.host.workdir import private_folder
from lab.marks import Marks
from lab.measure.campaign import open_recording
from lab.measure.floor.program import Output, run_block
from lab.measure.ground import Ground
from lab.measure.sample import filesystem_of, held_back, held_back_warnings
from lab.runs.columns import COLUMNS
from lab.runs.records import RUN_SCHEMA, Outcome, RunRecord, jsonable, utc_now
from lab.runs.run import Run
from lab.runs.sets import RunSet
from lab.scenario.document import to_json
from lab.scenario.floor import WORK_MIB, Block, FloorPlan, round_blocks

KIND = "floor"
SHARED_MEMORY = Path("/dev/shm")
# Shown before the first block has been timed.
TYPICAL_BLOCK_S = 0.4
# What a process needs besides the memory that is measured.
_OVERHEAD_MIB = 64


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a recording stands, for a progress line."""

    round: int
    block: Block
    done: int
    total: int
    remaining_s: float


OnStart = Callable[[Progress], None]


def survey(plan: FloorPlan, program: Program, image_dir: Path) -> Ground:
    """Look at this host, and refuse early what would fail late.

    :raise HostError: no userfaultfd, or too little memory or disk.
    """
    require_uffd()
    # A file in /dev/shm is memory, and so is what warms it up.
    require_memory(
        max(plan.mib, WORK_MIB, 2 * plan.write_mib) + _OVERHEAD_MIB, f"{plan.mib} MiB to protect"
    )
    require_room(image_dir, plan.write_mib << 20, "a file to write", "choose a smaller --write-mib")
    host = msgspec.to_builtins(HostInfo.collect()) | {"image_filesystem": filesystem_of(image_dir)}
    built = msgspec.to_builtins(program, enc_hook=str)
    return Ground(host=host, binaries={KIND: {k: v for k, v in built.items() if k != "path"}})


async def measure_floor(
    plan: FloorPlan,
    out: Path,
    *,
    image_dir: Path,
    program: Program,
    ground: Ground,
    note: str = "",
    on_start: OnStart | None = None,
    on_run: Callable[[Run], None] | None = None,
) -> RunSet:
    """Measure the rounds that are missing and return the complete set.

    :param out: folder of the run set; an unfinished set of the same plan is continued.
    :param image_dir: where a file is written: its disk is part of what is measured.
    :param on_start: called before each block; `on_run` after each round, with the sealed run.

    :raise HostError: this host cannot do it: the set stays, unfinished.
    :raise RunError: `out` holds something else.
    """
    document = jsonable(to_json(plan)) | {"kind": KIND, "methods": [KIND]}
    run_set = open_recording(out, document, ground, note)
    with run_set.lock(), _folders(image_dir) as (work, targets):
        taken = {one.record.order for one in run_set}
        rounds = [k for k in range(plan.repeats) if k not in taken]
        clock = _Clock(len(rounds) * len(round_blocks(plan, 0)), on_start)
        for round_ in rounds:
            created = utc_now()
            outcome: Outcome = "ok"
            reason, table, skipped = None, None, dict[str, str]()
            host, warnings = jsonable(ground.host), list[str]()
            try:
                with neighbours() as beside:
                    throttle = ThrottleCount()
                    table, skipped = await _round(plan, round_, program.path, work, targets, clock)
                    throttled = throttle.so_far()
                host |= held_back(throttled, beside)
                warnings = held_back_warnings(throttled, beside)
            except HostError:
                # The next round would fail in the same way.
                raise
            except LabError as error:
                outcome, reason = "failed", str(error)
            record = RunRecord(
                schema=RUN_SCHEMA,
                id=uuid.uuid4().hex,
                kind=KIND,
                created_utc=created,
                outcome=outcome,
                reason=reason,
                method=KIND,
                order=round_,
                round=round_,
                warmup=False,
                scenario=document,
                host=host,
                binaries=jsonable(ground.binaries),
                clocks={"*_ns": "CLOCK_MONOTONIC of the host, ns"},
                marks=Marks(),
                summary={
                    "method": KIND,
                    "outcome": outcome,
                    "samples": None if table is None else len(table),
                    "skipped": skipped,
                    "reason": reason,
                },
                tables={},
                files=[],
                note=note,
                warnings=warnings,
            )
            recorded = run_set.append(record, {} if table is None else {KIND: table})
            if on_run is not None:
                on_run(recorded)
        run_set.finish()
    return run_set


@contextlib.contextmanager
def _folders(image_dir: Path) -> Iterator[tuple[Path, Mapping[str, Path]]]:
    """A private folder for the log, and one to write files in for each target that is there."""
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(private_folder("lab-floor-"))
        targets = {"image-dir": stack.enter_context(private_folder("lab-floor-", image_dir))}
        if SHARED_MEMORY.is_dir() and filesystem_of(SHARED_MEMORY) == "tmpfs":
            targets["tmpfs"] = stack.enter_context(private_folder("lab-floor-", SHARED_MEMORY))
        yield work, targets


class _Clock:
    """Tells the caller about each block that begins, with an estimate of what is left."""

    def __init__(self, total: int, on_start: OnStart | None) -> None:
        self._total = total
        self._on_start = on_start
        self._done = 0
        self._started = time.monotonic()

    def begin(self, round_: int, block: Block) -> None:
        each_s = TYPICAL_BLOCK_S
        if self._done:
            each_s = (time.monotonic() - self._started) / self._done
        if self._on_start is not None:
            left_s = each_s * (self._total - self._done)
            self._on_start(
                Progress(
                    round=round_,
                    block=block,
                    done=self._done,
                    total=self._total,
                    remaining_s=left_s,
                )
            )
        self._done += 1


async def _round(
    plan: FloorPlan,
    round_: int,
    program: Path,
    work: Path,
    targets: Mapping[str, Path],
    clock: _Clock,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Measure one round: its table, and label and reason of the blocks that could not be."""
    frames: list[pd.DataFrame] = []
    skipped: dict[str, str] = {}
    for place, block in enumerate(round_blocks(plan, round_)):
        clock.begin(round_, block)
        if block.target is not None and block.target not in targets:
            skipped[block.label] = f"there is no {block.target} in {SHARED_MEMORY}"
            continue
        folder = None if block.target is None else str(targets[block.target])
        output = await run_block(program, plan.arguments(block, round_, folder), work)
        if output.skipped is not None:
            skipped[block.label] = output.skipped
        else:
            frames.append(_table(block, place, output))
    return _joined(frames), dict(sorted(skipped.items()))


def _table(block: Block, place: int, output: Output) -> pd.DataFrame:
    table = pd.DataFrame(output.samples, columns=["stage", "pages", "value_ns"])
    table["block"] = place
    table["benchmark"] = block.benchmark
    table["variant"] = block.variant
    table["ram_kind"] = pd.Series([block.ram_kind] * len(table), dtype=object)
    table["target"] = pd.Series([block.target] * len(table), dtype=object)
    table["busy_threads"] = block.busy_threads
    table["sample"] = table.groupby("stage").cumcount()
    return table


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    columns = list(COLUMNS[KIND])
    joined = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    # By stage, which packs better than one sample of each stage after the other.
    joined = joined.sort_values(["block", "stage", "sample"], kind="stable", ignore_index=True)
    return joined[columns].astype({column.name: column.dtype for column in COLUMNS[KIND].values()})
