#!/bin/sh
# A migration into a command is "completed", whatever the command's exit status.
#
# One would guess: `migrate` to "exec:COMMAND" waits for the command, and fails if that fails, as
#   a pipe does in a shell with `pipefail`.
# What is so: QEMU waits for the command and throws its status away.  The migration is
#   "completed", with no error text, when the command exits with 3 or dies by a signal after it
#   has taken the stream.
# Seen with: QEMU 7.2 of Debian 12 (1:7.2+dfsg-7+deb12u18+b3), as here; also QEMU 10.0.13.
# Output seen: exit 0: completed, no error
#              exit 3: completed, no error
#              kill -9 $$: completed, no error
# Why it matters: `exec:gzip > image` on a file system that becomes full with the last block gives
#   a damaged image, and no word of it.  Write to a file descriptor or `file:` instead, or have
#   the command leave a mark when it succeeds, and look for that mark.
#
# Needs: Debian 12 on amd64 with current package lists (apt-get download), Python 3.  QEMU's
# libraries that are not here come the same way.  No root.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"
apt-get download -q \
    qemu-system-x86=1:7.2+dfsg-7+deb12u18+b3 qemu-system-common=1:7.2+dfsg-7+deb12u18+b3 \
    libcapstone4=4.0.2-5 libdaxctl1=76.1-1 libfdt1=1.6.1-4+b1 libibverbs1=44.0-2 \
    libndctl6=76.1-1 libnl-3-200=3.7.0-0.2+b1 libnl-route-3-200=3.7.0-0.2+b1 \
    libpmem1=1.12.1-2 librdmacm1=44.0-2 libvdeplug2=4.0.1-4 > apt 2>&1 \
    || { cat apt >&2; exit 1; }
for package in *.deb; do
    dpkg -x "$package" tree
done
export LD_LIBRARY_PATH="$work/tree/usr/lib/x86_64-linux-gnu:$work/tree/lib/x86_64-linux-gnu"

python3 - tree/usr/bin/qemu-system-x86_64 << 'END'
import json
import socket
import subprocess
import sys
import time


def migrated_into(command):
    """What query-migrate says after a machine without anything in it has been sent."""
    ours, its = socket.socketpair()
    qemu = subprocess.Popen(
        [sys.argv[1], "-machine", "none", "-m", "8", "-nodefaults", "-display", "none", "-S"]
        + ["-chardev", f"socket,id=qmp,fd={its.fileno()}", "-mon", "chardev=qmp,mode=control"],
        pass_fds=[its.fileno()],
        stderr=subprocess.DEVNULL,
    )
    its.close()
    stream = ours.makefile("rw")

    def execute(name, **arguments):
        stream.write(json.dumps({"execute": name, "arguments": arguments}))
        stream.flush()
        while True:
            reply = json.loads(stream.readline())
            if "error" in reply:
                raise SystemExit(reply["error"]["desc"])
            if "return" in reply:
                return reply["return"]

    try:
        stream.readline()  # The greeting.
        execute("qmp_capabilities")
        execute("migrate", uri=f"exec:cat > /dev/null; {command}")
        while (reply := execute("query-migrate")).get("status") not in ("completed", "failed"):
            time.sleep(0.02)
        return f"{reply['status']}, {reply.get('error-desc', 'no error')}"
    finally:
        qemu.kill()
        qemu.wait()


print(subprocess.check_output([sys.argv[1], "--version"], text=True).splitlines()[0], flush=True)
right = True
for command in ("exit 0", "exit 3", "kill -9 $$"):
    seen = migrated_into(command)
    print(f"{command}: {seen}")
    right &= seen == "completed, no error"
sys.exit(not right)
END
