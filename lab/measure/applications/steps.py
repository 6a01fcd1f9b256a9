"""What the lab's Debian does by itself, step by step, for those who have no server to ask: how each
is made ready, and the loop that prints a line a step.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lab.scenario.applications import Application

FOLDER = "/var/lib/lab-steps"
_ROWS = 50_000
_FUNCTIONS = 8
_FILE_MIB = 64
_FOR_EVER_S = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Steps:
    """An application of the guest's shell.  Each client has files of its own.

    :param prepare: returns the command that makes a client's files.
    :param loop: returns the command that goes on for ever, and prints a line when a step is done.
    """

    prepare: Callable[[int], str]
    loop: Callable[[int], str]


def _in_folder(command: str) -> str:
    return f"mkdir -p {FOLDER} && cd {FOLDER} && {command}"


def _prepare_sqlite(client: int) -> str:
    return _in_folder(
        f"rm -f {client}.db* && sqlite3 {client}.db 'PRAGMA journal_mode = WAL; "
        "CREATE TABLE rows (id INTEGER PRIMARY KEY, value BLOB); "
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {_ROWS}) "
        "INSERT INTO rows SELECT i, randomblob(100) FROM n;'"
    )


def _loop_sqlite(client: int) -> str:
    # Drawn in a subquery, because otherwise each row would be compared with a number of its own.
    update = (
        "UPDATE rows SET value = randomblob(100) "
        f"WHERE id = (SELECT 1 + abs(random() % {_ROWS})); SELECT 1;"
    )
    return _in_folder(
        f"awk 'BEGIN {{ for (;;) print \"{update}\" }}' "
        f"| stdbuf -oL sqlite3 -cmd 'PRAGMA synchronous = FULL' {client}.db"
    )


def _prepare_compile(client: int) -> str:
    function = (
        "int f$i(int n) { int s = $i; for (int k = 0; k < n; k++) s += (s >> 3) ^ k * $i; "
        "return s; }"
    )
    return _in_folder(
        f'for i in $(seq {_FUNCTIONS}); do echo "{function}"; done > {client}.c && sync'
    )


def _loop_compile(client: int) -> str:
    return _in_folder(f"while gcc -O2 -c {client}.c -o {client}.o; do echo; done")


def _prepare_fio(client: int) -> str:
    return _in_folder(
        f"{_fio_file(client)} && mkdir -p ${{file%/*}} && "
        f"dd if=/dev/zero of=$file bs=1M count={_FILE_MIB} conv=fsync"
    )


def _loop_fio(client: int) -> str:
    options = (
        f"--name=step --filename=$file --size={_FILE_MIB}M --time_based --runtime={_FOR_EVER_S} "
        "--bs=4k --rw=randwrite --randrepeat=0 --ioengine=sync --direct=1 --fsync=1 "
        "--output=/dev/null --write_iolog=/dev/stdout"
    )
    return _in_folder(f"{_fio_file(client)} && fio {options} | grep --line-buffered -o ' sync '")


def _fio_file(client: int) -> str:
    # fio logs what it does while it does it, but through a buffer of 8 KiB.  Each line has the
    # file's name, so a name of almost 4 KiB makes that a write and its sync at a time.
    depth, part = 15, 250
    return (
        f"part=$(printf '%{part}s' '' | tr ' ' x) && file={client} && "
        f"for i in $(seq {depth}); do file=$file/$part; done && file=$file/data"
    )


STEPS: Mapping[Application, Steps] = types.MappingProxyType(
    {
        "sqlite": Steps(prepare=_prepare_sqlite, loop=_loop_sqlite),
        "compile": Steps(prepare=_prepare_compile, loop=_loop_compile),
        "fio": Steps(prepare=_prepare_fio, loop=_loop_fio),
    }
)
