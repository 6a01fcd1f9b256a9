"""The host's side of the guest's protocol: command line, records, progress page, working set.

linux/workload.c and common/*.h are the guest's side, and README.md describes both. Everything here
is pure: bytes and lines in, values out. A test runs the C code on the host and compares.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self, get_args

import numpy as np
import numpy.typing as npt

from lab.errors import GuestError, UsageError
from lab.scenario.workload import WorkloadKind

PAGE_BYTES = 4096
PAGE_WORDS = PAGE_BYTES // 8
#: Kinds of workload; the position is the number in the progress page.
KINDS: tuple[WorkloadKind, ...] = get_args(WorkloadKind)
#: Kinds whose working set a host can replay. An idle guest has nothing to replay, and memory that
#: `allocate` has given back still holds pages that name themselves, which only the guest's page
#: tables tell from those of the working set.
REPLAYED_KINDS = tuple(kind for kind in KINDS if kind not in ("idle", "allocate"))
#: A scattered writer writes to one page out of so many.
SCATTER = 64
#: Of a hotcold writer's pages one in so many is hot, one operation in so many goes to the others,
#: and which pages are hot changes after so many operations.
HOT_SHARE = 10
COLD_EVERY = 10
HOT_PERIOD = 1 << 20
#: A readmostly writer writes in one operation out of so many, and reads in the others.
WRITE_EVERY = 10
MAX_THREADS = 62
MAX_WSS_MIB = 1 << 20
MAX_RATE = 1_000_000_000

PROGRESS_MAGIC = 0x31474F525042414C  # "LABPROG1"
PROGRESS_LAYOUT = 1
#: Word of thread i's counter in the progress page: PROGRESS_OPS + PROGRESS_OPS_STRIDE * i.
PROGRESS_OPS = 16
PROGRESS_OPS_STRIDE = 8
#: First of the four words about devices, where the last thread's counter leaves room.
PROGRESS_DEVICES = 508
STATES = {1: "populating", 2: "running", 3: "refused"}
#: Words of the microguest: the number of the host's request, of the one answered, the answer.
PROGRESS_REQUEST = 13

LATENCY_MAGIC = 0x315954414C42414C  # "LABLATY1"
#: Sub-buckets an octave of the operations' durations, and buckets in all.
LATENCY_SUBS = 64
LATENCY_BUCKETS = 5 * PAGE_WORDS
LATENCY_PAGES = LATENCY_BUCKETS // PAGE_WORDS
#: Word of the address of thread i's page k: LATENCY_GPAS + LATENCY_GPAS_STRIDE * i + k.
LATENCY_GPAS = 16
LATENCY_GPAS_STRIDE = 8
#: A ring of what was slow, of which the first entry is how many there ever were.
SLOW_ENTRIES = 4096
SLOW_WORDS = 4

PAGE_MAGIC = 0x4547415042414C56  # "VLABPAGE"
WORD_MAGIC = 0
WORD_INDEX = 1
WORD_HEAD = 2
WORD_BODY = 256
WORD_TAIL = 511

RECORD_KINDS = ("hello", "params", "ready", "tick", "verify", "error", "bye")

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
#: Operations replayed at a time: some 50 MiB of temporary arrays.
_REPLAY_CHUNK = 1 << 20
_SCAN_CHUNK_PAGES = 1 << 14

U64 = npt.NDArray[np.uint64]

#: What the lab asks of the kernel, each for a reason of measurement or of boot time.
KERNEL_PARAMETERS: tuple[str, ...] = (
    "console=ttyS0",
    # Nothing but the workload's records on the console, except a panic's message.
    "quiet",
    "loglevel=1",
    # A panic restarts, and -no-reboot turns that into an exit that the host sees.
    "panic=-1",
    # The self tests of ciphers nobody uses take 0.2 s under TCG.
    "cryptomgr.notests",
    "no_timer_check",
    # The same addresses in every boot; no mitigations, as the guest runs one program.
    "nokaslr",
    "mitigations=off",
    # A paused VM loses time. That is no reason to distrust the clock or to report a stall.
    "tsc=reliable",
    "nowatchdog",
    "rcupdate.rcu_cpu_stall_suppress=1",
    # Pages of 4 KiB that are written by nobody but the workload, and that stay where they are:
    # the host keeps the physical address of the progress page.
    "init_on_alloc=0",
    "transparent_hugepage=never",
    "sysctl.vm.compaction_proactiveness=0",
    "sysctl.vm.compact_unevictable_allowed=0",
)


DISKS = ("none", "ide", "virtio", "scsi")


def kernel_command_line(
    *,
    kind: str,
    wss_mib: int,
    threads: int,
    seed: int,
    time_writes: bool = False,
    rate_ops_per_s: int = 0,
    disk: str = "none",
    net: bool = False,
    display: bool = False,
    balloon: bool = False,
) -> str:
    """Return the kernel command line that boots the guest into a workload.

    :param kind: one of `KINDS`.
    :param wss_mib: working set in MiB, shared out among the threads.
    :param threads: writers, each on its own vCPU if there are as many.
    :param seed: of the sequence of pages; the same seed gives the same sequence.
    :param time_writes: whether the writers time their operations.
    :param rate_ops_per_s: how many operations all writers do in a second; 0 is as many as they can.
    :param disk: the disk to put load on: one of `DISKS`.
    :param net: exchange packets over the first network card.
    :param display: draw on the screen.
    :param balloon: load the balloon's driver.
    :raises UsageError: the guest would refuse these parameters.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown workload {kind!r}", f"choose one of {', '.join(KINDS)}")
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"{threads} workload threads", f"choose 1 to {MAX_THREADS}")
    if not 0 <= wss_mib <= MAX_WSS_MIB:
        raise UsageError(
            f"a working set of {wss_mib} MiB", f"choose 0 to {MAX_WSS_MIB} MiB (0 only when idle)"
        )
    if kind != "idle" and wss_mib == 0:
        raise UsageError(f"a {kind} workload needs a working set", "choose at least 1 MiB")
    if not 0 <= seed <= _MASK:
        raise UsageError(f"seed {seed}", "choose a number of 64 bits, not negative")
    if not 0 <= rate_ops_per_s <= MAX_RATE:
        raise UsageError(f"{rate_ops_per_s} operations a second", f"choose 0 to {MAX_RATE}")
    if kind == "idle" and rate_ops_per_s:
        raise UsageError("an idle guest has no rate of writes", "choose another workload")
    if disk not in DISKS:
        raise UsageError(f"unknown disk {disk!r}", f"choose one of {', '.join(DISKS)}")
    workload = [
        f"lab.workload={kind}",
        f"lab.wss_mib={wss_mib}",
        f"lab.threads={threads}",
        f"lab.seed={seed}",
        f"lab.time_writes={int(time_writes)}",
    ]
    if rate_ops_per_s:
        workload.append(f"lab.rate={rate_ops_per_s}")
    if disk != "none":
        workload.append(f"lab.disk={disk}")
    devices = {"net": net, "display": display, "balloon": balloon}
    workload += [f"lab.{name}=1" for name, used in devices.items() if used]
    return " ".join([*KERNEL_PARAMETERS, *workload])


