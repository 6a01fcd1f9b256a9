"""Run the tests of guests on a QEMU with the compiler's sanitizers, and show what they found.

    python -m tests.support.sanitize address|thread [pytest's arguments]

Addresses and undefined behaviour are watched by `address`, data races by `thread`. Each finding is
printed once, and makes the status 1. So does a test that fails, but a QEMU that is several times
slower may miss what a test waits for: read the report before the failure.

`thread` knows nothing of QEMU's own ways to be safe, such as its coroutines, its RCU, memory that a
guest and a thread of the host both use on purpose, and the order that userfaultfd makes: no fault
comes before its memory is protected. What it reports has to be judged. Without tests named it runs
those of KVM. TCG leaves translated code by longjmp(), so that the sanitizer's own stack of calls
grows until it is full, and QEMU hangs in the sanitizer.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

from lab.progress import ProgressLine
from lab.qemu.build import ensure_sanitized_qemu
from lab.scenario.methods import Sanitizer
from tests.support.paths import ROOT

#: What is run when no tests are named.
#: But for the test that QEMU's memory does not grow: the sanitizers keep what QEMU gives back.
_QUICK = (
    *("tests/vm", "-m", "vm and not slow and not thorough"),
    *("--deselect", "tests/vm/test_repeat.py::test_nothing_piles_up_in_one_process"),
)
DEFAULTS: dict[Sanitizer, tuple[str, ...]] = {
    "address": _QUICK,
    "thread": (*_QUICK, "-k", "micro-kvm"),
}

#: Memory that is still in use at the end is of no interest, and a guest's end is not waited for.
COMMON = "detect_leaks=0:halt_on_error=0:abort_on_error=0:print_stacktrace=1"


def _options(folder: Path) -> dict[str, str]:
    options = f"{COMMON}:log_path={folder / 'report'}"
    # Threads that fault in write-protected memory are QEMU's normal life.
    return {
        # Tests load a library of their own into QEMU before the sanitizer's.
        "ASAN_OPTIONS": f"{options}:detect_stack_use_after_return=0:handle_segv=1"
        ":verify_asan_link_order=0",
        "UBSAN_OPTIONS": options,
        "TSAN_OPTIONS": f"{options}:report_signal_unsafe=0:second_deadlock_stack=1",
    }


def findings(folder: Path) -> dict[str, str]:
    """Return each finding once: its place, and the report of it."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("report*")):
        text = path.read_text(errors="replace")
        for line in text.splitlines():
            if "SUMMARY:" in line or "runtime error:" in line:
                found.setdefault(line.strip(), text)
    return found


def main(arguments: list[str]) -> int:
    """Build, run, and report; return the exit status."""
    if not arguments or arguments[0] not in get_args(Sanitizer):
        print(__doc__, file=sys.stderr)
        return 2
    sanitizer: Sanitizer = "address" if arguments[0] == "address" else "thread"
    with ProgressLine() as progress:
        binary = asyncio.run(ensure_sanitized_qemu(sanitizer, progress))
    with tempfile.TemporaryDirectory(prefix="sanitize-") as name:
        folder = Path(name)
        chosen = arguments[1:] or DEFAULTS[sanitizer]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *chosen],
            cwd=ROOT,
            env=os.environ | _options(folder) | {"LAB_QEMU_PATCHED": str(binary.path)},
        )
        found = findings(folder)
    for text in dict.fromkeys(found.values()):
        print(text)
    for line in found:
        print(line)
    print(f"{len(found)} findings of the {sanitizer} sanitizer")
    return 1 if found else done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
