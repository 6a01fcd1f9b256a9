"""Live memory snapshots of virtual machines, and what they cost the guest.

The verbs are awaitable; see the notebooks for a tour. Names are loaded when first used, so that
``lab --help`` and ``import lab`` stay quick.
"""

import importlib
from typing import TYPE_CHECKING

from lab.errors import (
    BuildError,
    GuestError,
    GuestSilentError,
    HostError,
    LabError,
    LaunchError,
    QmpError,
    RestoreError,
    RunError,
    SnapshotError,
    TransientError,
    UsageError,
)

if TYPE_CHECKING:
    from lab.figures import plot_slowdown as plot_slowdown
    from lab.host import HostInfo as HostInfo
    from lab.plots import plot_cost as plot_cost
    from lab.plots import plot_fault_histogram as plot_fault_histogram
    from lab.plots import plot_fault_latency as plot_fault_latency
    from lab.plots import plot_faults_over_time as plot_faults_over_time
    from lab.plots import plot_floor as plot_floor
    from lab.plots import plot_phases as plot_phases
    from lab.run import Run as Run
    from lab.run import RunSet as RunSet
    from lab.run import load_set as load_set
    from lab.scenario import METHODS as METHODS
    from lab.scenario import Machine as Machine
    from lab.scenario import Method as Method
    from lab.scenario import Scenario as Scenario
    from lab.scenario import Workload as Workload
    from lab.snapshot import Snapshot as Snapshot
    from lab.vm import VM as VM
    from lab.vm import boot as boot
    from lab.vm import restore as restore

__version__ = "0.1.0"

# public name -> module that defines it
_LAZY: dict[str, str] = {
    "HostInfo": "lab.host",
    "METHODS": "lab.scenario",
    "Machine": "lab.scenario",
    "Method": "lab.scenario",
    "Run": "lab.run",
    "RunSet": "lab.run",
    "Scenario": "lab.scenario",
    "Snapshot": "lab.snapshot",
    "VM": "lab.vm",
    "Workload": "lab.scenario",
    "boot": "lab.vm",
    "load_set": "lab.run",
    "plot_cost": "lab.plots",
    "plot_fault_histogram": "lab.plots",
    "plot_fault_latency": "lab.plots",
    "plot_faults_over_time": "lab.plots",
    "plot_floor": "lab.plots",
    "plot_phases": "lab.plots",
    "plot_slowdown": "lab.figures",
    "restore": "lab.vm",
}

__all__ = [
    "BuildError",
    "GuestError",
    "GuestSilentError",
    "HostError",
    "LabError",
    "LaunchError",
    "QmpError",
    "RestoreError",
    "RunError",
    "SnapshotError",
    "TransientError",
    "UsageError",
    "__version__",
]


if not TYPE_CHECKING:  # a type checker would take every name to be there

    def __getattr__(name: str) -> object:
        try:
            module = _LAZY[name]
        except KeyError:
            raise AttributeError(f"module 'lab' has no attribute {name!r}") from None
        return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