# Records


@dataclass(frozen=True)
class Record:
    """One line the guest wrote: its kind and its fields as text."""

    kind: str
    fields: Mapping[str, str]


_RECORD = re.compile(r"LAB1 ([a-z]+)((?: [a-z][a-z0-9_]*=[!-<>-~]+)*)")


def parse_record(line: str) -> Record | None:
    """Return the record on a console line, None if the line is not the workload's.

    A line is the workload's when it begins with `LAB1`; what follows must then be a record to
    the letter, for a mangled record would otherwise be waited for in vain.

    :raises GuestError: the line begins like a record and is none.
    """
    line = line.rstrip("\r\n")
    if not line.startswith("LAB1"):
        return None
    match = _RECORD.fullmatch(line)
    if match is None or match[1] not in RECORD_KINDS:
        raise GuestError(f"not a record: {line[:200]!r}", "look at the console log")
    pairs = [field.split("=", 1) for field in match[2].split()]
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise GuestError(f"a field is there twice: {line[:200]!r}", "look at the console log")
    return Record(match[1], fields)


def _number(record: Record, field: str, base: int = 10) -> int:
    text = record.fields.get(field)
    digits = r"[0-9]+" if base == 10 else r"[0-9a-f]+"
    if text is None or not re.fullmatch(digits, text) or int(text, base) > _MASK:
        raise GuestError(f"{record.kind} record: {field}={text}", "look at the console log")
    return int(text, base)


