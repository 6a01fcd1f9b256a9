"""Debian's packages: which of those that the lab needs are installed, and a client of apt.

The mirrors are those that the system's apt is set up with.  Nothing is installed and nothing of the
system's changes, so root is not needed.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from lab.errors import BuildError, HostError
from lab.host.files import write_atomically
from lab.host.tools import run_tool

_KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)


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


def has_apt() -> bool:
    """Whether packages can be downloaded and unpacked here."""
    return all(shutil.which(name) for name in ("apt-get", "apt-cache", "dpkg-deb"))


def archive_keyring() -> Path:
    """Return the file with the keys of Debian's archive.

    :raise HostError: when it is not installed.
    """
    keyring = next((path for path in _KEYRINGS if path.exists()), None)
    if keyring is None:
        raise HostError(
            "the keys of Debian's archive are not installed", "install debian-archive-keyring"
        )
    return keyring


def _options(settings: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(part for key, value in settings.items() for part in ("-o", f"{key}={value}"))


@dataclass(frozen=True, kw_only=True)
class Apt:
    """Asks apt, with the system's package lists unless it is given lists of its own.

    Every method raises `HostError` when the tool is not there, and `BuildError` when it fails.

    :param log: what apt says is appended here.
    """

    log: Path
    options: tuple[str, ...] = _options(
        {
            "Acquire::Retries": 3,
            # As root apt would hand downloads to a user who may not enter a private folder.
            "APT::Sandbox::User": "root",
        }
    )

    def with_lists(self, folder: Path) -> "Apt":
        """Return a client whose package lists and downloads are in a folder of its own."""
        for name in ("lists/partial", "cache/archives/partial"):
            folder.joinpath(name).mkdir(parents=True, exist_ok=True)
        own = _options({"Dir::State::lists": folder / "lists", "Dir::Cache": folder / "cache"})
        return replace(self, options=(*self.options, *own))

    def with_debian_source(self, folder: Path, uri: str, suite: str) -> "Apt":
        """Return a client that knows the sources of one suite of Debian's and nothing else.

        :raise HostError: when the keys of Debian's archive are not installed.
        """
        keyring = archive_keyring()
        own = self.with_lists(folder)
        listing = folder / "sources.list"
        write_atomically(listing, f"deb-src [signed-by={keyring}] {uri} {suite} main\n".encode())
        only = {
            "Dir::Etc::SourceList": listing,
            "Dir::Etc::SourceParts": "/dev/null",
            "Acquire::Languages": "none",
            # By default apt calls a mirror that does not answer a warning.
            "APT::Update::Error-Mode": "any",
        }
        return replace(own, options=(*own.options, *_options(only)))

    async def _run(self, program: str, *arguments: str, cwd: Path | None = None) -> list[str]:
        environment = {**os.environ, "LC_ALL": "C"}
        command = [program, "-q", *self.options, *arguments]
        return await run_tool(command, log=self.log, cwd=cwd, env=environment)

    async def debian_archives(self) -> list[str]:
        """Return the URIs of Debian's main archive that the system's apt is set up with."""
        return main_archive_uris("\n".join(await self._run("apt-get", "indextargets")))

    async def update(self) -> None:
        """Fetch the package lists."""
        await self._run("apt-get", "update")

    async def depends(self, package: str) -> str:
        """Return what apt says of a package's dependencies."""
        return "\n".join(await self._run("apt-cache", "depends", "--important", package))

    async def source_versions(self, package: str) -> list[str]:
        """Return the versions of a source package."""
        lines = await self._run("apt-cache", "showsrc", "--only-source", package)
        return [line.removeprefix("Version:").strip() for line in lines if "Version:" in line[:8]]

    async def download(self, package: str, folder: Path) -> Path:
        """Download a package into a folder, and return the file."""
        await self._run("apt-get", "download", package, cwd=folder)
        return _only(folder.glob("*.deb"), package)

    async def download_source(self, package: str, version: str, folder: Path) -> Path:
        """Download a source package into a folder, and return its .dsc."""
        which = f"{package}={version}"
        await self._run("apt-get", "source", "--download-only", "--only-source", which, cwd=folder)
        return _only(folder.glob("*.dsc"), package)

    async def unpack(self, package: Path, folder: Path) -> None:
        """Unpack a package's files into a folder."""
        await run_tool(["dpkg-deb", "-x", package, folder], log=self.log)


def _only(paths: Iterable[Path], package: str) -> Path:
    found = sorted(paths)
    if len(found) != 1:
        raise BuildError(f"apt downloaded {len(found)} files of {package} instead of one")
    return found[0]


def main_archive_uris(indextargets: str) -> list[str]:
    """The URIs of Debian's main archive in the output of ``apt-get indextargets``, best first.

    The security archive and other distributions' have no source of the suite we want. Before the
    first ``apt-get update`` apt does not know whose archive a URI is; those come last.
    """
    known: list[str] = []
    unknown: list[str] = []
    for paragraph in indextargets.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        uri = fields.get("Repo-URI", "")
        if not uri:
            continue
        if fields.get("Origin") == "Debian" and fields.get("Label") == "Debian":
            known.append(uri)
        elif "Origin" not in fields and "security" not in uri and "ubuntu" not in uri:
            unknown.append(uri)
    return list(dict.fromkeys([*known, *unknown]))
