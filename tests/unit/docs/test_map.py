"""lab/README.md is a map of the code as it is, and its levels are those of the imports."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

LAB = ROOT / "lab"
TEXT = (LAB / "README.md").read_text(encoding="utf-8")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in LAB.rglob("*.py")
}
# The package itself imports nothing but a library; a module of no room is a room.
ROOMS = sorted({module.split(".")[1] for module in MODULES if module != "lab"} - {"__main__"})


def levels() -> dict[str, int]:
    """Each room's level, as the map says."""
    found = {}
    for level, rooms in re.findall(r"^\| (\d+) \| (.*?) \|", TEXT, re.M):
        for room in re.findall(r"`(\w+)(?:\.py|/)`", rooms):
            assert room not in found, f"{room} is on the map twice"
            found[room] = int(level)
    return found


def imports() -> Iterator[tuple[str, str, bool]]:
    """Who imports whom, by module, and whether inside a function."""
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        functions = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        inside = {node for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lab":
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    imported = name if name in MODULES else str(node.module)
                    yield module, imported, node in inside


def test_the_map_has_every_room_and_no_other() -> None:
    assert sorted(levels()) == ROOMS


def test_a_room_imports_only_from_the_levels_below_it() -> None:
    level = levels()
    upwards = sorted(
        f"{module} imports {imported}"
        for module, imported, _ in imports()
        if module.count(".") and imported.count(".") and module != "lab.__main__"
        for room, other in [(module.split(".")[1], imported.split(".")[1])]
        if room != other and level[other] >= level[room]
    )
    assert upwards == []


def test_there_is_no_circle_of_modules() -> None:
    above: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, imported, _ in imports():
        if imported != module:
            above[module].add(imported)
    left = set(MODULES)
    while free := {module for module in left if not above[module] & left}:
        left -= free
    assert left == set()


def test_only_commands_import_inside_functions() -> None:
    indented = {module for module, _, inside in imports() if inside}
    assert {module for module in indented if not module.startswith("lab.cli.")} == set()


NAMED = sorted(set(re.findall(r"`((?:\w+/)*[\w-]+\.(?:py|pyi|c)|(?:\w+/)+)`", TEXT)))


@pytest.mark.parametrize("name", NAMED)
def test_what_the_map_names_is_there(name: str) -> None:
    def in_patches() -> bool:
        return any(name in patch.read_text() for patch in (LAB / "qemu" / "patches").iterdir())

    assert (LAB / name).exists() or in_patches()


def test_links_between_the_pages_of_the_code_lead_somewhere() -> None:
    for page in [*LAB.rglob("*.md"), ROOT / "README.md", ROOT / "data" / "README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"
