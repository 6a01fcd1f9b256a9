"""``lab compare``: two run sets, or two methods, against each other."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lab.cli import Subparsers, add_command

if TYPE_CHECKING:
    from lab.runs.sets import RunSet


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "compare",
        _compare,
        summary="compare two run sets",
        description="Compare B with A, metric by metric, over boots: difference and ratio of "
        "medians, an interval for the ratio, and p of a permutation test. Only parameters that "
        "differ are named.",
    )
    for name in ("a", "b"):
        parser.add_argument(
            name, metavar=name.upper(), help="a run set, or SET:METHOD for one method of it"
        )


def _compare(args: argparse.Namespace) -> int:
    from lab.analysis.compare import comparison_text, sides

    (a, method_a), (b, method_b) = _load(args.a), _load(args.b)
    pairs = sides(a, b, method_a, method_b)
    print("\n\n".join(comparison_text(left, right) for left, right in pairs))
    return 0


def _load(text: str) -> "tuple[RunSet, str | None]":
    from lab.runs.sets import load_set

    # A path may hold a colon too: the whole is tried first.
    path, _, method = text.rpartition(":")
    if not path or Path(text).exists():
        return load_set(text), None
    return load_set(path), method
