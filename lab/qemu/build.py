"""Build QEMU twice from one tree, without and with the patch series, and keep the binaries.

The unpatched one is the peer in every comparison, so both come from the same source, with the
same flags and devices. A build is kept under a key made of everything that went into it; the two
are keyed apart, so a changed series does not rebuild the unpatched one.

Layout below the cache directory::

    qemu/sources/<identity>/          what was downloaded
    qemu/source.json                  which of them is current
    qemu/builds/<build id>/           qemu-system-x86_64, qemu-img, build-id.json
    qemu/tests/<build id>/            QEMU's own test programs, where somebody has asked for them
    qemu/logs/                        one log a build
    qemu/python-<key>/                meson for QEMU's configure
    qemu/work-*/                      a build that is going on

``LAB_KEEP_BUILD=1`` leaves the tree of a build for a look at it. ``LAB_QEMU_PATCHED`` and
``LAB_QEMU_UNPATCHED`` name binaries to use in place of built ones.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import get_args

import msgspec

from lab.errors import BuildError, HostError, TransientError
from lab.host.cache import locked
from lab.host.files import sha256_of
from lab.host.room import require_room
from lab.host.tools import require_tools, run_tool
from lab.qemu.series import apply_patch, apply_series, read_series, series_sha256
from lab.qemu.source import Progress, Source, known_source, obtain_source, qemu_cache, unpack
from lab.scenario.methods import Sanitizer, Variant

VARIANTS: tuple[Variant, ...] = get_args(Variant)

_log = logging.getLogger(__name__)

_NO_DEBUG_INFO = "--disable-debug-info"
TARGETS = ("qemu-system-x86_64", "qemu-img")
# Debian's source has no firmware; these are its seabios, ipxe-qemu and qemu-system-data.
FIRMWARE_DIRS = tuple(
    Path(folder) for folder in ("/usr/share/qemu", "/usr/share/seabios", "/usr/lib/ipxe/qemu")
)
FLAGS = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--without-default-devices",
    "--with-devices-x86_64=lab",
    "--enable-system",
    "--enable-tcg",
    "--enable-kvm",
    # What the RFC's own command line uses: a screen, user and tap networking, a qcow2 disk.
    "--enable-vnc",
    "--enable-slirp",
    "--enable-pixman",
    "--enable-linux-aio",
    "--enable-zstd",
    "--enable-seccomp",
    # Devices that other processes serve, which write to guest RAM past QEMU: to be refused.
    "--enable-vhost-user",
    "--enable-vhost-vdpa",
    "--enable-vhost-kernel",
    "--enable-vhost-net",
    "--enable-trace-backends=log,simple",
    "--enable-tools",
    "--disable-docs",
    "--disable-werror",
    "--disable-download",
    "--disable-install-blobs",
    _NO_DEBUG_INFO,
    f"--firmwarepath={':'.join(map(str, FIRMWARE_DIRS))}",
)
SANITIZER_FLAGS: Mapping[Sanitizer, tuple[str, ...]] = {
    "address": ("--enable-asan", "--enable-ubsan", "--enable-debug-info"),
    "thread": ("--enable-tsan", "--enable-debug-info"),
}
# Debian 12's meson is older than what QEMU 10 asks for.
PYTHON_REQUIREMENTS = ("meson>=1.5", "pycotap==1.3.1", "setuptools", "wheel")
NEEDED_TOOLS = ("gcc", "ninja", "pkg-config", "flex", "bison", "patch", "perl", "xz")
NEEDED_SPACE_MIB = 2048
_KEPT_LOGS = 20

_IN_A_BUILDS_PATH = "/._-+@~"
"""What may be in the path of a build besides letters and digits.  QEMU's configure refuses spaces
and colons; what a shell, ninja or meson takes for something else fails later, and less clearly."""

_NINJA_STEP = re.compile(r"^\[(\d+)/(\d+)\]")


@dataclass(frozen=True, kw_only=True)
class QemuBinary:
    """A QEMU to run: where it is and what it was made of.

    ``series_sha256`` is None for the unpatched one, and for a binary named by the environment.
    """

    path: Path
    variant: Variant
    version: str
    build_id: str
    series_sha256: str | None
    sha256: str

    @property
    def qemu_img(self) -> Path:
        """The program for disk images that belongs to it, or else the system's or the lab's.

        :raise HostError: when there is none.
        """
        beside = self.path.with_name("qemu-img")
        if beside.is_file():
            return beside
        if found := shutil.which("qemu-img"):
            return Path(found)
        return find_qemu("patched").path.with_name("qemu-img")


@dataclass(frozen=True, kw_only=True)
class BuildStamp:
    """``build-id.json``: what a build was made of."""

    schema: str
    build_id: str
    variant: Variant
    version: str
    source: str
    series: list[str]
    series_sha256: str | None
    flags: list[str]
    devices_sha256: str
    compiler: str
    built_utc: str
    binary_sha256: str


DEVICES = Path(__file__).with_name("lab.mak")
"""The devices that are built, for QEMU's configuration."""