@dataclass(frozen=True, kw_only=True)
class ReadyRecord:
    """The guest's announcement that its working set is populated and its writers run.

    :param nonce: a number made at boot that is nowhere but in guest RAM and in this record.
    :param progress_gpa: guest physical address of the progress page.
    :param wss_pages: pages of 4096 bytes in the working set.
    """

    nonce: int
    progress_gpa: int
    wss_pages: int
    threads: int
    seed: int
    kind: str

    @classmethod
    def from_record(cls, record: Record) -> Self:
        """Return the typed form of a `ready` record.

        :raises GuestError: another kind of record, or a field is missing or out of range.
        """
        if record.kind != "ready":
            raise GuestError(f"a {record.kind} record where ready was expected")
        if set(record.fields) != {
            "nonce", "progress_gpa", "wss_pages", "threads", "seed", "kind"
        }:  # fmt: skip
            raise GuestError(f"ready record with fields {', '.join(record.fields)}")
        ready = cls(
            nonce=_number(record, "nonce", 16),
            progress_gpa=_number(record, "progress_gpa", 16),
            wss_pages=_number(record, "wss_pages"),
            threads=_number(record, "threads"),
            seed=_number(record, "seed"),
            kind=record.fields["kind"],
        )
        if (
            ready.kind not in KINDS
            or not 1 <= ready.threads <= MAX_THREADS
            or ready.progress_gpa == 0
            or ready.progress_gpa % PAGE_BYTES
        ):
            raise GuestError(f"ready record out of range: {ready}")
        return ready


# The progress page


@dataclass(frozen=True, kw_only=True)
class ProgressPage:
    """The page in which the guest counts, decoded.

    The counters are stored one by one, not as a snapshot of one instant: between two threads'
    counters, or between `ops` and `page_checks`, a running guest goes on.

    :param state: "populating", "running" or, of the microguest alone, "refused".
    :param page_errors: pages found torn, stale or damaged by the writers.
    :param page_checks: pages checked, as of the last tick.
    :param table_gpa: guest physical address of the version table's first page, 0 without one.
    :param tick_ns: the guest's CLOCK_MONOTONIC at its last tick, ten times a second.
    :param latency_gpa: guest physical address of the latency page, 0 when nothing is timed.
    :param answered: number of the request that the microguest answered last.
    :param answer: pages that it found wrong; where it refused to run, why.
    :param ops: operations completed, for each thread.
    :param disk_ops: reads and writes of the disk done; like the next two, 0 without the device.
    :param net_packets: packets that came back over the network.
    :param display_writes: pages of the screen's memory written to.
    :param device_errors: I/O errors, and wrong data from a disk, the network or the screen.
    """

    nonce: int
    threads: int
    wss_pages: int
    kind: str
    seed: int
    state: str
    page_errors: int
    page_checks: int
    table_gpa: int
    tick_ns: int
    latency_gpa: int
    ops: tuple[int, ...]
    answered: int = 0
    answer: int = 0
    disk_ops: int = 0
    net_packets: int = 0
    display_writes: int = 0
    device_errors: int = 0

    @property
    def total_ops(self) -> int:
        """Operations completed by all threads together."""
        return sum(self.ops)

    @classmethod
    def decode(cls, page: bytes | memoryview) -> Self:
        """Decode the 4096 bytes of the page.

        :raises GuestError: this is not a progress page that this version knows.
        """
        if len(page) != PAGE_BYTES:
            raise GuestError(f"a progress page of {len(page)} bytes instead of {PAGE_BYTES}")
        word = [int(value) for value in np.frombuffer(page, "<u8")]
        if word[0] != PROGRESS_MAGIC:
            raise GuestError("no progress page there: its first word is not LABPROG1")
        if word[1] != PROGRESS_LAYOUT:
            raise GuestError(
                f"progress page of layout {word[1]}, this version reads {PROGRESS_LAYOUT}"
            )
        if not 1 <= word[3] <= MAX_THREADS or word[5] >= len(KINDS) or word[7] not in STATES:
            raise GuestError(
                f"progress page out of range: threads {word[3]}, kind {word[5]}, state {word[7]}"
            )
        return cls(
            nonce=word[2],
            threads=word[3],
            wss_pages=word[4],
            kind=KINDS[word[5]],
            seed=word[6],
            state=STATES[word[7]],
            page_errors=word[8],
            page_checks=word[9],
            table_gpa=word[10],
            tick_ns=word[11],
            latency_gpa=word[12],
            answered=word[PROGRESS_REQUEST + 1],
            answer=word[PROGRESS_REQUEST + 2],
            ops=tuple(word[PROGRESS_OPS + PROGRESS_OPS_STRIDE * i] for i in range(word[3])),
            disk_ops=word[PROGRESS_DEVICES],
            net_packets=word[PROGRESS_DEVICES + 1],
            display_writes=word[PROGRESS_DEVICES + 2],
            device_errors=word[PROGRESS_DEVICES + 3],
        )


