"""See to it that a VM of somebody else's does not stay stopped when the lab is killed.

Some ways to take a snapshot stop the VM, and let it go on when the lab says so.  A lab that is
killed in between says nothing any more.  So a small process of its own waits beside it, with the
same connection to QEMU's monitor: when the lab is gone in the middle of a snapshot, it cancels that
and lets the VM run.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_ARMED, _DISARMED = b"1", b"0"

PATIENCE_S = 60.0
"""How long the monitor is asked to let the VM run, which it refuses while it ends a migration."""

_POLL_S = 0.05


class Guard:
    """The process that waits.  Made by `guarded`."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    @contextlib.contextmanager
    def armed(self, was_running: bool) -> Iterator[None]:
        """Have it act if this process ends while the context lasts.

        :param was_running: False: the VM is to stay stopped anyway.
        """
        if not was_running:
            yield
            return
        self._say(_ARMED)
        try:
            yield
        finally:
            self._say(_DISARMED)

    def _say(self, what: bytes) -> None:
        with contextlib.suppress(OSError):  # it is gone itself: there is nobody to ask
            os.write(self._pipe, what)


@contextlib.contextmanager
def guarded(monitor: int) -> Iterator[Guard]:
    """Have a process wait beside this one while the context lasts.

    :param monitor: the descriptor of a connection to QEMU's monitor.
    """
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            # Isolated, so that it starts in a moment and nothing of the user's gets into its way.
            [sys.executable, "-IS", str(Path(__file__)), str(reading), str(monitor)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(reading, monitor),
            # What ends a whole session is not to end it together with the lab.
            start_new_session=True,
        )
    finally:
        os.close(reading)
    try:
        yield Guard(writing)
    finally:
        os.close(writing)
        process.wait()


def wait_and_act(pipe: int, monitor: int) -> None:
    """Wait until nobody has the other end of a pipe; what was said last decides what is done."""
    last = _DISARMED
    while said := os.read(pipe, 1024):
        last = said[-1:]
    if last == _ARMED:
        _let_run(monitor)


def _let_run(monitor: int) -> None:
    end = time.monotonic() + PATIENCE_S
    # Other threads of a killed lab may have sent half a command: QEMU skips to the next line.
    _send(monitor, b"\n")
    _execute(monitor, "migrate_cancel", end)
    while time.monotonic() < end:
        _execute(monitor, "cont", end)
        reply = _execute(monitor, "query-status", end)
        if reply is None or reply.get("running"):
            return
        time.sleep(_POLL_S)


def _execute(monitor: int, command: str, end: float) -> "dict[str, object] | None":
    """Run a command; returns nothing but errors as an empty reply, None when QEMU is gone."""
    name = f"guard-{command}-{time.monotonic_ns()}"
    if not _send(monitor, json.dumps({"execute": command, "id": name}).encode() + b"\n"):
        return None
    left = b""
    while time.monotonic() < end:
        try:
            if not select.select([monitor], [], [], _POLL_S)[0]:
                continue
            data = os.read(monitor, 65536)
        except BlockingIOError:
            continue
        except OSError:
            return None
        if not data:
            return None
        *lines, left = (left + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                reply = json.loads(line)
                if reply.get("id") == name:
                    found: dict[str, object] = reply.get("return") or {}
                    return found
    return None


def _send(monitor: int, text: bytes) -> bool:
    while text:
        try:
            text = text[os.write(monitor, text) :]
        except BlockingIOError:
            select.select([], [monitor], [], _POLL_S)
        except OSError:
            return False
    return True


if __name__ == "__main__":
    wait_and_act(int(sys.argv[1]), int(sys.argv[2]))
