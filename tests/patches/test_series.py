"""The patch series is one a QEMU maintainer could be shown."""

import asyncio
import re
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

from lab.errors import BuildError
from lab.qemu.build import check_each_step
from lab.qemu.series import (
    SERIES_DIR,
    PatchCheck,
    apply_patch,
    check_series,
    read_series,
    series_sha256,
)

SUBJECT_COLUMNS = 76


def message(patch: Path) -> Message:
    return message_from_string(patch.read_text(encoding="utf-8"))


def subject(patch: Path) -> str:
    unfolded = re.sub(r"\n\s+", " ", str(message(patch)["Subject"]))
    return re.sub(r"^\[PATCH[^\]]*\] ", "", unfolded)


def body(patch: Path) -> str:
    text = str(message(patch).get_payload()).partition("\n---\n")[0]
    kept = [line for line in text.splitlines() if not re.match(r"[A-Z][A-Za-z-]+: ", line)]
    return "\n".join(kept).strip()


def test_the_series_lists_exactly_the_patches_present() -> None:
    listed = [patch.name for patch in read_series()]

    assert sorted(listed) == sorted(path.name for path in SERIES_DIR.glob("*.patch"))
    assert len(set(listed)) == len(listed)


def test_patches_are_numbered_in_the_order_they_apply() -> None:
    names = [patch.name for patch in read_series()]

    assert names == sorted(names)
    assert [int(name.partition("-")[0]) for name in names] == list(range(1, len(names) + 1))


def test_subjects_name_a_subsystem_and_are_short() -> None:
    for patch in read_series():
        text = subject(patch)
        assert len(text) <= SUBJECT_COLUMNS, patch.name
        assert re.match(r"[\w/.,+-]+: \S", text), patch.name
        assert not text.endswith("."), patch.name


def test_every_patch_says_why() -> None:
    for patch in read_series():
        assert len(body(patch).split()) >= 10, patch.name


def test_a_series_that_names_a_missing_patch_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("series").write_text("# comment\n\n0001-a.patch  # why\n")
    with pytest.raises(BuildError, match=r"0001-a\.patch"):
        read_series(tmp_path)

    tmp_path.joinpath("0001-a.patch").touch()
    assert [patch.name for patch in read_series(tmp_path)] == ["0001-a.patch"]


def test_a_series_is_known_by_names_contents_and_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("1")
    second.write_text("2")
    hashes = {series_sha256(order) for order in ([], [first], [first, second], [second, first])}
    first.write_text("3")
    hashes.add(series_sha256([first]))

    assert len(hashes) == 5


PATCH = "--- a/file\n+++ b/file\n@@ -1,6 +1,7 @@\n one\n two\n three\n+new\n four\n five\n six\n"


@pytest.mark.parametrize(
    ("text", "applies"),
    [
        ("one\ntwo\nthree\nfour\nfive\nsix\n", True),
        ("zero\none\ntwo\nthree\nfour\nfive\nsix\n", True),
        ("ONE\ntwo\nthree\nfour\nfive\nsix\n", False),
        ("one\ntwo\nthree\nnew\nfour\nfive\nsix\n", False),
    ],
    ids=["exact", "moved", "needs fuzz", "already applied"],
)
async def test_no_fuzz_is_allowed(tmp_path: Path, text: str, applies: bool) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    tree.joinpath("file").write_text(text)
    patch = tmp_path / "0001-a.patch"
    patch.write_text(PATCH)

    if applies:
        await apply_patch(tree, patch, tmp_path / "log")
        assert tree.joinpath("file").read_text() == text.replace("three\n", "three\nnew\n")
    else:
        with pytest.raises(BuildError):
            await apply_patch(tree, patch, tmp_path / "log")
        assert tree.joinpath("file").read_text() == text
    assert [path.name for path in tree.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def checks() -> list[PatchCheck]:
    return asyncio.run(check_series())


@pytest.mark.source
def test_every_patch_applies_to_the_pristine_source(checks: list[PatchCheck]) -> None:
    assert [check.name for check in checks] == [patch.name for patch in read_series()]
    assert {check.name: check.problem for check in checks if check.problem} == {}


@pytest.mark.source
def test_checkpatch_has_nothing_to_say(checks: list[PatchCheck]) -> None:
    reports = {check.name: check.report for check in checks if check.errors or check.warnings}
    assert reports == {}


@pytest.mark.slow
@pytest.mark.timeout(7200)
async def test_qemu_builds_after_every_patch() -> None:
    assert await check_each_step() == [patch.name for patch in read_series()]
