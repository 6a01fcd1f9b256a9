"""Have the kernel swap out a running guest's memory, as a host that is short of memory does.

A cgroup's limit does that too, once the kernel finds nothing else to take.  Here it is told which
pages to take (`MADV_PAGEOUT`), so that it happens while a snapshot is taken, to pages of the guest,
and to no other process.
"""

import asyncio
import errno
import os
import random

import psutil

from lab.errors import HostError
from lab.host.memory import may_advise_others, process_madvise
from lab.vm.vm import RunningVM

_MADV_PAGEOUT = 21
_PIECE_BYTES = 4 << 20
PAUSE_S = 0.01

MIN_SWAP_MIB = 1024
"""Less might be full with one guest, and then be missing to the rest of the host."""


def swapping_problem() -> str:
    """Return why no guest's memory can be swapped out here; empty when it can."""
    if psutil.swap_memory().free >> 20 < MIN_SWAP_MIB:
        return f"there are not {MIN_SWAP_MIB} MiB of swap free"
    if not may_advise_others():
        return "that takes root, or CAP_SYS_NICE"
    return ""


async def swap_out(vm: RunningVM) -> None:
    """Have random pieces of a guest's RAM swapped out, one after the other, until cancelled.

    :raise HostError: when this process may not.
    """
    blocks = [block for block in await vm.ram_blocks() if block.used_bytes >= _PIECE_BYTES]
    weights = [block.used_bytes for block in blocks]
    descriptor = os.pidfd_open(vm.pid)
    try:
        while True:
            (block,) = random.choices(blocks, weights)
            at = random.randrange(0, block.used_bytes - _PIECE_BYTES + 1, _PIECE_BYTES)
            address = block.host_address + at
            code = await asyncio.to_thread(
                process_madvise, descriptor, address, _PIECE_BYTES, _MADV_PAGEOUT
            )
            if code == errno.EPERM:
                raise HostError(
                    "a guest's memory cannot be swapped out", "run as root, or with CAP_SYS_NICE"
                )
            await asyncio.sleep(PAUSE_S)
    finally:
        os.close(descriptor)
