"""Obtain QEMU's source: a tree of the user's, Debian's source package, or the release.

Nothing system-wide changes and no root is needed: apt's lists and the sources are kept in the
cache directory.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import tomllib
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

import msgspec

from lab.errors import BuildError, HostError, LabError, TransientError, UsageError
from lab.host.cache import cache_dir, locked
from lab.host.debian import Apt
from lab.host.files import sha256_of, write_atomically
from lab.host.tools import require_tools, run_tool

Progress = Callable[[str], None]
Origin = Literal["local", "debian", "release"]

_log = logging.getLogger(__name__)

_NETWORK_TIMEOUT_S = 30


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """What ``upstream.toml`` says about the base of the series."""

    series: str
    oldest_point: int
    debian_package: str
    debian_suite: str
    release_version: str
    release_url: str
    release_sha256: str

    def supports(self, version: str) -> bool:
        """Whether a version such as ``10.0.13`` is one the patches are kept for."""
        match = re.match(rf"{re.escape(self.series)}\.(\d+)\b", version)
        return match is not None and int(match[1]) >= self.oldest_point


@dataclass(frozen=True, kw_only=True)
class Source:
    """A QEMU source on disk.

    ``identity`` changes whenever the source does; builds are keyed by it. ``path`` is a ``.dsc``,
    a tarball or a tree.
    """

    identity: str
    version: str
    origin: Origin
    path: Path
    sha256: str = ""


def read_upstream() -> Upstream:
    """Return the contents of ``upstream.toml``."""
    text = resources.files("lab.qemu").joinpath("upstream.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    return Upstream(
        series=table["series"]["version"],
        oldest_point=table["series"]["oldest_point"],
        debian_package=table["debian"]["package"],
        debian_suite=table["debian"]["suite"],
        release_version=table["release"]["version"],
        release_url=table["release"]["url"],
        release_sha256=table["release"]["sha256"],
    )


def qemu_cache() -> Path:
    """The part of the cache that belongs to QEMU."""
    path = cache_dir() / "qemu"
    path.mkdir(exist_ok=True)
    return path


# --- A source of the user's ------------------------------------------------------------------


@lru_cache(maxsize=8)
def _file_identity(path: Path, size_bytes: int, mtime_ns: int) -> str:
    return f"local-{sha256_of(path)[:16]}"


def _tree_identity(tree: Path) -> str:
    """Names, sizes and times stand for the contents: hashing 480 MB would take seconds."""
    digest = hashlib.sha256()
    for folder, names, files in os.walk(tree):
        names[:] = sorted(name for name in names if name not in {".git", "build"})
        for name in sorted(files):
            path = Path(folder, name)
            status = path.lstat()
            line = f"{path.relative_to(tree)} {status.st_size} {status.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return f"local-{digest.hexdigest()[:16]}"


def local_source() -> Source | None:
    """The source ``LAB_QEMU_SOURCE`` names: a tree, a tarball or a ``.dsc``; None when unset.

    :raise UsageError: when it names something else.
    """
    chosen = os.environ.get("LAB_QEMU_SOURCE")
    if not chosen:
        return None
    path = Path(chosen).absolute()
    if path.is_dir():
        try:
            version = path.joinpath("VERSION").read_text().strip()
        except OSError:
            raise UsageError(
                f"LAB_QEMU_SOURCE={chosen} is no QEMU source tree: it has no VERSION file"
            ) from None
        return Source(identity=_tree_identity(path), version=version, origin="local", path=path)
    if not path.is_file():
        raise UsageError(f"LAB_QEMU_SOURCE={chosen} does not exist")
    match = re.match(r"qemu[-_](\d+\.\d+\.\d+)", path.name)
    if match is None or not path.name.endswith((".dsc", ".tar.xz", ".tar.bz2", ".tar.gz", ".tar")):
        raise UsageError(
            f"LAB_QEMU_SOURCE={chosen} is neither a tree nor named like a QEMU source",
            "name a directory, qemu-10.0.*.tar.xz or qemu_10.0.*.dsc",
        )
    status = path.stat()
    return Source(
        identity=_file_identity(path, status.st_size, status.st_mtime_ns),
        version=match[1],
        origin="local",
        path=path,
    )


# --- Debian's source package -----------------------------------------------------------------


def newest_version(versions: Iterable[str], upstream: Upstream) -> str | None:
    """The newest Debian version whose upstream part the patches are kept for, None if none is."""

    def order(version: str) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", version))

    fitting = [v for v in versions if upstream.supports(v.partition(":")[2] or v)]
    return max(fitting, key=order, default=None)


async def _from_debian(upstream: Upstream, log: Path, progress: Progress) -> Source:
    require_tools(["apt-get", "apt-cache", "dpkg-source"])
    package = upstream.debian_package
    system = Apt(log=log)
    uris = await system.debian_archives()
    if not uris:
        raise HostError("apt is not set up with a Debian mirror")
    version, apt = None, system
    failure: LabError = TransientError("no mirror answered")
    for uri in uris:
        progress("look up Debian's source of QEMU")
        apt = system.with_debian_source(qemu_cache() / "apt", uri, upstream.debian_suite)
        try:
            await apt.update()
            version = newest_version(await apt.source_versions(package), upstream)
        except BuildError as error:
            failure = error
            continue
        if version is not None:
            break
        failure = HostError(f"Debian {upstream.debian_suite} has no {package} {upstream.series}.*")
    if version is None:
        raise failure
    identity = f"debian-{version.partition(':')[2] or version}"
    progress(f"download Debian's source of QEMU {version}")
    with tempfile.TemporaryDirectory(prefix="source-", dir=qemu_cache()) as folder:
        dsc = await apt.download_source(package, version, Path(folder))
        match = re.search(r"\d+\.\d+\.\d+", version)
        assert match is not None
        return _keep(
            Source(
                identity=identity,
                version=match[0],
                origin="debian",
                path=dsc,
                sha256=sha256_of(dsc),
            )
        )


# --- The release -----------------------------------------------------------------------------


def _download(url: str, target: Path, cancelled: threading.Event, progress: Progress) -> None:
    with urllib.request.urlopen(url, timeout=_NETWORK_TIMEOUT_S) as reply, target.open("wb") as out:
        total_mib = int(reply.headers.get("Content-Length", 0)) >> 20
        done_bytes = 0
        while chunk := reply.read(1 << 20):
            if cancelled.is_set():
                return
            out.write(chunk)
            done_bytes += len(chunk)
            progress(f"download QEMU's release {done_bytes >> 20}/{total_mib} MiB")


async def _from_release(upstream: Upstream, progress: Progress) -> Source:
    loop = asyncio.get_running_loop()
    cancelled = threading.Event()

    def report(message: str) -> None:
        loop.call_soon_threadsafe(progress, message)

    with tempfile.TemporaryDirectory(prefix="source-", dir=qemu_cache()) as folder:
        tarball = Path(folder) / upstream.release_url.rpartition("/")[2]
        try:
            await asyncio.to_thread(_download, upstream.release_url, tarball, cancelled, report)
        except (OSError, urllib.error.URLError) as error:
            raise TransientError(
                f"{upstream.release_url} cannot be downloaded: {error}",
                "set LAB_QEMU_SOURCE to a tarball or tree, or try again",
            ) from error
        finally:
            cancelled.set()
        actual = sha256_of(tarball)
        if actual != upstream.release_sha256:
            raise BuildError(
                f"{upstream.release_url} has SHA-256 {actual}, not {upstream.release_sha256}",
                "do not use it; set LAB_QEMU_SOURCE to a source you trust",
            )
        return _keep(
            Source(
                identity=f"release-{upstream.release_version}",
                version=upstream.release_version,
                origin="release",
                path=tarball,
                sha256=actual,
            )
        )


# --- What is in the cache --------------------------------------------------------------------


def _record() -> Path:
    return qemu_cache() / "source.json"


def _keep(source: Source) -> Source:
    """Move a downloaded source's folder into the cache and make it the current one."""
    target = qemu_cache() / "sources" / source.identity
    target.parent.mkdir(exist_ok=True)
    if not target.exists():
        source.path.parent.rename(target)
        # The caller's TemporaryDirectory wants something to remove.
        source.path.parent.mkdir()
    kept = replace(source, path=target / source.path.name)
    # Relative, so that a cache can be moved.
    entry = dataclasses.asdict(kept) | {"path": str(kept.path.relative_to(qemu_cache()))}
    write_atomically(_record(), f"{json.dumps(entry, indent=1)}\n".encode())
    return kept


