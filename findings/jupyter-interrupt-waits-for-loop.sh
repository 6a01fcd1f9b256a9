#!/bin/sh
# The interrupt button does not end a cell that awaits, until its event loop wakes by itself.
#
# One would guess: interrupting `await something()` raises KeyboardInterrupt in the cell at once,
#   as in a cell that computes or sleeps.
# What is so: the kernel's SIGINT handler only puts a callback on the event loop, and does not
#   wake it.  A loop with nothing to do notices at its next timer or input, however late that is.
#   What the cell then gets is asyncio.CancelledError, so `except KeyboardInterrupt` is skipped.
#   With any signal handler of its own, the loop is woken by every signal, and the interrupt
#   comes at once.
# Seen with: ipykernel 7.4.0, jupyter_client 8.10.0, tornado 6.6.1, Python 3.11; also ipykernel
#   6.30.1.
# Output seen: idle loop: timer, CancelledError
#              loop that ticks: CancelledError
#              loop with a signal handler: CancelledError
#              no await: KeyboardInterrupt
# Why it matters: a cell that waits for a snapshot or a guest cannot be stopped while both are
#   quiet.  Clean up in `finally`, and have the loop wake now and then, or add a signal handler.
#
# Needs: Python 3.11 or later with venv, and the network for pip.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q \
    ipykernel==7.4.0 jupyter_client==8.10.0 tornado==6.6.1 2> "$work/pip" \
    || { cat "$work/pip" >&2; exit 1; }
export IPYTHONDIR="$work/ipython" JUPYTER_CONFIG_DIR="$work/config" \
    JUPYTER_DATA_DIR="$work/data" JUPYTER_RUNTIME_DIR="$work/runtime"

cat > "$work/finding.py" << 'END'
import importlib.metadata
import sys
import time

from jupyter_client.manager import KernelManager

PREPARE = """
import asyncio, signal, time

async def tick():
    while True:
        await asyncio.sleep(0.05)
"""
AWAITS = """
order = []
asyncio.get_running_loop().call_later(6, order.append, "timer")
print("waiting", flush=True)
try:
    await asyncio.Event().wait()
except BaseException as error:
    order.append(type(error).__name__)
"""
TICKS = "ticking = asyncio.create_task(tick())" + AWAITS + "ticking.cancel()"
HANDLES = "asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print)" + AWAITS
COMPUTES = """
order = []
print("waiting", flush=True)
try:
    time.sleep(6)
except BaseException as error:
    order.append(type(error).__name__)
"""


def run(client, code, started=lambda: None):
    """Run a cell, call `started` when it has printed, and wait for its end."""
    request = client.execute(code)
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") != request:
            continue
        if message["msg_type"] == "stream":
            printed = message["content"]["text"].strip()
            if printed == "waiting":
                started()
            else:
                return printed
        elif message["msg_type"] == "error":
            raise SystemExit(f"cell failed: {message['content']['evalue']}")
        elif message["content"].get("execution_state") == "idle":
            return ""


def interrupt(manager):
    time.sleep(1)  # Until the cell's loop waits.
    manager.interrupt_kernel()


for name in ("ipykernel", "jupyter_client", "tornado"):
    print(name, importlib.metadata.version(name))
manager = KernelManager(kernel_name="python3")
manager.start_kernel()
try:
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    run(client, PREPARE)
    right = True
    for name, cell, expected in (
        ("idle loop", AWAITS, "timer, CancelledError"),
        ("loop that ticks", TICKS, "CancelledError"),
        ("loop with a signal handler", HANDLES, "CancelledError"),
        ("no await", COMPUTES, "KeyboardInterrupt"),
    ):
        run(client, cell, lambda: interrupt(manager))
        seen = run(client, "print(', '.join(order))")
        print(f"{name}: {seen}")
        right &= seen == expected
finally:
    manager.shutdown_kernel(now=True)
sys.exit(not right)
END
"$work/venv/bin/python" "$work/finding.py" 2> "$work/errors" || { cat "$work/errors" >&2; exit 1; }
