"""What README shows of a user's own VM does what it says."""

import ast
import asyncio
import re
import textwrap
from pathlib import Path

import pytest

import lab
from lab.errors import HostError
from lab.guests.debian.build import ensure_debian
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.vm,
    pytest.mark.thorough,
    pytest.mark.platforms("tcg"),
    # It may have to build Debian first.
    pytest.mark.timeout(3600),
]

README = (ROOT / "README.md").read_text(encoding="utf-8")


def shown(section: str) -> str:
    """The Python that README shows in a section."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block[1]


async def test_a_debian_that_was_broken_is_back_with_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        await ensure_debian()
    except HostError as error:
        pytest.skip(f"Debian cannot be built here: {error}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAB_LAYERS_DIR", str(tmp_path / "layers"))
    code = shown("A VM of your own, with its disks")
    assert "rm -rf" in code
    ast.parse(f"async def shown():\n{textwrap.indent(code, '    ')}")
    space: dict[str, object] = {"lab": lab}
    exec(f"async def shown():\n{textwrap.indent(code, '    ')}", space)
    run = space["shown"]
    assert asyncio.iscoroutinefunction(run)
    await run()
    assert capsys.readouterr().out.strip() == "precious"
