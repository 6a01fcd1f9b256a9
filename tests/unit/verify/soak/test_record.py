"""What a soak records can be read, added up and done again."""

import json
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lab.__main__ import build_parser
from lab.errors import RunError
from lab.scenario.document import to_json
from lab.scenario.machine import Machine
from lab.verify.soak.draw import LARGE_RAM_MIB, NEVER_DRAWN, VERSION, Choice, Offer, draw
from lab.verify.soak.record import (
    Result,
    df_tally,
    findings,
    header_line,
    read_record,
    reopen_record,
    result_line,
    summarise,
    summary_line,
    tally_text,
)


def as_read(machine: Machine) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(to_json(machine)))
    return read


ANON = as_read(Machine())
HUGE = as_read(Machine(ram_kind="hugetlb", vcpus=4, disk="virtio", disk_iothread=True, net=True))

EQUAL = Result(
    iteration=1,
    seed=7,
    shot=1,
    method="live",
    machine=ANON,
    workload={"kind": "idle"},
    variant="patched",
    buffer_mib=8,
    log_faults=True,
    channels=1,
    balloon_mib=0,
    reset=False,
    outcome="equal",
    pages_compared=65536,
    faults=12,
)
DIFFERS = msgspec.structs.replace(
    EQUAL,
    iteration=2,
    seed=9,
    shot=3,
    machine=HUGE,
    outcome="differs",
    detail="1 of 9 pages differ",
    pages_differing=1,
    faults=None,
)
FAILED = msgspec.structs.replace(EQUAL, iteration=3, seed=8, method="live-rfc", outcome="failed")
ALL = [EQUAL, DIFFERS, FAILED]
NO_GUEST = msgspec.structs.replace(FAILED, outcome="no-guest", detail="silent", pages_compared=0)


def write_record(path: Path) -> None:
    lines = [header_line(7, Choice(), Offer(), {"qemu": {"patched": "10.0.0 (x)"}})]
    lines += [result_line(result) for result in ALL]
    path.write_text("\n".join([*lines, summary_line(ALL)]) + "\n")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_record(path)
    assert read_record(path) == ALL
    first, *_, last = [json.loads(line) for line in path.read_text().splitlines()]
    assert (first["record"], first["seed"], first["qemu"]["patched"]) == ("soak", 7, "10.0.0 (x)")
    assert last == {"record": "summary", **summarise(ALL)}


