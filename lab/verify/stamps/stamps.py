"""Prove that a snapshot's memory and disks are of one instant, at random instants.

A guest stamps its memory and its disks alternately (`stamps.c`).  While it runs, snapshots of it
are taken, each after a random time.  Of each the memory is read in a QEMU that was restored from it
and stands still, and the disks from the layers that it froze, past that QEMU; then `check.findings`
says whether both are of one instant.  After that the restored guest runs on for some rounds, in
which it reads what it wrote before the instant, and must meet no error.

That the check can fail is shown by `spoil`: snapshots that are made wrong on purpose.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from lab.disks.chain import Layer
from lab.disks.qemu_img import run_qemu_img
from lab.disks.store import Store
from lab.errors import GuestError, HostError, LabError, UsageError
from lab.guests.protocol import PAGE_BYTES
from lab.host.workdir import private_folder
from lab.qemu.build import find_qemu
from lab.scenario.machine import DiskCache, DiskKind
from lab.session import VM, boot, restore
from lab.snapshot.disks import DiskSwitch
from lab.snapshot.sidecar import parse_sidecar, sidecar_path
from lab.verify.stamps.check import REGION_BYTES, DiskStamps, MemoryStamps, findings
from lab.verify.stamps.guest import Case, ImageFormat, make_images, stamping_machine
from lab.vm.disks import Held

BOOT_TIMEOUT_S = 120.0
GO_ON_TIMEOUT_S = 60.0

GO_ON_ROUNDS = 20
"""How many rounds a restored guest has to do."""

MAX_WAIT_S = 0.2
"""The longest time between two snapshots of one guest."""

SNAPSHOTS_PER_BOOT = 12
"""Each snapshot makes the chain of layers longer by one."""

_POLL_S = 0.005

Spoil = Literal["", "later", "earlier"]
"""What is done wrong on purpose.  `later`: the snapshot is of the memory alone, and the disks are
looked at some time after it.  `earlier`: the first disk is frozen some time before the rest."""

Progress = Callable[[str], None]


class Instant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One snapshot: what its memory and its disks say, and what is wrong with that.

    `number` counts them from 1.  `round`, `begun` and `known` are of the memory, by disk;
    `newest` is the last round on each disk, in the guest's order as far as the disks name
    themselves.  `problems` is empty when all is of one instant and the guest went on.
    """

    number: int
    round: int = 0
    begun: tuple[int, ...] = ()
    known: tuple[int, ...] = ()
    newest: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came of one case.

    `instants` is how many snapshots were looked at, and `one_instant` how many of them were of one
    instant and went on; `failures` has the others in full.  `in_flight` is at how many instants a
    write was on its way, and `landed` at how many of these it was on the disk.  `rounds` is how
    many rounds the guests of all `boots` had done before their last snapshots.  `case` is what was
    asked for, and `seed` what the times between snapshots were drawn from.  `qemu` is the version
    and the build that took the snapshots.
    """

    case: Case
    qemu: str
    seed: int
    spoil: Spoil
    instants: int
    one_instant: int
    in_flight: int
    landed: int
    boots: int
    rounds: int
    failures: tuple[Instant, ...]

    @property
    def ok(self) -> bool:
        """Whether every instant was one."""
        return self.one_instant == self.instants


async def prove(
    *,
    instants: int,
    disks: int,
    disk: DiskKind,
    iothread: bool,
    cache: DiskCache,
    image_format: ImageFormat,
    method: str,
    seed: int,
    folder: Path,
    progress: Progress | None = None,
    cached: bool = False,
    sync_every: int = 0,
    spoil: Spoil = "",
    snapshots_per_boot: int = SNAPSHOTS_PER_BOOT,
) -> Report:
    """Take snapshots of a guest that stamps its memory and disks, and look at each.

    A snapshot that is not of one instant, that cannot be taken or restored, or whose guest does not
    go on, is a failure in the report and raises nothing; after it the guest boots again.

    :param instants: how many.
    :param folder: for disks and images; nothing is left in it.
    :param progress: called with one line before each snapshot.
    :param snapshots_per_boot: after so many the guest boots again, on empty disks.
    :raise UsageError: the case cannot be.
    :raise HostError: this host cannot do it, or lacks the room.
    :raise LabError: the guest does not boot.

    Other parameters are those of `Case`.
    """
    case = Case(
        method=method,
        disks=disks,
        disk=disk,
        iothread=iothread,
        cache=cache,
        image_format=image_format,
        cached=cached,
        sync_every=sync_every,
    )
    return await prove_case(
        case,
        instants=instants,
        seed=seed,
        folder=folder,
        progress=progress,
        spoil=spoil,
        snapshots_per_boot=snapshots_per_boot,
    )


async def prove_case(
    case: Case,
    *,
    instants: int,
    seed: int,
    folder: Path,
    progress: Progress | None = None,
    spoil: Spoil = "",
    snapshots_per_boot: int = SNAPSHOTS_PER_BOOT,
) -> Report:
    """Do what `prove` says, for a case."""
    if instants < 1:
        raise UsageError(f"{instants} instants", "choose one at least")
    if spoil not in ("", "later", "earlier"):
        raise UsageError(f"spoil {spoil!r}", "choose later or earlier, or nothing")
    rng = random.Random(seed)
    done: list[Instant] = []
    boots = rounds = 0
    with private_folder("stamps-", folder) as work:
        while len(done) < instants:
            boots += 1
            async with stamping(case, work) as guest:
                for _ in range(min(snapshots_per_boot, instants - len(done))):
                    if progress is not None:
                        bad = sum(bool(one.problems) for one in done)
                        progress(f"instant {len(done) + 1}/{instants}, {bad} bad: {case}")
                    await asyncio.sleep(rng.uniform(0.0, MAX_WAIT_S))
                    rounds_before = guest.round
                    try:
                        done.append(await guest.look(len(done) + 1, spoil))
                    except (HostError, UsageError):
                        raise
                    except LabError as error:
                        done.append(Instant(number=len(done) + 1, problems=(str(error),)))
                        break
                rounds += rounds_before
    flights = [one for one in done if one.begun != one.known]
    binary = find_qemu(case.variant)
    return Report(
        case=case,
        qemu=f"{binary.version} {binary.variant} ({binary.build_id})",
        seed=seed,
        spoil=spoil,
        instants=len(done),
        one_instant=sum(not one.problems for one in done),
        in_flight=len(flights),
        landed=sum(one.newest == one.begun for one in flights),
        boots=boots,
        rounds=rounds,
        failures=tuple(one for one in done if one.problems),
    )


@dataclass
class StampingGuest:
    """A guest that stamps.

    :param gpa: where its page is in its memory.
    :param address: and where in QEMU's.
    """

    vm: VM
    case: Case
    folder: Path
    gpa: int
    address: int

    async def look(self, number: int, spoil: Spoil) -> Instant:
        """Take a snapshot and look at it; nothing of it is left."""
        image = self.folder / "instant.snap"
        early: Path | None = None
        try:
            if spoil == "earlier":
                early = await self._freeze_first()
                await asyncio.sleep(MAX_WAIT_S)
            await self.vm.snapshot(
                image,
                self.case.method,
                fault_log=False,
                progress=False,
                disks=spoil != "later",
                checksums=False,
            )
            if spoil == "later":
                await asyncio.sleep(MAX_WAIT_S)
                regions = await self._regions_now()
            else:
                sidecar = parse_sidecar(image, sidecar_path(image).read_bytes())
                layers = [(Path(one.layer), one.format) for one in sidecar.disks]
                if early is not None:
                    layers[0] = (early, "qcow2")
                # At once, while the guest writes to the layers above.  When it is stopped QEMU
                # writes out all that it has kept back, and that may not be needed any more.
                regions = await self._regions(layers)
            problem = await self._goes_on(self.vm, self._now(self.vm, self.address))
            # The other guest has the CPU meanwhile.
            await self.vm.stop()
            try:
                instant = await self._compared(number, image, regions, goes_on=not spoil)
            finally:
                await self.vm.cont()
            if problem:
                problems = (*instant.problems, f"the guest itself {problem}")
                instant = msgspec.structs.replace(instant, problems=problems)
            return instant
        finally:
            image.unlink(missing_ok=True)
            sidecar_path(image).unlink(missing_ok=True)

    async def _compared(
        self, number: int, image: Path, regions: list[bytes], *, goes_on: bool
    ) -> Instant:
        async with restore(image, paused=True, check=False) as restored:
            address = await restored.host_address(self.gpa)
            try:
                memory = MemoryStamps.decode(restored.read_host(address, PAGE_BYTES))
            except GuestError as error:
                return Instant(number=number, problems=(error.cause,))
            disks = [DiskStamps.decode(region, memory.nonce) for region in regions]
            problems = findings(memory, disks, cached=self.case.cached)
            if goes_on:
                await restored.cont()
                if problem := await self._goes_on(restored, memory, address):
                    problems.append(f"the restored guest {problem}")
        in_order = sorted(disks, key=lambda one: -1 if one.disk is None else one.disk)
        return Instant(
            number=number,
            round=memory.round,
            begun=memory.begun,
            known=memory.known,
            newest=tuple(one.newest for one in in_order),
            problems=tuple(problems),
        )

    async def _goes_on(self, vm: VM, before: MemoryStamps, address: int | None = None) -> str:
        """Say what keeps a guest from going on after `before`; nothing when it does."""
        loop = asyncio.get_running_loop()
        end = loop.time() + GO_ON_TIMEOUT_S
        while True:
            now = self._now(vm, self.address if address is None else address)
            if now.errors > before.errors:
                said = [line for line in vm.console.text.splitlines() if "LAB1 error" in line]
                return f"had {now.errors - before.errors} errors of its disks: {said[:1]}"
            if now.round >= before.round + GO_ON_ROUNDS:
                return ""
            if loop.time() > end:
                return f"stood at round {now.round} for {GO_ON_TIMEOUT_S:g} s"
            await asyncio.sleep(_POLL_S)

    def _now(self, vm: VM, address: int) -> MemoryStamps:
        return MemoryStamps.decode(vm.read_host(address, PAGE_BYTES), is_still=False)

    @property
    def round(self) -> int:
        """The round that the guest is in."""
        return self._now(self.vm, self.address).round

    async def _freeze_first(self) -> Path:
        """Freeze the first disk alone, and return its layer."""
        vm = self.vm

        async def next_layer(base: Layer) -> Held:
            return await Store.default().new_layer(vm.binary.qemu_img, base)

        switch = DiskSwitch(vm, next_layer, vm.files.disks[:1])
        await switch.prepare()
        await vm.stop()
        try:
            await switch.switch()
        finally:
            await vm.cont()
            await switch.undo()
        [frozen] = await switch.frozen()
        return Path(frozen.layer)

    async def _regions_now(self) -> list[bytes]:
        """Read the disks as they are now."""
        await self.vm.stop()
        try:
            layers = [(one.layer.path, one.layer.format) for one in self.vm.files.disks]
            return await self._regions(layers, in_use=True)
        finally:
            await self.vm.cont()

    async def _regions(
        self, layers: list[tuple[Path, str]], *, in_use: bool = False
    ) -> list[bytes]:
        """Read the stamped part of disks from their layers.

        :param in_use: a QEMU that stands still may write to them.
        """
        return list(
            await asyncio.gather(
                *(
                    self._region(layer, form, self.folder / f"region{number}", in_use)
                    for number, (layer, form) in enumerate(layers)
                )
            )
        )

    async def _region(self, layer: Path, form: str, target: Path, in_use: bool) -> bytes:
        target.unlink(missing_ok=True)
        done = await run_qemu_img(
            self.vm.binary.qemu_img,
            "dd",
            *(["-U"] if in_use else []),
            *("-f", form, "-O", "raw", f"bs={REGION_BYTES}", "count=1"),
            *(f"if={layer}", f"of={target}"),
        )
        try:
            if done.status:
                raise HostError(f"the layer {layer} cannot be read: {done.said}")
            # What is not written to is a hole, also at the end.
            return target.read_bytes().ljust(REGION_BYTES, b"\0")
        finally:
            target.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def stamping(case: Case, folder: Path) -> AsyncIterator[StampingGuest]:
    """Boot a guest that stamps empty disks."""
    binary = case.variant
    qemu_img = find_qemu(binary).qemu_img
    images = await make_images(case, qemu_img, folder)
    machine = await stamping_machine(case, images)
    try:
        async with boot(machine, binary=binary) as vm:
            said = vm.console.wait_record(
                lambda record: record.kind in ("ready", "error"), timeout_s=BOOT_TIMEOUT_S
            )
            record = await vm.watched(said, "the guest booted")
            if record.kind == "error":
                raise GuestError(f"the guest cannot stamp: {dict(record.fields)}")
            gpa = int(record.fields["stamps_gpa"])
            yield StampingGuest(vm, case, folder, gpa, await vm.host_address(gpa))
    finally:
        # The snapshots are gone, so nothing needs their layers.
        store = Store.default()
        await store.forget(folder)
        await store.collect(qemu_img)
