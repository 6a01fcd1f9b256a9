"""What a run records about its host."""

import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from lab.host.files import kernel_text
from lab.host.limits import Limits
from lab.host.probe import KVM_DEVICE, kvm_is_pvm

_RECORDED_LIBRARIES = (
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "matplotlib",
    "msgspec",
    "psutil",
    "qemu.qmp",
)
_THP = Path("/sys/kernel/mm/transparent_hugepage")


@dataclass(frozen=True, kw_only=True)
class HostInfo:
    """The host a measurement was made on, without what names it or its owner.

    ``virtualisation``: ``none``, ``vm``, ``container`` or ``vm+container``. ``kvm``: ``none``,
    ``pvm`` or ``present`` (a usable device node; see `lab.host.probe.probe_kvm` for whether it
    runs). ``governor``: the CPU frequency governors in use, empty where the kernel has none.
    ``thp``: files of ``/sys/kernel/mm/transparent_hugepage`` and the value selected in each.
    """

    cpu_model: str
    cpu_count: int
    numa_nodes: int
    memory_bytes: int
    swap_bytes: int
    page_size_bytes: int
    architecture: str
    kernel: str
    distribution: str
    virtualisation: str
    kvm: str
    governor: str
    clocksource: str
    thp: dict[str, str]
    python: str
    libraries: dict[str, str]
    limits: Limits | None = None
    """What the measuring process could use of it; None in sets that are older than this."""

    @classmethod
    def collect(cls) -> "HostInfo":
        """Read this host. Takes milliseconds and starts no process."""
        cpuinfo = kernel_text("/proc/cpuinfo")
        model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
        return cls(
            cpu_model=model[1].strip() if model else platform.machine(),
            cpu_count=os.cpu_count() or 1,
            numa_nodes=len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
            memory_bytes=psutil.virtual_memory().total,
            swap_bytes=psutil.swap_memory().total,
            page_size_bytes=os.sysconf("SC_PAGESIZE"),
            architecture=platform.machine(),
            kernel=platform.release(),
            distribution=platform.freedesktop_os_release().get("PRETTY_NAME", ""),
            virtualisation=_virtualisation(cpuinfo),
            kvm=_kvm(),
            governor=cpu_governor(),
            clocksource=kernel_text(
                "/sys/devices/system/clocksource/clocksource0/current_clocksource"
            ).strip(),
            thp=thp_settings(),
            python=platform.python_version(),
            libraries=_libraries(),
            limits=Limits.collect(),
        )


def selected(setting: str) -> str:
    """The choice in brackets of a line such as ``always [madvise] never``, else the line."""
    match = re.search(r"\[([^\]]+)\]", setting)
    return match[1] if match else setting.strip()


def thp_settings() -> dict[str, str]:
    """The kernel's settings for transparent huge pages; empty where it has none."""
    names = ("enabled", "defrag", "shmem_enabled")
    return {name: selected(text) for name in names if (text := kernel_text(_THP / name))}


def _virtualisation(cpuinfo: str) -> str:
    kinds = []
    if re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE):
        kinds.append("vm")
    markers = (Path("/.dockerenv"), Path("/run/.containerenv"), Path("/run/systemd/container"))
    if any(marker.exists() for marker in markers):
        kinds.append("container")
    return "+".join(kinds) or "none"


def _kvm() -> str:
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return "none"
    return "pvm" if kvm_is_pvm() else "present"


def cpu_governor() -> str:
    """The CPU frequency governors in use; empty where the kernel has none."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return ",".join(sorted({kernel_text(file).strip() for file in files}))


def _libraries() -> dict[str, str]:
    versions = {}
    for name in _RECORDED_LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
