"""Restore a guest from an image."""

import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from lab.disks.frozen import changed
from lab.disks.store import Store
from lab.errors import GuestError, LaunchError, QmpError, RestoreError, UsageError
from lab.qemu.build import find_qemu
from lab.scenario.machine import Accel
from lab.scenario.methods import MAPPED_RAM, Variant, method
from lab.snapshot.attempt import IMAGE_DESCRIPTOR
from lab.snapshot.image import OpenImage, check_image, file_channel, open_image
from lab.vm.accelerator import settled
from lab.vm.commandline import Launch
from lab.vm.launch import VMT, launched
from lab.vm.qmp import COMMAND_TIMEOUT_S, Event
from lab.vm.vm import RunningVM

RESTORE_BYTES_PER_S = 10_000_000
"""A restore slower than this is taken to hang."""

NEEDS_RESET = ("shutdown", "internal-error")
"""Run states in which QEMU refuses to let the guest run before it is reset."""


@contextlib.asynccontextmanager
async def restored(
    kind: type[VMT],
    path: str | Path,
    *,
    paused: bool,
    binary: Variant | None,
    channels: int,
    accel: Accel | None,
    forward: Sequence[str] | None,
    check: bool,
) -> AsyncIterator[VMT]:
    """Restore a guest; see `lab.session.restore`, which says what may be raised.

    :param kind: the class of what is yielded.
    """
    async with contextlib.AsyncExitStack() as stack:
        # Closed once QEMU has read it.  What is published under its name meanwhile is another one.
        with open_image(Path(path).absolute()) as image:
            vm = await _loaded(kind, image, stack, binary, channels, accel, forward, check=check)
        if not paused:
            await _run(vm, image.path.name)
        yield vm


async def _loaded(
    kind: type[VMT],
    image: OpenImage,
    stack: contextlib.AsyncExitStack,
    binary: Variant | None,
    channels: int,
    accel: Accel | None,
    forward: Sequence[str] | None,
    *,
    check: bool,
) -> VMT:
    """Check an image and load it into a QEMU that ends with `stack`; see `restored`."""
    name, sidecar = image.path.name, image.sidecar
    mapped = method(sidecar.method).has_places
    if channels < 1 or (channels > 1 and not mapped):
        raise UsageError(
            f"{channels} channels cannot read {name}, a {sidecar.method} snapshot",
            "use channels=1, or take the snapshot with method live-mapped",
        )
    if sidecar.line is not None and forward:
        raise UsageError(
            f"{name} is of a VM that the lab did not start, whose ports the lab does not choose",
            "use forward=() to forward none of them, as beside the VM itself",
        )
    if sidecar.line is not None and binary is None:
        qemu = sidecar.binary
    else:
        qemu = find_qemu(binary or sidecar.binary.variant)
    changes: dict[str, Any] = {}
    if forward is not None:
        # The card stays, whatever leads to it.
        has_card = sidecar.machine.net or bool(sidecar.machine.forward)
        if forward and sidecar.line is None and not has_card:
            raise UsageError(
                f"{name} is of a guest without a network card, so no port can lead to it",
                "leave forward out",
            )
        changes = {"forward": tuple(forward), "net": has_card}
    wanted = dataclasses.replace(sidecar.machine, accel=accel or sidecar.machine.accel, **changes)
    choice = await settled(wanted)
    if sidecar.machine.accel == "kvm" and choice.machine.accel == "tcg":
        raise RestoreError(
            f"{name} was taken under KVM and holds the state of KVM's clock, which TCG can "
            "not load",
            'restore it with accel="kvm"',
        )
    if check:
        if sidecar.machine.image and not sidecar.disks:
            raise RestoreError(
                f"{name} is of the memory alone, and its guest has a disk, which is not as it was",
                "take a snapshot with its disks; or use check=False, for a guest whose disk may "
                "be damaged",
            )
        for disk in sidecar.disks:
            if written := changed(disk):
                raise RestoreError(
                    f"{written} was written to after {name} was taken, so the disk on it is not "
                    "the one of that instant",
                    "restore that file from a copy; or use check=False, for a guest whose disk "
                    "may be damaged",
                )
        await check_image(image)
    try:
        launch = Launch(
            binary=qemu,
            machine=choice.machine,
            workload=sidecar.workload,
            machine_type=sidecar.machine_type,
            bases=tuple(Path(disk.layer) for disk in sidecar.disks),
            line=sidecar.line,
            named=tuple(Path(disk.named) for disk in sidecar.disks if disk.named),
            drops_forwards=forward == (),
            incoming=True,
            paused=True,
        )
        vm = await stack.enter_async_context(launched(kind, launch))
    except LaunchError as error:
        raise RestoreError(
            f"no QEMU for {name}, a {sidecar.machine_type}: {error.cause}",
            "restore with the QEMU version that took the snapshot",
        ) from error
    vm.fallback = choice.fallback
    vm.machine_type = sidecar.machine_type
    _keep_layers(image)
    await _load(vm, image, mapped=mapped, channels=channels)
    await vm.taken_over(sidecar.ready, sidecar.boot_before)
    if vm.is_ready:
        await _check_identity(vm, name)
    return vm