_SCHEMA = "lab.qemu-build/1"


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a build of one variant is made of, and so where it is kept."""

    variant: Variant
    source: Source
    patches: tuple[Path, ...]
    series_sha256: str | None
    sanitizer: Sanitizer | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        if self.sanitizer is None:
            return FLAGS
        # A report names functions and lines.
        kept = [flag for flag in FLAGS if flag != _NO_DEBUG_INFO]
        return (*kept, *SANITIZER_FLAGS[self.sanitizer])

    @property
    def build_id(self) -> str:
        parts = [
            self.source.identity,
            self.series_sha256,
            self.flags,
            _devices_sha256(),
            platform.machine(),
        ]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
        kind = self.variant if self.sanitizer is None else f"{self.variant}-{self.sanitizer}"
        return f"{kind}-{self.source.version}-{key}"

    @property
    def folder(self) -> Path:
        return qemu_cache() / "builds" / self.build_id

    def test_program(self, target: str) -> Path:
        return qemu_cache() / "tests" / self.build_id / Path(target).name


def _devices_sha256() -> str:
    return sha256_of(DEVICES)


def _plan(variant: Variant, source: Source, sanitizer: Sanitizer | None = None) -> _Plan:
    if variant == "unpatched":
        return _Plan(variant=variant, source=source, patches=(), series_sha256=None)
    patches = tuple(read_series())
    return _Plan(
        variant=variant,
        source=source,
        patches=patches,
        series_sha256=series_sha256(patches),
        sanitizer=sanitizer,
    )


def _copy_patches(plan: _Plan, folder: Path) -> list[Path]:
    """Copy the patches of a plan, so that somebody who edits them does not edit this build.

    :raise TransientError: when they were edited since the plan was made.
    """
    folder.mkdir()
    copies = [Path(shutil.copy2(patch, folder)) for patch in plan.patches]
    if series_sha256(copies) != plan.series_sha256:
        raise TransientError("the patches changed while QEMU was about to be built", "try again")
    return copies


# --- Finding ---------------------------------------------------------------------------------


def _version_of(binary: Path) -> str:
    """The version a binary reports.

    :raise HostError: when it cannot be run.
    """
    try:
        done = subprocess.run([binary, "-version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{binary} cannot be run: {error}") from error
    match = re.search(r"version (\d+\.\d+\.\d+)", done.stdout)
    if match is None:
        reason = (done.stderr or done.stdout).strip() or f"status {done.returncode}"
        raise HostError(f"{binary} does not report a QEMU version: {reason}")
    return match[1]


@lru_cache(maxsize=8)
def _overriding_binary(variant: Variant, path: Path, size_bytes: int, mtime_ns: int) -> QemuBinary:
    sha256 = sha256_of(path)
    return QemuBinary(
        path=path,
        variant=variant,
        version=_version_of(path),
        build_id=f"override-{sha256[:12]}",
        series_sha256=None,
        sha256=sha256,
    )


def _override(variant: Variant) -> QemuBinary | None:
    name = f"LAB_QEMU_{variant.upper()}"
    chosen = os.environ.get(name)
    if not chosen:
        return None
    path = Path(chosen).absolute()
    try:
        status = path.stat()
    except OSError as error:
        raise HostError(
            f"{name}={chosen}: {error.strerror}", f"unset {name} or correct it"
        ) from None
    return _overriding_binary(variant, path, status.st_size, status.st_mtime_ns)


def read_stamp(folder: Path) -> BuildStamp | None:
    """Return the stamp of a kept build, None when there is no complete build in the folder."""
    try:
        stamp = msgspec.json.decode(folder.joinpath("build-id.json").read_bytes(), type=BuildStamp)
    except (OSError, msgspec.DecodeError):
        return None
    complete = all(os.access(folder / target, os.X_OK) for target in TARGETS)
    return stamp if complete and stamp.schema == _SCHEMA else None


def _built(plan: _Plan) -> QemuBinary | None:
    stamp = read_stamp(plan.folder)
    if stamp is None:
        return None
    return QemuBinary(
        path=plan.folder / TARGETS[0],
        variant=stamp.variant,
        version=stamp.version,
        build_id=stamp.build_id,
        series_sha256=stamp.series_sha256,
        sha256=stamp.binary_sha256,
    )


def find_qemu(variant: Variant) -> QemuBinary:
    """Return a binary that is there already; never builds or asks the network.

    :raise HostError: when it is not built, or the series has changed since.
    """
    if (chosen := _override(variant)) is not None:
        return chosen
    source = known_source()
    binary = _built(_plan(variant, source)) if source is not None else None
    if binary is None:
        raise HostError(f"the {variant} QEMU is not built", "run `lab build`")
    return binary


# --- Building --------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _building_alone(report: Progress) -> AsyncIterator[None]:
    """Hold the lock that keeps two processes from building at once.

    :raise HostError: when nothing can be built in the cache, before anything is downloaded.
    """
    _require_path(qemu_cache())
    async with locked(qemu_cache() / "lock", lambda: report("wait for another build of QEMU")):
        # Nobody else is building, so what lies here is of builds that were killed.
        stale_folders = [*qemu_cache().glob("work-*"), *qemu_cache().glob("trash-*")]
        for stale in stale_folders:
            if not stale.joinpath("keep").exists():
                await asyncio.to_thread(shutil.rmtree, stale, ignore_errors=True)
        yield


@contextlib.asynccontextmanager
async def _work_folder() -> AsyncIterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="work-", dir=qemu_cache()))
    try:
        yield folder
    except asyncio.CancelledError:
        if not _kept(folder):
            _discard(folder)
        raise
    finally:
        if folder.exists() and not folder.joinpath("keep").exists() and not _kept(folder):
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _kept(folder: Path) -> bool:
    if os.environ.get("LAB_KEEP_BUILD") != "1":
        return False
    folder.joinpath("keep").touch()
    _log.warning("kept the build in %s", folder)
    return True


def _discard(folder: Path) -> None:
    """Remove a folder without waiting: half a gigabyte takes a busy disk up to a minute, and
    whoever interrupted the build is waiting for the prompt.
    """
    trash = folder.rename(folder.with_name(folder.name.replace("work-", "trash-", 1)))
    subprocess.run(["setsid", "--fork", "rm", "-rf", "--", trash], stdin=subprocess.DEVNULL)


def _new_log(name: str) -> Path:
    folder = qemu_cache() / "logs"
    folder.mkdir(exist_ok=True)
    for old in sorted(folder.glob("*.log"))[: -_KEPT_LOGS + 1]:
        old.unlink(missing_ok=True)
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    return folder / f"{moment}-{name}-{os.getpid()}.log"


def _compiler() -> tuple[dict[str, str], str]:
    """The environment to build in, and the compiler's own name and version."""
    environment = dict(os.environ)
    # Flags and paths of a user's shell or conda environment would make another binary.
    for name in ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "MAKEFLAGS", "NINJA_STATUS"):
        environment.pop(name, None)
    environment["CC"] = "ccache gcc" if shutil.which("ccache") else "gcc"
    environment["LC_ALL"] = "C.UTF-8"
    done = subprocess.run(["gcc", "--version"], capture_output=True, text=True, timeout=20)
    return environment, done.stdout.partition("\n")[0]


