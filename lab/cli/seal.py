"""``lab seal``: pack a complete run set into a few files."""

import argparse
from pathlib import Path

from lab.cli import Subparsers, add_command


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "seal",
        _seal,
        summary="pack a complete run set into a few files",
        description="Pack a complete run set into one table of each kind for all runs, one file "
        "of their records, and checksums. `lab measure` and `lab floor` do it by themselves; this "
        "is for sets of older versions, for one that had no room, and for one that was "
        "interrupted while it was sealed. No recorded value is lost: all is read back and compared "
        "before the single runs are removed.",
    )
    parser.add_argument("set", type=Path, metavar="SET", nargs="+", help="a run set")


def _seal(args: argparse.Namespace) -> int:
    from lab.runs.sets import seal_set

    for path in args.set:
        found = seal_set(path)
        files = [file for file in path.iterdir() if file.is_file()]
        size_mib = sum(file.stat().st_size for file in files) / (1 << 20)
        print(f"{path}: {len(found)} runs in {len(files)} files, {size_mib:.1f} MiB")
    return 0
