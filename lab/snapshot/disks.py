"""Freeze the disks of a VM at the instant that its image shows.

Each disk gets an overlay, a new layer that is empty, made and opened before the guest is stopped.
At the instant, with the guest stopped, all of them are put on top, by QEMU where it has been told
of them before (`wanted`), else by one transaction (`switch`): what was written until then is in the
layer below, which nobody writes to any more, and what comes later goes into the overlay.  Nothing
is copied, so the time that it takes does not depend on the disk's size.

Until then all can be taken back.  After it the guest stays on its overlays, also when the snapshot
fails then: that only makes its chain of layers longer by one.
"""

import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from lab.disks.chain import Layer
from lab.errors import LabError
from lab.vm.disks import Disk, Held, blockdev
from lab.vm.vm import RunningVM

log = logging.getLogger(__name__)


class FrozenDisk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A disk in a sidecar: the layer that holds it as it was at the instant.

    `layer` is a file's full path; its own header leads to what is below it.  `named` is the file by
    which the recorded command line of a VM names the disk, empty where the lab made the line.
    """

    node: str
    layer: str
    format: str
    virtual_bytes: int
    named: str


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
    frozen: tuple[FrozenDisk, ...] = ()
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
            node = blockdev(name, held.layer.path, direct=disk.direct, aio=disk.aio)
            # It gets what it covers when it is put on top.
            await self.vm.execute("blockdev-add", {**node, "backing": None})
            prepared.is_added = True

    async def switch(self) -> None:
        """Put all overlays on top, or none; the guest has to stand still.

        :raise QmpError: when QEMU refuses; then no disk has changed.
        """
        actions = [{"type": "blockdev-snapshot", "data": pair} for pair in self.wanted]
        await self.vm.execute("transaction", {"actions": actions})
        self.switched()

    @property
    def wanted(self) -> list[dict[str, str]]:
        """Which disks are to get which overlays, in QEMU's words."""
        return [
            {"node": prepared.disk.node, "overlay": prepared.node} for prepared in self._prepared
        ]

    def switched(self) -> None:
        """Note that all overlays are on top."""
        self.frozen = tuple(
            FrozenDisk(
                node=prepared.disk.node,
                layer=str(prepared.disk.layer.path),
                format=prepared.disk.layer.format,
                virtual_bytes=prepared.disk.layer.virtual_bytes,
                named=str(prepared.disk.named or ""),
            )
            for prepared in self._prepared
        )
        for prepared in self._prepared:
            prepared.disk.held.append(prepared.held)
            prepared.disk.layer = prepared.held.layer
            prepared.disk.node = prepared.node
        self._prepared.clear()

    async def undo_unless_switched(self) -> None:
        """Take back what was prepared, unless QEMU, which was told of it, has put it on top."""
        if not self._prepared:
            return
        try:
            depth = await self._depth(self._prepared[0].node)
        except LabError as error:
            log.error("whether disks have got their overlays is not known: %s", error)
            for prepared in self._prepared:
                prepared.held.release()
            self._prepared.clear()
            return
        if depth:
            self.switched()
        else:
            await self.undo()

    async def _depth(self, node: str) -> int:
        """Return how many layers are below a node; none also if there is no such node."""
        nodes = await self.vm.execute("query-named-block-nodes")
        return next((n["backing_file_depth"] for n in nodes if n["node-name"] == node), 0)

    async def undo(self) -> None:
        """Take back what was prepared and not switched to; what fails here is logged."""
        for prepared in self._prepared:
            try:
                if prepared.is_added and not self.vm.qmp.is_lost:
                    await self.vm.execute("blockdev-del", {"node-name": prepared.node})
            except LabError as error:
                log.error("taking back an overlay: %s", error)
                # QEMU may have it open.
                prepared.held.release()
                continue
            with contextlib.suppress(OSError):
                prepared.held.discard()
        self._prepared.clear()
