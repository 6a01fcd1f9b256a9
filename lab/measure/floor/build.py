"""Compile floor.c with the system's C compiler into the cache.

What is in the cache::

    floor/floor-<key>      key: hash of the source, the flags and what the compiler says it is
    floor/build.log

A program appears under its final name complete or not at all.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab.host.cache import cache_dir
from lab.host.files import content_key, sha256_of
from lab.host.tools import find_compiler, run_tool

SOURCE = Path(__file__).with_name("floor.c")
#: The tests add -Werror: a compiler that is newer than this lab may warn about more.
CFLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-pthread")
COMPILERS = ("cc", "gcc", "clang")


@dataclass(frozen=True, kw_only=True)
class Program:
    """The compiled floor.c, and what it was compiled from and with."""

    path: Path
    sha256: str
    source_sha256: str
    compiler: str
    flags: str


async def ensure_program() -> Program:
    """Return the program, after compiling it if it is not in the cache.

    :raise HostError: no C compiler.
    :raise BuildError: the compilation failed.
    """
    compiler = find_compiler(COMPILERS, "the floor's program", "install gcc and libc6-dev")
    folder = cache_dir() / "floor"
    folder.mkdir(exist_ok=True)
    log = folder / "build.log"
    version = (await run_tool([compiler, "--version"], log=log))[0]
    flags = " ".join(CFLAGS)
    key = content_key(SOURCE.read_bytes(), flags.encode(), version.encode())
    path = folder / f"floor-{key}"
    if not path.is_file():
        with tempfile.TemporaryDirectory(prefix=".floor-", dir=folder) as temporary:
            made = Path(temporary) / "floor"
            await run_tool([compiler, *CFLAGS, "-o", made, SOURCE], log=log)
            made.replace(path)
    return Program(
        path=path,
        sha256=sha256_of(path),
        source_sha256=sha256_of(SOURCE),
        compiler=version,
        flags=flags,
    )
