"""A running guest as a user holds it: boot or restore it, take snapshots, be sure that it ends.

>>> import lab
>>> async def main() -> None:
...     async with lab.boot(lab.Machine(ram_mib=512), lab.Workload("random", wss_mib=64)) as vm:
...         live = await vm.snapshot("live.snap")
...     async with lab.restore("live.snap") as again:
...         print(again.ready.nonce)
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pandas as pd

from lab.errors import UsageError
from lab.guests.debian.build import key_of
from lab.guests.debian.shell import in_guest, wait_for_ssh
from lab.instruments.instrument import Moment, Watch
from lab.instruments.progress import ProgressSampler, sampling
from lab.instruments.slowwrites import read_slow_writes
from lab.instruments.writelatency import WriteLatency, write_latency
from lab.scenario.machine import Accel, Machine
from lab.scenario.methods import Variant
from lab.scenario.workload import Workload
from lab.snapshot.restore import restored
from lab.snapshot.result import Snapshot
from lab.snapshot.take import prepared
from lab.vm.attach import attached
from lab.vm.boot import booted
from lab.vm.vm import BOOT_TIMEOUT_S, RunningVM

SHELL_TIMEOUT_S = 120.0
"""A command in a guest that boots under TCG."""


class VM(RunningVM):
    """A guest and its QEMU, with what the rooms above it do: instruments and snapshots.

    Made by `boot`, `restore` and `attach`, valid inside their context.
    """

    _lets_in = False
    """Whether the guest is known to let one in by ssh."""

    def sampling(self, interval_us: int = 1000) -> AbstractAsyncContextManager[ProgressSampler]:
        """Sample the guest's progress every `interval_us` while the context lasts.

        :raise HostError: when this process may not read QEMU's memory.
        """
        return sampling(self, interval_us)

    async def write_latency(self) -> WriteLatency:
        """Return the reader of how long the guest's operations take.

        :raise UsageError: when the guest was not asked to time them.
        """
        return await write_latency(self)

    async def slow_writes(self) -> pd.DataFrame:
        """Return those of the guest's operations that were slow, each with its page.

        `lab.instruments.slowwrites.read_slow_writes` says what there is of each.

        :raise UsageError: when the guest was not asked to time them, or is none that notes them.
        """
        return await read_slow_writes(self)

    async def shell(self, command: str, *, timeout_s: float = SHELL_TIMEOUT_S) -> str:
        """Run a command in the lab's Debian, as root by ssh, and return what it prints.

        Waits until the guest lets one in.

        :raise UsageError: this is another guest, or its port 22 is not forwarded.
        :raise GuestError: the command fails; the error has its last line.
        :raise GuestSilentError: no answer in time.
        """
        key = key_of(Path(self.machine.image[0])) if self.machine.image else None
        if key is None:
            raise UsageError(
                "commands run in the lab's Debian alone, and this is another guest",
                "log in to it by its console, or a port of its",
            )
        if 22 not in self.ports:
            raise UsageError(
                "no port of this host leads to the guest's ssh", 'boot it with forward=("0:22",)'
            )
        if not self._lets_in:
            await wait_for_ssh(self.ports[22], key, timeout_s=timeout_s)
            self._lets_in = True
        return await in_guest(self.ports[22], key, command, timeout_s=timeout_s)

    async def snapshot(
        self,
        path: str | Path,
        method: str = "live",
        *,
        fault_log: bool = True,
        progress: bool = True,
        before_s: float = 1.0,
        after_s: float = 1.0,
        storage_mib_per_s: int = 0,
        disks: bool = True,
        checksums: bool = True,
    ) -> Snapshot:
        """Take a snapshot into the file `path`; the guest runs on afterwards.

        `path` appears, with a sidecar `path.json` beside it, when the snapshot is complete and
        not before; an older snapshot of the same name is replaced.  Both are private (0600),
        because they hold guest memory.  Cancelling takes the snapshot back.

        The disks of a user's machine are frozen at the instant that the image shows; the guest goes
        on writing to new layers (`lab.disks`).

        :param method: one of `lab.METHODS`.
        :param fault_log: log every write fault, where QEMU can (the patched one, live methods).
        :param progress: sample the guest's progress, if it is one of the lab's, from `before_s`
            before the request to `after_s` after the end.
        :param storage_mib_per_s: write the image no faster than that, as if to a slower disk; 0 is
            no limit.  Only for methods that write one byte after the other.
        :param disks: freeze the disks as well; without them the snapshot is of the memory alone,
            and is restored only with `check=False`, on the image as it was before the boot.
        :param checksums: write checksums of the image into the sidecar, for `restore` to check.
            They are made after all that is measured, while the guest runs: all CPUs of the host
            read the image for a second or less a GiB.
        :raise UsageError: when the method does not exist, needs the other QEMU, or cannot write
            to storage of a limited rate.
        :raise SnapshotError: when one is running already or it cannot be completed.
        :raise HostError: when this host does not permit the method.
        """
        prepare = prepared(
            self,
            path,
            method,
            fault_log=fault_log,
            storage_mib_per_s=storage_mib_per_s,
            disks=disks,
        )
        sampler = latency = None
        watch = Watch()
        async with prepare as taking, contextlib.AsyncExitStack() as stack:
            if self.workload.time_writes and self.is_ready:
                latency = await self.write_latency()
                latency.read()
                watch = Watch([dict.fromkeys((Moment.REQUEST, Moment.COMPLETED), latency.read)])
            # A user's guest counts nothing.
            progress = progress and self.is_ready
            if progress:
                sampler = await stack.enter_async_context(self.sampling())
                await asyncio.sleep(before_s)
            await taking.run(watch)
            if progress:
                # Before the checksums are made: what they take from the guest comes after that.
                await asyncio.sleep(after_s)
            snapshot = await taking.publish(checksums=checksums)
        durations = None if latency is None else latency.df()
        return dataclasses.replace(snapshot, sampler=sampler, write_latency=durations)


def boot(
    machine: Machine,
    workload: Workload | None = None,
    *,
    binary: Variant = "patched",
    socket: str | Path | None = None,
    timeout_s: float = BOOT_TIMEOUT_S,
) -> AbstractAsyncContextManager[VM]:
    """Boot a guest; inside the context its workload runs, after it QEMU is gone.

    A machine with an `image` runs what is installed there, and is at its beginning when the context
    is entered: wait for `vm.console.wait_text("login:")`, for a port of its, or for `vm.shell`.

    :param workload: what a guest of the lab's does; None is the default one.
    :param socket: where to serve QEMU's monitor as well, for `lab snapshot --qmp`.
    :param binary: which QEMU; `live-*` methods need the patched one, `background` the other.
    :param timeout_s: how long the guest may take until its writers run.
    :raise UsageError: when machine and workload do not fit.
    :raise HostError: when the host lacks memory, a build or an accelerator.
    :raise LaunchError: when QEMU does not start or dies; carries command and log.
    :raise GuestError: when the guest refuses the workload.
    :raise GuestSilentError: when it says nothing in time.
    """
    if workload is None:
        workload = Workload("idle") if machine.is_users else Workload()
    return booted(
        VM,
        machine,
        workload,
        binary=binary,
        socket=None if socket is None else Path(socket).absolute(),
        timeout_s=timeout_s,
    )


def attach(socket: str | Path) -> AbstractAsyncContextManager[VM]:
    """Attach to a VM that runs already, in whatever QEMU; it runs on afterwards.

    What it is, the lab asks its monitor and reads in /proc: nothing has to be said.  A snapshot of
    it can be restored: its command line is recorded, and restored with what would get into the way
    of the VM itself changed.  Its disks are frozen as a guest's of the lab are; the layers that it
    writes to from then on lie beside its disks, and whoever starts it again has to name them, as
    after any external snapshot.  Once no snapshot needs a disk as it was, and the VM has ended,
    `qemu-img commit` puts what is in a layer back into the disk.

    :param socket: of QEMU's monitor, as `-qmp unix:PATH,server=on,wait=off` makes it, which nobody
        else may be connected to.
    :raise UsageError: nothing answers there, or the command line cannot be understood.
    :raise HostError: QEMU is another user's, or in another container.
    :raise SnapshotError: a migration runs.  That a disk cannot be frozen is told when a snapshot
        is to freeze it.
    :raise QmpError: what answers is no QEMU, or one that is too old.
    """
    return attached(VM, Path(socket))


def restore(
    path: str | Path,
    *,
    paused: bool = False,
    binary: Variant | None = None,
    channels: int = 1,
    accel: Accel | None = None,
    forward: Sequence[str] | None = None,
    check: bool = True,
) -> AbstractAsyncContextManager[VM]:
    """Restore the guest from the snapshot `path`; it runs unless `paused`.

    The image is opened once, and what is published under its name while it is checked and loaded
    does not matter.  The machine is built as the sidecar describes it.  Each disk of a user's
    machine goes on from the layer that was frozen at the instant, on an overlay of its own, so that
    one snapshot can be restored as often as one likes, and at once; a scratch disk is empty.

    That the image holds the guest that the sidecar names is checked in the restored memory before
    the guest runs.  A guest that was taken while it booted has no name yet: it is
    restored unchecked, and `wait_ready` waits for it.

    :param binary: which QEMU; None is the kind that took the snapshot.
    :param channels: how many threads read the image; more than one takes an image in which each
        page has its place, such as `live-mapped` makes.
    :param accel: None is the one that it was taken under.  An image taken under TCG can be
        restored under KVM; one taken under KVM holds the state of KVM's clock, which TCG has not.
    :param forward: ports of this host that lead to the guest's, in place of those that it had, as
        in `Machine`.
    :param check: read the image against the sidecar's checksums first; of an image without them
        the log warns.  QEMU itself finds no damage in a page: without the check the guest may be
        silently another one.
    :raise UsageError: when the image cannot be read by more than one thread.
    :raise RestoreError: when the image or its sidecar is missing, cut short, damaged, of another
        machine type or another format, or does not restore; or its guest cannot run before it is
        reset, and is not to be `paused`.
    :raise HostError: when the host lacks memory, a build or an accelerator.
    """
    return restored(
        VM,
        path,
        paused=paused,
        binary=binary,
        channels=channels,
        accel=accel,
        forward=None if forward is None else tuple(forward),
        check=check,
    )
