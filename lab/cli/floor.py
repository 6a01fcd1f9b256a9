"""``lab floor``: the bare userfaultfd microbenchmark, into a run set."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lab.cli import Subparsers, add_command
from lab.cli.recording import add_output_arguments, out_folder, recording, report_failures
from lab.scenario.flags import add_arguments, from_arguments
from lab.scenario.floor import FloorPlan, describe

if TYPE_CHECKING:
    from lab.measure.floor.measure import Progress
    from lab.runs.sets import RunSet


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "floor",
        _floor,
        summary="measure what the kernel asks for each step of a snapshot, with no VM",
        description="Time the steps that a live snapshot is made of, with no VM: protecting "
        "memory, one write fault by each kind of handler, releasing memory, copying, looking for "
        "zeros, writing a file. Rounds of blocks in random order, each block in a process of its "
        "own. An unfinished run set of the same plan is continued.",
    )
    add_arguments(parser.add_argument_group("plan"), FloorPlan)
    add_output_arguments(parser, "files", "step")


async def _floor(args: argparse.Namespace) -> int:
    plan = from_arguments(FloorPlan, args)
    if args.dry_run:
        print("\n".join(describe(plan)))
        return 0
    done = await run_floor(
        plan, out_folder(args, "floor-"), image_dir=args.image_dir, note=args.note
    )
    print_floor(done, as_json=args.json)
    return 0 if all(run.ok for run in done) else 1


async def run_floor(
    plan: FloorPlan, out: Path, *, image_dir: Path | None = None, note: str = ""
) -> "RunSet":
    """Measure `plan` into `out` with a progress line."""
    from lab.host.cache import cache_dir
    from lab.measure.floor.build import ensure_program
    from lab.measure.floor.measure import measure_floor, survey
    from lab.scenario.plan import estimate_text

    image_dir = image_dir or cache_dir()
    program = await ensure_program()
    ground = survey(plan, program, image_dir)
    with recording(out) as line:

        def on_start(progress: "Progress") -> None:
            # Only numbers differ from block to block, so that a log gets a line every 15 s.
            line(
                f"round {progress.round + 1}/{plan.repeats}, block {progress.done + 1}/"
                f"{progress.total}: about {estimate_text(progress.remaining_s)} left"
            )

        return await measure_floor(
            plan,
            out,
            image_dir=image_dir,
            program=program,
            ground=ground,
            note=note,
            on_start=on_start,
            on_run=report_failures(line),
        )


def print_floor(run_set: "RunSet", *, as_json: bool) -> None:
    """The medians, as JSON lines or as a table with what could not be measured."""
    from lab.analysis.floor import df_floor_medians, df_floor_readable, skipped
    from lab.display import text_table
    from lab.runs.records import jsonable

    if as_json:
        for row in df_floor_medians(run_set).to_dict("records"):
            print(json.dumps(jsonable(row)))
        return
    print(text_table(df_floor_readable(run_set)))
    for reason in skipped(run_set):
        print(f"caveat: {reason}")
    print(f"median over rounds [interval of the median]; runs in {run_set.path}")
