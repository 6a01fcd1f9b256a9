"""Freeze the disks of a VM at the instant that its image shows.

Each disk gets an overlay, a new layer that is empty, made and opened before the guest is stopped.
At the instant, with the guest stopped, all of them are put on top: what was written until then is
in the layer below, which nobody writes to any more, and what comes later goes into the overlay.
Nothing is copied, so the time that it takes does not depend on the disk's size.

The patched QEMU does that itself for a live snapshot, when it is told the overlays beforehand, and
flushes nothing meanwhile.  For what else there is the guest is held stopped, and one transaction
puts them on top; QEMU flushes the disks first, and the guest waits for that.

Until then all can be taken back.  After it the guest stays on its overlays, also when the snapshot
fails then: that only makes its chain of layers longer by one.
"""

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from lab.disks.chain import Layer, read_chain
from lab.disks.frozen import FrozenDisk, stamped
from lab.disks.store import Store
from lab.errors import LabError
from lab.vm.disks import Disk, Held
from lab.vm.vm import RunningVM

log = logging.getLogger(__name__)


NextLayer = Callable[[Layer], Awaitable[Held]]
"""Makes an empty layer on another one."""


@dataclass
class _Prepared:
    disk: Disk
    node: str
    held: Held
    is_added: bool = False


@dataclass
class DiskSwitch:
    """One switch of all disks of a VM.

    :param next_layer: makes each overlay.
    :param disks: those that are frozen, all or none of the VM's.
    """

    vm: RunningVM
    next_layer: NextLayer
    disks: Sequence[Disk]
    _frozen: list[Disk] = field(default_factory=list)
    _prepared: list[_Prepared] = field(default_factory=list)

    @property
    def has_disks(self) -> bool:
        """Whether there is anything to freeze."""
        return bool(self.disks)

    async def prepare(self) -> None:
        """Make and open the overlays, of which the guest feels nothing.

        :raise LabError: when one cannot be made; the others are taken back by `undo`.
        """
        for number, disk in enumerate(self.disks):
            held = await self.next_layer(disk.layer)
            # Random, as an earlier one may have been taken in another session.
            name = f"lab-{number}-{secrets.token_hex(8)}"
            prepared = _Prepared(disk, name, held)
            self._prepared.append(prepared)
            node = disk.blockdev(name, held.layer.path)
            # It gets what it covers when it is put on top.
            await self.vm.execute("blockdev-add", {**node, "backing": None})
            prepared.is_added = True

    @property
    def overlays(self) -> list[dict[str, object]]:
        """The pairs of what is on top now and its overlay, as QEMU wants to be told them."""
        return [
            {"node": prepared.disk.node, "overlay": prepared.node} for prepared in self._prepared
        ]

    async def switch(self) -> None:
        """Put all overlays on top, or none; the guest has to stand still.

        :raise QmpError: when QEMU refuses; then no disk has changed.
        """
        actions = [{"type": "blockdev-snapshot", "data": pair} for pair in self.overlays]
        await self.vm.execute("transaction", {"actions": actions})
        self.note_switched()

    def note_switched(self) -> None:
        """Take note that the overlays are on top: what is below them is frozen."""
        if not self._prepared:
            return
        self._frozen = [dataclasses.replace(prepared.disk) for prepared in self._prepared]
        for prepared in self._prepared:
            prepared.disk.held.append(prepared.held)
            prepared.disk.layer = prepared.held.layer
            prepared.disk.node = prepared.node
        self._prepared.clear()

    async def frozen(self) -> tuple[FrozenDisk, ...]:
        """Return the disks as they were at the instant, for the sidecar.

        Once the snapshot is complete: nothing is written to them any more.

        :raise LabError: a file that one is on is not there any more.
        """
        store, qemu_img = Store.default(), self.vm.binary.qemu_img
        return tuple(
            [
                FrozenDisk(
                    node=disk.node,
                    layer=str(disk.layer.path),
                    format=disk.layer.format,
                    virtual_bytes=disk.layer.virtual_bytes,
                    named=str(disk.named or ""),
                    stands_on=stamped(
                        await read_chain(qemu_img, disk.layer.path, format=disk.layer.format), store
                    ),
                )
                for disk in self._frozen
            ]
        )

    async def _is_switched(self) -> bool:
        """Whether QEMU has put the overlays on top, of which the lab was not told.

        :raise LabError: when QEMU does not say.
        """
        blocks = await self.vm.execute("query-block")
        tops = {block["inserted"]["node-name"] for block in blocks if block.get("inserted")}
        return all(prepared.node in tops for prepared in self._prepared)

    async def undo(self) -> None:
        """Take back what was prepared and not switched to; what fails here is logged."""
        try:
            if self._prepared and await self._is_switched():
                self.note_switched()
        except LabError as error:
            log.error("whether disks have got their overlays is not known: %s", error)
            for prepared in self._prepared:
                # A guest that goes on without the lab may write to it.
                prepared.held.release()
            self._prepared.clear()
        for prepared in self._prepared:
            try:
                if prepared.is_added:
                    await self.vm.execute("blockdev-del", {"node-name": prepared.node})
            except LabError as error:
                log.error("taking back an overlay: %s", error)
                # QEMU may have it open.
                prepared.held.release()
                continue
            with contextlib.suppress(OSError):
                prepared.held.discard()
        self._prepared.clear()
