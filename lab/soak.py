"""Soak: random guests, random snapshots of them, and every byte of every image compared.

A trial (`lab.draw`) is a guest and a few snapshots of it; trials have consecutive seeds, and an
iteration is one snapshot.  What is found is therefore repeated by the trial's seed and as many
iterations as it took: `Result.reproduce`.

An iteration is `equal`, or `differs` when the oracle says so, or `failed` when the guest did not
boot or go on, or the snapshot could not be taken or restored.  Either of the latter ends its
trial, because nothing is known about that guest any more; the soak goes on with the next.  A guest
that is silent at boot is booted once more; what is recorded of the first time, `no-guest`, has the
number of the iteration that follows.
"""

import asyncio
import contextlib
import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import get_args

from lab.draw import MAX_RAM_MIB, Choice, Offer, Trial, draw
from lab.errors import GuestError, GuestSilentError, HostError, LabError, UsageError
from lab.host import huge_pages, thp_settings
from lab.oracle import Verification, verify_method
from lab.ram import require_ram
from lab.rfb import viewing
from lab.scenario import HUGE_PAGE_MIB, Machine, RamKind, to_json
from lab.tally import Outcome, Result
from lab.vm import VM, boot

GUEST_TIMEOUT_S = 120.0
"""How long a guest may take to show that it goes on; it ticks ten times a second."""

RESUME_TIMEOUT_S = 300.0

POLL_S = 0.02


def survey(image_dir: Path, choice: Choice) -> Offer:
    """Look at what this host offers of what may be drawn.

    Kinds of RAM that are asked for by name count as offered: that one is not there is then an
    error of the boot, and not passed over.
    """
    asked = choice.ram_kinds != Choice().ram_kinds
    thp = thp_settings()
    return Offer(
        ram_kinds=frozenset(kind for kind in get_args(RamKind) if asked or _has_room(kind)),
        thp=thp.get("enabled", "never") != "never",
        shmem_thp=thp.get("shmem_enabled", "never") not in ("never", "deny"),
        direct_io=_permits_direct_io(image_dir),
        disk_direct_io=_permits_direct_io(Path(tempfile.gettempdir())),
    )


def _has_room(kind: RamKind) -> bool:
    # Twice: a restored guest runs beside the one that is snapshotted.
    if kind == "hugetlb":
        return huge_pages()[1] * HUGE_PAGE_MIB >= 2 * MAX_RAM_MIB
    try:
        require_ram(Machine(ram_mib=2 * MAX_RAM_MIB, ram_kind=kind))
    except HostError:
        return False
    return True


def _permits_direct_io(folder: Path) -> bool:
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        try:
            os.close(os.open(probe.name, os.O_WRONLY | os.O_DIRECT))
        except OSError:
            return False
    return True


async def soak(
    *,
    seed: int,
    iterations: int | None = None,
    minutes: float | None = None,
    choice: Choice,
    offer: Offer,
    folder: Path,
    on_start: Callable[[int, Trial, int], None],
    on_result: Callable[[Result], None],
    number: int = 1,
    last_seed: int | None = None,
) -> None:
    """Take random snapshots, verify each, and hand over its result at once.

    A result is of the snapshot that `on_start` named before, by its number, its trial and its
    place in that, from 1; or of a guest that did not boot, of which no snapshot was begun.

    :param seed: of the first trial; the next has the next.
    :param number: of the first snapshot: a soak that goes on has taken those before.
    :param last_seed: no trial after that of this seed.
    :param iterations: the last snapshot's number; without it and `minutes` there is no end.
    :param minutes: after so long no snapshot is begun.
    :param folder: for images and dumps; nothing is left in it.
    :raise HostError: when the host lacks something, so that the next trial would fail as well.
    """
    loop = asyncio.get_running_loop()
    end_s = None if minutes is None else loop.time() + 60 * minutes
    for trial_seed in itertools.count(seed):
        if last_seed is not None and trial_seed > last_seed:
            return
        trial = draw(trial_seed, choice, offer)
        try:
            async with contextlib.AsyncExitStack() as stack:
                vm = await _booted(trial, number, stack, on_result)
                for shot in range(1, len(trial.shots) + 1):
                    if end_s is not None and loop.time() >= end_s:
                        return
                    on_start(number, trial, shot)
                    result = await _verified(vm, trial, shot, number, folder)
                    on_result(result)
                    if number == iterations:
                        return
                    number += 1
                    if result.outcome != "equal":
                        break
        except (HostError, UsageError):
            raise
        except LabError as error:
            # The guest did not boot.  That is no snapshot, but nothing to pass over either.
            on_result(_result(trial, 1, number, "failed", f"no guest: {error}"))
            if number == iterations:
                return
            number += 1


