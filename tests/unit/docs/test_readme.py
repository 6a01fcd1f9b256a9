"""What the README says is there, is there, and its numbers are those of the recorded data."""

import re

import pytest

import lab
from lab.report.notebooks import with_tables
from lab.scenario.methods import METHODS
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "lab" / "cli" / "README.md").read_text()
PROMISES = (ROOT / "lab" / "snapshot" / "README.md").read_text()


def test_its_tables_are_made_from_the_recorded_data() -> None:
    assert "<!-- table of data/first-light -->" in README
    assert with_tables(README, ROOT) == README


@pytest.mark.parametrize(
    ("name", "said", "bound"),
    [
        ("redis-large", "takes less than a tenth of the time with `live`", 0.1),
        ("redis-set", "with little data in a guest of 1 GiB, less than half", 0.5),
    ],
)
def test_what_it_says_of_redis_is_in_the_recorded_data(name: str, said: str, bound: float) -> None:
    assert said in README
    found = lab.df_application_ratios(lab.load_set(ROOT / "data" / name))
    worst = found[found["metric"] == "request_worst_ms"].set_index("against")["ratio"]
    assert (worst[["background", "migrate-to-file"]] < bound).all()


def test_a_newcomer_reads_it_in_two_minutes() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize(
    "name",
    [*sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("[!.]*/**/*.md")), "README.md"],
)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_every_make_target_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)\b", README + COMMANDS):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_command_it_names_exists() -> None:
    named = set(re.findall(r"\blab ([a-z]+)\b(?= [\-|]| data|`)", README + COMMANDS))
    known = {path.stem for path in (ROOT / "lab" / "cli").glob("[a-z]*.py")}
    assert {"measure", "compare", "report", "doctor"} <= named
    assert named <= known


def test_every_test_that_proves_a_promise_exists() -> None:
    named = re.findall(r"\b(test_\w+)\.py: ((?:test_\w+(?:, )?)+)", PROMISES)
    assert len(named) > 20
    for module, tests in named:
        content = "".join(path.read_text() for path in (ROOT / "tests").rglob(f"{module}.py"))
        for test in tests.split(", "):
            assert re.search(rf"^(async )?def {test}\(", content, re.MULTILINE), test


def test_it_explains_every_method() -> None:
    for name in METHODS:
        assert f"| `{name}` |" in README


def test_it_does_not_promise_that_twins_differ() -> None:
    """Two guests of one image have the same random numbers.  Field report F14."""
    (not_promised,) = re.findall(r"^\*\*Not promised\*\*.*$", PROMISES, re.MULTILINE)
    assert "same random numbers" in not_promised
    assert "VMGenID" in not_promised


def test_an_image_is_described_by_the_title_of_its_figure() -> None:
    text = "![old](a/b.png) <!-- figure plot_cost -->\n![other](c.png)\n"
    title = lab.plot_cost.text.title
    assert with_tables(text, ROOT) == text.replace("old", title)
    assert "<!-- figure plot_slowdown -->" in README
