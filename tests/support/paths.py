"""Where things are in the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
"""The recorded run sets."""

TEST_DATA = ROOT / "tests" / "unit" / "data"
"""Run sets and records that were made up for tests."""
