"""The host's side of the protocol, against the guest's own C code where that decides."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import GuestError, UsageError
from lab.guests import protocol
from lab.guests.kinds import include_options
from lab.guests.protocol import (
    HOT_PERIOD,
    KINDS,
    LATENCY_BUCKETS,
    PAGE_BYTES,
    PAGE_WORDS,
    REPLAYED_KINDS,
    WORD_BODY,
    WORD_HEAD,
    WORD_TAIL,
    ProgressPage,
    ReadyRecord,
    Record,
    check_working_set,
    find_progress_page,
    first_page,
    kernel_command_line,
    latency_bounds_ticks,
    pages_of_operations,
    parse_record,
    replay_versions,
    writes_of_operations,
)
from lab.scenario.guests import GUEST_LIMITS

SOURCE = Path(protocol.__file__).with_name("linux") / "workload.c"
NONCE = 0x0123456789ABCDEF
U64 = protocol.U64

keys = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
values = st.from_regex(r"[!-<>-~]{1,20}", fullmatch=True)
seeds = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """workload.c compiled for this host: runs the writers and prints the working set."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    binary = tmp_path_factory.mktemp("harness") / "harness"
    includes = include_options(binary.parent, GUEST_LIMITS["linux"])
    subprocess.run(
        [compiler, "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-DLAB_HOST_TEST",
         *includes, "-o", str(binary), str(SOURCE)],
        check=True,
    )  # fmt: skip
    return binary


def progress_page(kind: str, seed: int, wss_pages: int, ops: Sequence[int]) -> ProgressPage:
    words = np.zeros(PAGE_WORDS, dtype="<u8")
    words[:8] = (
        protocol.PROGRESS_MAGIC, 1, NONCE, len(ops), wss_pages, KINDS.index(kind), seed, 2
    )  # fmt: skip
    words[8:13] = (3, 4, 4096, 6, 8192)
    words[16 : 16 + 8 * len(ops) : 8] = ops
    return ProgressPage.decode(words.tobytes())


def working_set(harness: Path, kind: str, seed: int, wss_pages: int, ops: Sequence[int]) -> U64:
    arguments = [KINDS.index(kind), seed, len(ops), wss_pages, NONCE, *ops]
    done = subprocess.run(
        [str(harness), *map(str, arguments)], capture_output=True, check=True, timeout=60
    )
    return np.frombuffer(done.stdout, "<u8").reshape(-1, PAGE_WORDS).copy()


# Records


@given(st.sampled_from(protocol.RECORD_KINDS), st.dictionaries(keys, values))
def test_a_record_written_by_the_grammar_is_read_back(kind: str, fields: dict[str, str]) -> None:
    line = " ".join([f"LAB1 {kind}", *(f"{key}={value}" for key, value in fields.items())])
    assert parse_record(line + "\r\n") == Record(kind, fields)


@given(st.text())
def test_no_line_from_the_console_surprises_the_parser(line: str) -> None:
    if line.startswith("LAB1"):
        line = line[1:]
    assert parse_record(line) is None


@pytest.mark.parametrize(
    "line",
    [
        "LAB1",
        "LAB1 ",
        "LAB1 rea",
        "LAB1 ready ",
        "LAB1 ready nonce",
        "LAB1 ready nonce=",
        "LAB1 ready  nonce=1",
        "LAB1 ready nonce=1 nonce=1",
        "LAB1 ready nonce=[    1.0] oops",
        "LAB1 unknown a=b",
        "LAB12 hello",
    ],
)
def test_a_mangled_record_is_an_error_and_not_a_missing_record(line: str) -> None:
    with pytest.raises(GuestError):
        parse_record(line)


READY = (
    "LAB1 ready nonce=00000000deadbeef progress_gpa=29fa000 wss_pages=65536 threads=1 seed=7"
    " kind=random"
)


def read_ready(line: str) -> ReadyRecord:
    record = parse_record(line)
    assert record is not None
    return ReadyRecord.from_record(record)


def test_the_ready_record_is_typed() -> None:
    assert read_ready(READY) == ReadyRecord(
        nonce=0xDEADBEEF,
        progress_gpa=0x29FA000,
        wss_pages=65536,
        threads=1,
        seed=7,
        kind="random",
    )


@pytest.mark.parametrize(
    ("field", "instead"),
    [
        ("seed=7 ", ""),
        ("seed=7", "seed=-7"),
        ("seed=7", "seed=7_0"),
        ("seed=7", "seed=18446744073709551616"),
        ("29fa000", "29fa001"),
        ("29fa000", "0"),
        ("threads=1", "threads=0"),
        ("kind=random", "kind=other"),
        ("kind=random", "kind=random more=1"),
        ("LAB1 ready", "LAB1 hello"),
    ],
)
def test_a_ready_record_that_is_incomplete_or_out_of_range_is_refused(
    field: str, instead: str
) -> None:
    with pytest.raises(GuestError):
        read_ready(READY.replace(field, instead))


