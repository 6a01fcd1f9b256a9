"""Compile floor.c."""

from pathlib import Path

from lab.host.compiled import Program, ensure_compiled

SOURCE = Path(__file__).with_name("floor.c")
#: The tests add -Werror: a compiler that is newer than this lab may warn about more.
CFLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-pthread")


async def ensure_program() -> Program:
    """Return the program, after compiling it if it is not in the cache.

    :raise HostError: no C compiler.
    :raise BuildError: the compilation failed.
    """
    return await ensure_compiled(SOURCE, CFLAGS, "the floor's program")
