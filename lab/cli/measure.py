"""``lab measure``: methods times repeats, interleaved, into a run set."""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import HostError, UsageError
from lab.progress import ProgressLine
from lab.scenario.dimensions import parse_dimension
from lab.scenario.flags import add_arguments, from_arguments
from lab.scenario.instruments import Instruments
from lab.scenario.machine import Machine
from lab.scenario.methods import METHODS
from lab.scenario.storage import Storage
from lab.scenario.workload import Workload

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


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "measure",
        help="measure methods, interleaved, into a run set",
        description="Measure methods times repeats, each run a fresh boot, in rounds of random "
        "order;\nwith --vary, each method with every combination of the values given. An "
        "unfinished\nrun set of the same plan is continued. Exit status 1 when a run failed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EXAMPLES,
    )
    parser.add_argument("moved", nargs="?", action=_Moved, help=argparse.SUPPRESS)
    plan = parser.add_argument_group("plan")
    plan.add_argument(
        "--method",
        action="append",
        dest="methods",
        metavar="METHOD",
        help=f"repeatable; one of {', '.join(METHODS)} (default: every method)",
    )
    plan.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="PARAMETER=VALUE,...",
        help="measure each of these values of a parameter below, as in ram-mib=512,1024 or "
        "workload=idle,random; yes, no or default for a switch; repeatable for every combination",
    )
    plan.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="boots per case (default 5)"
    )
    plan.add_argument(
        "--warmups",
        type=int,
        default=0,
        metavar="N",
        help="rounds before them that do not count (default 0)",
    )
    plan.add_argument(
        "--order-seed",
        type=int,
        default=1,
        metavar="N",
        help="seed of the order of cases within each round (default 1)",
    )
    plan.add_argument(
        "--verify",
        action="store_true",
        help="after each timed snapshot take another, restore it and compare every byte of RAM",
    )
    add_arguments(parser.add_argument_group("machine"), Machine)
    add_arguments(parser.add_argument_group("workload"), Workload)
    add_arguments(parser.add_argument_group("storage"), Storage)
    add_arguments(parser.add_argument_group("instruments"), Instruments)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, metavar="DIR", help="the run set (default: a new one in the cache)"
    )
    output.add_argument(
        "--image-dir",
        type=Path,
        metavar="DIR",
        help="where images are written (default: in the cache)",
    )
    output.add_argument(
        "--keep-images",
        action="store_true",
        help="leave the images there (default: in the folder images of the cache)",
    )
    output.add_argument("--note", default="", help="free text, kept in the run set")
    output.add_argument("--json", action="store_true", help="one JSON object per run on stdout")
    output.add_argument("--dry-run", action="store_true", help="only say what would be measured")
    parser.set_defaults(handler=_measure)


async def _measure(args: argparse.Namespace) -> int:
    from lab.host.cache import cache_dir
    from lab.scenario.plan import Plan, describe
    from lab.vm.accelerator import settled

    chosen = await settled(from_arguments(Machine, args))
    plan = Plan(
        methods=tuple(dict.fromkeys(args.methods or METHODS)),
        machine=chosen.machine,
        workload=from_arguments(Workload, args),
        storage=from_arguments(Storage, args),
        instruments=from_arguments(Instruments, args),
        repeats=args.repeats,
        warmups=args.warmups,
        seed=args.order_seed,
        verify=args.verify,
        vary=_varied(args.vary),
    )
    if args.dry_run:
        print("\n".join(describe(plan)))
        return 0
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    out = args.out or cache_dir() / "runs" / stamp
    done = await run_campaign(
        plan,
        out,
        image_dir=args.image_dir,
        note=args.note,
        keep_images=args.keep_images,
        as_json=args.json,
        fallback=chosen.fallback,
    )
    if not args.json:
        print_table(done)
    return 0 if all(run.ok for run in done) else 1


def _varied(given: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    varied: dict[str, tuple[Any, ...]] = {}
    for text in given:
        name, equals, values = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not values:
            raise UsageError(f"--vary {text}", "give it as PARAMETER=VALUE,VALUE")
        if name in varied:
            raise UsageError(f"--vary names {name} twice", "give all its values at once")
        varied[name] = tuple(parse_dimension(name, value) for value in values.split(","))
    return varied


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
    """Measure `plan` into `out` with a progress line; print a line a run when `as_json`.

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
    with ExitStack() as stack:
        if image_dir is not None:
            images = image_dir
        elif keep_images:
            images = cache_dir() / "images"
            images.mkdir(mode=0o700, exist_ok=True)
        else:
            # A campaign that is killed leaves an image; the next one removes it with its folder.
            images = stack.enter_context(private_folder("images-", cache_dir()))
        line = stack.enter_context(ProgressLine())

        def on_start(progress: "Progress") -> None:
            line(
                f"run {progress.done + 1}/{progress.total}: {progress.slot.case.name}, "
                f"about {estimate_text(progress.remaining_s)} left"
            )

        def on_run(run: "Run") -> None:
            if as_json:
                print(json.dumps(run.summary), flush=True)
            if not run.ok:
                line(f"{run.name} {run.record.outcome}: {run.record.reason}")

        try:
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
        except asyncio.CancelledError:
            stack.close()
            print(
                f"lab: interrupted; the same arguments with --out {out} continue", file=sys.stderr
            )
            raise


def print_table(run_set: "RunSet") -> None:
    """The summary table, what to distrust about it, and where the runs are."""
    from lab.analysis.warnings import warnings_of
    from lab.display import text_table
    from lab.runs.methods import df_methods, df_readable

    print(text_table(df_readable(df_methods(run_set))))
    for warning in warnings_of(run_set):
        print(f"caveat: {warning}")
    print(f"median over boots [interval of the median, see `lab report`]; runs in {run_set.path}")
