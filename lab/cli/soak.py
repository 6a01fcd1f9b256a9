"""``lab soak``: random snapshots of random guests, every byte compared."""

import argparse
import random
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lab.cli import Subparsers, add_command
from lab.errors import UsageError
from lab.progress import ProgressLine
from lab.scenario.machine import Accel, Machine, RamKind
from lab.scenario.methods import METHODS
from lab.verify.soak.draw import NEVER_DRAWN, VERSION, GuestChoice, RunState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.verify.soak.draw import Choice, Trial
    from lab.verify.soak.record import Result

DEFAULT_MINUTES = 5.0
MAX_SEED = 1_000_000_000
DEFAULT_ATTEMPTS = 3


_EXAMPLES = """\
examples:
  lab soak --minutes 5
  lab soak --guest any --iterations 1000       both guests, and KVM where it runs them
  lab soak --resume RECORD --minutes 60        go on where a soak ended
  lab soak --seed 7 --iterations 3 --shrink    make what it found simpler
"""


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "soak",
        _soak,
        summary="verify random snapshots of random guests",
        description="Take snapshots of guests, both drawn at random, restore each and compare "
        "every byte of RAM. What differs or fails is listed with the command that does it again. "
        "Exit status 1 when anything did. A guest that is silent at boot is listed and booted "
        "once more, and fails when it is silent again. The same seed gives the same guest and "
        "snapshots. Never drawn: "
        + "; ".join(f"{what}: {why}" for what, why in NEVER_DRAWN.items())
        + ". What this host does not offer is said at the start.",
        epilog=_EXAMPLES,
        usage="%(prog)s [FLAG ...]",
    )
    _add_length_arguments(parser.add_argument_group("how much"))
    _add_drawn_arguments(parser.add_argument_group("what is drawn"))
    _add_finding_arguments(parser.add_argument_group("what was found"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, metavar="FILE", help="the record (default: a new one in the cache)"
    )
    output.add_argument("--json", action="store_true", help="the record on stdout as well")


def _add_length_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help=f"begin no snapshot after N minutes (default {DEFAULT_MINUTES:g} without "
        "--iterations)",
    )
    group.add_argument("--iterations", type=int, metavar="N", help="end after N snapshots")
    group.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="go on after the last guest of a record, with what that soak drew from; "
        "--iterations counts those of the record, too",
    )


def _add_drawn_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--seed", type=int, metavar="S", help="seed of the first guest (default: any)"
    )
    group.add_argument(
        "--method",
        action="append",
        dest="methods",
        metavar="METHOD",
        help=f"repeatable; draw only these of {', '.join(METHODS)}",
    )
    group.add_argument(
        "--ram-kind",
        action="append",
        dest="ram_kinds",
        metavar="KIND",
        help=f"repeatable; draw only these of {', '.join(get_args(RamKind))} (default: all that "
        "this host has)",
    )
    group.add_argument(
        "--guest",
        choices=get_args(GuestChoice),
        default="linux",
        help="what the guests run; any: draw that, and the accelerator with it (default linux)",
    )
    group.add_argument(
        "--accel",
        choices=get_args(Accel),
        help="QEMU's accelerator; auto: kvm where the guest runs on it (default tcg, and auto with "
        "--guest any)",
    )
    group.add_argument(
        "--state",
        action="append",
        dest="states",
        choices=get_args(RunState),
        help="repeatable; draw only these run states in which a guest is taken (default running, "
        "and sometimes paused)",
    )


