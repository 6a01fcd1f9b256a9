"""``lab boot``: run a guest until interrupted."""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path
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
        "interrupted or for --seconds. With --image it is a guest of yours, or the lab's Debian, "
        "and its serial console is shown; on a terminal you type to it, and Ctrl-] ends it. Your "
        "image is never written to.",
    )
    add_arguments(parser, Machine)
    add_arguments(parser, Workload)
    add_running_arguments(parser)
    parser.add_argument(
        "--qmp",
        type=Path,
        metavar="SOCKET",
        help="serve QEMU's monitor there as well, for `lab snapshot --qmp SOCKET`",
    )
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

    machine, workload = machine_and_workload(args)
    async with boot(machine, workload, binary=args.binary, socket=args.qmp) as vm:
        await show(vm, args)
    return 0


def machine_and_workload(args: argparse.Namespace) -> tuple[Machine, Workload]:
    """What is to be booted; a user's guest does no workload of the lab's.

    :raise UsageError: a value that cannot work.
    """
    machine, workload = from_arguments(Machine, args), from_arguments(Workload, args)
    if machine.is_users and not hasattr(args, "workload"):
        workload = dataclasses.replace(workload, kind="idle")
    return machine, workload


async def show(vm: "VM", args: argparse.Namespace) -> None:
    """Print one line about `vm`, and then one per second about its speed.

    Of a user's guest, which has none that the lab could read, show the console.
    """
    first = {"pid": vm.pid, "qemu": vm.binary.version, "variant": vm.binary.variant}
    # An image may be of a guest that was booting.
    first |= {"nonce": f"{vm.ready.nonce:016x}" if vm.is_ready else None}
    first |= {"status": await vm.status()}
    if vm.machine.is_users:
        first |= {"ports": {str(guest): host for guest, host in vm.ports.items()}}
    print(json.dumps(first) if args.json else f"{vm!r} {first['status']}", flush=True)
    if vm.machine.is_users:
        for guest, host in vm.ports.items():
            if not args.json:
                print(f"127.0.0.1:{host} leads to port {guest} of the guest", flush=True)
        await _show_console(vm, args)
        return
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


_END_KEY = b"\x1d"
"""Ctrl-], which ends the console of other tools as well."""


async def _show_console(vm: "VM", args: argparse.Namespace) -> None:
    """Show the guest's console, and type to it what comes from a terminal, until it ends."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    terminal = sys.stdin.fileno() if sys.stdin.isatty() else None

    def show_text(text: str) -> None:
        # A terminal that passes every key on also leaves lines as they come.
        shown = text if terminal is None else text.replace("\n", "\r\n")
        (sys.stderr if args.json else sys.stdout).write(shown)
        (sys.stderr if args.json else sys.stdout).flush()

    typed: set[asyncio.Task[None]] = set()

    def take_keys() -> None:
        keys = os.read(sys.stdin.fileno(), 1024)
        if not keys or _END_KEY in keys:
            ended.set()
            return
        task = loop.create_task(vm.console.send(keys))
        typed.add(task)
        task.add_done_callback(typed.discard)

    show_text(vm.console.text)
    vm.console.listener = show_text
    with contextlib.ExitStack() as stack:
        if terminal is not None:
            stack.enter_context(_every_key(terminal))
            loop.add_reader(terminal, take_keys)
            stack.callback(loop.remove_reader, terminal)
        stack.callback(setattr, vm.console, "listener", None)
        waits = [loop.create_task(ended.wait()), loop.create_task(vm.process.wait(args.seconds))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


@contextlib.contextmanager
def _every_key(terminal: int) -> Iterator[None]:
    """Have a terminal pass on every key, Ctrl-C as well, while the context lasts."""
    before = termios.tcgetattr(terminal)
    tty.setraw(terminal)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
