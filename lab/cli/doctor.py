"""``lab doctor``: what this host can do, and the remedy for what it cannot."""

import argparse
from typing import TYPE_CHECKING

from lab.cli import Subparsers, add_command

if TYPE_CHECKING:
    from lab.doctor import Check

EXIT_UNUSABLE_HOST = 2


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "doctor",
        _doctor,
        summary="check what this host can do",
        description="Check what this host can do. Changes nothing. Exit status 2 when it cannot "
        "take a live snapshot.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object: host and checks")


async def _doctor(args: argparse.Namespace) -> int:
    import msgspec

    from lab.doctor import kvm_checks, run_checks
    from lab.host.info import HostInfo

    host = HostInfo.collect()
    checks = run_checks() + await kvm_checks()
    if args.json:
        print(msgspec.json.encode({"host": host, "checks": checks}).decode())
    else:
        where = f"{host.cpu_model}, {host.cpu_count} CPUs, {host.memory_bytes >> 20} MiB"
        print(f"{where}, Linux {host.kernel}, {host.distribution}")
        print(table(checks))
    return EXIT_UNUSABLE_HOST if any(check.status == "fail" for check in checks) else 0


def table(checks: "list[Check]") -> str:
    """The checks as text, one a line, each remedy below its own."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.status:4}  {check.name:{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"      {'':{width}}  -> {check.remedy}")
    return "\n".join(lines)
