"""The microguest: compile its ROM, and write a copy of it that holds what the guest is to do.

README.md beside this file describes the guest, and ../README.md the pages that it counts in, which
are those of the Linux guest.  What is in the cache: ``guest/microguest-<key>.rom``, where the key
is a hash of everything the bytes depend on.
"""

import secrets
import struct
import tempfile
from pathlib import Path

from lab.errors import BuildError, GuestError
from lab.guests import common
from lab.guests.kinds import include_options, kinds_header
from lab.guests.protocol import KINDS, ProgressPage, ReadyRecord
from lab.host.files import content_key
from lab.host.tools import run_tool
from lab.scenario.guests import GUEST_LIMITS
from lab.scenario.machine import Machine
from lab.scenario.workload import Workload

_LIMITS = GUEST_LIMITS["micro"]
_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / name for name in ("boot.S", "main.c", "layout.ld.S")]
_HEADERS = [_FOLDER / name for name in ("memory.h", "processor.h")]
_HEADERS += common.HEADERS
# No register but the general ones: nobody has set up the others.  No red zone and no protector of
# the stack, because nobody has set up what they need either.
_CFLAGS = (
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-ffreestanding", "-nostdlib"),
    *("-mgeneral-regs-only", "-mno-red-zone", "-mcmodel=small", "-fno-pic", "-fno-pie"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none"),
)
_LDFLAGS = ("-n", "-static", "--build-id=none", "--no-warn-rwx-segments")

ROM_BYTES = 64 << 10
ROM_ADDRESS = 0xF0000
PARAMETERS_ADDRESS = 0xFFF00
PROGRESS_ADDRESS = 0x200000
PARAMETERS_MAGIC = 0x3152434D4C42414C  # "LABLMCR1"
_PARAMETERS = struct.Struct("<9Q")

FLAG_TIME_WRITES = 1 << 0
FLAG_HUGE_PAGES = 1 << 1
FLAG_WARM_UP = 1 << 2

REFUSALS = {
    1: "it does not know such parameters",
    2: "the working set does not fit into its RAM",
    3: "the timer of its APIC does not count",
    4: "a vCPU does not start",
}


def rom_path() -> Path:
    """Return where the ROM is kept that today's sources give."""
    flags = " ".join((*_CFLAGS, *_LDFLAGS)).encode()
    key = content_key(
        flags,
        kinds_header(_LIMITS).encode(),
        *(path.read_bytes() for path in (*_SOURCES, *_HEADERS)),
    )
    return common.cache_folder() / f"microguest-{key}.rom"


async def compile_rom(target: Path) -> None:
    """Compile the ROM; the file appears complete or not at all.

    :raise HostError: no compiler.
    :raise BuildError: it does not compile.
    """
    boot, main, layout = _SOURCES
    with tempfile.TemporaryDirectory(prefix=".microguest-", dir=target.parent) as temporary:
        work = Path(temporary)
        includes = include_options(work, _LIMITS)
        for command in (
            ("gcc", *_CFLAGS, "-c", "-o", "boot.o", boot),
            ("gcc", *_CFLAGS, *includes, "-c", "-o", "main.o", str(main)),
            # The script has addresses of the C code's, so it goes through the preprocessor.
            ("gcc", "-E", "-P", "-x", "assembler-with-cpp", "-o", "layout.ld", layout),
            ("ld", *_LDFLAGS, "-T", "layout.ld", "-o", "elf", "boot.o", "main.o"),
            ("objcopy", "-O", "binary", "--gap-fill", "0", "elf", "rom"),
        ):
            await run_tool(command, log=common.build_log(), cwd=work)
        size = (work / "rom").stat().st_size
        if size != ROM_BYTES:
            raise BuildError(f"the microguest's ROM has {size} bytes instead of {ROM_BYTES}")
        (work / "rom").replace(target)


def parameters(machine: Machine, workload: Workload, entropy: int) -> bytes:
    """Return what the guest is told, as it reads it.

    :param entropy: goes into the nonce of the boot.
    """
    flags = FLAG_TIME_WRITES if workload.time_writes else 0
    flags |= FLAG_HUGE_PAGES if workload.page_kib == 2048 else 0
    # A processor's own translation caches are as large as they are.
    flags |= FLAG_WARM_UP if machine.accel == "tcg" else 0
    return _PARAMETERS.pack(
        PARAMETERS_MAGIC,
        KINDS.index(workload.kind),
        workload.wss_mib,
        1 if workload.kind == "idle" else workload.threads,
        workload.seed,
        workload.rate_ops_per_s,
        machine.ram_mib,
        flags,
        entropy,
    )


def rom_for(rom: bytes, machine: Machine, workload: Workload) -> bytes:
    """Return a ROM that boots into a workload: one of 64 KiB, like `rom`.

    :raises GuestError: `rom` is no ROM of this guest.
    """
    if len(rom) != ROM_BYTES:
        raise GuestError(f"a ROM of {len(rom)} bytes instead of {ROM_BYTES}", "run `lab build`")
    content = bytearray(rom)
    at = PARAMETERS_ADDRESS - ROM_ADDRESS
    told = parameters(machine, workload, secrets.randbits(64))
    content[at : at + len(told)] = told
    return bytes(content)


def ready_record(page: ProgressPage) -> ReadyRecord:
    """Return what a guest that has a console says when its writers start, from the page that this
    one counts in.
    """
    return ReadyRecord(
        nonce=page.nonce,
        progress_gpa=PROGRESS_ADDRESS,
        wss_pages=page.wss_pages,
        threads=page.threads,
        seed=page.seed,
        kind=page.kind,
    )
