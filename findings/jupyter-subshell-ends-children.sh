#!/bin/sh
# A process started in a notebook's subshell is killed when that subshell is deleted.
#
# One would guess: a child that asked for a signal at its parent's death (PR_SET_PDEATHSIG) lives
#   as long as the kernel, the process that started it.
# What is so: the parent of that signal is the thread that called fork.  Since ipykernel 7 a cell
#   can run in a subshell, which is a thread: deleting the subshell ends the child, while the
#   kernel and its variables live on.
# Seen with: ipykernel 7.4.0, jupyter_client 8.10.0, Linux 6.18.
# Output seen: child of the main shell: runs
#              child of the subshell: ended by signal 15
# Why it matters: whoever starts processes that must not outlive the notebook's kernel uses that
#   signal.  A guest booted from a subshell ends with it, for no reason that its user can see.
#
# Needs: Python 3.11 or later with venv, and the network for pip.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q ipykernel==7.4.0 jupyter_client==8.10.0 2> "$work/pip" \
    || { cat "$work/pip" >&2; exit 1; }
export IPYTHONDIR="$work/ipython" JUPYTER_CONFIG_DIR="$work/config" \
    JUPYTER_DATA_DIR="$work/data" JUPYTER_RUNTIME_DIR="$work/runtime"

cat > "$work/finding.py" << 'END'
import importlib.metadata
import sys

from jupyter_client.manager import KernelManager

PREPARE = """
import ctypes, signal, subprocess
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)

def start():
    return subprocess.Popen(
        ["sleep", "120"], preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    )
"""
# The signal comes when the thread ends, so that is waited for; a child that runs is waited for
# a second longer.
STATES = """
subshell_thread.join(30)
try:
    of_subshell.wait(1)
except subprocess.TimeoutExpired:
    pass
for name, child in ("main shell", of_main), ("subshell", of_subshell):
    code = child.poll()
    print(f"child of the {name}:", "runs" if code is None else f"ended by signal {-code}")
    child.kill()
"""


def run(client, code, subshell=None):
    content = dict(code=code, silent=False, store_history=False, user_expressions={})
    message = client.session.msg("execute_request", content)
    message["header"]["subshell_id"] = subshell
    client.shell_channel.send(message)
    printed = ""
    while True:
        reply = client.get_iopub_msg(timeout=60)
        if reply["parent_header"].get("msg_id") != message["header"]["msg_id"]:
            continue
        if reply["msg_type"] == "stream":
            printed += reply["content"]["text"]
        elif reply["msg_type"] == "error":
            raise SystemExit(f"cell failed: {reply['content']['evalue']}")
        elif reply["content"].get("execution_state") == "idle":
            return printed


def control(client, kind, **content):
    message = client.session.msg(kind, content)
    client.control_channel.send(message)
    while True:
        reply = client.get_control_msg(timeout=60)
        if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
            return reply["content"]


for name in ("ipykernel", "jupyter_client"):
    print(name, importlib.metadata.version(name))
manager = KernelManager(kernel_name="python3")
manager.start_kernel()
try:
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    run(client, PREPARE)
    run(client, "of_main = start()")
    subshell = control(client, "create_subshell_request")["subshell_id"]
    run(client, "import threading; subshell_thread = threading.current_thread()", subshell)
    run(client, "of_subshell = start()", subshell)
    control(client, "delete_subshell_request", subshell_id=subshell)
    seen = run(client, STATES)
finally:
    manager.shutdown_kernel(now=True)
print(seen, end="")
sys.exit(seen != "child of the main shell: runs\nchild of the subshell: ended by signal 15\n")
END
"$work/venv/bin/python" "$work/finding.py" 2> "$work/errors" || { cat "$work/errors" >&2; exit 1; }
