"""What a sanitizer reports is found, each once."""

from pathlib import Path

from tests.support.sanitize import findings

ASAN = """\
==7==ERROR: AddressSanitizer: heap-use-after-free on address 0x1
    #0 0x1 in foo ../migration/ram.c:12
SUMMARY: AddressSanitizer: heap-use-after-free ../migration/ram.c:12 in foo
"""
UBSAN = "../hw/a.c:3:4: runtime error: shift exponent 64 is too large\n"


def test_each_finding_is_named_once_with_its_report(tmp_path: Path) -> None:
    (tmp_path / "report.1").write_text(ASAN)
    (tmp_path / "report.2").write_text(ASAN)
    (tmp_path / "report.3").write_text(UBSAN)
    found = findings(tmp_path)
    assert len(found) == 2
    assert "heap-use-after-free" in next(iter(found))
    assert "migration/ram.c:12" in next(iter(found.values()))
    assert UBSAN.strip() in found


def test_no_report_is_no_finding(tmp_path: Path) -> None:
    assert findings(tmp_path) == {}
