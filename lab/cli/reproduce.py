"""``lab reproduce``: build what is missing, measure every method, report, re-make the figures."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.cli import Subparsers, add_command
from lab.errors import HostError
from lab.progress import ProgressLine
from lab.scenario.methods import METHODS

if TYPE_CHECKING:
    from lab.runs.sets import RunSet
    from lab.scenario.plan import Plan

#: The recorded set in whose place the main measurement is shown.
MAIN_SET = "first-light"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How often a profile measures every method; `every_set` adds the campaigns of the other sets
    that notebooks show.
    """

    repeats: int
    every_set: bool = False


PROFILES = {
    # Of the order of minutes on 2 CPUs; three boots show a factor, not a percentage.
    "quick": Profile(repeats=3),
    "full": Profile(repeats=6, every_set=True),
}


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "reproduce",
        _reproduce,
        summary="build, measure every method, write the report and the figures",
        description="Build what is missing, measure every method on this machine, print the table, "
        "write one HTML report and re-make the notebooks' figures from this machine's own data. "
        "The profile full measures every set that the notebooks show (some three hours); quick the "
        "one that most of them do. The same command with --out goes on after an interruption.",
    )
    parser.add_argument(
        "--profile", choices=sorted(PROFILES), default="quick", help="default: quick"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run set (default: data/PROFILE-TIME here)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help="boots per case in every set, rounds of the floor (default: the profile's, and those "
        "of the recorded sets); 1 shows whether all works here",
    )
    parser.add_argument(
        "--beside",
        action="store_true",
        help="also write a page that shows every figure beside the recorded one; with --out of a "
        "measurement that is complete, nothing is measured again",
    )


async def _reproduce(args: argparse.Namespace) -> int:
    from lab.cli.measure import print_table
    from lab.guests.registry import ensure_guests
    from lab.qemu.build import ensure_qemu
    from lab.scenario.plan import Plan

    profile = PROFILES[args.profile]
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    out = args.out or Path("data") / f"{args.profile}-{stamp}"
    plan = Plan(
        methods=tuple(METHODS),
        repeats=profile.repeats if args.repeats is None else args.repeats,
    )
    with ProgressLine() as line:
        await ensure_qemu(line)
        await ensure_guests(line)
    note = f"lab reproduce --profile {args.profile}"
    done = await _measured(plan, out, note)
    print_table(done)
    own = {MAIN_SET: done}
    if profile.every_set:
        own |= await _other_sets(out / "sets", note, args.repeats)
    await write_up(done, own, beside=args.beside)
    return 0 if all(run.ok for measured in own.values() for run in measured) else 1


async def _measured(plan: "Plan", out: Path, note: str) -> "RunSet":
    """Measure a plan into `out`, or go on with it; what is complete is left as it is.

    Raises RunError when `out` holds another plan's runs.
    """
    from lab.cli.measure import run_campaign
    from lab.measure.campaign import plan_of
    from lab.runs.sets import load_set

    if (out / "set.json").exists():
        found = load_set(out)
        if found.complete and plan_of(found) == plan:
            print(f"already measured: {out}")
            return found
    return await run_campaign(plan, out, note=note)


async def _other_sets(folder: Path, note: str, repeats: int | None) -> "dict[str, RunSet]":
    """Measure the campaign of every other set that a notebook shows, unless this host does not have
    the accelerator for it.

    :param repeats: instead of those of the plans.
    """
    from lab.cli.applications import run_applications
    from lab.cli.floor import run_floor
    from lab.measure.campaign import plan_here
    from lab.report.notebooks import notebook_paths, sets_named
    from lab.runs.sets import load_set
    from lab.scenario.applications import ApplicationsPlan
    from lab.scenario.campaigns import campaign
    from lab.scenario.floor import FloorPlan
    from lab.vm.accelerator import accelerator_problem

    names = {name for path in notebook_paths() for name in sets_named(path).values()}
    own = {}
    for name in sorted(names - {MAIN_SET}):
        plan, out = campaign(name).plan, folder / name
        special = isinstance(plan, FloorPlan | ApplicationsPlan)
        if special and (out / "set.json").exists() and (found := load_set(out)).complete:
            own[name] = found
        elif isinstance(plan, ApplicationsPlan):
            try:
                plan = plan if repeats is None else replace(plan, rounds=repeats)
                own[name] = await run_applications(plan, out, note=note)
            except HostError as error:
                print(f"{name} is shown as it was recorded: {error}", file=sys.stderr)
        elif isinstance(plan, FloorPlan):
            plan = plan if repeats is None else replace(plan, repeats=repeats)
            own[name] = await run_floor(plan, out, note=note)
        else:
            plan = plan_here(plan)
            if problem := await accelerator_problem(plan.machine):
                print(f"{name} is shown as it was recorded: {problem}", file=sys.stderr)
                continue
            if repeats is not None:
                plan = replace(plan, repeats=repeats, warmups=0)
            own[name] = await _measured(plan, out, note)
    return own


async def write_up(
    run_set: "RunSet", own: "Mapping[str, RunSet] | None" = None, *, beside: bool = False
) -> None:
    """Write report, notebooks and figures of a set beside its runs, and say where they are.

    :param own: name of a recorded set -> the one that was measured here in its place; by default
        `run_set` for the one that most notebooks show.
    :param beside: write a page as well that shows every figure beside the recorded one.
    """
    from lab.report.notebooks import NOTEBOOKS, execute, notebook_paths, save_figures, sets_named
    from lab.report.report import render_beside, render_report, write_report

    own = {MAIN_SET: run_set} if own is None else own
    for one in own.values():
        report = one.path / "report.html"
        write_report(report, render_report(one))
        print(f"report: {report}")
    figures = []
    with ProgressLine() as line:
        for source in notebook_paths():
            line(f"executing {source.name}")
            target = run_set.path / "notebooks" / source.name
            parameters: dict[str, Any] = {
                parameter: str(own[name].path.resolve())
                for parameter, name in sets_named(source).items()
                if name in own
            }
            await execute(source, target, parameters | {"LIVE": False})
            figures += save_figures(target, run_set.path / "figures")
    if not figures:
        print("figures: none, the notebooks are not part of this installation", file=sys.stderr)
        return
    print(f"figures: {len(figures)} in {run_set.path / 'figures'}")
    print(f"notebooks, re-executed: {run_set.path / 'notebooks'}")
    if beside:
        pairs = [(NOTEBOOKS / "figures" / path.name, path) for path in figures]
        page = run_set.path / "beside.html"
        write_report(page, render_beside(pairs))
        print(f"beside the recorded figures: {page}")