def test_a_record_of_a_soak_that_was_killed_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_record(path)
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    assert read_record(path) == ALL[:2]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lab.soak/1", "lab.soak/2"),
        ('"format"', '"shape"'),
        ('"iteration":2', '"iteration":"two"'),
        ('"outcome":"differs"', '"outcome":"fine"'),
        ("{", ""),
    ],
)
def test_what_is_no_record_of_this_version_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "a.jsonl"
    write_record(path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(RunError) as caught:
        read_record(path)
    assert caught.value.remedy
    with pytest.raises(RunError):
        read_record(tmp_path / "missing")


def test_a_soak_goes_on_with_the_guest_after_the_last_and_what_it_drew_from(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl"
    choice = Choice(methods=("live",), simplify=("vcpus",))
    path.write_text(header_line(7, choice, Offer(), {}) + "\n")
    empty = reopen_record(path)
    assert (empty.choice, empty.results, empty.next_seed) == (choice, [], 7)
    torn = result_line(DIFFERS)[:-7]
    path.write_text(f"{path.read_text()}{result_line(EQUAL)}\n{torn}")
    again = reopen_record(path)
    assert (again.choice, again.results, again.next_seed) == (choice, [EQUAL], 8)
    # What was not written to its end is gone, so that the next line begins a line.
    with path.open("a") as file:
        print(header_line(8, choice, Offer(), {}), result_line(DIFFERS), sep="\n", file=file)
    assert read_record(path) == [EQUAL, DIFFERS]


@pytest.mark.parametrize("content", [b"", b"\xff\n", b"{}\n", b"[1]\n", b'{"record":"soak"}\n'])
def test_what_is_no_record_can_not_be_gone_on_with(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(RunError):
        reopen_record(path)


def test_results_add_up() -> None:
    total = summarise(ALL)
    assert (total["iterations"], total["trials"], total["seeds"]) == (3, 3, "7-9")
    assert (total["equal"], total["differs"], total["failed"]) == (1, 1, 1)
    assert (total["pages_compared"], total["pages_differing"]) == (3 * 65536, 1 * 1)
    assert total["by_method"] == {"live": 2, "live-rfc": 1}
    assert total["by_vcpus"] == {"1": 2, "4": 1}
    assert total["by_disk"] == {"none": 2, "virtio writeback threads iothread": 1}
    assert total["with"] == {
        "net": 1, "vnc": 0, "balloon": 0, "balloon_reporting": 0, "flash": 0, "undriven": 0,
    }  # fmt: skip
    assert summarise([])["iterations"] == 0
    assert summarise([EQUAL, DIFFERS])["seeds"] == "7, 9"


def test_each_thing_that_is_drawn_is_counted() -> None:
    wide = msgspec.structs.replace(
        EQUAL,
        machine=as_read(
            Machine(ram_mib=LARGE_RAM_MIB, chipset="q35", disk="scsi", flash=True, undriven=True)
        ),
        state="paused",
        generation=2,
        images_kept=3,
        ksm=True,
        pressure=True,
    )
    total = summarise([EQUAL, wide])
    assert total["by_chipset"] == {"pc": 1, "q35": 1}
    assert total["by_state"] == {"paused": 1, "running": 1}
    assert total["by_generation"] == {"0": 1, "2": 1}
    assert total["by_disk"] == {"none": 1, "scsi writeback threads": 1}
    assert (total["with"]["flash"], total["with"]["undriven"]) == (1, 1)
    names = ("above_4_gib", "with_ksm", "with_swapping", "with_images_kept")
    assert [total[name] for name in names] == [1, 1, 1, 1]
    text = tally_text([EQUAL, wide])
    assert "chipset: pc 1, q35 1" in text
    assert "KSM 1" in text


def test_a_record_says_what_is_never_drawn() -> None:
    assert json.loads(header_line(1, Choice(), Offer(), {}))["never"] == dict(NEVER_DRAWN)


def test_seeds_of_another_version_of_what_is_drawn_are_refused_in_one_line(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl"
    write_record(path)
    assert reopen_record(path).results == ALL
    # A record of before there was a number; it is read all the same.
    head = json.loads(path.read_text().splitlines()[0])
    del head["draw"]
    path.write_text("\n".join([json.dumps(head), *path.read_text().splitlines()[1:]]) + "\n")
    assert read_record(path) == ALL
    with pytest.raises(RunError, match=f"version 1 of .* version {VERSION}") as caught:
        reopen_record(path)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_a_guest_that_did_not_boot_is_counted_and_is_no_snapshot() -> None:
    total = summarise([*ALL, NO_GUEST])
    assert (total["iterations"], total["failed"], total["no-guest"]) == (3, 1, 1)
    assert "1 guests did not boot at first" in tally_text([*ALL, NO_GUEST])
    assert "did not boot" not in tally_text(ALL)
    assert findings([NO_GUEST], Choice())[0].startswith("no-guest: ")


def test_the_table_counts_by_kind_and_by_vcpus() -> None:
    table = df_tally(ALL).set_index("method")
    assert table.loc["live", "hugetlb"] == 1
    assert table.loc["live", "4 vCPU"] == 1
    assert table.loc["live-rfc", "anon"] == 1
    text = tally_text(ALL)
    assert "3 snapshots of 3 guests, seeds 7-9: 1 equal, 1 differ, 1 failed" in text


@pytest.mark.parametrize(
    "choice",
    [
        Choice(),
        Choice(methods=("live", "live-rfc"), ram_kinds=("hugetlb",)),
        Choice(guest="micro", accel="kvm", only_shot=1, simplify=("vcpus", "ram-kind")),
        Choice(guest="any", accel="auto", states=("paused", "prelaunch")),
    ],
)
def test_the_command_that_does_it_again_draws_the_same(choice: Choice) -> None:
    command = shlex.split(DIFFERS.reproduce(choice))
    assert command[0] == "lab"
    args = build_parser().parse_args(command[1:])
    assert (args.seed, args.iterations, args.draw) == (9, 3, VERSION)
    again = Choice(
        methods=tuple(args.methods or Choice().methods),
        ram_kinds=tuple(args.ram_kinds or Choice().ram_kinds),
        guest=args.guest,
        states=tuple(args.states or Choice().states),
        accel=args.accel or Choice().accel,
        only_shot=args.only_shot,
        simplify=tuple(args.simplify),
    )
    assert draw(args.seed, again) == draw(9, choice)


def test_only_what_is_not_equal_is_a_finding() -> None:
    first, second = findings(ALL, Choice())
    assert first.splitlines() == [
        "differs: live, seed 9, snapshot 3: 1 of 9 pages differ",
        f"  again: lab soak --seed 9 --iterations 3 --draw={VERSION}",
    ]
    assert second.startswith("failed: live-rfc, seed 8")
