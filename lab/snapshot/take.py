"""Take a snapshot: from the request to the published image."""

import asyncio
import contextlib
from datetime import UTC, datetime
from pathlib import Path

from lab.errors import SnapshotError, UsageError
from lab.guests.protocol import ReadyRecord
from lab.instruments.progress import ProgressSampler, sampling
from lab.instruments.threads import ThreadTimes
from lab.instruments.writelatency import WriteLatency, write_latency
from lab.scenario.methods import METHODS, Method
from lab.scenario.methods import method as method_of
from lab.scenario.scenario import check_storage
from lab.scenario.storage import Storage
from lab.snapshot.attempt import Attempt
from lab.snapshot.checksums import Checksums, checksums_of
from lab.snapshot.image import partial_image
from lab.snapshot.mechanisms.base import Hold
from lab.snapshot.result import Snapshot
from lab.snapshot.room import check_disk
from lab.snapshot.sidecar import Sidecar
from lab.snapshot.throttle import limited
from lab.vm.vm import RunningVM


async def take(
    vm: RunningVM,
    path: str | Path,
    method: str,
    *,
    fault_log: bool = True,
    progress: bool = True,
    before_s: float = 1.0,
    after_s: float = 1.0,
    storage_mib_per_s: int = 0,
    sampler: ProgressSampler | None = None,
    latency: WriteLatency | None = None,
    threads: ThreadTimes | None = None,
    hold: Hold | None = None,
    checksums: bool = False,
) -> Snapshot:
    """Take a snapshot of `vm`; `VM.snapshot` says more.

    :param sampler: one that runs already; then none is started, and there is no waiting before
        and after.
    :param latency: a reader of a guest that times its operations, with one reading at the
        beginning of what is to be compared with; by default one that begins now.
    :param threads: a reader of the times of QEMU's threads, likewise.  After an ordinary migration
        it is read when the guest goes on, so as not to make the pause longer.
    :param hold: called at the instant that the image shows, while the guest is stopped there.
        On the patched QEMU's live methods that is the engine's pre-switchover hold; for ordinary
        migration, completion.  The unpatched `background` can not be held: the guest is stopped
        and held before the request, and goes on when QEMU has transferred the first pages.
    :param checksums: read the image again for the checksums of its sidecar.  It takes the host's
        CPUs from the guest, so measurements do without.
    """
    how = method_of(method)
    if not how.runs_on(vm.binary.variant):
        raise UsageError(
            f"{method} needs the {how.binary} QEMU and this guest runs on the {vm.binary.variant}",
            f'boot with binary="{how.binary}", or choose from: {_possible(vm.binary.variant)}',
        )
    check_storage(how, Storage(storage_mib_per_s=storage_mib_per_s))
    with vm.busy_with(f"a {method} snapshot"):
        image = Path(path).absolute()
        async with contextlib.AsyncExitStack() as stack:
            writing = stack.enter_context(partial_image(image))
            partial = writing.path
            check_disk(vm, how, image)
            storage = None
            if storage_mib_per_s:
                storage = await stack.enter_async_context(limited(partial, storage_mib_per_s))
            if latency is None and vm.workload.time_writes and vm.is_ready:
                latency = await write_latency(vm)
                latency.read()
            if sampler is None and progress:
                sampler = await stack.enter_async_context(sampling(vm))
                await asyncio.sleep(before_s)
            else:
                after_s = 0.0
            attempt = Attempt(
                vm,
                how,
                partial,
                storage=storage,
                storage_mib_per_s=storage_mib_per_s,
                hold=hold,
                log_faults=fault_log,
                latency=latency,
                threads=threads,
            )
            await attempt.run()
            ready = attempt.ready_at_pause()
            # Before the checksums are made, so that what they take from the guest is not shown.
            await asyncio.sleep(after_s)
            mark = writing.add_mark()
            size = partial.stat().st_size
            sums = await _checksums(partial, size) if checksums else None
            writing.publish(_sidecar(vm, how, ready, size, mark, sums))
        return attempt.result(image, size, sampler)


def _possible(variant: str) -> str:
    return ", ".join(name for name, how in METHODS.items() if how.runs_on(variant))


async def _checksums(partial: Path, size: int) -> Checksums:
    try:
        return await checksums_of(partial, size)
    except OSError as error:
        raise SnapshotError(
            f"{partial} can not be read for its checksums: {error.strerror}",
            "take the snapshot again, on another disk",
        ) from error


def _sidecar(
    vm: RunningVM,
    how: Method,
    ready: ReadyRecord | None,
    size: int,
    mark: str,
    sums: Checksums | None,
) -> Sidecar:
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
    )