# The kernel command line


def test_the_command_line_has_what_the_guest_reads() -> None:
    words = kernel_command_line(kind="random", wss_mib=256, threads=2, seed=9).split()
    assert "console=ttyS0" in words
    assert "panic=-1" in words
    assert words[-5:] == [
        "lab.workload=random",
        "lab.wss_mib=256",
        "lab.threads=2",
        "lab.seed=9",
        "lab.time_writes=0",
    ]


def test_a_rate_of_operations_is_named_only_where_there_is_one() -> None:
    words = kernel_command_line(
        kind="random", wss_mib=1, threads=1, seed=1, rate_ops_per_s=5000
    ).split()
    assert words[-2:] == ["lab.time_writes=0", "lab.rate=5000"]


def test_devices_are_named_only_where_there_are_some() -> None:
    words = kernel_command_line(
        kind="idle", wss_mib=0, threads=1, seed=1, disk="ide", display=True
    ).split()
    assert words[-2:] == ["lab.disk=ide", "lab.display=1"]


@pytest.mark.parametrize(
    "change",
    [
        {"disk": "floppy"},
        {"kind": "busy"},
        {"threads": 0},
        {"threads": 63},
        {"wss_mib": -1},
        {"wss_mib": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"rate_ops_per_s": -1},
        {"rate_ops_per_s": protocol.MAX_RATE + 1},
        {"rate_ops_per_s": 1, "kind": "idle"},
    ],
)
def test_parameters_that_the_guest_would_refuse_are_refused_before(
    change: dict[str, object],
) -> None:
    good: dict[str, object] = {"kind": "random", "wss_mib": 1, "threads": 1, "seed": 0}
    with pytest.raises(UsageError):
        kernel_command_line(**(good | change))  # type: ignore[arg-type]  # wrong on purpose


def test_an_idle_guest_needs_no_working_set() -> None:
    assert "lab.wss_mib=0" in kernel_command_line(kind="idle", wss_mib=0, threads=1, seed=1)


# The progress page


def test_the_progress_page_is_decoded_word_by_word() -> None:
    page = progress_page("sequential", 2**64 - 1, 1024, [5, 6, 7])
    assert page.ops == (5, 6, 7)
    assert page.total_ops == 18
    assert (page.nonce, page.threads, page.wss_pages, page.kind, page.seed, page.state) == (
        NONCE, 3, 1024, "sequential", 2**64 - 1, "running"
    )  # fmt: skip
    assert (page.page_errors, page.page_checks, page.table_gpa, page.tick_ns) == (3, 4, 4096, 6)
    assert page.latency_gpa == 8192


@pytest.mark.parametrize(
    ("word", "value"), [(0, 0), (1, 2), (3, 0), (3, 63), (5, len(KINDS)), (7, 0)]
)
def test_a_page_that_is_not_a_progress_page_is_refused(word: int, value: int) -> None:
    words = np.zeros(PAGE_WORDS, dtype="<u8")
    words[:8] = (protocol.PROGRESS_MAGIC, 1, NONCE, 1, 0, 0, 0, 2)
    ProgressPage.decode(words.tobytes())
    words[word] = value
    with pytest.raises(GuestError):
        ProgressPage.decode(words.tobytes())


def test_a_short_progress_page_is_refused() -> None:
    with pytest.raises(GuestError):
        ProgressPage.decode(bytes(8))


# The latency page


def test_the_guests_own_code_counts_in_the_bucket_that_the_host_reads(harness: Path) -> None:
    bounds = latency_bounds_ticks().astype(np.int64)
    ticks = [*bounds[:-1], *(bounds[1:] - 1), 10**15]
    done = subprocess.run(
        [str(harness), "bucket", *map(str, ticks)], capture_output=True, check=True, timeout=60
    )
    buckets = [int(line) for line in done.stdout.split()]
    every = list(range(LATENCY_BUCKETS))
    assert buckets == [*every, *every, LATENCY_BUCKETS - 1]


# The sequence of operations


