"""``lab disk``: the layers that the lab keeps of guests' disks."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lab.cli import Subparsers, add_command, setting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.disks.frozen import FrozenDisk
    from lab.disks.store import Kept, Store

MIB = 1 << 20


def register(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = add_command(
        subparsers,
        "disk",
        lambda args: 0,
        summary="the layers that the lab keeps of guests' disks",
        description="A guest writes to a layer on its user's disk image, never to the image, and a "
        "snapshot needs the layers of its instant. They are in LAB_LAYERS_DIR, by default in the "
        "cache. Layers of guests that ended are removed when the next one boots.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _register_list(commands)
    _register_clean(commands)
    _register_commit(commands)
    _register_export(commands)
    _register_pause(commands)


def _register_list(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "list",
        _list,
        summary="each layer: its size, what it is on, who needs it",
        description="List the layers: size on the disk, what it is on, and who needs it.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _register_clean(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "clean",
        _clean,
        summary="remove the layers that nobody needs",
        description="Remove the layers that nobody needs. Those of a snapshot that is not there "
        "any more are named only, as it may have been moved: --yes removes them. A snapshot that "
        "was moved is known again once it was restored, or named to `lab disk commit`.",
    )
    parser.add_argument(
        "--yes", action="store_true", help="also those of snapshots that are not there any more"
    )
    parser.add_argument(
        "--forget",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="also those of snapshots that were at or below PATH, a folder or a disk that is gone "
        "for good",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _register_commit(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "commit",
        _commit,
        summary="shorten the chain of layers of a snapshot's disks",
        description="Take into the topmost layer of each disk of a snapshot those below it that "
        "nobody else needs, and remove these. The disk in it does not change.",
    )
    parser.add_argument("snapshot", type=Path, metavar="SNAPSHOT", help="the image of a snapshot")


def _register_export(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "export",
        _export,
        summary="write a disk of a snapshot into one file",
        description="Write a disk of a snapshot, as it was at its instant, into one file that "
        "needs no other and replaces none.",
    )
    parser.add_argument("snapshot", type=Path, metavar="SNAPSHOT", help="the image of a snapshot")
    parser.add_argument("disk", type=int, metavar="N", help="which disk, from 0 on")
    parser.add_argument("file", type=Path, metavar="FILE", help="the new file")
    parser.add_argument(
        "--format",
        choices=("qcow2", "raw"),
        help="(default: raw where FILE ends in .raw or .img, otherwise qcow2)",
    )


def _register_pause(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "pause",
        _pause,
        summary="measure what freezing disks adds to the pause, on this host",
        description="Boot a guest that writes to all its disks, and take its snapshots in pairs, "
        "with its disks frozen and of its memory alone. What the disks add to the pause is the "
        "difference.",
    )
    parser.add_argument(
        "--disks",
        type=int,
        action="append",
        metavar="N",
        help="a number of disks; repeatable (default: 1, 2 and 4)",
    )
    parser.add_argument("--pairs", type=int, default=20, metavar="N", help="for each (default: 20)")
    parser.add_argument(
        "--cache",
        choices=("writeback", "none"),
        default="writeback",
        help="none bypasses the host's page cache (default: writeback)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="of the order (default: 1)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the record, with every pair")
    parser.add_argument("--json", action="store_true", help="the record on stdout")


def _qemu_img() -> Path:
    from lab.errors import HostError
    from lab.qemu.build import find_qemu

    # Either of the two does; both are of one source.
    try:
        binary = find_qemu("patched")
    except HostError:
        binary = find_qemu("unpatched")
    return binary.path.with_name("qemu-img")


async def _list(args: argparse.Namespace) -> int:
    from lab.disks.store import Store

    store = Store.default()
    layers = await store.survey(_qemu_img())
    if args.json:
        print(json.dumps({"folder": str(store.folder), "layers": [_as_json(x) for x in layers]}))
        return 0
    if not layers:
        print(f"no layers in {store.folder}")
    for kept in layers:
        print(f"{kept.path.name}  {_mib(kept.allocated_bytes)}  on {kept.backing or 'nothing'}")
        for who in _reasons(kept):
            print(f"    {who}")
    if layers:
        print(f"{len(layers)} in {store.folder}, {_mib(sum(x.allocated_bytes for x in layers))}")
    return 0


async def _clean(args: argparse.Namespace) -> int:
    from lab.disks.store import Store

    store, qemu_img = Store.default(), _qemu_img()
    for path in args.forget:
        await store.forget(path)
    before = await store.survey(qemu_img, gone=args.yes)
    removed = set(await store.collect(qemu_img, gone=args.yes))
    freed_bytes = sum(kept.allocated_bytes for kept in before if kept.path in removed)
    left = [kept for kept in before if kept.path not in removed]
    if args.json:
        document = {
            "folder": str(store.folder),
            "removed": [str(path) for path in sorted(removed)],
            "freed_bytes": freed_bytes,
            "layers": [_as_json(kept) for kept in left],
        }
        print(json.dumps(document))
        return 0
    print(f"{len(removed)} layers removed, {_mib(freed_bytes)} freed; {len(left)} are kept")
    for kept in left:
        missing = [found for found in kept.references if found.state != "there"]
        if missing and not kept.held and len(missing) == len(kept.references):
            print(f"{kept.path.name}  {_mib(kept.allocated_bytes)}")
            for who in _reasons(kept):
                print(f"    {who}")
    return 0


async def _commit(args: argparse.Namespace) -> int:
    from lab.disks.commit import commit
    from lab.disks.store import Store
    from lab.errors import UsageError
    from lab.progress import ProgressLine

    store, qemu_img = Store.default(), _qemu_img()
    refused = []
    disks = _disks(store, args.snapshot)
    for disk in disks:
        try:
            with ProgressLine() as progress:
                done = await commit(qemu_img, Path(disk.layer), progress=progress, store=store)
        except UsageError as error:
            refused.append(error)
            print(f"{disk.node}: {error.cause}")
        else:
            print(f"{disk.node}: {len(done.merged)} layers are in {done.top.path.name} now")
    print(f"{len(await store.collect(qemu_img))} layers removed")
    if len(refused) == len(disks):
        raise refused[0]
    return 0


async def _export(args: argparse.Namespace) -> int:
    from lab.disks.commit import export
    from lab.disks.store import Store
    from lab.errors import UsageError
    from lab.progress import ProgressLine

    store = Store.default()
    disks = _disks(store, args.snapshot)
    if not 0 <= args.disk < len(disks):
        raise UsageError(
            f"{args.snapshot} has no disk {args.disk}", f"it has {len(disks)}, counted from 0 on"
        )
    chosen = args.format or ("raw" if args.file.suffix in (".raw", ".img") else "qcow2")
    with ProgressLine() as progress:
        path = await export(
            *(_qemu_img(), Path(disks[args.disk].layer), args.file),
            format=chosen,
            progress=progress,
            store=store,
        )
    print(f"{path}: {chosen}, {_mib(path.stat().st_blocks * 512)}")
    return 0


def _disks(store: "Store", snapshot: Path) -> "Sequence[FrozenDisk]":
    from lab.disks.frozen import remember
    from lab.errors import UsageError

    disks = remember(store, snapshot)
    if not disks:
        raise UsageError(f"{snapshot} has no disks", "it is a snapshot of memory alone")
    return disks


def _reasons(kept: "Kept") -> list[str]:
    from lab.disks.commit import who_needs

    return who_needs(kept) or ["nobody needs it"]


def _as_json(kept: "Kept") -> dict[str, object]:
    return {
        "path": str(kept.path),
        "allocated_bytes": kept.allocated_bytes,
        "backing": None if kept.backing is None else str(kept.backing),
        "needed": kept.needed,
        "held": kept.held,
        "held_by": list(kept.held_by),
        "snapshots": [
            {
                "snapshot": None if found.snapshot is None else str(found.snapshot),
                "mark": found.mark,
                "state": found.state,
            }
            for found in kept.references
        ],
        "above": [str(path) for path in kept.above],
    }


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.1f} MiB"


async def _pause(args: argparse.Namespace) -> int:
    from lab.errors import UsageError
    from lab.host.cache import cache_dir
    from lab.host.files import write_atomically
    from lab.host.workdir import private_folder
    from lab.progress import ProgressLine
    from lab.records import encode
    from lab.verify.stamps.guest import Case
    from lab.verify.stamps.pauses import added, measure_pauses

    counts = list(dict.fromkeys(args.disks or (1, 2, 4)))
    if args.pairs < 1:
        raise UsageError(f"{args.pairs} pairs", "choose one at least")
    for count in counts:
        Case(disks=count)  # raises for what cannot be, before anything boots
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(private_folder("pausing-", cache_dir()))
        # Layers of its own: those of a measurement that is killed go with its folder.
        stack.enter_context(setting("LAB_LAYERS_DIR", str(folder / "layers")))
        record = await measure_pauses(
            Case(cache=args.cache, image_format="qcow2"),
            counts,
            pairs=args.pairs,
            seed=args.seed,
            folder=folder,
            progress=stack.enter_context(ProgressLine()),
        )
    if args.out is not None:
        write_atomically(args.out, encode(record))
    if args.json:
        print(encode(record).decode(), end="")
        return 0
    for one in added(record.pairs):
        low, high = one.interval.low, one.interval.high
        print(
            f"disks: {one.disks}, pause {one.with_ms:.2f} ms with them and {one.without_ms:.2f} ms "
            f"without, {one.added_ms:+.2f} ms [{low:+.2f}, {high:+.2f}] in {one.n} pairs; "
            f"of that the switch {one.switch_ms:.2f} ms"
        )
    return 0
