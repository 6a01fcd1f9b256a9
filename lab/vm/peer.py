"""A QEMU that runs already: which process it is, and what its machine is and permits."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lab.errors import HostError, QmpError, SnapshotError
from lab.vm.qmp import Qmp

log = logging.getLogger(__name__)

PROC = Path("/proc")

_ENGINE = "x-snapshot-engine"
"""A parameter that only the patched QEMU has."""

_HOST_ADDRESS = re.compile(r"is (0x[0-9a-f]+)")

_IDLE = frozenset(("none", "completed", "failed", "cancelled"))
"""States of a migration that does not run."""

_NO_SNAPSHOT = frozenset(("inmigrate", "finish-migrate", "preconfig", "save-vm", "restore-vm"))
"""Run states in which QEMU reads or writes the machine's state itself, or has none yet."""


@dataclass(frozen=True, kw_only=True)
class MigrationSettings:
    """How a QEMU's migration was set."""

    capabilities: Mapping[str, bool]
    parameters: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What a QEMU that the lab did not start is, as its monitor says."""

    pid: int
    version: str
    """Such as "10.0.13"."""
    package: str
    """What its distributor added to the version; may be empty."""
    patched: bool
    """Whether it is the lab's, with the snapshot engines."""
    accel: Literal["kvm", "tcg"]
    vcpus: int
    ram_mib: int
    """What the guest was started with, and what was plugged in since, in MiB."""
    machine_type: str
    """The versioned name, such as pc-i440fx-10.0."""
    run_state: str
    """Such as "running" or "paused"."""
    devices: frozenset[str]
    """The ids of its devices; those on its line are `lab.vm.argv.device_ids`."""
    saved: MigrationSettings
    """How its migration is set; `put_back` sets it so again."""


async def find_process(qmp: Qmp) -> int:
    """Return the process id of the QEMU at the other end of a monitor.

    It is found by the threads of its vCPUs, since the socket may have been made by another process,
    as libvirt's is.

    :raise HostError: when no process here has these threads, or it is another user's.
    :raise QmpError: when the QEMU does not say.
    """
    cpus = await qmp.execute("query-cpus-fast")
    threads = {int(cpu["thread-id"]) for cpu in cpus}
    owners = {_process_of(thread) for thread in threads}
    pid = owners.pop() if len(owners) == 1 else None
    if pid is None:
        raise _elsewhere()
    # In another PID namespace the numbers may be those of another process here.
    found = _HOST_ADDRESS.search(await qmp.hmp("gpa2hva 0"))
    if found is None:
        raise QmpError("this QEMU does not say where the guest's memory begins")
    if not _has_mapped(pid, int(found[1], 16)):
        raise _elsewhere()
    return pid


def _process_of(thread: int) -> int | None:
    try:
        status = (PROC / str(thread) / "status").read_text(errors="replace")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    # A kernel thread has no memory, and the number may be one's.
    return int(fields["Tgid"]) if "VmSize" in fields else None


def _elsewhere() -> HostError:
    return HostError(
        "the QEMU behind this monitor is no process that can be seen here",
        "run on its host and outside of containers, where it is seen",
    )


def _has_mapped(pid: int, address: int) -> bool:
    try:
        lines = (PROC / str(pid) / "maps").read_text(errors="replace").splitlines()
    except PermissionError as error:
        raise HostError(
            f"the QEMU behind this monitor is process {pid}, which is another user's",
            "run as that user, or as root",
        ) from error
    except OSError:
        return False
    ranges = (line.split(None, 1)[0].split("-") for line in lines)
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


async def describe(qmp: Qmp, pid: int) -> Peer:
    """Return what a QEMU is.  Changes nothing.

    What writes to its memory past a snapshot is not looked for here (`lab.snapshot.escapes`).

    :raise SnapshotError: when a migration runs, or the QEMU waits for one.
    :raise QmpError: when it is too old to answer.
    """
    run_state = str((await qmp.execute("query-status"))["status"])
    if run_state in _NO_SNAPSHOT:
        raise SnapshotError(
            f"the machine cannot be snapshotted while its state is {run_state}",
            "wait until it runs",
        )
    migration = str((await qmp.execute("query-migrate")).get("status", "none"))
    if migration not in _IDLE:
        raise SnapshotError(
            f"a migration runs in this QEMU already (its state is {migration})",
            "wait until it has ended, or cancel it with migrate_cancel",
        )
    version = await qmp.execute("query-version")
    numbers = version["qemu"]
    memory = await qmp.execute("query-memory-size-summary")
    saved = await _migration_settings(qmp)
    kvm = await qmp.execute("query-kvm")
    peripherals = await qmp.execute("qom-list", {"path": "/machine/peripheral"})
    return Peer(
        pid=pid,
        version=".".join(str(numbers[part]) for part in ("major", "minor", "micro")),
        package=str(version["package"]).strip(),
        patched=_ENGINE in saved.parameters,
        accel="kvm" if kvm["enabled"] else "tcg",
        vcpus=len(await qmp.execute("query-cpus-fast")),
        ram_mib=(int(memory["base-memory"]) + int(memory.get("plugged-memory", 0))) >> 20,
        machine_type=await _machine_type(qmp),
        run_state=run_state,
        devices=frozenset(
            str(each["name"]) for each in peripherals if str(each["type"]).startswith("child<")
        ),
        saved=saved,
    )


async def _machine_type(qmp: Qmp) -> str:
    """The versioned name: QEMU's class of the machine is called by it, whatever the line says."""
    kind = str(await qmp.execute("qom-get", {"path": "/machine", "property": "type"}))
    name = kind.removesuffix("-machine")
    known = {str(each["name"]) for each in await qmp.execute("query-machines")}
    if name not in known:
        raise QmpError(f"this QEMU has a machine {kind} that is none of its types")
    return name


async def _migration_settings(qmp: Qmp) -> MigrationSettings:
    capabilities = await qmp.execute("query-migrate-capabilities")
    return MigrationSettings(
        capabilities={str(each["capability"]): bool(each["state"]) for each in capabilities},
        parameters=dict(await qmp.execute("query-migrate-parameters")),
    )


async def put_back(qmp: Qmp, saved: MigrationSettings) -> None:
    """Set the migration as it was.  What cannot be set is left as it is, and a warning says so.

    :raise QmpError: when the QEMU is gone.
    """
    now = await _migration_settings(qmp)
    changed = [
        {"capability": name, "state": on}
        for name, on in saved.capabilities.items()
        if now.capabilities.get(name, on) != on
    ]
    if changed:
        # Together, since some are permitted only with others.
        await _set(qmp, "migrate-set-capabilities", {"capabilities": changed})
    for name, value in saved.parameters.items():
        # One by one: some can be asked for and not set.
        if now.parameters.get(name) != value:
            await _set(qmp, "migrate-set-parameters", {name: value})


async def _set(qmp: Qmp, command: str, arguments: Mapping[str, object]) -> None:
    try:
        await qmp.execute(command, arguments)
    except QmpError as error:
        if qmp.is_lost:
            raise
        log.warning("%s of the migration cannot be put back: %s", dict(arguments), error.cause)
