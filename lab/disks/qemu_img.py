"""Run `qemu-img`: its output and its complaints apart, and nothing of it left behind."""

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.errors import HostError
from lab.host.needs import require_setpriv
from lab.host.process import kill_child

_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Done:
    """A `qemu-img` that has ended.

    `said` is what it wrote to stderr, in one line and without its own name.
    """

    status: int
    output: bytes
    said: str


async def run_qemu_img(
    qemu_img: Path, *arguments: str | Path, look: Callable[[], None] | None = None
) -> Done:
    """Run it to its end.  It ends with this process, and when this coroutine is cancelled.

    :param look: called several times a second while it runs; what it raises ends `qemu-img`.
    :raise HostError: when there is no such program.
    """
    if not os.access(qemu_img, os.X_OK):
        raise HostError(f"there is no program {qemu_img}", "run `lab build`")
    process = await asyncio.create_subprocess_exec(
        *(require_setpriv(), "--pdeathsig=KILL", "--", qemu_img, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # What it says is read here, so it has to be in one language.
        env=os.environ | {"LC_ALL": "C.UTF-8"},
        start_new_session=True,
    )
    talk = asyncio.create_task(process.communicate())
    try:
        while not (await asyncio.wait([talk], timeout=_LOOK_EVERY_S))[0]:
            if look is not None:
                look()
        output, errors = talk.result()
    finally:
        if not talk.done():
            kill_child(process)
            await asyncio.shield(talk)
    status = process.returncode
    assert status is not None
    said = " ".join(errors.decode(errors="replace").replace("qemu-img: ", "").split())
    if status < 0:
        said = f"{said} (ended by {signal.Signals(-status).name})".lstrip()
    return Done(status, output, said)
