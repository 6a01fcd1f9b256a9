"""What an instrument is: what it finds, at which moments it reads, and what it looks at."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Protocol

import pandas as pd

from lab.column import Column, Metric
from lab.guests.guest import Running
from lab.guests.protocol import ProgressPage, ReadyRecord
from lab.marks import Marks
from lab.scenario.dimensions import dimensions
from lab.scenario.scenario import Scenario


class Moment(Enum):
    """The moments of a measured snapshot at which instruments read, in their order.

    From BASELINE to TAKEN everything is timed.  `lab.snapshot.attempt` tells of REQUEST, COMPLETED
    and RUNNING, `lab.measure.sample` of the others.
    """

    SETTLED = "the guest runs evenly: what may disturb it is read now"
    READY = "nothing disturbs it any more: the last that is done before the collector is off"
    BASELINE = "the second begins that the rest is compared with"
    ARMED = "this second is over, and the snapshot comes next"
    REQUEST = "right before the first command that affects the guest"
    COMPLETED = "QEMU has reported the migration completed"
    RUNNING = "the guest runs on, also after an ordinary migration"
    TAKEN = "the image has its name"
    BACK = "the old rate is back and recorded, and nothing is timed any more"
    LAST = "everything else has been read: the guest may be changed"


WINDOWS = ("before", "during")
"""What lies between the readings of an instrument: until the request, until completion."""

Step = Callable[[], Awaitable[None] | None]
"""What an instrument does at a moment."""


class Block(Protocol):
    """A RAM block of QEMU."""

    @property
    def name(self) -> str: ...
    @property
    def host_address(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...


class Happened(Protocol):
    """An event of QEMU's monitor."""

    @property
    def name(self) -> str: ...


class Monitor(Protocol):
    """QEMU's monitor, as far as events go."""

    @property
    def events(self) -> Sequence[Happened]:
        """All so far, oldest first."""
        ...

    async def wait_event(
        self, wanted: Callable[[Happened], bool], *, since: int = 0, timeout_s: float
    ) -> Happened:
        """Return the first one that is wanted, from number `since` on."""
        ...


class Watched(Running, Protocol):
    """The guest that an instrument looks at, which `lab.vm.vm.RunningVM` is."""

    @property
    def qmp(self) -> Monitor: ...
    @property
    def ready(self) -> ReadyRecord: ...
    async def ram_blocks(self) -> Sequence[Block]: ...
    async def progress_page(self) -> ProgressPage: ...
    async def vcpu_threads(self) -> Mapping[int, int]: ...


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What is known of a snapshot when instruments say what they found.

    `migration` is QEMU's last reply to `query-migrate`, `faults` the table of its fault log, of
    which it dropped `faults_dropped`; `progress` has every sample, also those after the old rate
    was back.
    """

    marks: Marks
    migration: Mapping[str, Any]
    faults: pd.DataFrame | None
    faults_dropped: int
    baseline_ops_per_s: float | None
    progress: pd.DataFrame


@dataclass(frozen=True, kw_only=True)
class Found:
    """What an instrument found: tables and metrics, by name, and what is wrong with them."""

    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


class Instrument:
    """One instrument, which looks at one guest for one snapshot.

    To add one: a subclass in a module of its own, its place in `lab.instruments.INSTRUMENTS`, and
    the parameter that asks for it.

    `title` is what people call it.  `switch` is the parameter of the scenario that asks for it;
    empty: it always looks.  `tables` are those that it gives, by name, with their columns, and
    `metrics` its numbers in the summary line; where nobody asked for it, they are null.
    """

    title: ClassVar[str]
    switch: ClassVar[str] = ""
    tables: ClassVar[Mapping[str, Sequence[Column]]] = {}
    metrics: ClassVar[Sequence[Metric]] = ()

    def __init__(self, vm: Watched, scenario: Scenario) -> None:
        self.vm = vm
        self.scenario = scenario

    @classmethod
    def is_asked(cls, scenario: Scenario) -> bool:
        """Return whether it looks at a snapshot of this scenario."""
        return not cls.switch or bool(dimensions(scenario)[cls.switch])

    @classmethod
    def require(cls) -> None:
        """See to it that it can look at a guest on this host.

        :raise HostError: it cannot.
        """

    @contextlib.asynccontextmanager
    async def attached(self) -> AsyncIterator[None]:
        """Look at the guest while the context lasts; it begins before the guest has settled."""
        yield

    def steps(self) -> Mapping[Moment, Step]:
        """Return what it does at which moment.  Called once it is attached."""
        return {}

    def found(self, taken: Taken) -> Found:
        """Return what it found, once it is no longer attached."""
        return Found()


class Watch:
    """All that looks at one snapshot.  Told of a moment, each takes its step, in their order.

    :param steps: what each does at which moment.
    """

    def __init__(self, steps: Iterable[Mapping[Moment, Step]] = ()) -> None:
        of_all = list(steps)
        # By moment beforehand: at the request nothing is looked for.
        self._steps = {moment: [of[moment] for of in of_all if moment in of] for moment in Moment}

    async def at(self, moment: Moment) -> None:
        """Take the steps of a moment, one after the other."""
        for step in self._steps[moment]:
            if (waiting := step()) is not None:
                await waiting


@contextlib.asynccontextmanager
async def watching(instruments: Iterable[Instrument]) -> AsyncIterator[Watch]:
    """Attach instruments to their guest while the context lasts."""
    attached = list(instruments)
    async with contextlib.AsyncExitStack() as stack:
        for instrument in attached:
            await stack.enter_async_context(instrument.attached())
        yield Watch(instrument.steps() for instrument in attached)
