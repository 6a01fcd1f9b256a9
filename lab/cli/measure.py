"""``lab measure``: methods times repeats, interleaved, into a run set."""

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lab.cli import Subparsers, add_command
from lab.cli.recording import add_output_arguments, out_folder, recording, report_failures
from lab.errors import HostError, UsageError
from lab.scenario.command import add_plan_arguments, plan_from_arguments
from lab.scenario.flags import from_arguments
from lab.scenario.machine import Machine
from lab.scenario.methods import METHODS

if TYPE_CHECKING:
    from lab.measure.campaign import Progress
    from lab.runs.run import Run
    from lab.runs.sets import RunSet
    from lab.scenario.plan import Plan


_EXAMPLES = """\
examples:
  lab measure --method live --method background --ram-mib 1024 --out data/mine
  lab measure --method live --vary ram-kind=anon,memfd --vary vcpus=1,2
  lab measure --method live --vary storage-mib-per-s=0,100   an image on a slower disk
  lab measure --vary rate-ops-per-s=5000,50000,0             a guest that is not always busy
  lab measure --method live --vary time-threads=yes,no       what one instrument costs
  lab measure --campaign ram-size --repeats 1                a recorded set's plan, once
"""


class _Moved(argparse.Action):
    """Says where `lab measure floor` went, before its options are looked at."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if values == "floor":
            raise UsageError("the floor has a command of its own", "use `lab floor`")
        if values is not None:
            parser.error(f"unrecognized arguments: {values}")


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "measure",
        _measure,
        summary="measure methods, interleaved, into a run set",
        description="Measure methods times repeats, each run a fresh boot, in rounds of random "
        "order; with --vary, each method with every combination of the values given. An unfinished "
        "run set of the same plan is continued. Exit status 1 when a run failed.",
        epilog=_EXAMPLES,
        usage="%(prog)s [FLAG ...]",
    )
    parser.add_argument("moved", nargs="?", action=_Moved, help=argparse.SUPPRESS)
    named = parser.add_argument_group("campaign")
    named.add_argument(
        "--campaign",
        metavar="NAME",
        help="measure the plan of this name, as in data/NAME; other flags change it",
    )
    named.add_argument("--campaigns", action="store_true", help="list names and questions")
    add_plan_arguments(parser)
    output = add_output_arguments(parser, "images", "run")
    output.add_argument(
        "--keep-images",
        action="store_true",
        help="leave the images there (default: in the folder images of the cache)",
    )


async def _measure(args: argparse.Namespace) -> int:
    from lab.scenario.plan import Plan, describe
    from lab.vm.accelerator import settled

    if args.campaigns:
        print(_campaigns_text())
        return 0
    base = _named_plan(args.campaign) if args.campaign else Plan(methods=tuple(METHODS))
    chosen = await settled(from_arguments(Machine, args, base.machine))
    args.accel = chosen.machine.accel
    plan = plan_from_arguments(args, base)
    if args.dry_run:
        print("\n".join(describe(plan)))
        return 0
    done = await run_campaign(
        plan,
        out_folder(args),
        image_dir=args.image_dir,
        note=args.note,
        keep_images=args.keep_images,
        as_json=args.json,
        fallback=chosen.fallback,
    )
    if not args.json:
        print_table(done)
    return 0 if all(run.ok for run in done) else 1


def _campaigns_text() -> str:
    from lab.scenario.campaigns import campaigns

    width = max(map(len, campaigns()))
    return "\n".join(f"{name:{width}}  {one.question}" for name, one in campaigns().items())


def _named_plan(name: str) -> "Plan":
    """The plan of a campaign.  Raises UsageError for one that another command measures."""
    from lab.scenario.campaigns import campaign
    from lab.scenario.command import command
    from lab.scenario.plan import Plan

    if isinstance(plan := campaign(name).plan, Plan):
        return plan
    raise UsageError(f"the campaign {name} is not one of this command", f"use `{command(plan)}`")


async def run_campaign(
    plan: "Plan",
    out: Path,
    *,
    image_dir: Path | None = None,
    note: str = "",
    keep_images: bool = False,
    as_json: bool = False,
    fallback: str = "",
) -> "RunSet":
    """Measure `plan` into `out` with a progress line; print a line per run when `as_json`.

    :param fallback: why accelerator "auto" is not KVM; the set keeps it.
    """
    from lab.host.cache import cache_dir
    from lab.host.workdir import private_folder
    from lab.measure.campaign import measure
    from lab.measure.ground import survey
    from lab.scenario.plan import estimate_text

    ground = survey(plan, fallback)
    if image_dir is not None and not image_dir.is_dir():
        raise HostError(f"there is no folder {image_dir}", "create it or name another --image-dir")
    with recording(out) as line, ExitStack() as stack:
        if image_dir is not None:
            images = image_dir
        elif keep_images:
            images = cache_dir() / "images"
            images.mkdir(mode=0o700, exist_ok=True)
        else:
            # A campaign that is killed leaves an image; the next one removes it with its folder.
            images = stack.enter_context(private_folder("images-", cache_dir()))
        report = report_failures(line)

        def on_start(progress: "Progress") -> None:
            line(
                f"run {progress.done + 1}/{progress.total}: {progress.slot.case.name}, "
                f"about {estimate_text(progress.remaining_s)} left"
            )

        def on_run(run: "Run") -> None:
            if as_json:
                print(json.dumps(run.summary), flush=True)
            report(run)

        return await measure(
            plan,
            out,
            image_dir=images,
            ground=ground,
            note=note,
            keep_images=keep_images,
            on_start=on_start,
            on_run=on_run,
        )


def print_table(run_set: "RunSet") -> None:
    """The summary table, what to distrust about it, and where the runs are."""
    from lab.analysis.warnings import warnings_of
    from lab.display import text_table
    from lab.runs.methods import df_methods, df_readable

    print(text_table(df_readable(df_methods(run_set))))
    for warning in warnings_of(run_set):
        print(f"caveat: {warning}")
    print(f"median over boots [interval of the median, see `lab report`]; runs in {run_set.path}")
