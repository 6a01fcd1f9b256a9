"""Take a snapshot: from the request to the published image."""

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

from lab.disks.chain import Layer
from lab.disks.frozen import FrozenDisk
from lab.disks.store import Store
from lab.errors import RestoreError, SnapshotError, UsageError
from lab.guests.protocol import ReadyRecord
from lab.instruments.instrument import Watch
from lab.scenario.methods import METHODS
from lab.scenario.methods import method as method_of
from lab.scenario.scenario import check_storage
from lab.scenario.storage import Storage
from lab.snapshot.attempt import Attempt
from lab.snapshot.checksums import Checksums, checksums_of
from lab.snapshot.disks import DiskSwitch
from lab.snapshot.image import PartialImage, partial_image, read_sidecar
from lab.snapshot.mechanisms.base import Hold
from lab.snapshot.result import Snapshot
from lab.snapshot.room import check_disk
from lab.snapshot.sidecar import Sidecar
from lab.snapshot.throttle import limited
from lab.vm.attach import layer_beside
from lab.vm.disks import Held
from lab.vm.vm import RunningVM


class Prepared:
    """A snapshot for which all is ready: `run` takes it, `publish` gives the image its name."""

    def __init__(self, attempt: Attempt, writing: PartialImage, image: Path) -> None:
        self._attempt = attempt
        self._writing = writing
        self._image = image
        self._ready: ReadyRecord | None = None

    async def run(self, watch: Watch) -> None:
        """Take it; the guest runs on.

        :param watch: told of REQUEST, COMPLETED and RUNNING.
        :raise SnapshotError: it cannot be completed.
        """
        await self._attempt.run(watch)
        self._ready = self._attempt.ready_at_pause()

    async def publish(self, *, checksums: bool = False) -> Snapshot:
        """Publish the image with its sidecar.

        :param checksums: read the image again for the checksums of its sidecar.  It takes the
            host's CPUs from the guest, so measurements do without.
        """
        attempt, partial = self._attempt, self._writing.path
        mark = self._writing.add_mark()
        size = partial.stat().st_size
        sums = await _checksums(partial, size) if checksums else None
        disks = await attempt.disks.frozen() if attempt.disks.has_disks else ()
        sidecar = _sidecar(attempt, self._ready, size, mark, sums, disks)
        replaced = _replaced(self._image)
        for layer in _layers(sidecar):
            # Before the snapshot is there that needs it: until then this means nothing.
            Store.default().keep_for(layer, self._image, mark)
        self._writing.publish(sidecar)
        if replaced is not None and replaced.mark is not None:
            for layer in _layers(replaced):
                Store.default().let_go(layer, self._image, replaced.mark)
        return attempt.result(self._image, size)


@contextlib.asynccontextmanager
async def prepared(
    vm: RunningVM,
    path: str | Path,
    method: str,
    *,
    fault_log: bool = True,
    storage_mib_per_s: int = 0,
    disks: bool = True,
    hold: Hold | None = None,
) -> AsyncIterator[Prepared]:
    """Prepare a snapshot of `vm`, of which the guest feels nothing yet.

    What has not been published when the context ends is taken away.  `take` says more.
    """
    how = method_of(method)
    if not how.runs_on(vm.binary.variant):
        raise UsageError(
            f"{method} needs the {how.binary} QEMU and this guest runs on the {vm.binary.variant}",
            f'boot with binary="{how.binary}", or choose from: {_possible(vm.binary.variant)}',
        )
    if disks and vm.disk_problem is not None:
        raise vm.disk_problem
    check_storage(how, Storage(storage_mib_per_s=storage_mib_per_s))
    with vm.busy_with(f"a {method} snapshot"):
        image = Path(path).absolute()
        async with contextlib.AsyncExitStack() as stack:
            writing = stack.enter_context(partial_image(image))
            check_disk(vm, how, image)
            storage = None
            if storage_mib_per_s:
                limit = limited(writing.path, storage_mib_per_s)
                storage = await stack.enter_async_context(limit)

            async def next_layer(base: Layer) -> Held:
                if vm.is_attached:
                    return await layer_beside(base, image, vm.binary.qemu_img)
                return await Store.default().new_layer(vm.binary.qemu_img, base)

            attempt = Attempt(
                vm,
                how,
                writing.path,
                storage=storage,
                storage_mib_per_s=storage_mib_per_s,
                hold=hold,
                disks=DiskSwitch(vm, next_layer, vm.files.disks if disks else []),
                log_faults=fault_log,
            )
            yield Prepared(attempt, writing, image)


async def take(
    vm: RunningVM,
    path: str | Path,
    method: str,
    *,
    watch: Watch | None = None,
    fault_log: bool = True,
    storage_mib_per_s: int = 0,
    hold: Hold | None = None,
) -> Snapshot:
    """Take a snapshot of `vm`; `VM.snapshot` says more.

    :param watch: what looks at it; by default nothing.
    :param hold: called at the instant that the image shows, while the guest is stopped there.
        On the patched QEMU's live methods that is the engine's pre-switchover hold; for ordinary
        migration, completion.  The unpatched `background` cannot be held: the guest is stopped
        and held before the request, and goes on when QEMU has transferred the first pages.
    """
    prepare = prepared(
        vm, path, method, fault_log=fault_log, storage_mib_per_s=storage_mib_per_s, hold=hold
    )
    async with prepare as snapshot:
        await snapshot.run(watch or Watch())
        return await snapshot.publish()


def _layers(sidecar: Sidecar) -> list[Path]:
    """Those of the frozen layers that the lab keeps; the others are the user's."""
    layers = [Path(disk.layer) for disk in sidecar.disks]
    return [layer for layer in layers if Store.default().owns(layer)]


def _replaced(image: Path) -> Sidecar | None:
    """The sidecar of the snapshot that has the name already, if it is a whole one."""
    try:
        return read_sidecar(image)
    except RestoreError:
        return None


def _possible(variant: str) -> str:
    return ", ".join(name for name, how in METHODS.items() if how.runs_on(variant))


async def _checksums(partial: Path, size: int) -> Checksums:
    try:
        return await checksums_of(partial, size)
    except OSError as error:
        raise SnapshotError(
            f"{partial} cannot be read for its checksums: {error.strerror}",
            "take the snapshot again, on another disk",
        ) from error


def _sidecar(
    attempt: Attempt,
    ready: ReadyRecord | None,
    size: int,
    mark: str,
    sums: Checksums | None,
    disks: tuple[FrozenDisk, ...],
) -> Sidecar:
    vm, how = attempt.vm, attempt.how
    return Sidecar(
        method=how.name,
        engine=how.engine,
        machine=vm.machine,
        workload=vm.workload,
        machine_type=vm.machine_type,
        image_bytes=size,
        mark=mark,
        checksums=sums,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        ready=ready,
        boot_before=vm.boot_before if ready is None else None,
        binary=vm.binary,
        kernel_sha256=vm.guest.kernel_sha256,
        disks=disks,
        line=vm.line,
    )
