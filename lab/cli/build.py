"""``lab build``: the QEMU binaries and the guests; on request a Debian."""

import argparse
import dataclasses
import json
import sys
from typing import get_args

from lab.cli import Subparsers, add_command
from lab.progress import ProgressLine
from lab.scenario.methods import Sanitizer


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "build",
        _build,
        summary="build QEMU, patched and unpatched, and the guests",
        description="Build what is missing: QEMU with and without the patch series, and the guests "
        "that need no disk. Debian is built when it is asked for.",
    )
    parser.add_argument(
        "--print",
        "--json",
        action="store_true",
        dest="print_json",
        help='print {"patched": PATH, "unpatched": PATH}; with --guest what was built',
    )
    parser.add_argument(
        "--guest",
        choices=("debian",),
        help="only build this disk: a Debian 12 with Redis, PostgreSQL, SQLite, gcc and fio, for "
        "machines with an image (minutes, about 300 MB of downloads)",
    )
    parser.add_argument(
        "--refresh-source",
        action="store_true",
        help="look for a newer source of QEMU although there is one in the cache",
    )
    parser.add_argument(
        "--check-series",
        action="store_true",
        help="only apply each patch with no fuzz and run checkpatch.pl on it",
    )
    parser.add_argument(
        "--check-each-step",
        action="store_true",
        help="only build after every patch of the series (minutes)",
    )
    parser.add_argument(
        "--sanitize",
        choices=get_args(Sanitizer),
        help="only build the patched QEMU with the compiler's sanitizers of addresses and "
        "undefined behaviour, or of threads, and print its path; `make sanitize` uses it",
    )


async def _build(args: argparse.Namespace) -> int:
    from lab.guests.registry import ensure_guests
    from lab.qemu.build import ensure_qemu

    if args.check_series:
        return await _check_series()
    if args.check_each_step:
        return await _check_each_step()
    if args.guest:
        return await _build_debian(args.print_json)
    if args.sanitize:
        return await _build_sanitized(args.sanitize)
    with ProgressLine() as progress:
        binaries = await ensure_qemu(progress, refresh_source=args.refresh_source)
        await ensure_guests(progress)
    if args.print_json:
        print(json.dumps({name: str(binary.path) for name, binary in sorted(binaries.items())}))
    else:
        for name, binary in sorted(binaries.items()):
            print(f"{name:10} {binary.version}  {binary.path}")
    return 0


async def _build_debian(print_json: bool) -> int:
    from lab.guests.debian.build import DISK_BYTES, ensure_debian

    with ProgressLine() as progress:
        debian = await ensure_debian(progress)
    if print_json:
        print(json.dumps(dataclasses.asdict(debian), default=str))
        return 0
    size = f"{debian.disk_bytes >> 20} MiB of a disk of {DISK_BYTES >> 30} GiB"
    print(f"debian     {size}, built in {debian.build_s:.0f} s  {debian.disk}")
    print(", ".join(f"{name} {version}" for name, version in sorted(debian.packages.items())))
    return 0


async def _build_sanitized(sanitizer: Sanitizer) -> int:
    from lab.qemu.build import ensure_sanitized_qemu

    with ProgressLine() as progress:
        binary = await ensure_sanitized_qemu(sanitizer, progress)
    print(binary.path)
    return 0


async def _check_series() -> int:
    from lab.qemu.series import check_series

    with ProgressLine() as progress:
        checks = await check_series(progress)
    for check in checks:
        state = "ok" if check.clean else "FAIL"
        print(f"{state:4} {check.name}: {check.errors} errors, {check.warnings} warnings")
        if not check.clean:
            print(check.problem or check.report, file=sys.stderr)
    return 0 if all(check.clean for check in checks) else 1


async def _check_each_step() -> int:
    from lab.qemu.build import check_each_step

    with ProgressLine() as progress:
        names = await check_each_step(progress)
    for name in names:
        print(f"builds {name}")
    return 0