async def _python_for_configure(log: Path, report: Progress) -> Path:
    """A Python with meson, for QEMU's configure; made once."""
    wanted = "\n".join([*PYTHON_REQUIREMENTS, sys.version, sys.base_prefix])
    key = hashlib.sha256(wanted.encode()).hexdigest()[:12]
    folder = qemu_cache() / f"python-{key}"
    python = folder / "bin/python"
    # Written last, because a virtual environment cannot be moved into place.
    complete = folder / "complete"
    if not complete.exists():
        report("install meson")
        await run_tool([sys.executable, "-m", "venv", "--clear", folder], log=log)
        install = ["-m", "pip", "install", "--disable-pip-version-check", "-q"]
        await run_tool([python, *install, *PYTHON_REQUIREMENTS], log=log)
        complete.touch()
    return python


def _ninja_progress(label: str, report: Progress) -> Callable[[str], None]:
    def on_line(line: str) -> None:
        if step := _NINJA_STEP.match(line):
            report(f"build qemu ({label}) {step[1]}/{step[2]}")

    return on_line


@dataclass(frozen=True, kw_only=True)
class _Workshop:
    """One unpacked tree and its build directory."""

    tree: Path
    build: Path
    log: Path
    environment: dict[str, str]
    compiler: str
    report: Progress

    async def ninja(self, label: str, targets: Sequence[str] = TARGETS) -> None:
        await run_tool(
            ["ninja", *targets],
            log=self.log,
            cwd=self.build,
            env=self.environment,
            on_line=_ninja_progress(label, self.report),
        )


