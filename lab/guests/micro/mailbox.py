"""Talk with a microguest, which has no console, through a page of its memory.

The page is the progress page, at an address that is the same in every microguest.  What the guest
says by it is what it counts there; what the host asks is a number in it.
"""

from __future__ import annotations

import asyncio
import struct

from lab.errors import GuestError, GuestSilentError
from lab.guests.guest import VERIFY_TIMEOUT_S, Running
from lab.guests.micro.build import PROGRESS_ADDRESS, REFUSALS, ready_record
from lab.guests.protocol import PAGE_BYTES, PROGRESS_REQUEST, ProgressPage, ReadyRecord
from lab.host.memory import write_process

POLL_S = 0.002
"""A guest boots in so few milliseconds that it is worth looking often."""


async def _page(vm: Running) -> ProgressPage | None:
    """Return the page, None while there is none yet."""
    address = await vm.host_address(PROGRESS_ADDRESS)
    octets = vm.read_host(address, PAGE_BYTES)
    try:
        return ProgressPage.decode(octets)
    except GuestError:
        # Empty, or half written by a guest that is beginning.
        return None


async def wait_running(vm: Running, not_nonce: int | None, timeout_s: float) -> ReadyRecord:
    """Wait until the guest's writers run.

    :param not_nonce: that of a boot which is over, and whose page may still be there.
    :raise GuestError: when the guest refuses what it is to do.
    :raise GuestSilentError: when it does not run in time.
    :raise LaunchError: when QEMU has died.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                page = await _page(vm)
                if page is not None and page.nonce != not_nonce:
                    if page.state == "refused":
                        why = REFUSALS.get(page.answer, f"reason {page.answer}")
                        raise GuestError(
                            f"the microguest refuses to run: {why}", "change the workload or RAM"
                        )
                    if page.state == "running":
                        return ready_record(page)
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise GuestSilentError(
            f"the microguest did not run its writers within {timeout_s:g} s", "give it more time"
        ) from None


async def count_bad_pages(vm: Running) -> int:
    """Have the guest stop its writers, compare every word of its working set and go on.

    :raise GuestSilentError: when it does not answer.
    """
    address = await vm.host_address(PROGRESS_ADDRESS)
    before = ProgressPage.decode(vm.read_host(address, PAGE_BYTES))
    request = before.answered + 1
    write_process(vm.pid, address + 8 * PROGRESS_REQUEST, struct.pack("<Q", request))
    try:
        async with asyncio.timeout(VERIFY_TIMEOUT_S):
            while True:
                page = ProgressPage.decode(vm.read_host(address, PAGE_BYTES))
                if page.answered == request:
                    return page.answer
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise GuestSilentError(
            f"the microguest did not verify its pages within {VERIFY_TIMEOUT_S:g} s",
            "look whether its vCPUs run",
        ) from None
