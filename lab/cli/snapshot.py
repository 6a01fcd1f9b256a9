"""``lab snapshot``: boot a guest and take one snapshot of it."""

import argparse
import json
from pathlib import Path

from lab.cli import Subparsers, add_command
from lab.scenario.flags import add_arguments, from_arguments
from lab.scenario.machine import Machine
from lab.scenario.methods import METHODS, method
from lab.scenario.scenario import check_storage
from lab.scenario.storage import Storage
from lab.scenario.workload import Workload


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "snapshot",
        _snapshot,
        summary="boot a guest and take one snapshot of it",
        description="Boot a guest, take a snapshot of it while its workload runs, and say how "
        "that went. For figures to compare use `lab measure`.",
    )
    parser.add_argument("path", type=Path, help="the image; PATH.json describes it")
    parser.add_argument(
        "--method", default="live", metavar="METHOD", help=f"one of {', '.join(METHODS)}"
    )
    add_arguments(parser, Machine)
    add_arguments(parser, Workload)
    add_arguments(parser, Storage)
    parser.add_argument(
        "--no-checksums",
        action="store_true",
        help="do not read the image again for the checksums in PATH.json",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


async def _snapshot(args: argparse.Namespace) -> int:
    from lab.session import boot

    machine = from_arguments(Machine, args)
    workload = from_arguments(Workload, args)
    how, storage = method(args.method), from_arguments(Storage, args)
    check_storage(how, storage)
    async with boot(machine, workload, binary=how.preferred_variant) as vm:
        snapshot = await vm.snapshot(
            args.path,
            args.method,
            progress=False,
            storage_mib_per_s=storage.storage_mib_per_s,
            checksums=not args.no_checksums,
        )
    print(json.dumps(snapshot.summary()) if args.json else repr(snapshot))
    return 0
