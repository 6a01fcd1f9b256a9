# What is public, for type checkers and for `lazy_loader`, which reads it when `lab` is imported.

from .errors import (
    BuildError as BuildError,
)
from .errors import (
    GuestError as GuestError,
)
from .errors import (
    GuestSilentError as GuestSilentError,
)
from .errors import (
    HostError as HostError,
)
from .errors import (
    LabError as LabError,
)
from .errors import (
    LaunchError as LaunchError,
)
from .errors import (
    QmpError as QmpError,
)
from .errors import (
    RestoreError as RestoreError,
)
from .errors import (
    RunError as RunError,
)
from .errors import (
    SnapshotError as SnapshotError,
)
from .errors import (
    TransientError as TransientError,
)
from .errors import (
    UsageError as UsageError,
)
from .figures.figures import plot_slowdown as plot_slowdown
from .figures.plots import (
    plot_cost as plot_cost,
)
from .figures.plots import (
    plot_fault_histogram as plot_fault_histogram,
)
from .figures.plots import (
    plot_fault_latency as plot_fault_latency,
)
from .figures.plots import (
    plot_faults_over_time as plot_faults_over_time,
)
from .figures.plots import (
    plot_floor as plot_floor,
)
from .figures.plots import (
    plot_phases as plot_phases,
)
from .host.info import HostInfo as HostInfo
from .runs.run import Run as Run
from .runs.sets import RunSet as RunSet
from .runs.sets import load_set as load_set
from .scenario.machine import Machine as Machine
from .scenario.methods import METHODS as METHODS
from .scenario.methods import Method as Method
from .scenario.scenario import Scenario as Scenario
from .scenario.workload import Workload as Workload
from .session import VM as VM
from .session import boot as boot
from .session import restore as restore
from .snapshot.result import Snapshot as Snapshot

__version__: str