@given(seeds, st.integers(0, 61), st.integers(1, 2**32 - 1), st.integers(0, 2**40))
def test_the_page_of_an_operation_is_the_formula_of_the_readme(
    seed: int, thread: int, pages: int, op: int
) -> None:
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix64(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    start = mix64((seed ^ (gamma * (thread + 1))) & mask)
    expected = mix64((start + gamma * (op + 1)) & mask) * pages >> 64
    assert int(pages_of_operations("random", seed, thread, pages, op, 1)[0]) == expected


@given(seeds, st.integers(1, 200), st.integers(0, 300), st.sampled_from(REPLAYED_KINDS))
def test_replaying_from_the_end_equals_replaying_from_the_start(
    seed: int, pages: int, ops: int, kind: str
) -> None:
    versions = [0] * pages
    writes = writes_of_operations(kind, seed, 0, 0, ops)
    for k, page in enumerate(pages_of_operations(kind, seed, 0, pages, 0, ops)):
        if writes[k]:
            versions[int(page)] = k + 1
    assert replay_versions(seed, 0, pages, ops, kind=kind).tolist() == versions


def test_replay_goes_back_over_as_many_chunks_as_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = replay_versions(3, 1, 50, 1000)
    monkeypatch.setattr(protocol, "_REPLAY_CHUNK", 7)
    assert np.array_equal(replay_versions(3, 1, 50, 1000), whole)


def test_a_long_run_is_replayed_by_looking_at_its_end_only() -> None:
    ops = 10**15
    versions = replay_versions(1, 0, 1000, ops)
    assert versions.max() == ops
    assert versions.min() > ops - 100_000


@settings(max_examples=25)
@given(
    kind=st.sampled_from(REPLAYED_KINDS),
    seed=seeds,
    ops=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    spare_pages=st.integers(0, 200),
)
def test_the_guests_own_code_leaves_what_the_host_replays(
    harness: Path, kind: str, seed: int, ops: list[int], spare_pages: int
) -> None:
    wss_pages = len(ops) + spare_pages
    pages = working_set(harness, kind, seed, wss_pages, ops)
    for thread, count in enumerate(ops):
        first = first_page(wss_pages, len(ops), thread)
        end = first_page(wss_pages, len(ops), thread + 1)
        expected = replay_versions(seed, thread, end - first, count, kind=kind)
        for word in (WORD_HEAD, WORD_BODY, WORD_TAIL):
            assert np.array_equal(pages[first:end, word], expected)
    check = check_working_set([pages.tobytes()], progress_page(kind, seed, wss_pages, ops))
    assert check.ok
    assert check.in_flight == 0


def test_the_hot_tenth_moves_on_in_the_guest_as_in_the_replay(harness: Path) -> None:
    ops = [2 * HOT_PERIOD + 1234, HOT_PERIOD - 5]
    pages = working_set(harness, "hotcold", 7, 301, ops)
    check = check_working_set([pages.tobytes()], progress_page("hotcold", 7, 301, ops))
    assert check.ok, check
    for period in range(3):
        page = pages_of_operations("hotcold", 7, 0, 100, period * HOT_PERIOD, 50_000)
        hot = (page // np.uint64(10)) == np.uint64(period)
        assert 0.88 < hot.mean() < 0.92


def test_each_kind_of_page_is_as_frequent_as_its_law_says() -> None:
    ops, pages = 400_000, 1000
    count = np.bincount(pages_of_operations("zipf", 3, 0, pages, 0, ops).astype(np.int64))
    expected = ops / np.arange(1, pages + 1) / (1 / np.arange(1, pages + 1)).sum()
    by_rank = np.sort(count)[::-1]
    assert np.allclose(by_rank[:20], expected[:20], rtol=0.1)
    assert len(count) == pages
    assert by_rank[-1] > expected[-1] / 3
    # The hottest are anywhere, and so hardly ever one beside the other.
    hottest = np.sort(np.argsort(count)[::-1][:10])
    assert (np.diff(hottest) > 1).sum() >= 7
    assert np.ptp(hottest) > pages / 2
    assert 0.095 < writes_of_operations("readmostly", 3, 0, 0, ops).mean() < 0.105


@pytest.mark.parametrize("pages", [1, 2, 3, 7, 8, 9, 100, 1023, 1024, 1025])
def test_the_order_of_ranks_is_a_permutation(pages: int) -> None:
    ranks = np.arange(pages, dtype=np.uint64)
    assert sorted(protocol._spread(ranks, pages).tolist()) == ranks.tolist()


@pytest.mark.parametrize(("wss_pages", "ops"), [(1, [9]), (700, [5, 3000]), (600, [256, 257, 0])])
def test_an_allocating_writer_finds_every_page_anew(
    harness: Path, wss_pages: int, ops: list[int]
) -> None:
    """The program fails when a page it takes is not zero, or one it gives back not right."""
    pages = working_set(harness, "allocate", 1, wss_pages, ops)
    named = pages[:, 0] == np.uint64(protocol.PAGE_MAGIC ^ NONCE)
    assert (pages[named, 1] == np.flatnonzero(named)).all()
    assert not pages[~named].any()
    for thread, count in enumerate(ops):
        first, end = (first_page(wss_pages, len(ops), thread + i) for i in (0, 1))
        share = end - first
        done = (count - 1) % share + 1 if count else 0
        given_back = min(-(-done // 256) * 256, share) - done
        assert named[first:end].sum() == share - given_back
        assert pages[first:end, WORD_TAIL].max() == count


def test_what_can_not_be_replayed_is_refused() -> None:
    for kind in set(KINDS) - set(REPLAYED_KINDS):
        with pytest.raises(ValueError, match=kind):
            pages_of_operations(kind, 1, 0, 1, 0, 1)


# The check of a dump


@pytest.fixture(scope="module")
def dump(harness: Path) -> U64:
    """A working set of 64 pages after 100 and 200 operations of two writers."""
    return working_set(harness, "random", 5, 64, [100, 200])


STATE = progress_page("random", 5, 64, [100, 200])


def in_flight_page(thread: int) -> int:
    ops = STATE.ops[thread]
    return first_page(64, 2, thread) + int(pages_of_operations("random", 5, thread, 32, ops, 1)[0])


def test_pages_are_found_wherever_they_are_and_in_any_order(dump: U64) -> None:
    order = np.random.default_rng(1).permutation(64)
    other = np.full((3, PAGE_WORDS), 7, dtype=np.uint64)
    blocks = [dump[order[:20]], other, dump[order[20:]]]
    assert check_working_set([b.view(np.uint8).ravel() for b in blocks], STATE).ok


def test_a_partial_page_at_the_end_of_a_block_is_no_page(dump: U64) -> None:
    assert check_working_set([dump.tobytes() + b"rest"], STATE).ok


@pytest.mark.parametrize("thread", [0, 1])
@pytest.mark.parametrize("stores", [1, 2, 3])
def test_the_operation_in_flight_is_tolerated(dump: U64, thread: int, stores: int) -> None:
    page = dump.copy()
    for word in (WORD_HEAD, WORD_BODY, WORD_TAIL)[:stores]:
        page[in_flight_page(thread), word] = STATE.ops[thread] + 1
    check = check_working_set([page.tobytes()], STATE)
    assert check.ok
    assert check.in_flight == 1


@pytest.mark.parametrize("words", [[WORD_TAIL], [WORD_BODY], [WORD_HEAD, WORD_TAIL]])
def test_stores_in_flight_out_of_order_are_wrong(dump: U64, words: list[int]) -> None:
    page = dump.copy()
    page[in_flight_page(0), words] = STATE.ops[0] + 1
    assert check_working_set([page.tobytes()], STATE).wrong == 1


def test_the_version_in_flight_on_another_page_is_wrong(dump: U64) -> None:
    page = dump.copy()
    other = (in_flight_page(0) + 1) % 32
    page[other, [WORD_HEAD, WORD_BODY, WORD_TAIL]] = STATE.ops[0] + 1
    check = check_working_set([page.tobytes()], STATE)
    assert (check.wrong, check.first_wrong) == (1, (other,))


@given(st.integers(0, 63), st.integers(0, PAGE_WORDS - 1), st.integers(0, 63))
def test_any_bit_of_the_working_set_matters(dump: U64, page: int, word: int, bit: int) -> None:
    damaged = dump.copy()
    damaged[page, word] ^= np.uint64(1 << bit)
    progress = STATE
    check = check_working_set([damaged.tobytes()], progress)
    # A wrong magic hides the page; a wrong index makes it another's copy, or impossible.
    assert check.ok == (
        page == in_flight_page(page // 32)
        and word == WORD_HEAD
        and int(damaged[page, word]) == progress.ops[page // 32] + 1
    )


def test_a_missing_page_and_a_second_copy_are_seen(dump: U64) -> None:
    check = check_working_set([np.vstack([dump[:-1], dump[:1]]).tobytes()], STATE)
    assert (check.ok, check.missing, check.surplus, check.wrong) == (False, 1, 1, 0)


def test_a_page_of_another_boot_is_no_page_of_this_one(dump: U64) -> None:
    other = dump.copy()
    other[:, 0] ^= np.uint64(1)
    assert check_working_set([other.tobytes()], STATE).missing == 64


def test_an_idle_guests_working_set_stays_as_populated(harness: Path) -> None:
    pages = working_set(harness, "sequential", 5, 16, [0])
    idle = progress_page("idle", 5, 16, [1234])
    assert check_working_set([pages.tobytes()], idle).ok


def test_the_progress_page_is_found_by_its_nonce() -> None:
    words = np.zeros((4, PAGE_WORDS), dtype="<u8")
    words[2, :8] = (protocol.PROGRESS_MAGIC, 1, NONCE, 1, 0, 0, 0, 2)
    words[3, :8] = (protocol.PROGRESS_MAGIC, 1, NONCE + 1, 1, 0, 0, 0, 2)
    ram = words.tobytes()
    assert find_progress_page([bytes(PAGE_BYTES), ram], NONCE).nonce == NONCE
    with pytest.raises(GuestError, match="0 progress pages"):
        find_progress_page([ram], 5)
    with pytest.raises(GuestError, match="2 progress pages"):
        find_progress_page([ram, ram], NONCE)
