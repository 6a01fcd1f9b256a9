"""The command line: ``lab``, also ``python -m lab``.

Exit status: 0 done, 1 failed, 2 unusable arguments or host, 130 interrupted. Errors are one line
on stderr naming cause and remedy.
"""

import argparse
import asyncio
import importlib
import inspect
import logging
import os
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

from lab import __version__
from lab.errors import LabError, LaunchError, UsageError

log = logging.getLogger(__name__)

COMMANDS = (
    "build",
    "qtest",
    "doctor",
    "boot",
    "snapshot",
    "restore",
    "disk",
    "measure",
    "floor",
    "applications",
    "seal",
    "compare",
    "report",
    "reproduce",
    "soak",
    "stamps",
)

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other error of the lab."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every command's own parser in it."""
    parser = _Parser(prog="lab", description="Live memory snapshots of VMs, measured.")
    parser.add_argument("--version", action="version", version=f"lab {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; twice for details"
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"lab.cli.{name}").register(subparsers)
    return parser


class _Terminated(Exception):
    """SIGTERM arrived; the handler was cancelled and has cleaned up."""


async def _until_done(work: Awaitable[int]) -> int:
    """Await the work; SIGTERM cancels it, so that a guest is not left behind."""
    task = asyncio.current_task()
    assert task is not None
    terminated = False

    def terminate() -> None:
        nonlocal terminated
        terminated = True
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    try:
        return await work
    except asyncio.CancelledError:
        if terminated:
            raise _Terminated from None
        raise


def _run(
    handler: Callable[[argparse.Namespace], Awaitable[int] | int], args: argparse.Namespace
) -> int:
    outcome = handler(args)
    if inspect.isawaitable(outcome):
        return asyncio.run(_until_done(outcome))
    return outcome


def _fail(error: Exception, status: int) -> int:
    print(f"lab: error: {error}", file=sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    :param argv: the arguments without the program's name; ``sys.argv[1:]`` when None.
    """
    try:
        try:
            args = build_parser().parse_args(argv)
        except SystemExit as stop:  # --help and --version
            status = int(stop.code or 0)
        else:
            logging.basicConfig(
                level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)],
                format="%(asctime)s %(name)s %(levelname)s %(message)s",
            )
            status = _run(args.handler, args)
        # Here, not at interpreter exit, so that a closed pipe is seen by the handler below.
        sys.stdout.flush()
    except LabError as error:
        if isinstance(error, LaunchError):
            log.info("QEMU's command: %s", shlex.join(error.command))
            log.info("the end of QEMU's log:\n%s", error.log_tail)
        return _fail(error, error.exit_status)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except _Terminated:
        return EXIT_TERMINATED
    except BrokenPipeError:
        # The reader of our output went away (`lab ... | head`). Python flushes stdout once more
        # at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        return _fail(error, EXIT_FAILED)
    return status


def entry_point() -> NoReturn:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
