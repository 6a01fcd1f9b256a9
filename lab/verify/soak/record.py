"""What a soak found: one result per iteration, recorded as a line of JSON, read again, added up."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import pandas as pd

from lab import __version__
from lab.display import text_table
from lab.errors import LabError, RunError
from lab.records import Schema
from lab.verify.soak.draw import LARGE_RAM_MIB, NEVER_DRAWN, VERSION, Choice, Offer

Outcome = Literal["equal", "differs", "failed", "no-guest"]
"""`no-guest` is not a snapshot's: the guest was silent at boot, and was booted once more."""
GOOD: tuple[Outcome, ...] = ("equal", "no-guest")
"""What no snapshot did wrong."""


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One iteration: what was done and what came of it.

    `shot` counts the trial's snapshots from 1.  `pages_*` are of 4096 bytes, over all RAM blocks;
    `faults` is how many writes the snapshot held up, None where QEMU does not say.  `detail` is
    one line about what is wrong, empty when nothing is.  `generation` is how many images lie
    between the guest that booted and this one, `images_kept` how many were on the disk, and
    `watched` whether it would have been seen that a thread was stuck (`lab.verify.stuck`).

    What has a default is missing in records of before it was drawn.
    """

    iteration: int
    seed: int
    shot: int
    method: str
    machine: dict[str, Any]
    workload: dict[str, Any]
    variant: str
    buffer_mib: int
    log_faults: bool
    channels: int
    balloon_mib: int
    reset: bool
    outcome: Outcome
    detail: str = ""
    pages_compared: int = 0
    pages_differing: int = 0
    faults: int | None = None
    state: str = "running"
    generation: int = 0
    images_kept: int = 0
    ksm: bool = False
    pressure: bool = False
    watched: bool = False

    def reproduce(self, choice: Choice) -> str:
        """Return the command that does this iteration again, and the trial's before it."""
        return reproduce_command(choice, self.seed, self.shot)


SCHEMA = Schema(
    family="lab.soak",
    version=1,
    kind=Result,
    remedy="name a file that `lab soak` wrote",
    key="format",
)


def reproduce_command(choice: Choice, seed: int, iterations: int) -> str:
    """Return the command that takes the first snapshots of the guest of a seed."""
    command = ["lab", "soak", "--seed", str(seed), "--iterations", str(iterations)]
    command.append(f"--draw={VERSION}")
    return shlex.join([*command, *choice_arguments(choice)])


def choice_arguments(choice: Choice) -> list[str]:
    """Return the flags that restrict a soak to `choice`."""
    flags = []
    if choice.methods != Choice().methods:
        flags += [f"--method={name}" for name in choice.methods]
    if choice.ram_kinds != Choice().ram_kinds:
        flags += [f"--ram-kind={kind}" for kind in choice.ram_kinds]
    if choice.guest != Choice().guest:
        flags.append(f"--guest={choice.guest}")
    if choice.states != Choice().states:
        flags += [f"--state={state}" for state in choice.states]
    if choice.accel != Choice().accel:
        flags.append(f"--accel={choice.accel}")
    if choice.only_shot:
        flags.append(f"--only-shot={choice.only_shot}")
    return flags + [f"--simplify={name}" for name in choice.simplify]


def header_line(seed: int, choice: Choice, offer: Offer, ground: Mapping[str, Any]) -> str:
    """Return the first line of a record: what was drawn from, and on what host."""
    return _line(
        {
            "record": "soak",
            SCHEMA.key: str(SCHEMA),
            "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "lab": __version__,
            "seed": seed,
            "draw": VERSION,
            "choice": choice,
            "never": dict(NEVER_DRAWN),
            "offer": offer,
            **ground,
        }
    )


def result_line(result: Result) -> str:
    """Return one iteration as a line of a record."""
    return _line({"record": "iteration", **msgspec.to_builtins(result)})


def summary_line(results: Sequence[Result]) -> str:
    """Return the last line of a record: what its iterations add up to."""
    return _line({"record": "summary", **summarise(results)})


def _line(record: Mapping[str, Any]) -> str:
    return msgspec.json.encode(record, order="deterministic").decode()


def read_record(path: Path) -> list[Result]:
    """Read the iterations of a record.

    :raise RunError: when the file cannot be read, or is of another version.
    """
    return _read(path)[1]


@dataclass(frozen=True, kw_only=True)
class Reopened:
    """What a soak drew from and has found, and the seed of the guest to go on with.

    That is the one after the last that has a result: what else was to be taken of that one, which
    ended with the soak, is not taken.
    """

    choice: Choice
    results: list[Result]
    next_seed: int


def reopen_record(path: Path) -> Reopened:
    """Read a record for its soak to go on.

    A last line that was not written to its end, as when the machine went down, is removed.

    :raise RunError: when the file cannot be read, is of another version, or its seeds gave other
        trials than they do now.
    """
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
    except OSError as error:
        raise RunError(f"{path} is not a soak's record: {error}", "name a whole one") from error
    first, results = _read(path)
    # Records of before there was a number are of the first version.
    require_draw(first.get("draw", 1), path.name)
    try:
        choice, seed = msgspec.convert(first["choice"], Choice), int(first["seed"])
    except (KeyError, TypeError, ValueError, LabError) as error:
        raise RunError(f"{path} does not say what it drew from: {error}") from error
    return Reopened(
        choice=choice, results=results, next_seed=results[-1].seed + 1 if results else seed
    )


