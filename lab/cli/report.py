"""``lab report``: a run set as one HTML file."""

import argparse
import sys
from pathlib import Path

from lab.cli import Subparsers, add_command


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "report",
        _report,
        summary="write one self-contained HTML file about a run set",
        description="Write one HTML file that can be mailed: figures, every run, the host, the "
        "builds, what each number is and what it does not show.",
    )
    parser.add_argument("set", type=Path, metavar="SET", help="the run set")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="default: SET.html beside it; - for stdout",
    )


def _report(args: argparse.Namespace) -> int:
    from lab.report.report import render_report, write_report
    from lab.runs.sets import load_set

    run_set = load_set(args.set)
    html = render_report(run_set)
    if args.output == Path("-"):
        sys.stdout.write(html)
        return 0
    path = args.output or run_set.path.with_name(run_set.path.name + ".html")
    write_report(path, html)
    print(path)
    return 0
