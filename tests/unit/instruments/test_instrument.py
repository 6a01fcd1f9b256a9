"""Instruments have one order, one switch each, and their results have one place."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import pytest

from lab.instruments import INSTRUMENTS
from lab.instruments.instrument import Instrument, Moment, Step, Watch, watching
from lab.scenario.dimensions import dimensions
from lab.scenario.scenario import Scenario


def test_no_two_instruments_give_the_same_table_or_metric() -> None:
    tables = Counter(name for one in INSTRUMENTS for name in one.tables)
    metrics = Counter(metric.name for one in INSTRUMENTS for metric in one.metrics)
    assert set(tables.values()) == set(metrics.values()) == {1}


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_each_is_asked_for_by_a_parameter_of_the_scenario(instrument: type[Instrument]) -> None:
    scenario = Scenario()
    assert not instrument.switch or instrument.switch in dimensions(scenario)
    assert isinstance(instrument.is_asked(scenario), bool)


class Noting(Instrument):
    """Notes when it is attached and what it is told of."""

    def __init__(self, name: str, diary: list[str], moments: tuple[Moment, ...]) -> None:
        super().__init__(cast(Any, None), Scenario())
        self.name = name
        self.diary = diary
        self.moments = moments

    @contextlib.asynccontextmanager
    async def attached(self) -> AsyncIterator[None]:
        self.diary.append(f"{self.name} attached")
        try:
            yield
        finally:
            self.diary.append(f"{self.name} gone")

    def steps(self) -> Mapping[Moment, Step]:
        return dict.fromkeys(self.moments, self._step)

    async def _step(self) -> None:
        await asyncio.sleep(0)
        self.diary.append(self.name)


async def test_at_a_moment_those_that_read_then_read_one_after_the_other() -> None:
    diary: list[str] = []
    first = Noting("first", diary, (Moment.REQUEST, Moment.COMPLETED))
    second = Noting("second", diary, (Moment.REQUEST,))
    async with watching([first, second]) as watch:
        for moment in (Moment.BASELINE, Moment.REQUEST, Moment.COMPLETED):
            await watch.at(moment)
    attached = ["first attached", "second attached"]
    assert diary == [*attached, "first", "second", "first", "second gone", "first gone"]


async def test_an_instrument_that_fails_fails_the_sample_and_all_are_detached() -> None:
    diary: list[str] = []

    class Failing(Noting):
        async def _step(self) -> None:
            raise OSError

    failing = Failing("failing", diary, (Moment.REQUEST,))
    with pytest.raises(OSError):
        async with watching([Noting("first", diary, ()), failing]) as watch:
            await watch.at(Moment.REQUEST)
    assert diary[2:] == ["failing gone", "first gone"]


async def test_nothing_that_watches_is_told_nothing() -> None:
    for moment in Moment:
        await Watch().at(moment)
