"""``lab qtest``: QEMU's own migration tests, on the unpatched QEMU and on the patched one."""

import argparse
import sys
from pathlib import Path

from lab.cli import Subparsers, add_command
from lab.progress import ProgressLine


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "qtest",
        _qtest,
        summary="run QEMU's own migration tests on both builds",
        description="Run QEMU's own migration tests, one by one, on the unpatched build and on "
        "the patched one, and print both lists side by side. Exit status 1 when the patched one "
        "fails a test that the unpatched one passes. A test takes seconds, "
        "or a minute on a slow host: --record keeps what is known, and the same command goes on.",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="run the tests whose name has this regular expression; repeatable",
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no test after N minutes")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="go on from this file, and write it"
    )
    parser.add_argument("--json", action="store_true", help="print the record")


async def _qtest(args: argparse.Namespace) -> int:
    import msgspec

    from lab.qemu.qtest import run_migration_tests, side_by_side

    with ProgressLine() as progress:
        record = await run_migration_tests(
            progress,
            only=args.only,
            budget_s=None if args.minutes is None else args.minutes * 60,
            record_path=args.record,
        )
    print(msgspec.json.encode(record).decode() if args.json else side_by_side(record))
    for result in record.regressions:
        print(f"broken: {result.name}", file=sys.stderr)
    return 1 if record.regressions else 0
