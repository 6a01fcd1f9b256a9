"""The guests' C code has the lab's kinds of workload, and refuses what it lacks by name."""

import shutil
import subprocess
import typing
from pathlib import Path

import pytest

from lab.guests import protocol
from lab.guests.kinds import include_options
from lab.scenario.guests import GUEST_LIMITS, GuestKind
from lab.scenario.workload import WorkloadKind

PROGRAM = """
#include "writers.h"
#include <stdio.h>
/* What a guest says of a damaged page. */
static void page_is_bad(struct writer *w, uint64_t page)
{
    printf("%d %d\\n", w->kind, (int)page);
}
int main(void)
{
    static const char *const names[] = KIND_NAMES;
    for (uint64_t kind = 0; kind < KIND_COUNT; kind++) {
        printf("%s %d\\n", names[kind], kind_is_done(kind));
    }
    printf("%d %d\\n", kind_is_done(KIND_COUNT), kind_is_done(UINT64_MAX));
    return 0;
}
"""


def answers(guest: GuestKind, folder: Path) -> list[str]:
    """What a guest's C code says of each kind, by name, and then of two numbers that are none."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "main.c").write_text(PROGRAM)
    includes = include_options(folder, GUEST_LIMITS[guest])
    strict = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, *strict, *includes, "-o", f"{folder}/main", f"{folder}/main.c"]
    subprocess.run(command, check=True)
    done = subprocess.run([folder / "main"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_every_kind_has_its_number_and_every_guest_its_limits() -> None:
    assert typing.get_args(WorkloadKind) == protocol.KINDS
    assert set(GUEST_LIMITS) == set(typing.get_args(GuestKind))
    # Recorded progress pages have these numbers.
    assert protocol.KINDS[:8] == (
        *("idle", "sequential", "random", "scattered"),
        *("zipf", "hotcold", "readmostly", "allocate"),
    )


@pytest.mark.parametrize("guest", typing.get_args(GuestKind))
def test_a_kind_is_refused_by_name_and_not_for_coming_after_another(
    guest: GuestKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "KINDS", (*protocol.KINDS, "later"))
    lacks = GUEST_LIMITS[guest].lacks
    expected = [f"{kind} {int(kind not in lacks)}" for kind in protocol.KINDS]
    assert answers(guest, tmp_path) == [*expected, "0 0"]