async def _set_up(
    folder: Path,
    source: Source,
    log: Path,
    report: Progress,
    flags: Sequence[str] = FLAGS,
) -> _Workshop:
    python = await _python_for_configure(log, report)
    environment, compiler = _compiler()
    shop = _Workshop(
        tree=folder / "tree",
        build=folder / "build",
        log=log,
        environment=environment,
        compiler=compiler,
        report=report,
    )
    report(f"unpack QEMU {source.version}")
    await unpack(source, shop.tree, log)
    devices = shop.tree / "configs/devices/x86_64-softmmu"
    shutil.copyfile(DEVICES, devices / "lab.mak")
    shop.build.mkdir()
    report("configure qemu")
    await run_tool(
        [shop.tree / "configure", f"--python={python}", *flags],
        log=log,
        cwd=shop.build,
        env=environment,
    )
    return shop


async def _install(shop: _Workshop, plan: _Plan) -> None:
    """Put a build into the cache in one step, complete or not at all."""
    plan.folder.parent.mkdir(exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix="install-", dir=shop.build.parent))
    for target in TARGETS:
        shutil.copy2(shop.build / target, staging / target)
    binary = staging / TARGETS[0]
    stamp = BuildStamp(
        schema=_SCHEMA,
        build_id=plan.build_id,
        variant=plan.variant,
        version=_version_of(binary),
        source=plan.source.identity,
        series=[patch.name for patch in plan.patches],
        series_sha256=plan.series_sha256,
        flags=list(plan.flags),
        devices_sha256=_devices_sha256(),
        compiler=shop.compiler,
        built_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        binary_sha256=sha256_of(binary),
    )
    staging.joinpath("build-id.json").write_text(json.dumps(asdict(stamp), indent=1) + "\n")
    # What may be here is a build that lost a file.
    shutil.rmtree(plan.folder, ignore_errors=True)
    staging.rename(plan.folder)


def _require_path(folder: Path) -> None:
    wrong = [c for c in str(folder) if not c.isalnum() and c not in _IN_A_BUILDS_PATH]
    if wrong:
        raise HostError(
            f"QEMU cannot be built in {str(folder)!r}, because of {wrong[0]!r} in that path",
            "set LAB_CACHE to a folder whose path has only letters, digits and any of "
            f"{_IN_A_BUILDS_PATH}",
        )


def _require_host() -> None:
    if platform.machine() != "x86_64":
        raise HostError(f"the lab builds QEMU on x86_64 hosts; this is {platform.machine()}")
    require_tools(NEEDED_TOOLS)
    remedy = "make room, or set LAB_CACHE to another file system"
    require_room(qemu_cache(), NEEDED_SPACE_MIB << 20, "building QEMU", remedy)


async def ensure_qemu(
    progress: Progress | None = None, *, refresh_source: bool = False
) -> dict[str, QemuBinary]:
    """Return both binaries, building what is missing. Quick when nothing is.

    Cancelling it stops what it started; the cache holds complete builds only.

    :param progress: called with one line such as ``build qemu (unpatched) 640/1343``.
    :param refresh_source: look for a newer source although one is in the cache.
    :raise HostError: when the host lacks a tool or disk space.
    :raise BuildError: when a step fails; names the log and its last lines.
    :raise TransientError: when no source can be downloaded.
    """
    report = progress or (lambda message: None)
    chosen: dict[str, QemuBinary] = {
        variant: binary for variant in VARIANTS if (binary := _override(variant)) is not None
    }
    wanted = [variant for variant in VARIANTS if variant not in chosen]
    if not wanted:
        return chosen
    source = None if refresh_source else known_source()
    plans = [_plan(variant, source) for variant in wanted] if source is not None else []
    if not plans or not all(_built(plan) for plan in plans):
        log = _new_log("build")
        async with _building_alone(report):
            source = await obtain_source(log, report, refresh=refresh_source)
            plans = [_plan(variant, source) for variant in wanted]
            # Another process may have built them while this one waited.
            missing = {plan.variant: plan for plan in plans if _built(plan) is None}
            if missing:
                _require_host()
                await _build(source, missing, log, report)
    for plan in plans:
        binary = _built(plan)
        if binary is None:
            raise BuildError(f"{plan.folder} vanished after it was built", "try again")
        chosen[plan.variant] = binary
    return chosen


