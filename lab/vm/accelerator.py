"""Which accelerator runs a guest: KVM where it is seen to, and the reason where it is not.

That a device node exists, or that one instruction runs, does not show that a guest does.  So a
guest of the kind that is asked for is booted under KVM and watched until its writers work.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

from lab.errors import HostError, LabError
from lab.guests.registry import GUESTS
from lab.host.needs import kvm_problem
from lab.qemu.build import find_qemu
from lab.scenario.machine import GuestKind, Machine
from lab.scenario.workload import Workload
from lab.vm.commandline import Launch
from lab.vm.launch import launched
from lab.vm.vm import RunningVM

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 30.0
"""A guest that takes longer under KVM than this is better run under TCG."""

_PROBE_WORKLOAD = Workload("sequential", wss_mib=8)

# What was found out in this process, by guest: a guest that ran will run again.
_found: dict[GuestKind, str] = {}


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A machine whose accelerator is "tcg" or "kvm", and why it is not the better one.

    `fallback` is empty where nothing was to be chosen, and where KVM was.
    """

    machine: Machine
    fallback: str = ""


async def kvm_guest_problem(guest: GuestKind) -> str:
    """Return why such a guest does not run under KVM here; empty when one was seen to.

    Takes seconds the first time, because it boots one.

    :raise HostError: when QEMU or the guest are not built.
    """
    if guest not in _found:
        _found[guest] = kvm_problem(guest) or await _probed(guest)
    return _found[guest]


async def accelerator_problem(machine: Machine) -> str:
    """Return why a machine does not run here for its accelerator; empty when nothing is known.

    :raise HostError: when QEMU or the guest are not built.
    """
    return await kvm_guest_problem(machine.guest) if machine.accel == "kvm" else ""


async def _probed(guest: GuestKind) -> str:
    # The unpatched one: whether KVM runs a guest has nothing to do with snapshots.
    launch = Launch(
        binary=find_qemu("unpatched"), machine=GUESTS[guest].probe, workload=_PROBE_WORKLOAD
    )
    try:
        async with launched(RunningVM, launch) as vm:
            await vm.wait_ready(PROBE_TIMEOUT_S)
            page = await vm.progress_page()
            return f"a guest under KVM found {page.page_errors} damaged pages" * bool(
                page.page_errors
            )
    except HostError:
        raise
    except LabError as error:
        return f"a guest was tried under KVM and did not boot: {error.cause}"


async def settled(machine: Machine) -> Settled:
    """Return the machine with "auto" replaced, and say aloud when that is not KVM.

    :raise HostError: when QEMU or the guest are not built.
    """
    if machine.accel != "auto":
        return Settled(machine=machine)
    problem = await kvm_guest_problem(machine.guest)
    if not problem:
        return Settled(machine=dataclasses.replace(machine, accel="kvm"))
    log.warning("accel auto is tcg, not kvm: %s", problem)
    return Settled(machine=dataclasses.replace(machine, accel="tcg"), fallback=problem)
