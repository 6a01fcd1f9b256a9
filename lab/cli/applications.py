"""``lab applications``: what a snapshot costs those who ask a server in the guest."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lab.cli import Subparsers, add_command
from lab.cli.recording import add_output_arguments, out_folder, recording, report_failures
from lab.scenario.applications import ApplicationsPlan, describe
from lab.scenario.flags import add_arguments, from_arguments

if TYPE_CHECKING:
    from lab.measure.applications.campaign import Progress
    from lab.runs.sets import RunSet


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "applications",
        _applications,
        summary="measure what a database feels while its VM is snapshotted",
        description="Load a server in the lab's Debian from this host, save the VM's state by each "
        "method in turn, and record every request. A round boots Debian once for each QEMU that "
        "its methods need, and takes them in random order. An unfinished run set of the same plan "
        "is continued. `lab build --guest debian` makes the guest.",
        epilog="example:\n  lab applications --application redis-set --method live "
        "--method background --rounds 5 --out data/mine",
    )
    add_arguments(parser.add_argument_group("plan"), ApplicationsPlan)
    add_output_arguments(parser, "images", "method")


async def _applications(args: argparse.Namespace) -> int:
    plan = from_arguments(ApplicationsPlan, args)
    if args.dry_run:
        print("\n".join(describe(plan)))
        return 0
    done = await run_applications(
        plan, out_folder(args, "applications-"), image_dir=args.image_dir, note=args.note
    )
    print_applications(done, as_json=args.json)
    return 0 if all(run.ok for run in done) else 1


async def run_applications(
    plan: ApplicationsPlan, out: Path, *, image_dir: Path | None = None, note: str = ""
) -> "RunSet":
    """Measure `plan` into `out` with a progress line."""
    from lab.host.cache import cache_dir
    from lab.measure.applications.campaign import measure_applications, survey
    from lab.scenario.plan import estimate_text

    ground = await survey(plan)
    with recording(out) as line:

        def on_start(progress: "Progress") -> None:
            line(
                f"round {progress.turn.round + 1}/{plan.rounds}, sample {progress.done + 1}/"
                f"{progress.total}: {progress.turn.method}, "
                f"about {estimate_text(progress.remaining_s)} left"
            )

        return await measure_applications(
            plan,
            out,
            image_dir=image_dir or cache_dir(),
            ground=ground,
            note=note,
            on_start=on_start,
            on_run=report_failures(line),
        )


def print_applications(run_set: "RunSet", *, as_json: bool) -> None:
    """The medians, as JSON lines or as a table with what should be known of them."""
    from lab.analysis.applications import (
        applications_notes,
        df_applications,
        df_applications_readable,
    )
    from lab.display import text_table
    from lab.runs.records import jsonable

    if as_json:
        for row in df_applications(run_set).to_dict("records"):
            print(json.dumps(jsonable(row)))
        return
    print(text_table(df_applications_readable(run_set)))
    for sentence in applications_notes(run_set):
        print(f"caveat: {sentence}")
    print(f"median over rounds [interval of the median]; runs in {run_set.path}")
