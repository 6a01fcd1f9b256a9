"""A program of its own: copy its input, a socket, to its output, a file, at so many bytes a second.

`lab.snapshot.throttle` runs it, as a script and without the site's packages, so that it starts at
once.  Its one argument is the rate.  On its standard error it says `ready`, and later why it
failed, if it did, before the sender can notice: its exit status is 0 when all until the end of the
input is in the file.

The file is no faster than the rate from the first byte to the last.  What the program could not
write because it did not run is made up for, but never more than `CATCH_UP_S` of it: a disk does
not catch up on what nobody asked of it.
"""

import os
import socket
import sys
import time

CATCH_UP_S = 0.01

# What is taken at once, as a time at the rate: the sender waits for so long, again and again.
PIECE_S = 0.002
MIN_PIECE_BYTES = 4 << 10
MAX_PIECE_BYTES = 256 << 10


def piece_bytes(bytes_per_s: int) -> int:
    """Return how much is read and written at a time."""
    return min(max(round(bytes_per_s * PIECE_S), MIN_PIECE_BYTES), MAX_PIECE_BYTES)


def copy(source: socket.socket, target: int, bytes_per_s: int) -> None:
    """Copy until the sender closes its end.

    :raise OSError: when the file cannot be written, or the sender was reset.
    """
    buffer = memoryview(bytearray(piece_bytes(bytes_per_s)))
    due_s = time.monotonic()
    while length := source.recv_into(buffer):
        rest = buffer[:length]
        while rest:
            rest = rest[os.write(target, rest) :]
        now_s = time.monotonic()
        due_s = max(due_s, now_s - CATCH_UP_S) + length / bytes_per_s
        if due_s > now_s:
            time.sleep(due_s - now_s)


def main() -> int:
    """Run as a program; return the exit status."""
    with socket.socket(fileno=os.dup(0)) as source:
        # The sender learns that this end is gone only when no descriptor of it is left.
        os.close(0)
        sys.stderr.write("ready\n")
        sys.stderr.flush()
        try:
            copy(source, 1, int(sys.argv[1]))
        except OSError as error:
            sys.stderr.write(f"{error.strerror}\n")
            sys.stderr.flush()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
