"""``lab snapshot``: boot a guest and take one snapshot of it."""

import argparse
import dataclasses
import json
from pathlib import Path

from lab.cli import Subparsers, add_command
from lab.cli.boot import machine_and_workload
from lab.errors import UsageError
from lab.scenario.dimensions import column_of
from lab.scenario.flags import add_arguments, from_arguments
from lab.scenario.machine import Machine
from lab.scenario.methods import METHODS, method
from lab.scenario.scenario import check_storage
from lab.scenario.storage import Storage
from lab.scenario.workload import Workload


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "snapshot",
        _snapshot,
        summary="take one snapshot, of a guest that it boots or of a VM that runs",
        description="Boot a guest, take a snapshot of it while its workload runs, and say how "
        "that went. With --qmp it is of a VM that runs already, memory and disks, and the VM runs "
        "on. For figures to compare use `lab measure`.",
    )
    parser.add_argument("path", type=Path, help="the image; PATH.json describes it")
    parser.add_argument(
        "--method", default="live", metavar="METHOD", help=f"one of {', '.join(METHODS)}"
    )
    parser.add_argument(
        "--qmp",
        type=Path,
        metavar="SOCKET",
        help="of the VM whose QEMU serves its monitor there; nothing is booted",
    )
    parser.add_argument(
        "--no-disks", action="store_true", help="the memory alone: do not freeze the disks"
    )
    add_arguments(parser, Machine)
    add_arguments(parser, Workload)
    add_arguments(parser, Storage)
    parser.add_argument(
        "--no-checksums",
        action="store_true",
        help="do not read the image again for the checksums in PATH.json",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


async def _snapshot(args: argparse.Namespace) -> int:
    from lab.session import attach, boot

    machine, workload = machine_and_workload(args)
    how, storage = method(args.method), from_arguments(Storage, args)
    check_storage(how, storage)
    if args.qmp is None:
        opened = boot(machine, workload, binary=how.preferred_variant)
    elif given := [name for name in _of_a_boot() if hasattr(args, name)]:
        raise UsageError(
            f"--{given[0].replace('_', '-')} is of a guest that is booted",
            "leave it out with --qmp",
        )
    else:
        opened = attach(args.qmp)
    async with opened as vm:
        before = [disk.layer.path for disk in vm.files.disks]
        snapshot = await vm.snapshot(
            args.path,
            args.method,
            progress=False,
            storage_mib_per_s=storage.storage_mib_per_s,
            disks=not args.no_disks,
            checksums=not args.no_checksums,
        )
        disks = [
            {"frozen": str(frozen), "written": str(disk.layer.path)}
            for frozen, disk in zip(before, vm.files.disks, strict=True)
            if frozen != disk.layer.path
        ]
    if args.json:
        print(json.dumps(snapshot.summary() | {"disks": disks}))
        return 0
    print(repr(snapshot))
    # A booted guest has ended, and what it wrote last with it.
    for disk in disks if args.qmp is not None else []:
        print(f"the VM writes to {disk['written']} from now on; {disk['frozen']} is frozen")
    return 0


def _of_a_boot() -> list[str]:
    return [column_of(f) for part in (Machine, Workload) for f in dataclasses.fields(part)]
