"""Run one block of floor.c and check that it did what it was asked for."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lab.errors import BuildError, HostError, LabError
from lab.host.tools import run_tool


class Sample(NamedTuple):
    """One timed step of 4 KiB pages."""

    stage: str
    pages: int
    value_ns: int


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a block printed.  `skipped`: why this host cannot measure it; None when it was."""

    samples: Sequence[Sample] = ()
    counts: dict[str, int]
    skipped: str | None = None


# What floor.c counted -> what it has to be equal to.
_EQUAL = {
    "faults": "pages_written",
    "zero_pages": "scanned_pages",
    "bytes_written": "file_bytes",
}
_SAMPLE = re.compile(r"sample (\w+) (\d+) (-?\d+)")
_COUNT = re.compile(r"count (\w+) (\d+)")


def parse(lines: Sequence[str]) -> Output:
    """Read what floor.c printed.

    :raise HostError: it says why it could not measure what it should have been able to.
    :raise LabError: something is missing or makes no sense.
    """
    samples: list[Sample] = []
    counts: dict[str, int] = {}
    for line in lines:
        if match := _SAMPLE.fullmatch(line):
            samples.append(Sample(match[1], int(match[2]), int(match[3])))
        elif match := _COUNT.fullmatch(line):
            counts[match[1]] = int(match[2])
        elif line.startswith("skip "):
            return Output(counts={}, skipped=line.removeprefix("skip "))
        elif line.startswith("error "):
            raise HostError(line.removeprefix("error "), "see `lab doctor`")
        elif line == "done" and counts.get("samples") == len(samples):
            return Output(samples=samples, counts=counts)
        else:
            break
    raise LabError(f"the floor's program printed {len(lines)} lines that do not end as they should")


def check(output: Output) -> None:
    """Compare what happened with what has to: each page written was one fault, the file is as
    long as what was written to it.

    :raise LabError: naming the first difference.
    """
    for name, same in _EQUAL.items():
        if output.counts.get(name) != output.counts.get(same):
            raise LabError(
                f"{output.counts.get(name)} {name} and {output.counts.get(same)} {same}",
                "do not use the figures",
            )
    if strange := output.counts.get("strange_faults"):
        raise LabError(f"{strange} faults on pages that nobody wrote", "do not use the figures")
    pages = output.counts.get("pages_written")
    stages = Counter(sample.stage for sample in output.samples)
    if pages is not None and set(stages.values()) != {pages}:
        raise LabError(f"{pages} pages written and samples {dict(stages)}")


async def run_block(program: Path, arguments: Sequence[str], folder: Path) -> Output:
    """Measure one block in a process of its own.

    :param folder: for the program's log.
    :raise HostError: this host lacks something that it should have had.
    :raise LabError: the program died, or its figures are not to be trusted.
    """
    log = folder / "floor.log"
    # Only the last block's: the log is for a program that dies.
    log.unlink(missing_ok=True)
    try:
        lines = await run_tool([program, *arguments], log=log, accept=(0, 1))
    except BuildError as error:
        what = " ".join(arguments[:2])
        raise LabError(f"the floor's program died measuring {what}") from error
    output = parse(lines)
    check(output)
    return output
