"""``lab reproduce``: build what is missing, measure every method, report, re-make the figures."""

import argparse
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lab.progress import ProgressLine
from lab.scenario import METHODS, Machine, Workload

if TYPE_CHECKING:
    from lab.run import RunSet


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a profile measures, with every method."""

    machine: Machine
    workload: Workload
    repeats: int


PROFILES = {
    # Of the order of minutes on 2 CPUs; three boots show a factor, not a percentage.
    "quick": Profile(machine=Machine(), workload=Workload(), repeats=3),
    "full": Profile(machine=Machine(), workload=Workload(), repeats=9),
}


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "reproduce",
        help="build, measure every method, write the report and the figures",
        description="Build what is missing, measure every method on this machine, print the table, "
        "write one HTML report and re-make the notebooks' figures from this machine's own data.",
    )
    parser.add_argument(
        "--profile", choices=sorted(PROFILES), default="quick", help="default: quick"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run set (default: data/PROFILE-TIME here)"
    )
    parser.set_defaults(handler=_reproduce)


async def _reproduce(args: argparse.Namespace) -> int:
    from lab.cli.measure import print_table, run_campaign
    from lab.guest.build import ensure_guest
    from lab.measure import Plan
    from lab.qemu.build import ensure_qemu

    profile = PROFILES[args.profile]
    with ProgressLine() as line:
        await ensure_qemu(line)
        await ensure_guest(line)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    out = args.out or Path("data") / f"{args.profile}-{stamp}"
    plan = Plan(
        methods=tuple(METHODS),
        machine=profile.machine,
        workload=profile.workload,
        repeats=profile.repeats,
    )
    done = await run_campaign(plan, out, note=f"lab reproduce --profile {args.profile}")
    print_table(done)
    await write_up(done)
    return 0 if all(run.ok for run in done) else 1


async def write_up(run_set: "RunSet") -> None:
    """Write report, notebooks and figures of a set beside its runs, and say where they are."""
    from lab.notebooks import execute, notebook_paths, save_figures
    from lab.report import render_report

    report = run_set.path / "report.html"
    report.write_text(render_report(run_set), encoding="utf-8")
    print(f"report: {report}")
    figures = []
    with ProgressLine() as line:
        for source in notebook_paths():
            line(f"executing {source.name}")
            target = run_set.path / "notebooks" / source.name
            await execute(source, target, {"DATA": str(run_set.path.resolve()), "LIVE": False})
            figures += save_figures(target, run_set.path / "figures")
    if figures:
        print(f"figures: {len(figures)} in {run_set.path / 'figures'}")
        print(f"notebooks, re-executed: {run_set.path / 'notebooks'}")
    else:
        print("figures: none, the notebooks are not part of this installation", file=sys.stderr)