def known_source() -> Source | None:
    """The source builds are made from, without asking the network; None if there is none yet."""
    if (local := local_source()) is not None:
        return local
    try:
        source = msgspec.json.decode(
            _record().read_bytes(), type=Source, dec_hook=lambda kind, value: kind(value)
        )
    except (OSError, msgspec.DecodeError):
        return None
    return replace(source, path=qemu_cache() / source.path)


async def obtain_source(log: Path, progress: Progress, *, refresh: bool = False) -> Source:
    """Return the source to build from, downloading it when the cache has none.

    In this order: what ``LAB_QEMU_SOURCE`` names, Debian's source package, the release.

    :param refresh: ask the archive for a newer one although there is one in the cache.
    :raise LabError: when no way works.
    """
    if not refresh and (known := _usable()) is not None:
        return known
    waiting = "wait for another download of QEMU's source"
    async with locked(qemu_cache() / "source.lock", lambda: progress(waiting)):
        known = _usable()
        if known is not None and (known.origin == "local" or not refresh):
            return known
        return await _download_source(log, progress)


def _usable() -> Source | None:
    known = known_source()
    return known if known is not None and known.path.exists() else None


async def _download_source(log: Path, progress: Progress) -> Source:
    upstream = read_upstream()
    try:
        return await _from_debian(upstream, log, progress)
    except (LabError, OSError) as error:
        _log.warning("no source from Debian (%s); trying the release", error)
        with log.open("a") as sink:
            sink.write(f"no source from Debian: {error}\n")
    return await _from_release(upstream, progress)