@dataclass(frozen=True, kw_only=True)
class LatencyPage:
    """The page that says where the durations of operations are counted, decoded.

    :param ticks_per_ns: speed of the guest's time stamp counter, by the guest's clock; None until
        it has ticked once.
    :param gpas: for each thread, the guest physical addresses of its pages of counts, in order.
    :param slow_gpas: for each thread that of its slow operations; 0 from a guest that notes none.
    :param set_gpa: that of the working set's first page; 0 from a guest whose pages are anywhere.
    :param start_ticks: what the counter was when the guest's clock was zero.
    """

    ticks_per_ns: float | None
    gpas: tuple[tuple[int, ...], ...]
    slow_gpas: tuple[int, ...]
    set_gpa: int
    start_ticks: int

    @classmethod
    def decode(cls, page: bytes | memoryview, threads: int) -> Self:
        """Decode the 4096 bytes of the page.

        :raises GuestError: this is not a latency page that this version knows.
        """
        word = [int(value) for value in np.frombuffer(page, "<u8")]
        if len(word) != PAGE_WORDS or word[0] != LATENCY_MAGIC:
            raise GuestError("no latency page there: its first word is not LABLATY1")
        if word[1] != LATENCY_BUCKETS:
            raise GuestError(
                f"a latency page of {word[1]} buckets, this version reads {LATENCY_BUCKETS}"
            )
        elapsed_ticks, elapsed_ns = word[4] - word[2], word[5] - word[3]
        first = [LATENCY_GPAS + LATENCY_GPAS_STRIDE * i for i in range(threads)]
        return cls(
            ticks_per_ns=elapsed_ticks / elapsed_ns if elapsed_ns > 0 else None,
            gpas=tuple(tuple(word[at : at + LATENCY_PAGES]) for at in first),
            slow_gpas=tuple(word[at + LATENCY_PAGES] for at in first),
            set_gpa=word[6],
            start_ticks=word[2],
        )


