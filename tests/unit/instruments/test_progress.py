"""The sampler sees the counters of a process exactly, and ends with it."""

import struct
import time
from collections.abc import Callable, Iterator

import pytest

from lab.errors import GuestError
from lab.instruments.progress import ProgressSampler
from tests.support.told import Told, told

# A page with counters at words 16 and 24; each line on stdin is what to add to the second.
_COUNTER = """
import ctypes, sys
page = (ctypes.c_uint64 * 512)()
page[16] = 1000
print(ctypes.addressof(page), flush=True)
for line in sys.stdin:
    page[24] += int(line)
    print("done", flush=True)
"""
BOUND_S = 30.0


@pytest.fixture
def counter() -> Iterator[Told]:
    with told(_COUNTER) as process:
        yield process


def wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + BOUND_S
    while not reached():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.001)


def test_every_thread_counts_and_a_known_number_of_operations_is_seen(counter: Told) -> None:
    with ProgressSampler(counter.process.pid, counter.address, threads=2) as sampler:
        wait_until(lambda: sampler.samples >= 3)
        before_ns = time.monotonic_ns()
        counter.tell(23)
        after_ns = time.monotonic_ns()
        seen = sampler.samples
        wait_until(lambda: sampler.samples >= seen + 2)
    df = sampler.df()
    assert list(df.columns) == ["t_ns", "ops", "read_ns"]
    assert (df.dtypes == "int64").all()
    assert set(df["ops"]) == {1000, 1023}
    assert df["t_ns"].is_monotonic_increasing
    assert df.loc[df["ops"] == 1000, "t_ns"].max() < after_ns
    assert df.loc[df["ops"] == 1023, "t_ns"].min() > before_ns
    assert (df["read_ns"] > 0).all()


def test_one_thread_leaves_the_other_counters_out(counter: Told) -> None:
    counter.tell(23)
    with ProgressSampler(counter.process.pid, counter.address, threads=1) as sampler:
        wait_until(lambda: sampler.samples >= 1)
    assert set(sampler.df()["ops"]) == {1000}


def test_samples_are_kept_beyond_one_chunk_without_a_gap(counter: Told) -> None:
    # As fast as possible, so that several chunks fill up soon.
    with ProgressSampler(counter.process.pid, counter.address, interval_ns=1000) as sampler:
        wait_until(lambda: sampler.samples > 40_000)
    df = sampler.df()
    assert len(df) == sampler.samples
    assert df["t_ns"].is_monotonic_increasing
    assert set(df["ops"]) == {1000}


def test_a_late_sample_does_not_shift_the_deadlines_after_it(counter: Told) -> None:
    interval_ns = 2_000_000
    with ProgressSampler(counter.process.pid, counter.address, interval_ns=interval_ns) as sampler:
        wait_until(lambda: sampler.samples >= 50)
    # Were each deadline counted from the sample before, lateness would add up.
    t = sampler.df()["t_ns"]
    late_ns = (t - t.iloc[0]) % interval_ns
    assert late_ns.quantile(0.25) < interval_ns / 2


def test_sampling_ends_when_the_process_does(counter: Told) -> None:
    with ProgressSampler(counter.process.pid, counter.address) as sampler:
        wait_until(lambda: sampler.samples >= 1)
        counter.process.kill()
        counter.process.wait()
        wait_until(lambda: not sampler._thread.is_alive())
    assert len(sampler.df()) >= 1


def test_an_address_with_nothing_there_fails_at_once(counter: Told) -> None:
    sampler = ProgressSampler(counter.process.pid, 4096)
    with pytest.raises(GuestError, match="progress page"), sampler:
        pass


def test_words_are_little_endian_as_in_the_guest() -> None:
    assert struct.pack("=Q", 1) == struct.pack("<Q", 1)
