"""floor.c: it compiles without a warning, does what it was asked for, and says so or says why not.

Nothing here asks how long something took but for lower bounds that hold on any machine.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

from lab.errors import BuildError, HostError, LabError
from lab.host.compiled import COMPILERS
from lab.host.probe import probe_uffd
from lab.host.tools import find_compiler, run_tool
from lab.measure.floor import build
from lab.measure.floor.program import Output, Sample, check, parse, run_block

needs_uffd = pytest.mark.skipif(not probe_uffd().usable, reason="userfaultfd is not permitted")
# A prime: it is no multiple of anything that could be counted instead.
FAULTS = 31
HANDLERS = ("sleep-near", "sleep-far", "spin", "sigbus")


@pytest.fixture
async def program() -> Path:
    return (await build.ensure_program()).path


def values(output: Output, stage: str) -> list[int]:
    return [sample.value_ns for sample in output.samples if sample.stage == stage]


def test_what_the_program_prints_is_read() -> None:
    lines = ["count busy_rounds 0", "sample call 512 1234", "sample return 1 -7"]
    output = parse([*lines, "count samples 2", "done"])
    assert output.samples == [Sample("call", 512, 1234), Sample("return", 1, -7)]
    assert output.counts == {"busy_rounds": 0, "samples": 2}
    assert output.skipped is None


def test_what_the_host_can_not_do_is_skipped_with_its_reason() -> None:
    assert parse(["skip no huge pages are reserved"]).skipped == "no huge pages are reserved"


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["sample call 1 10", "count samples 1"],
        ["sample call 1 10", "count samples 2", "done"],
        ["done"],
        ["sample call 1 ten", "count samples 1", "done"],
        ["Segmentation fault"],
    ],
)
def test_output_that_is_cut_short_or_mangled_is_refused(lines: list[str]) -> None:
    with pytest.raises(LabError, match="do not end as they should"):
        parse(lines)


def test_an_error_of_the_program_is_one_of_the_host() -> None:
    with pytest.raises(HostError, match="open: Permission denied"):
        parse(["count busy_rounds 0", "error open: Permission denied"])


@pytest.mark.parametrize(
    "counts",
    [
        {"faults": 30, "pages_written": 31},
        {"faults": 31, "pages_written": 31, "strange_faults": 1},
        {"bytes_written": 4096, "file_bytes": 0},
        {"zero_pages": 511, "scanned_pages": 512},
        {"faults": 31, "pages_written": 31, "strange_faults": 0},  # and no samples
    ],
)
def test_counts_that_differ_from_what_was_asked_for_are_found(counts: dict[str, int]) -> None:
    with pytest.raises(LabError):
        check(Output(samples=[Sample("fault", 1, 5)], counts=counts))


async def test_it_compiles_without_a_warning(tmp_path: Path) -> None:
    strict = ["-Werror", "-Wpedantic", "-Wshadow"]
    target = tmp_path / "floor"
    compiler = find_compiler(COMPILERS, "a test", "install gcc")
    await run_tool(
        [compiler, *build.CFLAGS, *strict, "-o", target, build.SOURCE], log=tmp_path / "log"
    )
    assert os.access(target, os.X_OK)


async def test_a_second_build_finds_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    first = await build.ensure_program()
    made = first.path.stat().st_mtime_ns
    assert await build.ensure_program() == first
    assert first.path.stat().st_mtime_ns == made
    assert first.compiler
    names = sorted(path.name for path in first.path.parent.iterdir())
    assert names == ["build.log", first.path.name]


async def test_a_source_that_does_not_compile_leaves_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "floor.c"
    source.write_text("int main(void) { return nothing; }\n")
    monkeypatch.setattr(build, "SOURCE", source)
    with pytest.raises(BuildError, match="nothing"):
        await build.ensure_program()
    assert [path.name for path in (tmp_path / "cache" / "floor").iterdir()] == ["build.log"]


async def test_a_host_without_a_compiler_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError) as caught:
        await build.ensure_program()
    assert "gcc" in caught.value.remedy


@needs_uffd
@pytest.mark.parametrize("busy", [0, 1])
@pytest.mark.parametrize("handler", HANDLERS)
async def test_each_page_written_is_one_fault(
    program: Path, tmp_path: Path, handler: str, busy: int
) -> None:
    output = await run_block(
        program, ["fault", handler, f"samples={FAULTS}", f"busy={busy}"], tmp_path
    )
    if output.skipped:
        pytest.skip(output.skipped)
    assert output.counts["faults"] == output.counts["pages_written"] == FAULTS
    assert output.counts["strange_faults"] == 0
    assert (output.counts["busy_rounds"] > 0) == (busy > 0)
    stages = Counter(sample.stage for sample in output.samples)
    assert stages == dict.fromkeys(("fault", "deliver", "unprotect", "return"), FAULTS)
    parts = zip(*(values(output, s) for s in ("deliver", "unprotect", "return")), strict=True)
    assert [sum(part) for part in parts] == values(output, "fault")
    assert min(values(output, "fault") + values(output, "deliver")) > 0


@needs_uffd
@pytest.mark.parametrize("handler", HANDLERS)
async def test_a_delay_of_the_handler_is_in_every_fault(
    program: Path, tmp_path: Path, handler: str
) -> None:
    arguments = ["fault", handler, "samples=7", "delay_us=300"]
    output = await run_block(program, arguments, tmp_path)
    if output.skipped:
        pytest.skip(output.skipped)
    assert min(values(output, "fault")) >= 300_000
    assert min(values(output, "unprotect")) >= 300_000


@needs_uffd
async def test_each_call_that_releases_is_one_sample_of_its_pages(
    program: Path, tmp_path: Path
) -> None:
    arguments = ["unprotect", "sweep", "ram=anon-4k", "mib=8", "samples=1000", "chunk=64"]
    output = await run_block(program, arguments, tmp_path)
    # 8 MiB are 2048 pages; after that nothing is left to release.
    assert [sample.pages for sample in output.samples] == [64] * 32
    output = await run_block(program, [*arguments, "samples=5"], tmp_path)
    assert len(output.samples) == 5


@needs_uffd
async def test_arming_says_how_many_pages_it_was(program: Path, tmp_path: Path) -> None:
    arguments = ["arm", "populated", "ram=anon-4k", "mib=10", "samples=3"]
    output = await run_block(program, arguments, tmp_path)
    assert [sample.pages for sample in output.samples] == [2560] * 3


@pytest.mark.parametrize("variant", ["fresh", "overwrite", "direct"])
async def test_a_written_file_is_as_long_as_what_was_written_and_goes_away(
    program: Path, tmp_path: Path, variant: str
) -> None:
    target = tmp_path / "images"
    target.mkdir()
    output = await run_block(program, ["write", variant, "mib=6", f"dir={target}"], tmp_path)
    if output.skipped:
        pytest.skip(output.skipped)
    assert output.counts["bytes_written"] == output.counts["file_bytes"] == 6 << 20
    assert [s.pages for s in output.samples if s.stage == "write"] == [512] * 3
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("variant", ["gather-4k", "bulk-2m"])
async def test_copying_is_2_mib_a_sample(program: Path, tmp_path: Path, variant: str) -> None:
    # The program itself compares each copied page with the one it is of.
    output = await run_block(program, ["copy", variant, "mib=8"], tmp_path)
    assert [sample.pages for sample in output.samples] == [512] * 4


async def test_all_zeros_are_found_to_be_zero(program: Path, tmp_path: Path) -> None:
    output = await run_block(program, ["scan", "zeros", "mib=8"], tmp_path)
    assert output.counts["zero_pages"] == output.counts["scanned_pages"] == 2048


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense", "nonsense"],
        ["scan"],
        ["scan", "ones"],
        ["scan", "zeros", "mib"],
        ["scan", "zeros", "mib=-1"],
        ["scan", "zeros", "mib=8x"],
        ["scan", "zeros", "colour=1"],
        ["write", "fresh", "mib=8"],
        ["write", "fresh", "mib=8", "dir=/nonexistent"],
    ],
)
async def test_what_it_can_not_do_is_an_error_in_one_line(
    program: Path, tmp_path: Path, arguments: list[str]
) -> None:
    with pytest.raises(HostError) as caught:
        await run_block(program, arguments, tmp_path)
    assert "\n" not in str(caught.value)


async def test_a_program_that_dies_is_an_error_that_names_no_place(tmp_path: Path) -> None:
    dies = tmp_path / "floor"
    dies.write_text("#!/bin/sh\nkill -SEGV $$\n")
    dies.chmod(0o755)
    with pytest.raises(LabError) as caught:
        await run_block(dies, ["scan", "zeros"], tmp_path)
    assert "died measuring scan zeros" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
