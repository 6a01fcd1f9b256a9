"""QEMU's own migration tests, on the unpatched QEMU and on the patched one.

They say whether the patches broke anything that is not the lab's: a test that passes on the one
has to pass on the other. The programs come from the two trees, the tests from their `--tap` output.

Tests run one by one, in a process and a folder of its own each, the unpatched QEMU first and the
patched one right after it: what a test takes away from the next, or leaves on a busy machine, both
get alike. A test takes up to a minute on a small machine, and there are many, so what is known can
be kept in a record and gone on from.

One word of the tests is changed, in both trees: on a 64-bit machine they run on `q35`, which is not
among the devices that the lab builds, and here they run on `pc`, as they do on a 32-bit one.
"""

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec

from lab.errors import BuildError, HostError, UsageError
from lab.host.files import write_atomically
from lab.host.ksm import KSM, ksm_runs
from lab.host.needs import kvm_problem
from lab.host.probe import KVM_DEVICE
from lab.host.tools import require_tools, run_tool
from lab.host.workdir import private_folder
from lab.qemu.build import VARIANTS, QemuBinary, ensure_qemu, ensure_test_program
from lab.qemu.source import Progress, qemu_cache
from lab.records import Schema, encode
from lab.scenario.methods import Variant

PROGRAM = "tests/qtest/migration-test"
TEST_TIMEOUT_S = 900
"""Several times what QEMU allows for the slowest test; a test that takes longer hangs."""

Outcome = Literal["passed", "failed", "skipped", "missing"]
"""`failed` includes a test program that died or hung; `missing` is a test that this program does
not have."""

# GLib's names have no spaces; what is behind one is a reason.
_RESULT = re.compile(r"(not )?ok\b(?:\s+\d+)?(?:\s+-)?\s+(/\S+)(.*)")
_SKIP = re.compile(r"#\s*skip\b", re.IGNORECASE)
_STATUS = "# exit status "


class TestResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One test, on both."""

    __test__ = False  # not for pytest

    name: str
    unpatched: Outcome
    patched: Outcome

    @property
    def is_regression(self) -> bool:
        """Whether the patches broke it."""
        return self.unpatched == "passed" and self.patched != "passed"


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known about two builds: `accel` is what ran the guests, `tests` what there is to run.

    `results` has those of the tests that were run, by name.
    """

    schema: str
    build_ids: dict[Variant, str]
    accel: str
    tests: list[str]
    results: dict[str, TestResult] = {}

    @property
    def regressions(self) -> list[TestResult]:
        """The tests that the patches broke."""
        return [result for result in self.results.values() if result.is_regression]


SCHEMA = Schema(
    family="lab.qtest", version=1, kind=Record, remedy="name a file that `lab qtest --record` wrote"
)


def parse_tap(lines: Iterable[str]) -> dict[str, Outcome]:
    """Read the outcomes of tests, by name, from what a program says in the Test Anything Protocol.

    What is not a result, such as the plan, comments and a test's own output, is left out. A test
    that is reported twice has the worse outcome.
    """
    rank = ("skipped", "passed", "failed")
    found: dict[str, Outcome] = {}
    for line in lines:
        match = _RESULT.match(line.rstrip())
        if match is None:
            continue
        outcome: Outcome = "failed" if match[1] else "passed"
        if _SKIP.search(match[3]):
            outcome = "skipped"
        name = match[2]
        if name not in found or rank.index(outcome) > rank.index(found[name]):
            found[name] = outcome
    return found


def outcome_of(name: str, lines: Sequence[str], status: int) -> Outcome:
    """Return what became of a test that was run alone.

    A program that died, or was killed because it hung, has not passed, whatever it said before.
    """
    reported = parse_tap(lines).get(name)
    if status not in (0, 77) or reported is None:
        return "failed"
    return reported


