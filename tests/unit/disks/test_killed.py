"""Whatever a process does in the store, and whenever it is killed, no needed layer is lost."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import secrets
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lab.disks.chain import Layer, read_chain
from lab.disks.store import HeldLayer, Store
from lab.errors import HostError, UsageError
from tests.unit.disks.conftest import Make

# These processes fork while no other thread of theirs runs.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

FORK = multiprocessing.get_context("fork")


def publish(snapshot: Path, mark: str, layer: Path) -> None:
    """Give a snapshot its name as the lab does: it is there, or it is not."""
    beside = snapshot.with_name(snapshot.name + ".json")
    unnamed = beside.with_name(beside.name + ".partial")
    unnamed.write_text(json.dumps({"mark": mark, "layer": str(layer)}))
    image = snapshot.with_name(snapshot.name + ".partial")
    image.write_bytes(bytes.fromhex(mark))
    image.rename(snapshot)
    unnamed.rename(beside)


def published(folder: Path) -> list[tuple[Path, str, Path]]:
    """The snapshots that are there: image, mark and layer."""
    found = []
    for image in sorted(folder.glob("*")):
        for end in (".json.partial", ".json"):
            # Others may publish and delete meanwhile.
            with contextlib.suppress(FileNotFoundError, ValueError):
                content = json.loads(image.with_name(image.name + end).read_text())
                if image.read_bytes().hex() == content["mark"]:
                    found.append((image, str(content["mark"]), Path(content["layer"])))
                    break
    return found


async def take(store: Store, held: HeldLayer, snapshot: Path) -> None:
    """What a snapshot does with the layer that its guest wrote to."""
    mark = secrets.token_hex(16)
    store.keep_for(held.layer.path, snapshot, mark)
    publish(snapshot, mark, held.layer.path)


def remove(snapshot: Path) -> None:
    """Delete a snapshot, as its user does."""
    snapshot.with_name(snapshot.name + ".json").unlink(missing_ok=True)
    snapshot.unlink(missing_ok=True)


async def check(qemu_img: Path, store: Store, base: Layer, snapshots: Path) -> None:
    """Each snapshot has its whole chain, and nothing is left but what they need."""

    async def needed() -> set[Path]:
        chains = [await read_chain(qemu_img, layer) for _, _, layer in published(snapshots)]
        assert all(chain[-1] == base for chain in chains)
        return {layer.path for chain in chains for layer in chain[:-1]}

    await needed()
    await store.collect(qemu_img)
    await needed()
    await store.collect(qemu_img, gone=True)
    left = {path for path in store.folder.iterdir() if path.name != "store.lock"}
    wanted = await needed()
    assert {path for path in left if path.suffix == ".qcow2"} == wanted
    assert {path.with_suffix(".qcow2") for path in left} == wanted


def forked(work: Callable[[], Coroutine[Any, Any, None]]) -> "multiprocessing.process.BaseProcess":
    """Start a process that does it."""
    process = FORK.Process(target=lambda: asyncio.run(work()))
    process.start()
    return process


_STEPS = {"os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock"}


def kill_at(step: int) -> None:
    """Have this process killed just before it changes something in the store for the nth time."""
    steps = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if event in _STEPS or writes or event == "subprocess.Popen":
            steps += 1
            if steps > step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.thorough)])
async def test_killed_at_any_step_nothing_needed_is_lost_and_the_rest_is_collected(
    qemu_img: Path, make: Make, tmp_path: Path, stride: int
) -> None:
    (base,) = await read_chain(qemu_img, make("disk.raw", "raw"))

    async def work(store: Store, snapshots: Path, step: int) -> None:
        kill_at(step)
        running = await store.new_layer(qemu_img, base)
        after = await store.new_layer(qemu_img, running.layer)
        await take(store, running, snapshots / "new")
        running.release()
        other = await store.new_layer(qemu_img, base)
        other.discard()
        remove(snapshots / "old")
        await store.collect(qemu_img, gone=True)
        await take(store, after, snapshots / "newer")
        after.release()
        # What it was on is needed by that one alone from here on.
        remove(snapshots / "new")
        await store.collect(qemu_img, gone=True)

    killed = True
    step = random.randrange(stride)
    while killed:
        store, snapshots = Store(tmp_path / f"{step}" / "layers"), tmp_path / f"{step}" / "snaps"
        snapshots.mkdir()
        old = await store.new_layer(qemu_img, base)
        await take(store, old, snapshots / "old")
        old.release()

        process = forked(partial(work, store, snapshots, step))
        await asyncio.to_thread(process.join)
        killed = process.exitcode == -signal.SIGKILL
        assert killed or process.exitcode == 0
        await check(qemu_img, store, base, snapshots)
        step += stride
    assert step > 40
    assert [path.name for path, _, _ in published(snapshots)] == ["newer"]


async def test_killed_at_any_moment_beside_others_nothing_needed_is_lost(
    qemu_img: Path, make: Make, tmp_path: Path
) -> None:
    (base,) = await read_chain(qemu_img, make("disk.raw", "raw"))
    store, snapshots = Store(tmp_path / "layers"), tmp_path / "snaps"
    snapshots.mkdir()
    draw = random.Random(1)

    async def work(seed: int) -> None:
        """Boot, snapshot, restore, delete and collect, for ever."""
        own = random.Random(seed)
        running: list[HeldLayer] = []
        while True:
            action = own.choice(["boot", "restore", "snapshot", "end", "delete", "collect"])
            if action == "boot":
                running.append(await store.new_layer(qemu_img, base))
            elif action == "restore" and (there := published(snapshots)):
                # It may be deleted and collected by another one before it is held.
                with contextlib.suppress(UsageError, HostError):
                    frozen = (await read_chain(qemu_img, own.choice(there)[2]))[0]
                    running.append(await store.new_layer(qemu_img, frozen))
            elif action == "snapshot" and running:
                held = running.pop()
                running.append(await store.new_layer(qemu_img, held.layer))
                await take(store, held, snapshots / secrets.token_hex(8))
                held.release()
            elif action == "end" and running:
                own.choice([HeldLayer.release, HeldLayer.discard])(running.pop())
            elif (
                action == "delete" and len(mine := list(snapshots.glob(f"*[{seed % 10}].json"))) > 3
            ):
                remove(own.choice(mine).with_suffix(""))
            elif action == "collect":
                await store.collect(qemu_img, gone=own.random() < 0.5)

    processes = [forked(partial(work, seed)) for seed in range(3)]
    for kill in range(30):
        await asyncio.sleep(draw.uniform(0.02, 0.4))
        process = processes.pop(0)
        assert process.is_alive(), "it failed by itself"
        process.kill()
        await asyncio.to_thread(process.join)
        processes.append(forked(partial(work, kill + 3)))
        for snapshot, mark, layer in published(snapshots):
            # Unless somebody has deleted it since it was looked for.
            assert layer.exists() or not snapshot.exists(), f"no layer of {snapshot} {mark}"
    for process in processes:
        process.kill()
        process.join()
    # What the last ones had started ends with them, a moment later.
    await asyncio.sleep(0.1)
    await check(qemu_img, store, base, snapshots)
    assert published(snapshots)
