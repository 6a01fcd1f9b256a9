"""QEMU's own tests pass on the patched QEMU where they did without the patches, as do the new ones.

Some of them, that is; `lab qtest` runs all, which takes hours.
"""

from pathlib import Path

import pytest

from lab.qemu.qtest import read_record, run_migration_tests
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.source, pytest.mark.timeout(7200)]

#: A stream and a file with and without places for pages, and cancelling: what the patches touch.
SOME = ("/precopy/unix/plain$", "/precopy/file/mapped-ram$", "/cancel/src/after/(none|active)$")


async def test_migration_tests_pass_as_without_the_patches(tmp_path: Path) -> None:
    path = tmp_path / "qtest.json"
    found = await run_migration_tests(only=SOME, record_path=path)

    assert len(found.results) == 4
    assert {result.unpatched for result in found.results.values()} == {"passed"}
    assert found.regressions == []
    assert read_record(path) == found


async def test_the_tests_that_the_patches_bring_pass(tmp_path: Path) -> None:
    path = tmp_path / "qtest.json"
    found = await run_migration_tests(only=("/migration/snapshot/",), record_path=path)

    recorded = read_record(ROOT / "data" / "qtest.json")
    brought = {name for name in recorded.results if "/migration/snapshot/" in name}
    assert set(found.results) == brought
    # With each of three engines a stream, a file, its log, and cancelling, at least.
    assert len(brought) > 3 * 4
    assert {result.unpatched for result in found.results.values()} == {"missing"}
    assert {result.patched for result in found.results.values()} == {"passed"}
