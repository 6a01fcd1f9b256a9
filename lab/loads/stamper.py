"""Write down when each line comes on stdin: 8 bytes a line on stdout, CLOCK_MONOTONIC in ns.

It is a process of its own, because one that also does other things would be late.
"""

import os
import sys
import time

_MOST_BYTES = 1 << 16


def main() -> None:
    """Until the end of stdin.  Lines that come together have the same instant."""
    while data := os.read(0, _MOST_BYTES):
        stamp = time.monotonic_ns().to_bytes(8, sys.byteorder)
        os.write(1, stamp * data.count(b"\n"))


if __name__ == "__main__":
    main()