def _add_finding_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--shrink",
        action="store_true",
        help="take the guest of --seed and as many snapshots as --iterations says, which is what "
        "a finding names, and make them simpler one by one as long as one of them fails",
    )
    group.add_argument(
        "--attempts",
        type=int,
        default=DEFAULT_ATTEMPTS,
        metavar="N",
        help=f"with --shrink: how often to try each (default {DEFAULT_ATTEMPTS})",
    )
    group.add_argument(
        "--only-shot",
        type=int,
        default=0,
        metavar="N",
        help="of each guest's snapshots take only this one, from 1; --shrink says so",
    )
    group.add_argument(
        "--simplify",
        action="append",
        default=[],
        metavar="WHAT",
        help="repeatable; something that is not drawn, but simple; --shrink says what",
    )
    group.add_argument(
        "--draw",
        type=int,
        default=VERSION,
        metavar="V",
        help="the version of what seeds give that a command was written for, to be refused when it "
        f"is another than this lab's, {VERSION}",
    )


async def _soak(args: argparse.Namespace) -> int:
    from lab.verify.soak.record import require_draw

    require_draw(args.draw, "this command")
    _check_arguments(args)
    return await (_shrink(args) if args.shrink else _go(args))


def _check_arguments(args: argparse.Namespace) -> None:
    numbers = {
        "--minutes": args.minutes,
        "--iterations": args.iterations,
        "--attempts": args.attempts,
    }
    for name, value in numbers.items():
        if value is not None and value <= 0:
            raise UsageError(f"{name} {value}", "give a number above 0")
    if args.shrink and (args.seed is None or args.iterations is None):
        raise UsageError(
            "--shrink needs --seed and --iterations", "name what a soak has found, as it says it"
        )
    drawn = (args.methods, args.ram_kinds, args.states, args.out, args.only_shot, args.simplify)
    if args.resume and (args.shrink or args.seed is not None or any(drawn)):
        raise UsageError(
            "--resume goes on as the record says",
            "leave out what is drawn, and from where, and where it is recorded",
        )


async def _chosen(args: argparse.Namespace) -> "tuple[Choice, str]":
    """Return what to draw from, and why the accelerator is not the one that was asked for."""
    from lab.verify.soak.draw import Choice
    from lab.vm.accelerator import settled

    accel: Accel
    if args.guest == "any":
        accel, fallback = args.accel or "auto", ""
    else:
        found = await settled(Machine(guest=args.guest, accel=args.accel or "tcg"))
        accel, fallback = found.machine.accel, found.fallback
    choice = Choice(
        methods=tuple(dict.fromkeys(args.methods or Choice().methods)),
        ram_kinds=tuple(dict.fromkeys(args.ram_kinds or Choice().ram_kinds)),
        guest=args.guest,
        accel=accel,
        states=tuple(args.states or Choice().states),
        only_shot=args.only_shot,
        simplify=tuple(dict.fromkeys(args.simplify)),
    )
    return choice, fallback


