#!/bin/sh
# qemu.qmp: whoever waits for an event is not told that the connection is gone, and the next
# connection of the same client delivers the events of the last one.
#
# One would guess: when QEMU goes away, `async for event in client.events` ends or raises, as
#   execute() raises ExecInterruptedError; and connect() begins with no events.
# What is so: the loop waits on, and neither the loss nor disconnect() ends it.  Events that
#   nobody has read stay in the listener.  After connect() to another QEMU the first event read
#   is the SHUTDOWN of the one before.
# Seen with: qemu.qmp 0.0.6, Python 3.11, against a server of a few lines that speaks QMP.
# Output seen: execute when the server is gone: ExecInterruptedError
#              loop over the events after disconnect(): still waits
#              first event of the second connection: SHUTDOWN of the first
# Why it matters: a client that waits for the end of a migration by its events waits for ever if
#   QEMU ends; one that connects again takes the new guest for one that shut down.  Watch
#   client.runstate_changed() beside the events, and use a new client, or clear the listener, for
#   each connection.
#
# Needs: Python 3.9 or later with pip, and the network for pip.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m pip install -q --target "$work/packages" qemu.qmp==0.0.6 2> "$work/pip" \
    || { cat "$work/pip" >&2; exit 1; }

PYTHONPATH="$work/packages" python3 - "$work/qmp" << 'END'
import asyncio
import contextlib
import importlib.metadata
import json
import logging
import sys

from qemu.qmp import QMPClient

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 13}, "package": ""}}}
GREETING["QMP"]["capabilities"] = []


class Server:
    """Answers every command, and tells of its end as QEMU does before it closes."""

    connections = 0

    async def serve(self, reader, writer):
        def send(message):
            writer.write(json.dumps(message).encode() + b"\r\n")

        self.connections += 1
        number = self.connections
        send(GREETING)
        while command := await reader.read(65536):
            command = json.loads(command)
            if command["execute"] == "quit":
                stamp = {"seconds": number, "microseconds": 0}
                send({"event": "SHUTDOWN", "data": {"of": number}, "timestamp": stamp})
                break
            send({"return": {}, "id": command.get("id")})
        writer.close()


async def find(path):
    right = True

    def seen(name, value, expected):
        nonlocal right
        print(f"{name}: {value}")
        right &= value == expected

    server = await asyncio.start_unix_server(Server().serve, path)
    client = QMPClient("finding")
    await client.connect(path)
    with client.listener() as listener:

        async def watch():
            async for event in listener:
                if event["event"] == "STOP":
                    break

        watching = asyncio.create_task(watch())
        try:
            await client.execute("quit")
            error = "none"
        except Exception as failure:
            error = type(failure).__name__
        seen("execute when the server is gone", error, "ExecInterruptedError")
        with contextlib.suppress(EOFError):
            await client.disconnect()
        await asyncio.wait([watching], timeout=1)
        state = "has ended" if watching.done() else "still waits"
        seen("loop over the events after disconnect()", state, "still waits")
        watching.cancel()

    await client.connect(path)
    event = await asyncio.wait_for(client.events.get(), 10)
    whose = "first" if event["data"]["of"] == 1 else "second"
    name = f"{event['event']} of the {whose}"
    seen("first event of the second connection", name, "SHUTDOWN of the first")
    await client.disconnect()
    server.close()
    return right


print("qemu.qmp", importlib.metadata.version("qemu.qmp"))
logging.disable()
sys.exit(not asyncio.run(find(sys.argv[1])))
END
