"""``lab boot``: run a guest until interrupted."""

import argparse
import asyncio
import json
from typing import TYPE_CHECKING

from lab.cli import Subparsers, add_command
from lab.scenario.flags import add_arguments, from_arguments
from lab.scenario.machine import Machine
from lab.scenario.workload import Workload

if TYPE_CHECKING:
    from lab.session import VM


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "boot",
        _boot,
        summary="run a guest until interrupted",
        description="Boot a guest, run its workload and show its speed once a second, until "
        "interrupted or for --seconds.",
    )
    add_arguments(parser, Machine)
    add_arguments(parser, Workload)
    add_running_arguments(parser)
    parser.add_argument(
        "--binary",
        choices=("patched", "unpatched"),
        default="patched",
        help="which QEMU (default patched)",
    )


def add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that keeps a guest running."""
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="end after S seconds (default: never)"
    )
    parser.add_argument("--json", action="store_true", help="JSON lines on stdout")


async def _boot(args: argparse.Namespace) -> int:
    from lab.session import boot

    machine = from_arguments(Machine, args)
    workload = from_arguments(Workload, args)
    async with boot(machine, workload, binary=args.binary) as vm:
        await show_speed(vm, args)
    return 0


async def show_speed(vm: "VM", args: argparse.Namespace) -> None:
    """Print one line about `vm` and then one per second about its speed."""
    first = {"pid": vm.pid, "qemu": vm.binary.version, "variant": vm.binary.variant}
    # An image may be of a guest that was booting.
    first |= {"nonce": f"{vm.ready.nonce:016x}" if vm.is_ready else None}
    first |= {"status": await vm.status()}
    print(json.dumps(first) if args.json else f"{vm!r} {first['status']}", flush=True)
    loop = asyncio.get_running_loop()
    end = None if args.seconds is None else loop.time() + args.seconds
    if not vm.is_ready and await vm.is_running():
        await vm.wait_ready()
    before = await vm.progress_page()
    while end is None or loop.time() < end:
        wait_s = 1.0 if end is None else min(1.0, max(0.0, end - loop.time()))
        started = loop.time()
        await asyncio.sleep(wait_s)
        now = await vm.progress_page()
        rate = (now.total_ops - before.total_ops) / (loop.time() - started)
        before = now
        line = {"ops": now.total_ops, "ops_per_s": round(rate), "page_errors": now.page_errors}
        text = f"{line['ops']} operations, {line['ops_per_s']}/s, {line['page_errors']} page errors"
        print(json.dumps(line) if args.json else text, flush=True)
