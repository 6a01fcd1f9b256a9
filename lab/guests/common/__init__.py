"""What the guests have in common: headers in C, and a folder of the cache."""

from pathlib import Path

from lab.host.cache import cache_dir

FOLDER = Path(__file__).parent
"""For the compiler's -I."""

HEADERS = tuple(FOLDER / name for name in ("layout.h", "mix.h", "writers.h"))


def cache_folder() -> Path:
    """Return the part of the cache that belongs to the guests."""
    path = cache_dir() / "guest"
    path.mkdir(exist_ok=True)
    return path


def build_log() -> Path:
    """Return the file that says what the tools said that made the guests."""
    return cache_folder() / "build.log"
