"""``lab stamps``: are memory and disks of a snapshot of one instant?"""

import argparse
import contextlib
import random
import time
from pathlib import Path

from lab.cli import Subparsers, add_command, setting
from lab.progress import ProgressLine
from lab.scenario.methods import METHODS

MAX_SEED = 1_000_000_000


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "stamps",
        _stamps,
        summary="prove that memory and disks of a snapshot are of one instant",
        description="Boot guests that stamp their memory and their disks alternately, take "
        "snapshots of them at random instants, restore each, and compare the stamps of both. Disks "
        "and methods are drawn at random. Exit status 1 when memory and disks of a snapshot were "
        "not of one instant.",
    )
    parser.add_argument("--instants", type=int, default=24, metavar="N", help="default: 24")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no guest after N minutes")
    parser.add_argument("--seed", type=int, metavar="N", help="of all that is drawn")
    parser.add_argument(
        "--method", action="append", choices=tuple(METHODS), help="draw from these; repeatable"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the record; one that is there is gone on with"
    )
    parser.add_argument("--json", action="store_true", help="the record on stdout")


async def _stamps(args: argparse.Namespace) -> int:
    from lab.host.cache import cache_dir
    from lab.host.workdir import private_folder
    from lab.records import encode
    from lab.verify.stamps.record import prove_many, tally

    seed = random.randrange(MAX_SEED) if args.seed is None else args.seed
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(private_folder("stamping-", cache_dir()))
        # Layers of its own: those of a proof that is killed go with its folder.
        stack.enter_context(setting("LAB_LAYERS_DIR", str(folder / "layers")))
        line = stack.enter_context(ProgressLine())
        record = await prove_many(
            instants=args.instants,
            seed=seed,
            folder=folder,
            out=args.out,
            methods=tuple(args.method or METHODS),
            minutes=args.minutes,
            clock=time.monotonic,
            progress=line,
        )
    if args.json:
        print(encode(record).decode(), end="")
    else:
        for what, instants, good in tally(record.cases):
            print(f"{what}: {good} of {instants}")
        for case in record.cases:
            for failure in case.failures:
                print(f"seed {case.seed}, {case.case}, instant {failure.number}: {failure}")
        print(
            f"seed {record.seed}: {record.one_instant} of {record.instants} snapshots have memory "
            f"and disks of one instant; a write was on its way at {record.in_flight} of them"
        )
    return 0 if record.one_instant == record.instants else 1