async def unpack(source: Source, tree: Path, log: Path) -> None:
    """Unpack a source into a directory that does not exist yet; Debian's patches are applied.

    :raise BuildError: when it is damaged, or of a version the patches are not kept for.
    """
    if source.path.is_dir():
        await run_tool(["cp", "-a", "--reflink=auto", "--", source.path, tree], log=log)
        shutil.rmtree(tree / ".git", ignore_errors=True)
    elif source.path.suffix == ".dsc":
        # dpkg-source compares the files with the .dsc; apt compared that with the archive.
        if source.sha256 and sha256_of(source.path) != source.sha256:
            raise BuildError(f"{source.path} is damaged", "delete it and try again")
        await run_tool(["dpkg-source", "--no-copy", "-x", source.path, tree], log=log)
    else:
        if source.sha256 and sha256_of(source.path) != source.sha256:
            raise BuildError(f"{source.path} is damaged", "delete it and try again")
        tree.mkdir()
        await run_tool(["tar", "-xf", source.path, "-C", tree, "--strip-components=1"], log=log)
    try:
        version = tree.joinpath("VERSION").read_text().strip()
    except OSError:
        raise BuildError(f"{source.path} holds no QEMU source: there is no VERSION in it") from None
    upstream = read_upstream()
    if not upstream.supports(version):
        raise BuildError(
            f"{source.path} is QEMU {version}; the patches are for {upstream.series}.y,"
            f" y >= {upstream.oldest_point}"
        )
