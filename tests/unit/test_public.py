"""`import lab` is quick, and the dozen names that a notebook uses are there."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lab

DECLARED = sorted(lab._LAZY)


@pytest.mark.parametrize("name", DECLARED)
def test_a_public_name_is_that_of_its_module(name: str) -> None:
    assert getattr(lab, name) is getattr(importlib.import_module(lab._LAZY[name]), name)
    assert name in dir(lab)


def test_type_checkers_are_told_the_same_names_as_the_interpreter() -> None:
    """The imports that only a type checker sees, read from the source."""
    tree = ast.parse(Path(lab.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.asname: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == lab._LAZY


def test_a_name_that_is_not_there_is_an_ordinary_error() -> None:
    misspelt = "snapshoot"
    with pytest.raises(AttributeError, match="no attribute 'snapshoot'"):
        getattr(lab, misspelt)


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("numpy", "pandas", "matplotlib", "scipy", "pyarrow", "msgspec", "qemu.qmp")
    program = f"import lab, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
