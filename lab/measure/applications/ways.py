"""Each way to have the guest's state, or its server's, on a disk: when it began and ended, and how
much it wrote.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import GuestError, GuestSilentError, LabError, SnapshotError
from lab.instruments.instrument import Moment, Watch
from lab.marks import Marks
from lab.measure.applications.ask import connected_redis
from lab.measure.applications.bench import Bench
from lab.scenario.applications import BGSAVE, NONE, SNAPSHOT_SAVE
from lab.snapshot.sidecar import sidecar_path
from lab.snapshot.take import take
from lab.vm.qmp import Event
from lab.vm.vm import RunningVM

NONE_S = 1.0
"""How long nothing happens where no snapshot is taken."""

BGSAVE_POLL_S = 0.02
"""How often Redis is asked whether it has saved: one more small request each time."""

SAVE_S = 300.0
"""How long a way that is none of the lab's may take."""

_DUMP = "/var/lib/redis/dump.rdb"
_TAG = "lab"


@dataclass(frozen=True, kw_only=True)
class Done:
    """What came of it.

    :param marks: `end_ns` is when the image, or the data set, was written.
    :param image_bytes: None: nothing was.
    """

    marks: Marks
    image_bytes: int | None = None


Begin = Callable[[], None]


class Way:
    """One way.  `run` is timed, `size` comes afterwards and may disturb."""

    def __init__(self, bench: Bench, method: str, image: Path) -> None:
        self.bench = bench
        self.method = method
        self.image = image

    async def run(self, begin: Begin) -> Done:
        """Go that way.

        :param begin: to be called right before the first command that affects the guest.
        """
        done = await take(
            self.bench.vm,
            self.image,
            self.method,
            watch=Watch([{Moment.REQUEST: begin}]),
            fault_log=False,
        )
        return Done(marks=done.marks, image_bytes=done.image_bytes)

    async def size(self) -> int | None:
        """How many bytes it wrote, where `run` did not say."""
        return None

    async def clean(self) -> None:
        """Remove what it wrote."""
        self.image.unlink(missing_ok=True)
        sidecar_path(self.image).unlink(missing_ok=True)


class _Nothing(Way):
    async def run(self, begin: Begin) -> Done:
        begin()
        request_ns = time.monotonic_ns()
        await asyncio.sleep(NONE_S)
        return Done(marks=Marks(request_ns=request_ns, end_ns=time.monotonic_ns()))


class _Bgsave(Way):
    async def run(self, begin: Begin) -> Done:
        async with connected_redis(self.bench.port) as redis:
            before = await redis.persistence()
            begin()
            request_ns = time.monotonic_ns()
            await redis.ask("BGSAVE")
            deadline = time.monotonic() + SAVE_S
            while True:
                told = await redis.persistence()
                if told["rdb_bgsave_in_progress"] == "0":
                    break
                if time.monotonic() > deadline:
                    raise GuestSilentError(f"Redis has not saved within {SAVE_S:g} s")
                await asyncio.sleep(BGSAVE_POLL_S)
            end_ns = time.monotonic_ns()
        if told["rdb_last_bgsave_status"] != "ok" or told["rdb_saves"] == before["rdb_saves"]:
            raise GuestError("Redis could not save")
        return Done(marks=Marks(request_ns=request_ns, end_ns=end_ns))

    async def size(self) -> int | None:
        return int(await self.bench.vm.shell(f"stat -c %s {_DUMP}"))

    async def clean(self) -> None:
        await self.bench.vm.shell(f"rm -f {_DUMP}")


class _SnapshotSave(Way):
    async def run(self, begin: Begin) -> Done:
        vm = self.bench.vm
        nodes = self._nodes()
        since = len(vm.qmp.events)
        begin()
        request_ns = time.monotonic_ns()
        end = await _job(vm, "snapshot-save", {"tag": _TAG, "vmstate": nodes[0], "devices": nodes})
        offset_ns = time.clock_gettime_ns(time.CLOCK_REALTIME) - time.monotonic_ns()
        events = vm.qmp.events[since:]

        def at(name: str) -> int | None:
            found = next((event for event in events if event.name == name), None)
            return None if found is None else found.time_us * 1000 - offset_ns

        return Done(
            marks=Marks(
                request_ns=request_ns,
                stop_ns=at("STOP"),
                resume_ns=at("RESUME"),
                end_ns=end.time_us * 1000 - offset_ns,
            )
        )

    def _nodes(self) -> list[str]:
        return [disk.node for disk in self.bench.vm.files.disks]

    async def size(self) -> int | None:
        blocks = await self.bench.vm.execute("query-named-block-nodes", {"flat": True})
        held: list[dict[str, Any]] = [
            snapshot
            for block in blocks
            if block["node-name"] == self._nodes()[0]
            for snapshot in block["image"].get("snapshots", [])
        ]
        return next((int(one["vm-state-size"]) for one in held if one["name"] == _TAG), None)

    async def clean(self) -> None:
        # A layer with an internal snapshot in it grows with the next one.
        with contextlib.suppress(LabError):
            await _job(self.bench.vm, "snapshot-delete", {"tag": _TAG, "devices": self._nodes()})


async def _job(vm: RunningVM, command: str, arguments: dict[str, object]) -> Event:
    """Run a job of QEMU's, and return the event of its end.

    :raise SnapshotError: it failed.
    """
    name = f"lab-{uuid.uuid4().hex}"
    since = len(vm.qmp.events)
    await vm.execute(command, {"job-id": name, **arguments})
    end = await vm.watched(
        vm.qmp.wait_event(
            lambda event: (
                event.name == "JOB_STATUS_CHANGE"
                and event.data["id"] == name
                and event.data["status"] == "concluded"
            ),
            since=since,
            timeout_s=SAVE_S,
        ),
        f"it did {command}",
    )
    told = next(job for job in await vm.execute("query-jobs") if job["id"] == name)
    await vm.execute("job-dismiss", {"id": name})
    if problem := told.get("error"):
        raise SnapshotError(f"{command} failed: {problem}")
    return end


_WAYS: dict[str, type[Way]] = {NONE: _Nothing, BGSAVE: _Bgsave, SNAPSHOT_SAVE: _SnapshotSave}


def way_of(bench: Bench, method: str, image: Path) -> Way:
    """Return the way that a method names.

    :param image: where an image would be written.
    """
    return _WAYS.get(method, Way)(bench, method, image)
