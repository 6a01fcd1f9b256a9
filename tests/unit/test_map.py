"""lab/README.md is a map of the code as it is."""

import re
from pathlib import Path

import pytest

LAB = Path(__file__).resolve().parents[2] / "lab"
TEXT = (LAB / "README.md").read_text(encoding="utf-8")
PLACES = [*LAB.glob("*.py"), *(path.parent for path in LAB.glob("*/__init__.py"))]


@pytest.mark.parametrize(
    "place", [p for p in PLACES if p.name != "__init__.py"], ids=lambda place: place.name
)
def test_every_module_and_room_is_on_the_map_once(place: Path) -> None:
    name = place.name + ("/" if place.is_dir() else "")
    rows = [line for line in TEXT.split("\n## The way")[0].splitlines() if line.startswith("| `")]
    assert sum(f"`{name}`" in line.split(" | ")[0] for line in rows) == 1


def test_what_the_map_names_is_there() -> None:
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|c)|\w+/)`", TEXT))
    for name in named - {n for n in named if n.startswith("migration/")}:
        found = (LAB / name).exists() or any(LAB.glob(f"*/{name}"))
        in_patches = any(name in patch.read_text() for patch in (LAB / "qemu").glob("*.patch"))
        assert found or in_patches, name