def side_by_side(record: Record) -> str:
    """Return both lists as text, one test a line, what the patches broke marked."""
    width = max((len(name) for name in record.results), default=4)
    lines = [f"{'test':{width}}  unpatched  patched"]
    for name, result in record.results.items():
        mark = "  <- broken" if result.is_regression else ""
        lines.append(f"{name:{width}}  {result.unpatched:9}  {result.patched}{mark}")
    lines.append(_counted(record))
    return "\n".join(lines)


def _counted(record: Record) -> str:
    counts = []
    for variant in ("unpatched", "patched"):
        outcomes = [getattr(result, variant) for result in record.results.values()]
        said = [f"{outcomes.count(o)} {o}" for o in get_args(Outcome) if o in outcomes]
        counts.append(f"{variant}: {', '.join(said) or 'nothing'}")
    left = len(record.tests) - len(record.results)
    return "; ".join([*counts, f"{left} of {len(record.tests)} not run"])


def read_record(path: Path) -> Record:
    """Read a record.

    :raise RunError: when it is unreadable or of another version.
    """
    return SCHEMA.read(path)


def write_record(record: Record, path: Path) -> None:
    """Write a record, whole or not at all."""
    write_atomically(path, encode(record, order="deterministic"))


class _Bench:
    """The two programs and their QEMUs, and how to run one of them."""

    def __init__(
        self, binaries: Mapping[str, QemuBinary], programs: Mapping[Variant, Path], hide_kvm: bool
    ) -> None:
        self._binaries = binaries
        self._programs = programs
        self._hide_kvm = hide_kvm
        self.log = qemu_cache() / "logs" / "qtest.log"

    async def run(self, variant: Variant, arguments: Sequence[str]) -> tuple[list[str], int]:
        """Run the program of a variant; return what it said and its exit status."""
        binary = self._binaries[variant].path
        with private_folder("lab-qtest-") as folder:
            environment = os.environ | {
                "QTEST_QEMU_BINARY": str(binary),
                "QTEST_QEMU_IMG": str(binary.with_name("qemu-img")),
                "TMPDIR": str(folder),
                "LC_ALL": "C.UTF-8",
            }
            timeout = ["timeout", "--kill-after=10", str(TEST_TIMEOUT_S)]
            *lines, status = await run_tool(
                [*self._shell(), *timeout, self._programs[variant], *arguments],
                log=self.log,
                cwd=folder,
                env=environment,
            )
        return lines, int(status.removeprefix(_STATUS))

    def _shell(self) -> list[str]:
        """What a program is run by: it says how the program ended, and hides KVM from it."""
        script = f'"$@"; echo "{_STATUS}$?"'
        if not self._hide_kvm:
            return ["sh", "-c", script, "sh"]
        # In a mount namespace of its own.
        require_tools(["unshare", "mount"])
        as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        hide = f"mount --bind /dev/null {KVM_DEVICE} || exit; "
        return ["unshare", "--mount", *as_root, "--", "sh", "-c", hide + script, "sh"]

    async def names(self, variant: Variant) -> list[str]:
        """Return the tests that the program of a variant has."""
        lines, status = await self.run(variant, ["--full", "-l"])
        names = [line for line in lines if line.startswith("/")]
        if status or not names:
            said = " | ".join(lines[-3:])
            raise HostError(f"{PROGRAM} does not list its tests: {said}", f"see {self.log}")
        return names

    async def outcome(self, variant: Variant, name: str, tests: Sequence[str]) -> Outcome:
        """Run one of the tests alone."""
        # Asked for a test, the program runs those as well whose names go on from it.
        below = [part for other in tests if other.startswith(f"{name}/") for part in ("-s", other)]
        arguments = ["--full", "--tap", "-k", "-p", name, *below]
        lines, status = await self.run(variant, arguments)
        return outcome_of(name, lines, status)


