"""Compile a Linux guest's only program, and pack it for QEMU's `-initrd`.

What is in the cache: ``guest/<program>-<key>.cpio``, where the key is a hash of everything that the
bytes depend on, this file among them.  It appears complete or not at all.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.errors import BuildError
from lab.guests import common
from lab.guests.kinds import include_options, kinds_header
from lab.guests.linux import modules, newc
from lab.host.files import content_key
from lab.host.tools import find_compiler, run_tool
from lab.scenario.guests import GUEST_LIMITS

_LIMITS = GUEST_LIMITS["linux"]
_FOLDER = Path(__file__).parent
_HEADERS = [_FOLDER / "basics.h", _FOLDER / "workload.h", *common.HEADERS]
_CFLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-static", "-pthread", "-s")
#: musl gives a program a tenth of the size, and no code that wants a newer CPU than QEMU's.
_COMPILERS = ("musl-gcc", "gcc", "cc")
_COMPILER_REMEDY = "install musl-tools, or gcc and libc6-dev"


@dataclass(frozen=True)
class Program:
    """What is all of a guest besides its kernel.

    :param name: what its archives' names begin with.
    :param sources: its own; `basics.c` and the headers are every program's.
    """

    name: str
    sources: tuple[Path, ...]

    @property
    def all_sources(self) -> tuple[Path, ...]:
        """Everything that is compiled."""
        return (*self.sources, _FOLDER / "basics.c")


WORKLOAD = Program("initramfs", (_FOLDER / "workload.c", _FOLDER / "devices.c"))
"""The Linux guest's."""


def initramfs_archive(init: bytes, drivers: Mapping[str, bytes] | None = None) -> bytes:
    """Return the bytes of an initramfs whose PID 1 is `init`, a static executable.

    /dev/console is what the kernel opens as PID 1's standard streams before any file system
    is mounted, so it has to be in the archive.

    :param drivers: kernel modules by name; a list for each device says which to load for it.
    """
    entries = [
        newc.directory("dev"),
        newc.character_device("dev/console", 5, 1),
        newc.regular_file("init", init, permissions=0o755),
        newc.directory("proc"),
        newc.directory("sys"),
    ]
    if drivers:
        entries.append(newc.directory("modules"))
        entries += [newc.regular_file(f"modules/{n}.ko", drivers[n]) for n in drivers]
        for device, names in modules.DRIVERS.items():
            order = "".join(f"{name}\n" for name in modules.load_order(names, drivers))
            entries.append(newc.regular_file(f"modules/{device}.list", order.encode()))
    return newc.write_archive(entries)


def archive_path(drivers: Mapping[str, bytes], program: Program = WORKLOAD) -> Path:
    """Return where the archive is kept that today's sources, compiler and drivers give.

    :raise HostError: no compiler.
    """
    code = [Path(module).read_bytes() for module in (newc.__file__, modules.__file__, __file__)]
    key = content_key(
        Path(_compiler()).name.encode(),
        " ".join(_CFLAGS).encode(),
        *(path.read_bytes() for path in (*program.all_sources, *_HEADERS)),
        kinds_header(_LIMITS).encode(),
        *code,
        *(part for name in sorted(drivers) for part in (name.encode(), drivers[name])),
    )
    return common.cache_folder() / f"{program.name}-{key}.cpio"


async def build_archive(
    drivers: Mapping[str, bytes], target: Path, program: Program = WORKLOAD
) -> None:
    """Compile a program, and pack it with the drivers.

    :raise HostError: no compiler.
    :raise BuildError: it does not compile.
    """
    compiler = _compiler()
    with tempfile.TemporaryDirectory(prefix=".initramfs-", dir=target.parent) as temporary:
        work = Path(temporary)
        includes = (*include_options(work, _LIMITS), f"-I{_FOLDER}")
        sources = map(str, program.all_sources)
        command = [compiler, *_CFLAGS, *includes, "-o", "init", *sources]
        try:
            await run_tool(command, log=common.build_log(), cwd=work)
        except BuildError as error:
            raise BuildError(error.cause, f"{_COMPILER_REMEDY}; {error.remedy}") from error
        (work / "archive").write_bytes(initramfs_archive((work / "init").read_bytes(), drivers))
        (work / "archive").replace(target)


def _compiler() -> str:
    return find_compiler(_COMPILERS, "the guest's workload", _COMPILER_REMEDY)
