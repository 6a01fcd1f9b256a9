"""Compile a small C program of the lab's with the system's C compiler into the cache.

What is in the cache::

    <name>/<name>-<key>      key: hash of the source, the flags and what the compiler says it is
    <name>/build.log

A program appears under its final name complete or not at all.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.host.cache import cache_dir
from lab.host.files import content_key, sha256_of
from lab.host.tools import find_compiler, run_tool

COMPILERS = ("cc", "gcc", "clang")


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled program, and what it was compiled from and with."""

    path: Path
    sha256: str
    source_sha256: str
    compiler: str
    flags: str


async def ensure_compiled(source: Path, flags: Sequence[str], what: str) -> Program:
    """Return the program of one C file, after compiling it if it is not in the cache.

    :param source: its name without `.c` is the program's.
    :param what: names the program in messages, as `the floor's program`.
    :raise HostError: no C compiler.
    :raise BuildError: the compilation failed.
    """
    compiler = find_compiler(COMPILERS, what, "install gcc and libc6-dev")
    name = source.stem
    folder = cache_dir() / name
    folder.mkdir(exist_ok=True)
    log = folder / "build.log"
    version = (await run_tool([compiler, "--version"], log=log))[0]
    key = content_key(source.read_bytes(), " ".join(flags).encode(), version.encode())
    path = folder / f"{name}-{key}"
    if not path.is_file():
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as temporary:
            made = Path(temporary) / name
            await run_tool([compiler, *flags, "-o", made, source], log=log)
            made.replace(path)
    return Program(
        path=path,
        sha256=sha256_of(path),
        source_sha256=sha256_of(source),
        compiler=version,
        flags=" ".join(flags),
    )
