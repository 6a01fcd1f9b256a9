"""The Debian packages that the lab needs."""

import shutil
import subprocess
from importlib import resources


def debian_packages() -> list[str]:
    """The Debian packages the lab needs, from ``debian-packages.txt``."""
    text = resources.files("lab").joinpath("debian-packages.txt").read_text(encoding="utf-8")
    return [name for line in text.splitlines() if (name := line.partition("#")[0].strip())]


def missing_packages() -> list[str]:
    """Those of `debian_packages` that are not installed; empty where there is no dpkg."""
    wanted = debian_packages()
    if shutil.which("dpkg-query") is None:
        return []
    done = subprocess.run(
        ["dpkg-query", "-W", "-f=${db:Status-Status} ${Package}\n", *wanted],
        capture_output=True,
        text=True,
        timeout=20,
    )
    installed = {
        line.removeprefix("installed ")
        for line in done.stdout.splitlines()
        if line.startswith("installed ")
    }
    return [name for name in wanted if name not in installed]