def latency_bounds_ticks() -> U64:
    """Return the lowest duration of each bucket, in ticks, and the end of the last.

    Buckets are one tick wide up to `2 * LATENCY_SUBS`, then `LATENCY_SUBS` an octave: what a
    bucket holds differs by 1/64 at most.  The last bucket also holds what is longer.
    """
    bucket = np.arange(LATENCY_BUCKETS + 1, dtype=np.uint64)
    subs = np.uint64(LATENCY_SUBS)
    shift = np.maximum(bucket // subs, np.uint64(1)) - np.uint64(1)
    bounds: U64 = (bucket - shift * subs) << shift
    return bounds


# The sequence of operations


def first_page(wss_pages: int, threads: int, thread: int) -> int:
    """Return the first page of a thread's share; it ends where the next thread's begins."""
    return wss_pages * thread // threads


def _mix64(z: U64) -> U64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return z ^ (z >> np.uint64(31))


def _scale(random: U64, pages: int) -> U64:
    """Return the high 64 bits of random * pages, for pages below 2**32."""
    count, low, shift = np.uint64(pages), np.uint64(0xFFFFFFFF), np.uint64(32)
    return ((random >> shift) * count + (((random & low) * count) >> shift)) >> shift


def _random_of_operations(seed: int, thread: int, first_op: int, ops: int) -> U64:
    """Return each operation's random number: SplitMix64, evaluated at the operation."""
    k = np.arange(first_op, first_op + ops, dtype=np.uint64)
    seeded = np.array([(seed ^ (_GAMMA * (thread + 1))) & _MASK], dtype=np.uint64)
    return _mix64(_mix64(seeded) + np.uint64(_GAMMA) * (k + np.uint64(1)))


def _zipf_ranks(random: U64, pages: int) -> U64:
    """Return a rank from 0 for each random number, with probabilities 1 : 1/2 : 1/3 and so on."""
    rank = np.zeros_like(random)
    waiting = np.arange(len(random))
    while len(waiting):
        first = np.uint64(1) << _scale(random, pages.bit_length())
        more = _mix64(random)
        proposed = first + ((more >> np.uint64(32)) & (first - np.uint64(1)))
        accepted = (proposed <= np.uint64(pages)) & (
            (more & np.uint64(0xFFFFFFFF)) * proposed < first << np.uint64(32)
        )
        rank[waiting[accepted]] = proposed[accepted] - np.uint64(1)
        waiting = waiting[~accepted]
        random = _mix64(random[~accepted] + np.uint64(_GAMMA))
    return rank


def _spread(rank: U64, pages: int) -> U64:
    """Permute numbers below `pages`, so that neighbouring ranks are not neighbouring pages."""
    bits = pages.bit_length()
    mask, half = np.uint64((1 << bits) - 1), np.uint64(bits // 2 + 1)
    page = rank.copy()
    outside = np.arange(len(rank))
    while len(outside):
        at = ((page[outside] + np.uint64(_GAMMA)) * np.uint64(_MIX_1)) & mask
        at ^= at >> half
        at = (at * np.uint64(_MIX_2)) & mask
        at ^= at >> half
        page[outside] = at
        outside = outside[at >= np.uint64(pages)]
    return page


def _hotcold(random: U64, pages: int, first_op: int) -> U64:
    k = np.arange(first_op, first_op + len(random), dtype=np.uint64)
    hot, count = -(-pages // HOT_SHARE), np.uint64(pages)
    # Divided first, because the product need not fit into 64 bits.
    moved = k // np.uint64(HOT_PERIOD) % count
    first = moved * np.uint64(hot) % count
    is_hot = (_scale(random, COLD_EVERY) > 0) | (hot == pages)
    rest = random * np.uint64(COLD_EVERY)
    cold = np.uint64(hot) + _scale(rest, pages - hot)
    return (first + np.where(is_hot, _scale(rest, hot), cold)) % count


def pages_of_operations(
    kind: str, seed: int, thread: int, pages: int, first_op: int, ops: int
) -> U64:
    """Return the page, counted within the thread's share, that each operation is about.

    Operation k, counted from 0, of a `random` writer is SplitMix64 evaluated at k::

        start(seed, thread) = mix64(seed XOR GAMMA * (thread + 1))
        random(k)           = mix64(start + GAMMA * (k + 1))
        page(k)             = high64(random(k) * pages)

    with GAMMA = 0x9e3779b97f4a7c15, mix64 the output function of SplitMix64, and arithmetic
    modulo 2**64. A `sequential` writer takes page k modulo `pages`, and a `scattered` one is a
    random writer to every `SCATTER`-th page. The README has the others, all functions of random(k).

    :param pages: pages in the share, 1 to 2**32 - 1.
    :param first_op: number of the first operation.
    :param ops: how many.
    """
    if kind == "sequential":
        return np.arange(first_op, first_op + ops, dtype=np.uint64) % np.uint64(pages)
    if kind not in REPLAYED_KINDS:
        raise ValueError(f"a workload of kind {kind!r} cannot be replayed")
    random = _random_of_operations(seed, thread, first_op, ops)
    match kind:
        case "zipf":
            return _spread(_zipf_ranks(random, pages), pages)
        case "hotcold":
            return _hotcold(random, pages, first_op)
        case "readmostly":
            return _scale(random * np.uint64(WRITE_EVERY), pages)
        case "scattered":
            return _scale(random, -(-pages // SCATTER)) * np.uint64(SCATTER)
        case "random":
            return _scale(random, pages)
    raise NotImplementedError(f"no replay of kind {kind!r}")


def writes_of_operations(
    kind: str, seed: int, thread: int, first_op: int, ops: int
) -> npt.NDArray[np.bool_]:
    """Return whether each operation writes to its page; the others only read it."""
    if kind != "readmostly":
        return np.ones(ops, dtype=bool)
    writes: npt.NDArray[np.bool_] = (
        _scale(_random_of_operations(seed, thread, first_op, ops), WRITE_EVERY) == 0
    )
    return writes


def replay_versions(seed: int, thread: int, pages: int, ops: int, *, kind: str = "random") -> U64:
    """Return the version of every page of a thread's share after `ops` operations.

    Operation k writes version k + 1, if it writes; a page never written has version 0. The sequence
    is walked from its end, because only the last write to a page counts, and the walk stops when
    every page has had one: the time does not grow with `ops` beyond that.

    :param pages: pages in the share, 1 to 2**32 - 1.
    """
    versions = np.zeros(pages, dtype=np.uint64)
    every = SCATTER if kind == "scattered" else 1
    end = ops
    while end > 0 and not versions[::every].all():
        start = max(0, end - _REPLAY_CHUNK)
        page = pages_of_operations(kind, seed, thread, pages, start, end - start)
        writes = writes_of_operations(kind, seed, thread, start, end - start)
        written = np.zeros(pages, dtype=np.uint64)
        # For an index that is there more than once, the last assignment stays.
        written[page[writes]] = np.arange(start + 1, end + 1, dtype=np.uint64)[writes]
        versions = np.where(versions == 0, written, versions)
        end = start
    return versions


# The working set in a dump of RAM


@dataclass(frozen=True, kw_only=True)
class WorkingSetCheck:
    """What became of the working set in a dump of guest RAM.

    :param pages: pages there should be.
    :param missing: of those, not found anywhere.
    :param wrong: found, with content that no moment between two operations, and no moment within
        the one operation that may be in flight in each thread, explains.
    :param in_flight: found with the content of an operation in flight; at most one a thread.
    :param surplus: pages that carry the nonce and are a second copy or have an impossible index.
    :param first_wrong: indices of the first few missing or wrong pages.
    """

    pages: int
    missing: int
    wrong: int
    in_flight: int
    surplus: int
    first_wrong: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether every page is there once and right."""
        return self.missing == self.wrong == self.surplus == 0


Ram = bytes | memoryview | npt.NDArray[np.uint8] | np.memmap[tuple[int], np.dtype[np.uint8]]


def _as_pages(block: Ram) -> U64:
    """View a block of RAM as rows of 512 words, leaving out a last partial page."""
    octets = np.frombuffer(block, np.uint8) if isinstance(block, bytes | memoryview) else block
    whole = octets.size // PAGE_BYTES * PAGE_BYTES
    return octets[:whole].view("<u8").reshape(-1, PAGE_WORDS)


def find_progress_page(blocks: Iterable[Ram], nonce: int) -> ProgressPage:
    """Find the progress page of the boot with this nonce in a dump of guest RAM.

    :param blocks: the RAM blocks, each beginning at a page boundary.
    :raises GuestError: it is not there, or is there more than once.
    """
    found: list[ProgressPage] = []
    for block in blocks:
        rows = _as_pages(block)
        hits = np.flatnonzero((rows[:, 0] == PROGRESS_MAGIC) & (rows[:, 2] == nonce))
        found += [ProgressPage.decode(rows[hit].tobytes()) for hit in hits]
    if len(found) != 1:
        raise GuestError(f"{len(found)} progress pages of boot {nonce:016x} instead of one")
    return found[0]


def check_working_set(blocks: Iterable[Ram], progress: ProgressPage) -> WorkingSetCheck:
    """Compare the working set in a dump of guest RAM with a replay of the guest's operations.

    Every word is compared. The pages are found by their first word, so the guest's page tables
    are not needed; the progress page must come from the same dump, see `find_progress_page`.

    For a writer whose counter says n, operations 0 to n - 1 are complete. Of operation n any
    number of the stores head, body, tail, in this order, may have happened too: its page passes
    with those versions as it would with the old ones.

    :param blocks: the RAM blocks, each beginning at a page boundary; read once, in order.
    """
    expected, pending, target = _expected_versions(progress)
    pages = progress.wss_pages
    magic = np.uint64(PAGE_MAGIC ^ progress.nonce)
    copies = np.zeros(pages, dtype=np.int64)
    bad = np.zeros(pages, dtype=bool)
    in_flight = impossible = 0
    for block in blocks:
        rows = _as_pages(block)
        hits = np.flatnonzero(rows[:, WORD_MAGIC] == magic)
        for start in range(0, len(hits), _SCAN_CHUNK_PAGES):
            chunk = rows[hits[start : start + _SCAN_CHUNK_PAGES]]
            known = chunk[:, WORD_INDEX] < pages
            impossible += int((~known).sum())
            chunk = chunk[known]
            index = chunk[:, WORD_INDEX].astype(np.int64)
            old = expected[index]
            new = np.where(target[index], pending[index], old)
            right, started = _compare_versions(chunk, old, new)
            right &= _filler_intact(chunk)
            np.add.at(copies, index, 1)
            bad[index[~right]] = True
            in_flight += int((right & started).sum())
    missing = copies == 0
    return WorkingSetCheck(
        pages=pages,
        missing=int(missing.sum()),
        wrong=int(bad.sum()),
        in_flight=in_flight,
        surplus=impossible + int(np.maximum(copies - 1, 0).sum()),
        first_wrong=tuple(int(i) for i in np.flatnonzero(missing | bad)[:8]),
    )


def _expected_versions(progress: ProgressPage) -> tuple[U64, U64, npt.NDArray[np.bool_]]:
    """Return each page's version, the version in flight, and where there is one in flight."""
    pages = progress.wss_pages
    expected = np.zeros(pages, dtype=np.uint64)
    pending = np.zeros(pages, dtype=np.uint64)
    target = np.zeros(pages, dtype=bool)
    if progress.kind == "idle":
        return expected, pending, target
    for thread, ops in enumerate(progress.ops):
        first = first_page(pages, progress.threads, thread)
        count = first_page(pages, progress.threads, thread + 1) - first
        expected[first : first + count] = replay_versions(
            progress.seed, thread, count, ops, kind=progress.kind
        )
        next_page = pages_of_operations(progress.kind, progress.seed, thread, count, ops, 1)
        at = first + int(next_page[0])
        pending[at] = ops + 1
        target[at] = writes_of_operations(progress.kind, progress.seed, thread, ops, 1)[0]
    return expected, pending, target


def _compare_versions(
    rows: U64, old: U64, new: U64
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which rows have explicable versions, and which of them a store in flight."""
    versions = [rows[:, word] for word in (WORD_HEAD, WORD_BODY, WORD_TAIL)]
    right = np.zeros(len(rows), dtype=bool)
    for stores in range(len(versions) + 1):
        right |= np.logical_and.reduce(
            [word == (new if i < stores else old) for i, word in enumerate(versions)]
        )
    return right, versions[0] != old


def _filler_intact(rows: U64) -> npt.NDArray[np.bool_]:
    word = np.arange(PAGE_WORDS, dtype=np.uint64)
    at = rows[:, WORD_INDEX, None] * np.uint64(PAGE_WORDS) + word
    same = rows == at * np.uint64(_GAMMA)
    same[:, [WORD_MAGIC, WORD_INDEX, WORD_HEAD, WORD_BODY, WORD_TAIL]] = True
    intact: npt.NDArray[np.bool_] = same.all(axis=1)
    return intact
