"""Soak: random guests, random snapshots of them, and every byte of every image compared.

A trial (`lab.verify.soak.draw`) is a guest and a few snapshots of it; trials have consecutive
seeds, and an iteration is one snapshot.  What is found is therefore repeated by the trial's seed
and as many iterations as it took: `Result.reproduce`.

An iteration is `equal`, or `differs` when the oracle says so, or `failed` when the guest did not
boot or go on, the snapshot could not be taken or restored, or a thread of QEMU waited for a page
that nobody released (`lab.verify.stuck`).  Either of the latter ends its trial, because nothing is
known about that guest any more; the soak goes on with the next.  A guest that is silent at boot is
booted once more, also when it boots only after its snapshot was taken in `prelaunch`; what is
recorded of the first time, `no-guest`, has the number of the iteration that follows.
"""

import asyncio
import contextlib
import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, get_args

from lab.errors import GuestError, GuestSilentError, HostError, LabError, TransientError, UsageError
from lab.host.ksm import KSM, ksm_running
from lab.host.needs import available_memory_mib, huge_pages
from lab.journal import meanwhile
from lab.scenario.document import to_json
from lab.scenario.guests import LabGuest
from lab.scenario.machine import HUGE_PAGE_MIB, Machine, RamKind
from lab.session import VM, boot, restore
from lab.snapshot.sidecar import sidecar_path
from lab.verify.oracle import Verification, verify_method
from lab.verify.soak.draw import LARGE_RAM_MIB, MAX_RAM_MIB, Choice, Offer, Shot, Trial, draw
from lab.verify.soak.pressure import swap_out, swapping_problem
from lab.verify.soak.record import Outcome, Result
from lab.verify.soak.screen import viewing
from lab.vm.accelerator import settled
from lab.vm.devices import find_firmware
from lab.vm.flash import write_flash
from lab.vm.ram import require_ram, require_thp

GUEST_TIMEOUT_S = 120.0
"""How long a guest may take to show that it goes on; it ticks ten times a second."""

RESUME_TIMEOUT_S = 300.0

POLL_S = 0.02


LARGE_RESERVE_MIB = 4096
"""What is to be left of the host's memory beside two guests of `LARGE_RAM_MIB`."""

KSM_POLL_S = 1.0


async def survey(image_dir: Path, choice: Choice) -> Offer:
    """Look at what this host offers of what may be drawn, and why not the rest.

    Kinds of RAM that are asked for by name count as offered: that one is not there is then an
    error of the boot, and not passed over.
    """
    asked = choice.ram_kinds != Choice().ram_kinds
    disk_dir = Path(tempfile.gettempdir())
    refused = {
        **{f"RAM of kind {kind}": "" if asked else _ram_problem(kind) for kind in _RAM_KINDS},
        **{f"transparent huge pages in {kind}": _thp_problem(kind) for kind in _RAM_KINDS},
        "images past the page cache": _direct_io_problem(image_dir),
        "disks past the page cache": _direct_io_problem(disk_dir),
        "RAM above 4 GiB": _large_ram_problem(),
        "flash": _flash_problem(),
        "merging of equal pages (KSM)": _ksm_problem(),
        "swapping": swapping_problem(),
        **{f"{kind} under KVM": await _kvm_problem(kind, choice) for kind in _GUESTS},
    }
    lacking = {name: problem for name, problem in refused.items() if problem}
    return Offer(
        ram_kinds=frozenset(kind for kind in _RAM_KINDS if f"RAM of kind {kind}" not in lacking),
        thp_kinds=frozenset(
            kind for kind in _RAM_KINDS if f"transparent huge pages in {kind}" not in lacking
        ),
        direct_io="images past the page cache" not in lacking,
        disk_direct_io="disks past the page cache" not in lacking,
        large_ram="RAM above 4 GiB" not in lacking,
        flash="flash" not in lacking,
        ksm="merging of equal pages (KSM)" not in lacking,
        pressure="swapping" not in lacking,
        kvm_guests=frozenset(kind for kind in _GUESTS if f"{kind} under KVM" not in lacking),
        lacking=lacking,
    )


_RAM_KINDS: tuple[RamKind, ...] = get_args(RamKind)
_GUESTS: tuple[LabGuest, ...] = get_args(LabGuest)


