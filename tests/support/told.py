"""A process that holds memory, and changes it when it is told a number."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Told:
    """Such a process, and the address of what it holds."""

    process: "subprocess.Popen[str]"
    address: int

    def tell(self, value: int) -> None:
        """Tell it a number, and wait until it has made of it what its program says."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{value}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@contextlib.contextmanager
def told(program: str) -> Iterator[Told]:
    """Run a program that prints an address, and then "done" after each line that it reads."""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield Told(process, int(process.stdout.readline()))
        finally:
            process.kill()
