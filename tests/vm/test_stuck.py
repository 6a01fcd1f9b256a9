"""A writer that waits for a page which nobody releases is found, and named.

The kernel, QEMU and the guest are the real ones; the release is held in front of the kernel
(`gate.py`).
"""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

import lab
from lab.session import VM
from lab.verify.oracle import verify_method
from lab.verify.stuck import watching
from tests.support.bench import (
    begin,
    ended,
    info,
    is_left_alone,
    phases,
    small,
    until,
    until_status,
    waiting_writers,
    works_on,
)
from tests.support.failing_disk import stalling
from tests.support.gate import Gates
from tests.support.gate import gates as gates_of_guests
from tests.support.outgoing import outgoing

pytestmark = [
    pytest.mark.vm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.platforms("tcg", "kvm", "micro-tcg", "micro-kvm"),
]

ENGINES = ("live", "live-rfc", "live-inline")


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gates]:
    with gates_of_guests(tmp_path_factory.mktemp("gates")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(gates: Gates, platform: str) -> AsyncIterator[VM]:
    async with lab.boot(*small()) as vm:
        yield vm


@pytest.mark.parametrize("method", ENGINES)
async def test_a_writer_that_nobody_lets_go_is_found_and_named(
    vm: VM, gates: Gates, method: str, tmp_path: Path
) -> None:
    async with watching(vm.pid) as watch:

        async def found() -> bool:
            return bool(watch.stuck)

        # Ahead of the pause `copy` releases itself what was quick to protect.
        await begin(vm, method, tmp_path / "image", hold=True)
        await until_status(vm, "pre-switchover")
        with gates.held("release"):
            await vm.execute("migrate-continue", {"state": "pre-switchover"})
            await until(found)
        await ended(vm, "completed")
    assert watch.sees
    assert watch.finding.startswith("waited over 1 s for one page: CPU 0/")
    await is_left_alone(vm)


async def test_in_an_ordinary_snapshot_nobody_is_stuck_and_the_hold_is_not_counted(
    vm: VM, tmp_path: Path
) -> None:
    for method in ENGINES:
        found = await verify_method(vm, method, tmp_path)
        assert found.equal, found.detail
        assert found.faults
        assert found.stuck == ""
        assert found.watched


@pytest.mark.platforms("micro-tcg", "micro-kvm")
@pytest.mark.parametrize("method", ["live", "live-rfc"])
async def test_who_comes_too_late_to_be_woken_is_woken_again(
    gates: Gates, method: str, tmp_path: Path
) -> None:
    """The kernel lets a thread wait for a page that was released just before, if it is read-only.

    Its message is read when the page is saved, and whoever waits was woken.  The thread that saves
    with `live-inline` reads faults itself, and releases such a page once more.  Field report F6.
    """
    async with lab.boot(*small(vcpus=3)) as vm:
        await begin(vm, method, tmp_path / "whole")
        await ended(vm, "completed")
        size = (tmp_path / "whole").stat().st_size

        async def all_wait() -> bool:
            return waiting_writers(vm) == 3

        async def nobody_waits() -> bool:
            return waiting_writers(vm) == 0

        async with outgoing(vm) as target:
            # Who writes ahead of the pause is let go, or the guest could not be stopped.
            await begin(vm, method, target.channels, hold=True)
            await until_status(vm, "pre-switchover")
            # As if they had begun to wait after all of the chunk was woken.  Their faults are read
            # last, because that wakes them.
            with gates.held("read"), gates.silent("wake"), gates.silent("release"):
                await vm.execute("migrate-continue", {"state": "pre-switchover"})
                await until(all_wait)
                # The writers' pages are among what is saved, but for a small chance.
                await target.read_exactly(size - (6 << 20))
                assert waiting_writers(vm) == 3
            await target.while_reading(until(nobody_waits))
            assert "complete" not in phases(await target.while_reading(info(vm)))
            await target.drain(tmp_path / "image")
            await ended(vm, "completed")
        await is_left_alone(vm)


async def test_who_comes_too_late_to_a_snapshot_given_up_does_not_wait_for_the_disk(
    vm: VM, gates: Gates, tmp_path: Path
) -> None:
    """`live-inline` has no thread that would read of it, and releases memory as a whole."""

    async def waits() -> bool:
        return waiting_writers(vm) == 1

    async with stalling(tmp_path / "disk", 512) as disk:
        await begin(vm, "live-inline", disk.folder / "image", hold=True)
        await until_status(vm, "pre-switchover")
        await disk.freeze()
        await vm.execute("migrate-continue", {"state": "pre-switchover"})
        await until(waits)
        with gates.silent("release"):
            # The main thread may hang: the vCPU may wait with the big lock held.
            await vm.qmp.execute("yank", {"instances": [{"type": "migration"}]}, out_of_band=True)
            await works_on(vm)
            await works_on(vm)
        await disk.thaw()
        reply = await ended(vm, "failed")
        assert "released unsaved" in reply["error-desc"]
    await is_left_alone(vm)
