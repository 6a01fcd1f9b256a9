"""Boot a guest, and be sure that it ends."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from lab.guests.image.guest import resolved
from lab.qemu.build import find_qemu
from lab.scenario.machine import Machine
from lab.scenario.methods import Variant
from lab.scenario.scenario import check_fit
from lab.scenario.workload import Workload
from lab.vm.accelerator import settled
from lab.vm.commandline import Launch
from lab.vm.launch import VMT, launched


@contextlib.asynccontextmanager
async def booted(
    kind: type[VMT],
    machine: Machine,
    workload: Workload,
    *,
    binary: Variant,
    socket: Path | None,
    timeout_s: float,
) -> AsyncIterator[VMT]:
    """Boot a guest; see `lab.session.boot`, which says what may be raised.

    :param kind: the class of what is yielded.
    """
    check_fit(machine, workload)
    choice = await settled(resolved(machine))
    launch = Launch(
        binary=find_qemu(binary), machine=choice.machine, workload=workload, socket=socket
    )
    async with launched(kind, launch) as vm:
        vm.fallback = choice.fallback
        await vm.find_machine_type()
        if not machine.is_users:
            await vm.wait_ready(timeout_s)
        yield vm