def _ram_problem(kind: RamKind) -> str:
    # Twice: a restored guest runs beside the one that is snapshotted.
    if kind == "hugetlb":
        free_mib = huge_pages()[1] * HUGE_PAGE_MIB
        enough = free_mib >= 2 * MAX_RAM_MIB
        return "" if enough else f"{free_mib} MiB of huge pages are free of {2 * MAX_RAM_MIB}"
    try:
        require_ram(Machine(ram_mib=2 * MAX_RAM_MIB, ram_kind=kind))
    except HostError as error:
        return error.cause
    return ""


def _thp_problem(kind: RamKind) -> str:
    if kind == "hugetlb":
        return "its pages are huge, and not transparent"
    try:
        require_thp(kind)
    except HostError as error:
        return error.cause
    return ""


def _large_ram_problem() -> str:
    needed_mib = 2 * LARGE_RAM_MIB + LARGE_RESERVE_MIB
    available_mib = available_memory_mib()
    enough = available_mib >= needed_mib
    return "" if enough else f"{available_mib} MiB of memory are available of {needed_mib}"


def _flash_problem() -> str:
    try:
        find_firmware()
    except HostError as error:
        return error.cause
    return ""


def _ksm_problem() -> str:
    if not (KSM / "run").exists():
        return "this kernel does not do that"
    return "" if os.access(KSM / "run", os.W_OK) else "only root may switch it on"


async def _kvm_problem(kind: LabGuest, choice: Choice) -> str:
    if choice.guest != "any" or choice.accel == "tcg":
        return ""
    return (await settled(Machine(guest=kind, accel="auto"))).fallback


def _direct_io_problem(folder: Path) -> str:
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        try:
            os.close(os.open(probe.name, os.O_WRONLY | os.O_DIRECT))
        except OSError as error:
            return f"the file system refuses that: {error.strerror}"
    return ""


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
                if trial.ksm:
                    await _enter_ksm(stack)
                guests = _Guests(trial, folder, stack)
                await guests.boot(number, on_result)
                for shot in range(1, len(trial.shots) + 1):
                    if end_s is not None and loop.time() >= end_s:
                        return
                    on_start(number, trial, shot)
                    result = await _verified(guests, shot, number, on_result)
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


async def _enter_ksm(stack: contextlib.AsyncExitStack) -> None:
    """Have KSM run for as long as `stack` lasts, as soon as nobody else has."""
    while True:
        try:
            stack.enter_context(ksm_running())
            return
        except TransientError:
            await asyncio.sleep(KSM_POLL_S)


class _Guests:
    """The guest that a trial is at, the images of it that are kept, and the guests before it.

    :param folder: for images.
    :param stack: what guests are entered into, and images that are kept.
    """

    def __init__(self, trial: Trial, folder: Path, stack: contextlib.AsyncExitStack) -> None:
        self.trial = trial
        self.folder = folder
        self.generation = 0
        """How many images lie between the guest that booted and this one."""
        self.images_kept = 0
        """How many images were on the disk when the last snapshot was begun."""
        self._stack = stack
        self._of_guest = contextlib.AsyncExitStack()
        self._vm: VM | None = None
        self._last: Path | None = None
        self._last_channels = 1

    @property
    def vm(self) -> VM:
        """The guest that snapshots are taken of."""
        assert self._vm is not None
        return self._vm

    async def boot(self, number: int, on_result: Callable[[Result], None]) -> None:
        """Boot the trial's guest; once more when it is silent, and hand that over as well.

        A guest of several vCPUs hangs while it boots once in a thousand times or less, with no
        snapshot anywhere near; that is noted, and does not keep its snapshots from being tried.
        """
        trial = self.trial
        try:
            await self._take_over(boot(trial.machine, trial.workload, binary=trial.variant))
        except GuestSilentError as error:
            on_result(_result(trial, 1, number, "no-guest", str(error)))
            await self._take_over(boot(trial.machine, trial.workload, binary=trial.variant))

    async def restore_last(self) -> None:
        """Go on with what the last image restores."""
        assert self._last is not None
        if not self.trial.keep:
            await self._of_guest.aclose()
        # Every byte of it has just been compared.
        await self._take_over(restore(self._last, channels=self._last_channels, check=False))
        await self.vm.wait_ready()
        self.generation += 1
        if not self.trial.keep:
            _remove(self._last)

    def new_image(self, number: int, shot: int) -> Path | None:
        """Return where the image of a snapshot is to stay; None when nobody needs it."""
        following = self.trial.shots[shot : shot + 1]
        is_wanted = self.trial.keep or any(how.restored for how in following)
        self.images_kept = len(list(self.folder.glob("*.kept")))
        if not is_wanted:
            return None
        self._last = self.folder / f"{number}.kept"
        self._last_channels = self.trial.shots[shot - 1].channels
        self._stack.callback(_remove, self._last)
        return self._last

    async def _take_over(self, guest: AbstractAsyncContextManager[VM]) -> None:
        of_guest = await self._stack.enter_async_context(contextlib.AsyncExitStack())
        self._vm = await of_guest.enter_async_context(guest)
        self._of_guest = of_guest
        await of_guest.enter_async_context(_watched(self._vm))


