"""QEMU processes of this lab that run on this host."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

NAME_PREFIX = "lab-"
"""QEMU's `-name` begins with this, so that `lab doctor` can list a stray guest."""

_MARKER = re.compile(rf"^(?:guest=)?{NAME_PREFIX}[0-9a-f]{{8}}")


@dataclass(frozen=True, kw_only=True)
class StrayQemu:
    """A running QEMU that carries the lab's marker, and whether whoever started it is gone."""

    pid: int
    name: str
    orphaned: bool


def is_lab_command(command: Sequence[str]) -> str:
    """The name of a QEMU the lab started, empty for any other command."""
    for option, value in itertools.pairwise(command):
        if option == "-name" and _MARKER.match(value):
            return value.split(",")[0]
    return ""


def running_qemus() -> list[StrayQemu]:
    """List the QEMUs with the lab's marker. Only lists: they may belong to another session."""
    found = []
    for process in psutil.process_iter():
        try:
            name = is_lab_command(process.cmdline())
            if not name or process.status() == psutil.STATUS_ZOMBIE:
                continue
            parent = process.parent()
            orphaned = parent is None or parent.pid == 1 or parent.name() == "systemd"
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        found.append(StrayQemu(pid=process.pid, name=name, orphaned=orphaned))
    return found