async def _go(args: argparse.Namespace) -> int:
    from lab.host.cache import cache_dir
    from lab.host.info import HostInfo
    from lab.host.workdir import private_folder
    from lab.qemu.build import VARIANTS, find_qemu
    from lab.verify.soak.record import GOOD, header_line, reopen_record, result_line, summary_line
    from lab.verify.soak.soak import soak, survey

    results: list[Result] = []
    if args.resume is not None:
        reopened = reopen_record(args.resume)
        choice, fallback, seed = reopened.choice, "", reopened.next_seed
        results += reopened.results
        out, mode = args.resume, "a"
    else:
        choice, fallback = await _chosen(args)
        seed = random.randrange(MAX_SEED) if args.seed is None else args.seed
        out, mode = args.out or _default_record(cache_dir()), "x"
    number = max((result.iteration for result in results), default=0) + 1
    if args.iterations is not None and number > args.iterations:
        raise UsageError(
            f"{out.name} has {number - 1} iterations already", "ask for more --iterations"
        )
    minutes = args.minutes
    if minutes is None and args.iterations is None:
        minutes = DEFAULT_MINUTES
    ground = {
        "host": HostInfo.collect(),
        "accel_fallback": fallback,
        "qemu": {
            name: f"{binary.version} ({binary.build_id})"
            for name in VARIANTS
            for binary in (find_qemu(name),)
        },
    }
    with ExitStack() as stack:
        record = stack.enter_context(out.open(mode, encoding="utf-8"))
        folder = stack.enter_context(private_folder("soak-", cache_dir()))
        line = stack.enter_context(ProgressLine())

        def write(text: str) -> None:
            # At once: what is known before the machine goes down is what a soak is for.
            print(text, file=record, flush=True)
            if args.json:
                print(text, flush=True)

        def on_start(number: int, trial: "Trial", shot: int) -> None:
            of = "" if args.iterations is None else f"/{args.iterations}"
            bad = sum(result.outcome not in GOOD for result in results)
            line(
                f"snapshot {number}{of}, {bad} not equal: {trial.shots[shot - 1].method}, "
                f"{trial.machine.ram_kind}, {trial.machine.vcpus} vCPU, {trial.workload.kind}, "
                f"seed {trial.seed}"
            )

        def on_result(result: "Result") -> None:
            results.append(result)
            write(result_line(result))

        offer = await survey(folder, choice)
        for what, why in offer.lacking.items():
            print(f"not offered here: {what}, because {why}", file=sys.stderr)
        write(header_line(seed, choice, offer, ground))
        try:
            await soak(
                seed=seed,
                iterations=args.iterations,
                minutes=minutes,
                choice=choice,
                offer=offer,
                folder=folder,
                on_start=on_start,
                on_result=on_result,
                number=number,
            )
        finally:
            # Interrupted, too: what was verified until then counts.
            write(summary_line(results))
            stack.close()
            _print_findings(results, choice, as_json=args.json)
            print(f"record: {out}", file=sys.stderr)
    return 0 if all(result.outcome in GOOD for result in results) else 1


async def _shrink(args: argparse.Namespace) -> int:
    from lab.host.cache import cache_dir
    from lab.host.workdir import private_folder
    from lab.verify.soak.draw import draw
    from lab.verify.soak.record import reproduce_command
    from lab.verify.soak.shrink import fails_in, shrink
    from lab.verify.soak.soak import survey

    choice, _ = await _chosen(args)
    seed, shot = args.seed, args.iterations
    with private_folder("soak-", cache_dir()) as folder, ProgressLine() as line:
        offer = await survey(folder, choice)
        seen: list[Result] = []

        async def fails(simpler: "Choice") -> bool:
            simplified = ", ".join(simpler.simplify) or "nothing"
            line(f"seed {seed}, snapshot {shot}, simplified: {simplified}")
            found = await fails_in(
                simpler,
                seed=seed,
                shot=shot,
                offer=offer,
                attempts=args.attempts,
                folder=folder,
            )
            if found is not None:
                seen.append(found)
            return found is not None

        shrunk = await shrink(choice, seed, shot, offer, fails)
    if shrunk is None:
        print(f"seed {seed} did not fail in {args.attempts} attempts")
        return 0
    trial = draw(seed, shrunk, offer)
    last = trial.shots[-1 if shrunk.only_shot else shot - 1]
    print(f"{seen[-1].outcome}: {seen[-1].detail}")
    whole = f"keep={trial.keep}, ksm={trial.ksm}, pressure={trial.pressure}"
    print(f"  {trial.machine}\n  {trial.workload}\n  {last}\n  {whole}")
    print(f"  again: {reproduce_command(shrunk, seed, 1 if shrunk.only_shot else shot)}")
    return 1


def _default_record(cache: Path) -> Path:
    folder = cache / "soak"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{datetime.now(UTC).strftime('%Y%m%dT%H%M%S%fZ')}.jsonl"


def _print_findings(results: "Sequence[Result]", choice: "Choice", *, as_json: bool) -> None:
    from lab.verify.soak.record import findings, tally_text

    if results and not as_json:
        print(tally_text(results))
    for text in findings(results, choice):
        print(text, file=sys.stderr)