async def _booted(
    trial: Trial,
    number: int,
    stack: contextlib.AsyncExitStack,
    on_result: Callable[[Result], None],
) -> VM:
    """Boot a trial's guest into `stack`; once more when it is silent, and hand that over as well.

    A guest of several vCPUs hangs while it boots once in a thousand times or less, with no snapshot
    anywhere near; that is noted, and does not keep its snapshots from being tried.
    """
    try:
        vm = await stack.enter_async_context(
            boot(trial.machine, trial.workload, binary=trial.variant)
        )
    except GuestSilentError as error:
        on_result(_result(trial, 1, number, "no-guest", str(error)))
        vm = await stack.enter_async_context(
            boot(trial.machine, trial.workload, binary=trial.variant)
        )
    await stack.enter_async_context(_watched(vm))
    return vm


async def _verified(vm: VM, trial: Trial, shot: int, number: int, folder: Path) -> Result:
    how = trial.shots[shot - 1]
    try:
        if trial.variant == "patched":
            size = {"x-snapshot-buffer-size": how.buffer_mib << 20}
            await vm.execute("migrate-set-parameters", size)
        if how.reset:
            await vm.reset()
        async with _balloon_moved(vm, how.balloon_mib):
            found = await verify_method(
                vm, how.method, folder, channels=how.channels, fault_log=how.log_faults
            )
        if found.equal:
            await vm.wait_ready()
            await _goes_on(vm)
            await _is_whole(vm)
    except (HostError, UsageError):
        raise
    except LabError as error:
        return _result(trial, shot, number, "failed", str(error))
    return _result(trial, shot, number, "equal" if found.equal else "differs", found.detail, found)


def _result(
    trial: Trial,
    shot: int,
    number: int,
    outcome: Outcome,
    detail: str,
    found: Verification | None = None,
) -> Result:
    how = trial.shots[shot - 1]
    return Result(
        iteration=number,
        seed=trial.seed,
        shot=shot,
        method=how.method,
        machine=to_json(trial.machine),
        workload=to_json(trial.workload),
        variant=trial.variant,
        buffer_mib=how.buffer_mib,
        log_faults=how.log_faults,
        channels=how.channels,
        balloon_mib=how.balloon_mib,
        reset=how.reset,
        outcome=outcome,
        detail=detail,
        pages_compared=0 if found is None else found.pages_compared,
        pages_differing=0 if found is None else found.pages_differing,
        faults=None if found is None else found.faults,
    )


@contextlib.asynccontextmanager
async def _watched(vm: VM) -> AsyncIterator[None]:
    """Have somebody look at the screen, if there is one."""
    if not vm.machine.vnc:
        yield
        return
    async with viewing(vm.files.vnc):
        yield


@contextlib.asynccontextmanager
async def _balloon_moved(vm: VM, balloon_mib: int) -> AsyncIterator[None]:
    """Tell the balloon its size as soon as the guest goes on after being stopped."""
    if not vm.machine.balloon:
        yield
        return

    async def move(since: int) -> None:
        await vm.qmp.wait_event(
            lambda event: event.name == "RESUME", since=since, timeout_s=RESUME_TIMEOUT_S
        )
        await vm.execute("balloon", {"value": (vm.machine.ram_mib - balloon_mib) << 20})

    moving = asyncio.create_task(move(len(vm.qmp.events)), name="moving the balloon")
    try:
        yield
        # Whoever verifies a snapshot sees the guest go on, so this is over in a moment.
        await moving
    finally:
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)


async def _goes_on(vm: VM) -> None:
    """Wait until the guest has ticked, worked unless it is idle, and used its devices, since now.

    :raise GuestError: when it does not, or has found a damaged page or a device's error.
    """
    before = await vm.progress_page()
    counts = [name for name, used in _counted(vm).items() if used]
    try:
        async with asyncio.timeout(GUEST_TIMEOUT_S):
            while True:
                now = await vm.progress_page()
                if all(getattr(now, name) > getattr(before, name) for name in counts):
                    break
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise GuestError(
            f"for {GUEST_TIMEOUT_S:g} s the guest did not do one of: {', '.join(counts)}"
        ) from None
    if now.page_errors or now.device_errors:
        raise GuestError(
            f"the guest found {now.page_errors} damaged pages, {now.device_errors} device errors"
        )


async def _is_whole(vm: VM) -> None:
    """Have the guest look at every word of its working set.

    :raise GuestError: when it finds one wrong.
    """
    if bad := await vm.verify_working_set():
        raise GuestError(f"the guest found {bad} pages of its working set wrong")


def _counted(vm: VM) -> dict[str, bool]:
    """Return which numbers of the progress page rise in this guest."""
    return {
        "tick_ns": True,
        "total_ops": vm.workload.kind != "idle",
        "disk_ops": vm.machine.disk != "none",
        "net_packets": vm.machine.net,
        "display_writes": vm.machine.vnc,
    }