def _remove(image: Path) -> None:
    image.unlink(missing_ok=True)
    sidecar_path(image).unlink(missing_ok=True)


async def _verified(
    guests: _Guests, shot: int, number: int, on_result: Callable[[Result], None]
) -> Result:
    trial = guests.trial
    how = trial.shots[shot - 1]
    try:
        if how.restored:
            await guests.restore_last()
        vm = guests.vm
        if trial.variant == "patched":
            size = {"x-snapshot-buffer-size": how.buffer_mib << 20}
            await vm.execute("migrate-set-parameters", size)
        await _bring_into_state(vm, how)
        keep = guests.new_image(number, shot)
        async with contextlib.AsyncExitStack() as stack:
            if trial.pressure:
                await stack.enter_async_context(_meanwhile(swap_out(vm)))
            if vm.machine.flash and how.state == "running":
                await stack.enter_async_context(_meanwhile(_flash_written(vm)))
            await stack.enter_async_context(_balloon_moved(vm, how))
            found = await verify_method(
                vm,
                how.method,
                guests.folder,
                channels=how.channels,
                fault_log=how.log_faults,
                keep=keep,
            )
        if found.equal:
            if how.state != "running":
                await vm.cont()
            try:
                await vm.wait_ready()
            except GuestSilentError as error:
                if how.state != "prelaunch":
                    raise
                # It boots only now, and may hang as any other does: see `_Guests.boot`.
                silent = _result(trial, shot, number, "no-guest", str(error), guests=guests)
                on_result(silent)
                await vm.reset()
                await vm.wait_ready()
            await _goes_on(vm)
            await _is_whole(vm)
    except (HostError, UsageError):
        raise
    except LabError as error:
        return _result(trial, shot, number, "failed", str(error), guests=guests)
    outcome: Outcome = "equal" if found.equal else "differs"
    if found.equal and found.stuck:
        outcome = "failed"
    detail = "; ".join(filter(None, (found.detail, found.stuck)))
    return _result(trial, shot, number, outcome, detail, found, guests)


async def _bring_into_state(vm: VM, how: Shot) -> None:
    if how.state != "running":
        await vm.stop()
    if how.reset or how.state == "prelaunch":
        await vm.reset()


@contextlib.asynccontextmanager
async def _meanwhile(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Have something done for as long as the context lasts; what it raises is raised at the end."""
    task = asyncio.create_task(work, name="meanwhile")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if not task.cancelled():
        task.result()


async def _flash_written(vm: VM) -> None:
    """Write to the guest's flash from when it goes on after being stopped.

    Not before: a write to what is protected would hold QEMU's main loop while the guest is held.
    """
    await _resumed(vm)
    await write_flash(vm)


async def _resumed(vm: VM) -> None:
    await vm.qmp.wait_event(
        lambda event: event.name == "RESUME",
        since=len(vm.qmp.events),
        timeout_s=RESUME_TIMEOUT_S,
    )


def _result(
    trial: Trial,
    shot: int,
    number: int,
    outcome: Outcome,
    detail: str,
    found: Verification | None = None,
    guests: _Guests | None = None,
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
        state=how.state,
        generation=0 if guests is None else guests.generation,
        images_kept=0 if guests is None else guests.images_kept,
        ksm=trial.ksm,
        pressure=trial.pressure,
        outcome=outcome,
        detail=detail,
        pages_compared=0 if found is None else found.pages_compared,
        pages_differing=0 if found is None else found.pages_differing,
        faults=None if found is None else found.faults,
        watched=found is not None and found.watched,
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
async def _balloon_moved(vm: VM, how: Shot) -> AsyncIterator[None]:
    """Tell the balloon its size as soon as the guest goes on after being stopped."""
    if not vm.machine.balloon or how.state != "running":
        yield
        return

    async def move() -> None:
        await _resumed(vm)
        await vm.execute("balloon", {"value": (vm.machine.ram_mib - how.balloon_mib) << 20})

    async with meanwhile(move(), "moving the balloon") as moving:
        yield
        # Verifying a snapshot has seen the guest go on, so this is over in a moment.
        await moving


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
