"""What the commands that record a run set share: its folder, progress, and interruption."""

import argparse
import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lab.progress import ProgressLine

if TYPE_CHECKING:
    from lab.runs.run import Run


def add_output_arguments(
    parser: argparse.ArgumentParser, written: str, each: str
) -> argparse._ArgumentGroup:
    """Add the flags that say where things go, as a group, and return it.

    :param written: what is written besides the run set, as its measurement.
    :param each: what `--json` prints an object for.
    """
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="the run set (default: a new one in the cache)"
    )
    group.add_argument(
        "--image-dir",
        type=Path,
        metavar="DIR",
        help=f"where {written} are written (default: in the cache)",
    )
    group.add_argument("--note", metavar="TEXT", default="", help="free text, kept in the run set")
    group.add_argument("--json", action="store_true", help=f"one JSON object per {each} on stdout")
    group.add_argument("--dry-run", action="store_true", help="only say what would be measured")
    return group


def out_folder(args: argparse.Namespace, prefix: str = "") -> Path:
    """The run set that the flags name, or a new one in the cache."""
    from lab.host.cache import cache_dir

    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return args.out or cache_dir() / "runs" / f"{prefix}{stamp}"


@contextmanager
def recording(out: Path) -> Iterator[ProgressLine]:
    """A progress line while a run set is recorded; an interruption says how to go on."""
    try:
        with ProgressLine() as line:
            yield line
    except asyncio.CancelledError:
        print(f"lab: interrupted; the same arguments with --out {out} continue", file=sys.stderr)
        raise


def report_failures(line: ProgressLine) -> "Callable[[Run], None]":
    """Return what says of a recorded run why it failed."""

    def on_run(run: "Run") -> None:
        if not run.ok:
            line(f"{run.name} {run.record.outcome}: {run.record.reason}")

    return on_run