def require_draw(version: int, name: str) -> None:
    """Refuse what was drawn in another way than this lab draws.

    :param version: `lab.verify.soak.draw.VERSION` at that time.
    :raise RunError: naming what it was.
    """
    if version != VERSION:
        raise RunError(
            f"the seeds of {name} are of version {version} of what is drawn, and this lab draws "
            f"by version {VERSION}",
            "repeat it with the version of the lab that wrote it, or begin a new soak",
        )


def _read(path: Path) -> tuple[dict[str, Any], list[Result]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        # A soak that went on has a head for each time.
        heads = [SCHEMA.upgraded(line, path.name) for line in lines if line["record"] == "soak"]
        if not heads:
            raise RunError(f"{path.name} does not say what it drew from", SCHEMA.remedy)
        results = [
            msgspec.convert({k: v for k, v in line.items() if k != "record"}, SCHEMA.kind)
            for line in lines
            if line["record"] == "iteration"
        ]
        return heads[0], results
    except (OSError, ValueError, KeyError, TypeError, msgspec.ValidationError) as error:
        raise RunError(f"{path} is not a soak's record: {error}", "name a whole one") from error


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Add up results: how many of each outcome, pages and faults, and how many iterations there
    were by each thing that is drawn.
    """
    outcomes = Counter(result.outcome for result in results)
    return {
        "iterations": sum(result.outcome != "no-guest" for result in results),
        "trials": len({result.seed for result in results}),
        "seeds": _ranges(sorted({result.seed for result in results})),
        **{name: outcomes[name] for name in get_args(Outcome)},
        "pages_compared": sum(result.pages_compared for result in results),
        "pages_differing": sum(result.pages_differing for result in results),
        "faults": sum(result.faults or 0 for result in results),
        "by_method": _counts(result.method for result in results),
        # Of a record from before there was a choice, what there was.
        "by_guest": _counts(
            f"{result.machine.get('guest', 'linux')} {result.machine['accel']}"
            for result in results
        ),
        "by_ram_kind": _counts(result.machine["ram_kind"] for result in results),
        "by_vcpus": _counts(str(result.machine["vcpus"]) for result in results),
        "by_workload": _counts(result.workload["kind"] for result in results),
        "by_disk": _counts(_disk(result.machine) for result in results),
        "by_chipset": _counts(result.machine.get("chipset", "pc") for result in results),
        "by_state": _counts(result.state for result in results),
        "by_generation": _counts(str(result.generation) for result in results),
        "with": {
            name: sum(bool(result.machine.get(name)) for result in results)
            for name in ("net", "vnc", "balloon", "balloon_reporting", "flash", "undriven")
        },
        "above_4_gib": sum(result.machine["ram_mib"] >= LARGE_RAM_MIB for result in results),
        "while_booting": sum(result.reset for result in results),
        "with_ksm": sum(result.ksm for result in results),
        "with_swapping": sum(result.pressure for result in results),
        "watched": sum(result.watched for result in results),
        "with_images_kept": sum(result.images_kept > 0 for result in results),
    }


def _disk(machine: Mapping[str, Any]) -> str:
    """Name a disk by what makes a difference to who writes to guest RAM."""
    if machine["disk"] == "none":
        return "none"
    thread = " iothread" if machine["disk_iothread"] else ""
    return f"{machine['disk']} {machine['disk_cache']} {machine['disk_aio']}{thread}"


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _ranges(numbers: Sequence[int]) -> str:
    """Write rising numbers as 1-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def df_tally(results: Sequence[Result]) -> pd.DataFrame:
    """Return how many iterations there were: a row per method, a column per kind of RAM and
    number of vCPUs.
    """
    frame = pd.DataFrame(
        {
            "method": [result.method for result in results],
            "kind": [result.machine["ram_kind"] for result in results],
            "vcpus": [f"{result.machine['vcpus']} vCPU" for result in results],
        }
    )
    both = [pd.crosstab(frame["method"], frame[name]) for name in ("kind", "vcpus")]
    return pd.concat(both, axis="columns").reset_index()


def tally_text(results: Sequence[Result]) -> str:
    """Return what results add up to, for people."""
    total = summarise(results)
    return (
        f"{text_table(df_tally(results))}\n\n"
        f"{total['iterations']} snapshots of {total['trials']} guests, seeds {total['seeds']}: "
        f"{total['equal']} equal, {total['differs']} differ, {total['failed']} failed\n"
        f"{total['pages_compared']} pages compared, {total['pages_differing']} differ; "
        f"{total['faults']} writes were held up\n"
        + _dimensions_text(total)
        + (f"\n{total['no-guest']} guests did not boot at first" if total["no-guest"] else "")
    )


def _dimensions_text(total: Mapping[str, Any]) -> str:
    """Return how often there was each of what the table does not have, a line each."""
    lists = ("guest", "workload", "disk", "chipset", "state", "generation")
    lines = [
        f"{name}: " + ", ".join(f"{value} {n}" for value, n in total[f"by_{name}"].items())
        for name in lists
    ]
    counts = {
        **total["with"],
        "RAM above 4 GiB": total["above_4_gib"],
        "while booting": total["while_booting"],
        "KSM": total["with_ksm"],
        "swapping": total["with_swapping"],
        "images kept": total["with_images_kept"],
        "watched for stuck threads": total["watched"],
    }
    return "\n".join([*lines, "with: " + ", ".join(f"{k} {n}" for k, n in counts.items())])


def findings(results: Iterable[Result], choice: Choice) -> list[str]:
    """Return two lines for each result that is not equal: what, and how to see it again."""
    return [
        f"{result.outcome}: {result.method}, seed {result.seed}, snapshot {result.shot}: "
        f"{result.detail}\n  again: {result.reproduce(choice)}"
        for result in results
        if result.outcome != "equal"
    ]
