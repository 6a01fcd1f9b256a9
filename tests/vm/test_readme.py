"""What is shown of a user's own VM does what it says."""

import asyncio
import re
import textwrap
from pathlib import Path

import pytest

import lab
from lab.errors import HostError
from lab.guests.debian.build import ensure_debian
from lab.measure.applications.ask import wait_for_redis
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.vm,
    pytest.mark.thorough,
    pytest.mark.platforms("tcg"),
    # It may have to build Debian first.
    pytest.mark.timeout(3600),
]

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "lab" / "cli" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
async def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian, layers of the test's own, and a folder for what it writes."""
    try:
        await ensure_debian()
    except HostError as error:
        pytest.skip(f"Debian cannot be built here: {error}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAB_LAYERS_DIR", str(tmp_path / "layers"))


def shown(text: str, section: str) -> str:
    """The Python that a text shows in a section."""
    found = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    block = re.search(r"```python\n(.*?)```", found, re.DOTALL)
    assert block is not None
    return block[1]


async def run_shown(code: str) -> None:
    """Run it as a notebook's cell would."""
    space: dict[str, object] = {"lab": lab}
    exec(f"async def shown():\n{textwrap.indent(code, '    ')}", space)
    run = space["shown"]
    assert asyncio.iscoroutinefunction(run)
    await run()


async def test_a_debian_that_was_broken_is_back_with_its_disk(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = shown(README, "A VM of your own, with its disks")
    assert "rm -rf" in code
    await run_shown(code)
    assert capsys.readouterr().out.strip() == "precious"


async def test_what_clients_feel_is_measured_from_outside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = shown(COMMANDS, "What the clients of a server of yours feel")
    socket = tmp_path / "monitor"
    machine = lab.Machine(image=("debian",), ram_mib=1024, forward=("0:6379",))
    async with lab.boot(machine, socket=socket) as vm:
        await wait_for_redis(vm.ports[6379], 300)
        code = code.replace("SOCKET", str(socket)).replace("port=6379", f"port={vm.ports[6379]}")
        await run_shown(code)
    said = re.fullmatch(r"worst ([0-9.]+) ms, (-?\d+) requests .*", capsys.readouterr().out.strip())
    assert said is not None
    assert float(said[1]) > 0
