"""The ways to install the lab agree with each other."""

import re
import subprocess
import tomllib
from typing import Any

from tests.support.paths import ROOT

# Distributions that conda-forge has under another name.
CONDA_NAMES = {"matplotlib": "matplotlib-base", "qemu.qmp": "python-qemu-qmp"}


def project() -> dict[str, Any]:
    with ROOT.joinpath("pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["project"]
    return table


def environment() -> dict[str, str | list[str]]:
    """The subset of YAML that environment.yml is written in: scalars and lists of scalars."""
    found: dict[str, str | list[str]] = {}
    key = ""
    for line in ROOT.joinpath("environment.yml").read_text().splitlines():
        text = line.partition("#")[0].rstrip()
        if match := re.fullmatch(r"([a-z]+):\s*(.*)", text):
            key = match[1]
            found[key] = match[2] or []
        elif match := re.fullmatch(r"\s+- (\S+)", text):
            entries = found[key]
            assert isinstance(entries, list)
            entries.append(match[1])
        else:
            assert not text, f"not understood: {line}"
    return found


def conda_requirement(requirement: str) -> str:
    match = re.fullmatch(r"([A-Za-z0-9._-]+?)(==|>=)(\S+)", requirement)
    assert match is not None, requirement
    operator = "=" if match[2] == "==" else match[2]
    return CONDA_NAMES.get(match[1], match[1]) + operator + match[3]


def test_conda_gets_what_pip_gets() -> None:
    table = project()
    wanted = [*table["dependencies"], *table["optional-dependencies"]["notebooks"]]
    dependencies = environment()["dependencies"]
    assert isinstance(dependencies, list)
    given = [entry for entry in dependencies if not re.match(r"(python=|pip:?$)", entry)]

    assert sorted(given) == sorted(conda_requirement(entry) for entry in wanted)


def test_conda_uses_a_python_the_project_supports() -> None:
    dependencies = environment()["dependencies"]
    (python,) = [entry for entry in dependencies if entry.startswith("python=")]
    match = re.fullmatch(r"python=3\.(\d+)\.\*", python)
    oldest = re.fullmatch(r">=3\.(\d+)", project()["requires-python"])

    assert match is not None
    assert oldest is not None
    assert int(match[1]) >= int(oldest[1])


def test_conda_uses_the_community_channel_alone() -> None:
    assert environment()["channels"] == ["conda-forge", "nodefaults"]


def test_the_licence_is_the_one_that_is_declared() -> None:
    assert project()["license"] == "GPL-2.0-or-later"
    assert "Version 2, June 1991" in ROOT.joinpath("LICENSE").read_text()


def test_every_make_target_is_listed_by_help() -> None:
    makefile = ROOT.joinpath("Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    listed = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))

    assert listed == set(phony.split())
    assert {"reproduce", "test", "lab", "notebooks", "lint", "help"} <= listed


def test_continuous_integration_runs_all_that_must_be_green() -> None:
    script = ROOT / ".ci/run"

    assert script.stat().st_mode & 0o111
    assert "make test-all" in script.read_text()
    assert "make test-all" in ROOT.joinpath("README.md").read_text()
    subprocess.run(["bash", "-n", script], check=True)
