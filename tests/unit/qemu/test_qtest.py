"""The outcomes of QEMU's own tests are read right, and set against each other right; with programs
that say what QEMU's would.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import HostError, RunError, UsageError
from lab.qemu import qtest
from lab.qemu.build import QemuBinary
from lab.qemu.qtest import (
    Outcome,
    Record,
    TestResult,
    outcome_of,
    parse_tap,
    read_record,
    run_migration_tests,
    side_by_side,
    write_record,
)
from lab.scenario.methods import Variant

NAMES = st.from_regex(r"(/[a-z0-9_-]{1,8}){1,5}", fullmatch=True)
OUTCOMES = st.sampled_from(["passed", "failed", "skipped"])
#: What a test program writes besides results.
NOISE = st.sampled_from(
    [
        "# random seed: R02S3a0b",
        "TAP version 14",
        "# Start of migration tests",
        "qemu-system-x86_64: warning: not ok for you",
        "okay, that is something else",
        "",
        "    ok of a subtest",
    ]
)


def tap_line(number: int, name: str, outcome: str) -> str:
    match outcome:
        case "failed":
            return f"not ok {number} {name} - ERROR:../tests/qtest/migration-test.c:1: no"
        case "skipped":
            return f"ok {number} {name} # SKIP not on this host"
        case _:
            return f"ok {number} {name}"


@given(st.dictionaries(NAMES, OUTCOMES), st.lists(NOISE), st.randoms())
def test_every_result_is_found_and_nothing_else(
    expected: dict[str, Outcome], noise: list[str], random: Random
) -> None:
    results = [
        tap_line(number, name, outcome)
        for number, (name, outcome) in enumerate(expected.items(), 1)
    ]
    lines = [*results, *noise]
    random.shuffle(lines)

    assert parse_tap([f"1..{len(expected)}", *lines]) == expected


@pytest.mark.parametrize(
    ("lines", "status", "outcome"),
    [
        (["ok 1 /a"], 0, "passed"),
        (["ok 1 /a # SKIP no"], 0, "skipped"),
        (["not ok 1 /a"], 1, "failed"),
        (["not ok 1 /a"], 0, "failed"),
        # It died after it had said so, was killed because it hung, or never came so far.
        (["ok 1 /a"], 134, "failed"),
        (["# Start of migration tests"], 124, "failed"),
        ([], 0, "failed"),
        (["ok 1 /a/b"], 0, "failed"),
        # A program that was asked for /a runs what is below it, too.
        (["not ok 1 /a/b", "ok 2 /a"], 0, "passed"),
    ],
)
def test_a_program_that_died_has_not_passed(lines: list[str], status: int, outcome: str) -> None:
    assert outcome_of("/a", lines, status) == outcome


@pytest.mark.parametrize(
    ("unpatched", "patched", "broken"),
    [
        ("passed", "passed", False),
        ("passed", "failed", True),
        ("passed", "skipped", True),
        ("passed", "missing", True),
        ("failed", "failed", False),
        ("failed", "passed", False),
        ("skipped", "failed", False),
        ("missing", "passed", False),
    ],
)
def test_broken_is_what_passes_without_the_patches_only(
    unpatched: Outcome, patched: Outcome, broken: bool
) -> None:
    assert TestResult(name="/a", unpatched=unpatched, patched=patched).is_regression is broken


def record(**results: tuple[Outcome, Outcome]) -> Record:
    return Record(
        schema=str(qtest.SCHEMA),
        build_ids={"unpatched": "u", "patched": "p"},
        accel="tcg",
        tests=["/a", "/b", "/c"],
        results={
            f"/{name}": TestResult(name=f"/{name}", unpatched=pair[0], patched=pair[1])
            for name, pair in results.items()
        },
    )


def test_both_lists_are_shown_side_by_side() -> None:
    text = side_by_side(record(a=("passed", "failed"), b=("skipped", "skipped")))

    assert "/a  passed     failed  <- broken" in text
    assert "unpatched: 1 passed, 1 skipped; patched: 1 failed, 1 skipped" in text
    assert "1 of 3 not run" in text


def test_a_record_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "qtest.json"
    write_record(record(a=("passed", "passed")), path)
    assert read_record(path) == record(a=("passed", "passed"))

    path.write_text('{"schema": "other"}')
    with pytest.raises(RunError, match=r"qtest\.json"):
        read_record(path)


# Stands in for migration-test: its tests' names say what they do.
PROGRAM = """\
#!/bin/sh
test -n "$QTEST_QEMU_BINARY" || exit 1
case "$*" in
"--full -l") printf '%s\\n' TESTS; exit ;;
esac
shift 3
echo "$*" >> LOG
echo "# random seed: R0"
case "$2" in
*/dies) kill -ABRT $$ ;;
*/fails) echo "not ok 1 $2"; exit 1 ;;
*/skips) echo "ok 1 $2 # SKIP no" ;;
*) echo "ok 1 $2" ;;
esac
"""

Programs = Callable[..., None]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def programs(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(qtest, "KVM_DEVICE", tmp_path / "no-kvm")
    # Another test may have the host merge pages meanwhile.
    monkeypatch.setattr("lab.qemu.qtest.ksm_runs", lambda: False)

    def make(unpatched: str, patched: str, build: str = "1") -> None:
        paths: dict[Variant, Path] = {}
        binaries = {}
        variants: dict[Variant, str] = {"unpatched": unpatched, "patched": patched}
        for variant, tests in variants.items():
            paths[variant] = tmp_path / variant
            paths[variant].write_text(PROGRAM.replace("TESTS", tests).replace("LOG", str(log)))
            paths[variant].chmod(0o755)
            binaries[variant] = QemuBinary(
                path=tmp_path / "qemu-system-x86_64",
                variant=variant,
                version="10.0.5",
                build_id=f"{variant}-{build}",
                series_sha256=None,
                sha256="",
            )

        async def qemu(progress: object) -> dict[Variant, QemuBinary]:
            return binaries

        async def program(target: str, progress: object, **options: object) -> dict[Variant, Path]:
            return paths

        monkeypatch.setattr(qtest, "ensure_qemu", qemu)
        monkeypatch.setattr(qtest, "ensure_test_program", program)

    return make


async def test_every_test_is_run_on_both_in_turn(programs: Programs, log: Path) -> None:
    programs("/q/passes /q/fails /q/skips /q/dies", "/q/passes /q/fails /q/dies /q/new")
    found = await run_migration_tests()

    assert {r.name: (r.unpatched, r.patched) for r in found.results.values()} == {
        "/q/passes": ("passed", "passed"),
        "/q/fails": ("failed", "failed"),
        "/q/skips": ("skipped", "missing"),
        "/q/dies": ("failed", "failed"),
        "/q/new": ("missing", "passed"),
    }
    assert found.accel == "tcg"
    assert found.regressions == []
    assert log.read_text().splitlines()[:4] == ["-p /q/passes"] * 2 + ["-p /q/fails"] * 2


async def test_a_test_is_run_without_those_below_it(programs: Programs, log: Path) -> None:
    programs("/q/a /q/a/b /q/ab", "/q/a")
    await run_migration_tests(only=["^/q/a$"])

    assert log.read_text().splitlines() == ["-p /q/a -s /q/a/b"] * 2


async def test_a_record_is_gone_on_from(
    programs: Programs, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "qtest.json"
    programs("/q/a /q/b", "/q/a /q/b")
    first = await run_migration_tests(only=["b$"], record_path=path)
    assert list(first.results) == ["/q/b"]

    whole = await run_migration_tests(record_path=path)
    assert list(whole.results) == ["/q/a", "/q/b"]
    assert whole == read_record(path)
    assert log.read_text().splitlines() == ["-p /q/b"] * 2 + ["-p /q/a"] * 2

    programs("/q/a /q/b", "/q/a /q/b", build="2")
    # Before anything is built.
    monkeypatch.setattr("lab.qemu.qtest.ensure_test_program", None)
    with pytest.raises(UsageError, match="other builds"):
        await run_migration_tests(record_path=path)


async def test_while_equal_pages_are_merged_nothing_is_recorded(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "qtest.json"
    programs("/q/a /q/b", "/q/a /q/b")
    # It begins while the second test runs.
    merging = iter([False, False, False, True])
    monkeypatch.setattr("lab.qemu.qtest.ksm_runs", lambda: next(merging))
    with pytest.raises(HostError, match="merges equal pages"):
        await run_migration_tests(record_path=path)
    assert list(read_record(path).results) == ["/q/a"]


async def test_no_test_is_begun_when_the_time_is_over(programs: Programs, log: Path) -> None:
    programs("/q/a", "/q/a")
    found = await run_migration_tests(budget_s=0)

    assert (found.tests, found.results) == (["/q/a"], {})
    assert not log.exists()


async def test_a_pattern_that_fits_nothing_is_refused(programs: Programs) -> None:
    programs("/q/a", "/q/a")
    with pytest.raises(UsageError, match="no test is named like x"):
        await run_migration_tests(only=["x"])
    with pytest.raises(UsageError, match="no regular expression"):
        await run_migration_tests(only=["("])