async def _build(
    source: Source, missing: Mapping[Variant, _Plan], log: Path, report: Progress
) -> None:
    async with _work_folder() as folder:
        patched = missing.get("patched")
        patches = _copy_patches(patched, folder / "patches") if patched is not None else []
        shop = await _set_up(folder, source, log, report)
        if (plan := missing.get("unpatched")) is not None:
            await shop.ninja("unpatched")
            await _install(shop, plan)
        if patched is not None:
            await apply_series(shop.tree, patches, log)
            await shop.ninja("patched")
            await _install(shop, patched)


async def ensure_sanitized_qemu(
    sanitizer: Sanitizer, progress: Progress | None = None
) -> QemuBinary:
    """Return the patched QEMU with a sanitizer in it, built when it is missing.

    It is for finding faults, not for figures: it is several times slower, and larger.  Where it
    is to be used, `LAB_QEMU_PATCHED` names it.

    :raise LabError: as `ensure_qemu`.
    """
    report = progress or (lambda message: None)
    log = _new_log(f"build-{sanitizer}")
    async with _building_alone(report):
        source = await obtain_source(log, report)
        plan = _plan("patched", source, sanitizer)
        if (binary := _built(plan)) is not None:
            return binary
        _require_host()
        async with _work_folder() as folder:
            patches = _copy_patches(plan, folder / "patches")
            shop = await _set_up(folder, source, log, report, plan.flags)
            await apply_series(shop.tree, patches, log)
            await shop.ninja(f"patched, {sanitizer} sanitizer")
            await _install(shop, plan)
    binary = _built(plan)
    if binary is None:
        raise BuildError(f"{plan.folder} vanished after it was built", "try again")
    return binary


async def ensure_test_program(
    target: str, progress: Progress | None = None, *, edit: Callable[[Path], None]
) -> dict[Variant, Path]:
    """Return one of QEMU's own test programs, from the tree of each variant; built when missing.

    :param target: what ninja calls it, such as ``tests/qtest/migration-test``.
    :param edit: called with the tree before anything of it is compiled.
    :raise LabError: as `ensure_qemu`.
    """
    report = progress or (lambda message: None)
    log = _new_log("test-program")
    async with _building_alone(report):
        source = await obtain_source(log, report)
        plans = [_plan(variant, source) for variant in ("unpatched", "patched")]
        programs = {plan.variant: plan.test_program(target) for plan in plans}
        missing = [plan for plan in plans if not os.access(programs[plan.variant], os.X_OK)]
        if not missing:
            return programs
        _require_host()
        async with _work_folder() as folder:
            shop = await _set_up(folder, source, log, report)
            edit(shop.tree)
            for plan in missing:
                if plan.patches:
                    copies = _copy_patches(plan, folder / "patches")
                    await apply_series(shop.tree, copies, log)
                await shop.ninja(f"{target}, {plan.variant}", [target])
                kept = programs[plan.variant]
                kept.parent.mkdir(parents=True, exist_ok=True)
                staging = kept.with_name(f".{kept.name}.partial")
                shutil.copy2(shop.build / target, staging)
                staging.rename(kept)
    return programs


async def check_each_step(progress: Progress | None = None) -> list[str]:
    """Build after every patch of the series, and return the names of the patches built.

    :raise BuildError: naming the first patch that does not apply or build.
    """
    report = progress or (lambda message: None)
    _require_host()
    log = _new_log("each-step")
    done: list[str] = []
    async with _building_alone(report):
        source = await obtain_source(log, report)
        async with _work_folder() as folder:
            shop = await _set_up(folder, source, log, report)
            for patch in read_series():
                try:
                    await apply_patch(shop.tree, patch, log)
                    await shop.ninja(patch.name)
                except BuildError as error:
                    raise BuildError(f"{patch.name}: {error.cause}", error.remedy) from error
                done.append(patch.name)
    return done
