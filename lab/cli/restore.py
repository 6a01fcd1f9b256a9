"""``lab restore``: run a guest from a snapshot until interrupted."""

import argparse
from pathlib import Path
from typing import get_args

from lab.cli import Subparsers, add_command
from lab.cli.boot import add_running_arguments, show
from lab.scenario.machine import Accel


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "restore",
        _restore,
        summary="run a guest from a snapshot until interrupted",
        description="Restore a guest and show its speed once a second, until interrupted or for "
        "--seconds.",
    )
    parser.add_argument("path", type=Path, help="the image; PATH.json has to be beside it")
    parser.add_argument("--paused", action="store_true", help="leave the vCPUs stopped")
    parser.add_argument(
        "--binary",
        choices=("patched", "unpatched"),
        help="which QEMU (default: the kind that took the snapshot)",
    )
    parser.add_argument(
        "--channels",
        type=int,
        default=1,
        metavar="N",
        help="threads that read the image; more than 1 for a live-mapped one (default 1)",
    )
    parser.add_argument(
        "--accel",
        choices=get_args(Accel),
        help="QEMU's accelerator (default: the one that it was taken under)",
    )
    ports = parser.add_mutually_exclusive_group()
    ports.add_argument(
        "--forward",
        action="append",
        metavar="HOST:GUEST",
        help="ports of this host that lead to the guest's, in place of those that it had",
    )
    ports.add_argument(
        "--no-forward",
        dest="forward",
        action="store_const",
        const=(),
        help="no port of this host, as beside the VM that has them",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not read the image against its checksums first",
    )
    add_running_arguments(parser)


async def _restore(args: argparse.Namespace) -> int:
    from lab.session import restore

    async with restore(
        args.path,
        paused=args.paused,
        binary=args.binary,
        channels=args.channels,
        accel=args.accel,
        forward=args.forward,
        check=not args.no_check,
    ) as vm:
        await show(vm, args)
    return 0