def _on_pc(tree: Path) -> None:
    framework = tree / "tests/qtest/migration/framework.c"
    before = framework.read_text()
    after = before.replace('machine_alias = "q35"', 'machine_alias = "pc"')
    if after == before:
        raise BuildError(f"{framework.name} does not name q35 where it did", "look at it")
    framework.write_text(after)


def _select(tests: Sequence[str], only: Sequence[str]) -> list[str]:
    try:
        patterns = [re.compile(pattern) for pattern in only]
    except re.error as error:
        raise UsageError(f"{error.pattern!r} is no regular expression: {error}") from None
    selected = [name for name in tests if not only or any(p.search(name) for p in patterns)]
    if not selected:
        raise UsageError(
            f"no test is named like {' or '.join(only)}", "`lab qtest --minutes 0 --json` lists all"
        )
    return selected


def _begin(path: Path | None, fresh: Record) -> Record:
    """Return the record to go on with: what the file has of the same builds, or nothing."""
    if path is None or not path.exists():
        return fresh
    known = read_record(path)
    if (known.build_ids, known.accel) != (fresh.build_ids, fresh.accel):
        raise UsageError(f"{path} is a record of other builds", "name another file, or delete it")
    return known


def _with(record: Record, results: Mapping[str, TestResult]) -> Record:
    ordered = {name: results[name] for name in record.tests if name in results}
    return msgspec.structs.replace(record, results=ordered)


def _require_no_ksm() -> None:
    # The tests start QEMU as anybody does, and a snapshot that is refused would count as broken.
    if ksm_runs():
        raise HostError(
            "the kernel merges equal pages (KSM), and so the patched QEMU refuses background "
            "snapshots",
            f"`echo 2 | sudo tee {KSM / 'run'}`, and give the command again; with --record it goes "
            "on",
        )


async def run_migration_tests(
    progress: Progress | None = None,
    *,
    only: Sequence[str] = (),
    budget_s: float | None = None,
    record_path: Path | None = None,
) -> Record:
    """Run QEMU's migration tests on both builds, and return what became of them.

    :param only: regular expressions; a test is run if one of them is found in its name.
    :param budget_s: begin no test after so much time.
    :param record_path: a record to go on from and to write after each test.
    :raise UsageError: when no test fits, or the record is of other builds.
    :raise HostError: while the kernel merges equal pages.
    :raise LabError: when something cannot be built.
    """
    report = progress or (lambda message: None)
    began = time.monotonic()
    binaries = await ensure_qemu(progress)
    hide_kvm = KVM_DEVICE.exists() and bool(kvm_problem("linux"))
    record = _begin(
        record_path,
        Record(
            schema=str(SCHEMA),
            build_ids={variant: binaries[variant].build_id for variant in VARIANTS},
            accel="kvm" if KVM_DEVICE.exists() and not hide_kvm else "tcg",
            tests=[],
        ),
    )
    programs = await ensure_test_program(PROGRAM, progress, edit=_on_pc)
    bench = _Bench(binaries, programs, hide_kvm)
    has = {variant: await bench.names(variant) for variant in VARIANTS}
    tests = list(dict.fromkeys([*has["unpatched"], *has["patched"]]))
    selected = _select(tests, only)
    record = msgspec.structs.replace(record, tests=tests)
    record = _with(record, record.results)
    left = [name for name in selected if name not in record.results]
    _require_no_ksm()
    for done, name in enumerate(left):
        if budget_s is not None and time.monotonic() - began >= budget_s:
            break
        outcomes: dict[Variant, Outcome] = {}
        for variant in ("unpatched", "patched"):
            report(f"qtest {done + 1}/{len(left)} {name} ({variant})")
            outcomes[variant] = (
                await bench.outcome(variant, name, tests) if name in has[variant] else "missing"
            )
            _require_no_ksm()
        result = TestResult(name=name, unpatched=outcomes["unpatched"], patched=outcomes["patched"])
        record = _with(record, {**record.results, name: result})
        if record_path is not None:
            write_record(record, record_path)
    return record
