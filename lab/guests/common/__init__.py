"""What the guests have in common: headers in C."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""For the compiler's -I."""

HEADERS = tuple(FOLDER / name for name in ("layout.h", "mix.h", "writers.h"))
