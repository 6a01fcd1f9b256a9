"""``lab floor``: the bare userfaultfd microbenchmark, into a run set."""

import argparse
import asyncio
import json
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lab.progress import ProgressLine
from lab.scenario.floor import BENCHMARKS, WORK_MIB, FloorPlan, describe

if TYPE_CHECKING:
    from lab.measure.floor.measure import Progress
    from lab.runs.run import Run
    from lab.runs.sets import RunSet


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "floor",
        help="measure what the kernel asks for each step of a snapshot, with no VM",
        description="Time the steps that a live snapshot is made of, with no VM: protecting "
        "memory, one write fault by each kind of handler, releasing memory, copying, looking for "
        "zeros, writing a file. Rounds of blocks in random order, each block in a process of its "
        "own. An unfinished run set of the same plan is continued.",
    )
    defaults = FloorPlan()

    def add_number(flag: str, meaning: str, default: int) -> None:
        text = f"{meaning} (default {default})"
        parser.add_argument(flag, type=int, metavar="N", default=default, help=text)

    parser.add_argument(
        "--benchmark",
        action="append",
        dest="benchmarks",
        choices=BENCHMARKS,
        help="repeatable (default: all of them)",
    )
    add_number("--repeats", "rounds", defaults.repeats)
    add_number("--samples", "most samples of a block", defaults.samples)
    add_number(
        "--mib", f"memory to protect, at most {WORK_MIB} of it for other steps", defaults.mib
    )
    add_number("--write-mib", "size of the file to write", defaults.write_mib)
    add_number(
        "--delay-us", "delay that the handler adds to each fault, to check", defaults.delay_us
    )
    add_number("--seed", "order of blocks and pages", defaults.seed)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run set (default: a new one in the cache)"
    )
    parser.add_argument(
        "--image-dir",
        type=Path,
        metavar="DIR",
        help="where files are written (default: in the cache)",
    )
    parser.add_argument("--note", metavar="TEXT", default="", help="free text, kept in the run set")
    parser.add_argument("--json", action="store_true", help="one JSON object per step on stdout")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be measured")
    parser.set_defaults(handler=_floor)


async def _floor(args: argparse.Namespace) -> int:
    from lab.host.cache import cache_dir

    plan = FloorPlan(
        benchmarks=tuple(dict.fromkeys(args.benchmarks or BENCHMARKS)),
        repeats=args.repeats,
        mib=args.mib,
        write_mib=args.write_mib,
        samples=args.samples,
        delay_us=args.delay_us,
        seed=args.seed,
    )
    if args.dry_run:
        print("\n".join(describe(plan)))
        return 0
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    out = args.out or cache_dir() / "runs" / f"floor-{stamp}"
    done = await run_floor(plan, out, image_dir=args.image_dir, note=args.note)
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
    with ExitStack() as stack:
        line = stack.enter_context(ProgressLine())

        def on_start(progress: "Progress") -> None:
            # Only numbers differ from block to block, so that a log gets a line now and then.
            line(
                f"round {progress.round + 1}/{plan.repeats}, block {progress.done + 1}/"
                f"{progress.total}: about {estimate_text(progress.remaining_s)} left"
            )

        def on_run(run: "Run") -> None:
            if not run.ok:
                line(f"{run.name} {run.record.outcome}: {run.record.reason}")

        try:
            return await measure_floor(
                plan,
                out,
                image_dir=image_dir,
                program=program,
                ground=ground,
                note=note,
                on_start=on_start,
                on_run=on_run,
            )
        except asyncio.CancelledError:
            stack.close()
            print(
                f"lab: interrupted; the same arguments with --out {out} continue", file=sys.stderr
            )
            raise


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
