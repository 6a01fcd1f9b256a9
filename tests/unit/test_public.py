"""`import lab` is quick, and the names that a notebook uses are there."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lab

STUB = ast.parse(Path(lab.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
DECLARED = {
    alias.name: f"lab.{node.module}" if node.module else ""
    for node in STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_a_public_name_is_that_of_its_module(name: str) -> None:
    module = DECLARED[name]
    found = getattr(importlib.import_module(module), name) if module else f"lab.{name}"
    assert getattr(lab, name) is (found if module else sys.modules[f"lab.{name}"])
    assert name in dir(lab)


def test_a_name_that_is_not_there_is_an_ordinary_error() -> None:
    misspelt = "snapshoot"
    with pytest.raises(AttributeError, match="attribute snapshoot"):
        getattr(lab, misspelt)


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("numpy", "pandas", "matplotlib", "scipy", "pyarrow", "msgspec", "qemu.qmp")
    program = f"import lab, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
