"""Any number of snapshots in one QEMU: engines mixed, some of them cancelled, some failed.  Nothing
that a snapshot sets up is left for the next, and nothing piles up.
"""

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

import lab
from lab.scenario.methods import METHODS
from lab.session import VM
from lab.verify.oracle import verify_method
from tests.support.bench import begin, configure, ended, info, is_left_alone, phases, small, start
from tests.support.failing_disk import full_after

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(3600),
    pytest.mark.platforms("tcg", "kvm", "micro-kvm"),
]

SEED = 20261125
LIVE = [name for name, how in METHODS.items() if how.runs_on("patched") and how.engine]
#: QEMU's heap may grow by this much, whatever the number of snapshots: less than one buffer.
MORE_MIB = 16


@dataclass(frozen=True)
class Held:
    """What QEMU holds of the host's."""

    descriptors: int
    threads: int
    memory_mib: int

    @classmethod
    def by(cls, vm: VM) -> Self:
        process = Path(f"/proc/{vm.pid}")
        status = process.joinpath("status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in status)
        return cls(
            descriptors=len(list(process.joinpath("fd").iterdir())),
            threads=int(fields["Threads"]),
            memory_mib=int(fields["RssAnon"].split()[0]) // 1024,
        )


async def completed(vm: VM, method: str, folder: Path, rng: random.Random) -> None:
    await begin(vm, method, folder / "image")
    await ended(vm, "completed")


async def cancelled(vm: VM, method: str, folder: Path, rng: random.Random) -> None:
    """Cancel wherever it is after some turns of the loop, or when that many phases have begun."""
    await configure(vm, method)
    await start(vm, folder / "image")
    wanted = rng.randrange(10)
    for _ in range(rng.randrange(30)):
        if len(phases(await info(vm))) >= wanted:
            break
        await asyncio.sleep(0)
    await vm.execute("migrate_cancel")
    await ended(vm, "cancelled", "completed")


async def failed(vm: VM, method: str, folder: Path, rng: random.Random) -> None:
    # The image has more than the working set.
    async with full_after(rng.randrange(vm.workload.wss_mib << 20)) as full:
        await begin(vm, method, full / "image")
        await ended(vm, "failed")


async def verified(vm: VM, method: str, folder: Path, rng: random.Random) -> None:
    found = await verify_method(vm, method, folder)
    assert found.equal, found.detail


HOW = (completed, completed, completed, cancelled, failed, verified)


@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.slow)])
async def test_nothing_piles_up_in_one_process(rounds: int, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    async with lab.boot(*small(vcpus=2)) as vm:
        for method in LIVE:
            await completed(vm, method, tmp_path, rng)
        await is_left_alone(vm)
        first = Held.by(vm)
        for number in range(rounds):
            for method in rng.sample(LIVE, len(LIVE)):
                how = rng.choice(HOW)
                try:
                    await how(vm, method, tmp_path, rng)
                    await is_left_alone(vm)
                except BaseException as error:
                    error.add_note(f"round {number} of seed {SEED}: {method}, {how.__name__}")
                    raise
        last = Held.by(vm)
        for method in LIVE:
            await verified(vm, method, tmp_path, rng)
    assert (last.descriptors, last.threads) == (first.descriptors, first.threads)
    assert last.memory_mib <= first.memory_mib + MORE_MIB