def _keep_layers(image: OpenImage) -> None:
    """Have the layers kept for the image where it is now, as it may have been moved."""
    for disk in image.sidecar.disks:
        layer, store, mark = Path(disk.layer), Store.default(), image.sidecar.mark
        if mark is not None and store.owns(layer):
            store.keep_for(layer, image.path, mark)


async def _run(vm: RunningVM, name: str) -> None:
    state = await vm.status()
    if state in NEEDS_RESET:
        raise RestoreError(
            f"{name} is of a guest that cannot run on: its state is {state}",
            "restore it with paused=True, and then use vm.reset() and vm.cont()",
        )
    await vm.cont()


def _has_loaded(event: Event) -> bool:
    return event.name == "MIGRATION" and event.data.get("status") in ("completed", "failed")


async def _load(vm: RunningVM, image: OpenImage, *, mapped: bool, channels: int) -> None:
    since = len(vm.qmp.events)
    timeout_s = COMMAND_TIMEOUT_S + image.sidecar.image_bytes / RESTORE_BYTES_PER_S
    needed = {"events": True, MAPPED_RAM: mapped, "multifd": channels > 1}
    log_chars = len(vm.process.log_text())
    try:
        known = {one["capability"] for one in await vm.execute("query-migrate-capabilities")}
        states = [
            {"capability": name, "state": on}
            for name, on in needed.items()
            # An older QEMU does not know all of what is not needed.
            if on or name in known
        ]
        await vm.execute("migrate-set-capabilities", {"capabilities": states})
        if channels > 1:
            await vm.execute("migrate-set-parameters", {"multifd-channels": channels})
        # Whoever looked for holes in it has moved its position, which QEMU takes for the beginning.
        os.lseek(image.descriptor, 0, os.SEEK_SET)
        async with _source(vm, image, reads_files=MAPPED_RAM in known) as source:
            await vm.execute("migrate-incoming", source)
            event = await vm.watched(
                vm.qmp.wait_event(_has_loaded, since=since, timeout_s=timeout_s),
                "loading the image",
            )
        if event.data["status"] == "completed":
            return
        why = (await vm.execute("query-migrate")).get("error-desc", "QEMU gives no reason")
        # What was wrong with the image, of which the reason says only where it is.
        if said := vm.process.messages(log_chars):
            why = f"{said[0]} ({why})"
    except LaunchError as error:
        why = error.cause
    except QmpError as error:
        why = error.cause
    raise RestoreError(
        f"{image.path.name} cannot be restored: {why}", "take the snapshot again"
    ) from None


@contextlib.asynccontextmanager
async def _source(
    vm: RunningVM, image: OpenImage, *, reads_files: bool
) -> AsyncIterator[dict[str, object]]:
    """Give QEMU the open image, and yield how the command has to name it."""
    if reads_files:
        async with vm.qmp.lent(image.descriptor) as lent:
            yield {"channels": file_channel(lent), "exit-on-error": False}
    else:
        # A QEMU before 9.0, which ends where it cannot load the image.
        await vm.qmp.send_descriptor(IMAGE_DESCRIPTOR, image.descriptor)
        yield {"uri": f"fd:{IMAGE_DESCRIPTOR}"}


async def _check_identity(vm: RunningVM, name: str) -> None:
    try:
        found = await vm.progress_page()
    except GuestError as error:
        raise RestoreError(
            f"{name} restored, but the guest's memory is not in it: {error.cause}",
            "take the snapshot again",
        ) from error
    if found.nonce != vm.ready.nonce:
        raise RestoreError(
            f"{name} holds boot {found.nonce:016x}, its sidecar names {vm.ready.nonce:016x}",
            "keep image and sidecar together",
        )
