"""What `lab floor` measures: blocks, in rounds of random order."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from lab.errors import UsageError

BENCHMARKS = ("arm", "unprotect", "fault", "copy", "scan", "write")
RAM_KINDS = ("anon-thp", "anon-4k", "memfd", "hugetlb")
CHUNKS_PAGES = (1, 16, 64, 512, 2048)
TARGETS = ("image-dir", "tmpfs")

#: Arming all of the memory is one call a sample, and populating it again takes long.
ARM_SAMPLES = 3
#: Memory that other benchmarks work on: more than a cache holds, quick to populate.
WORK_MIB = 256


@dataclass(frozen=True, kw_only=True)
class Block:
    """One benchmark in one variant: what one process of floor.c measures."""

    benchmark: str
    variant: str
    ram_kind: str | None = None
    target: str | None = None
    chunk_pages: int | None = None
    busy_threads: int = 0

    @property
    def label(self) -> str:
        """The block in a few words."""
        parts = [self.benchmark, self.variant]
        if self.chunk_pages is not None:
            parts.append(f"{self.chunk_pages} pages")
        parts += [part for part in (self.ram_kind, self.target) if part]
        return " ".join(parts) + (" busy" if self.busy_threads else "")


@dataclass(frozen=True, kw_only=True)
class FloorPlan:
    """What to measure: rounds that hold every block once, each in an order of its own.

    `seed` fixes the order of the blocks and which pages are written to.  `delay_us` is there to see
    that what is measured is what happens.
    """

    benchmarks: tuple[str, ...] = field(
        default=BENCHMARKS,
        metadata={
            "help": f"repeatable; one of {', '.join(BENCHMARKS)} (default: all of them)",
            "flag": "benchmark",
        },
    )
    repeats: int = field(default=9, metadata={"help": "rounds"})
    mib: int = field(
        default=1024,
        metadata={"help": f"memory to protect, at most {WORK_MIB} of it for other steps"},
    )
    write_mib: int = field(default=256, metadata={"help": "size of the file to write"})
    samples: int = field(
        default=199,
        metadata={"help": "most samples of a block; faults and unprotect calls in one"},
    )
    delay_us: int = field(
        default=0, metadata={"help": "delay that the handler adds to each fault, to check"}
    )
    seed: int = field(default=1, metadata={"help": "order of blocks and pages"})

    def __post_init__(self) -> None:
        unknown = [name for name in self.benchmarks if name not in BENCHMARKS]
        if unknown or not self.benchmarks:
            raise UsageError(
                f"no benchmark {', '.join(unknown)}" if unknown else "no benchmark to measure",
                f"choose from {', '.join(BENCHMARKS)}",
            )
        if self.repeats < 1:
            raise UsageError("fewer than one round", "give --repeats 1 or more")
        if min(self.mib, self.write_mib) < 8 or max(self.mib, self.write_mib) > 1 << 20:
            raise UsageError("sizes go from 8 MiB to 1 TiB", "change --mib or --write-mib")
        if not 1 <= self.samples <= 100_000:
            raise UsageError("samples go from 1 to 100000", "change --samples")
        if not 0 <= self.delay_us <= 1_000_000:
            raise UsageError("the delay goes from 0 to 1000000 us", "change --delay-us")
        if not 0 <= self.seed < 1 << 32:
            raise UsageError("the seed goes from 0 to 4294967295", "change --seed")

    def arguments(self, block: Block, round_: int, folder: str | None) -> list[str]:
        """The arguments that make floor.c measure `block` in round `round_`.

        :param folder: where a file is written, for the blocks that write one.
        """
        sizes = {"arm": self.mib, "write": self.write_mib}
        options: dict[str, str | int | None] = {
            "ram": block.ram_kind,
            "mib": sizes.get(block.benchmark, min(self.mib, WORK_MIB)),
            "chunk": block.chunk_pages,
            "busy": block.busy_threads,
            "samples": min(self.samples, ARM_SAMPLES) if block.benchmark == "arm" else self.samples,
            "delay_us": self.delay_us if block.benchmark == "fault" else 0,
            # Another order of pages each round, the same whenever this plan is measured.
            "seed": self.seed * 1000 + round_,
            "dir": folder,
        }
        given = [f"{key}={value}" for key, value in options.items() if value is not None]
        return [block.benchmark, block.variant, *given]


def all_blocks() -> list[Block]:
    """Every block there is, in the order in which results are shown."""
    blocks = [
        Block(benchmark="arm", variant=variant, ram_kind=kind)
        for kind in RAM_KINDS
        for variant in ("populated", "unpopulated")
    ]
    blocks += [
        Block(benchmark="fault", variant=variant, ram_kind="anon-4k", busy_threads=busy)
        for busy in (0, 1)
        for variant in ("sleep-near", "sleep-far", "spin", "sigbus")
    ]
    blocks += [
        Block(
            benchmark="unprotect",
            variant="sweep",
            ram_kind=kind,
            chunk_pages=pages,
            busy_threads=busy,
        )
        for kind in ("anon-thp", "anon-4k")
        for busy in (0, 1)
        for pages in CHUNKS_PAGES
    ]
    for kind in ("anon-thp", "anon-4k"):
        blocks += [
            Block(benchmark="copy", variant=variant, ram_kind=kind)
            for variant in ("gather-4k", "bulk-2m")
        ]
        blocks.append(Block(benchmark="scan", variant="zeros", ram_kind=kind))
    blocks += [
        Block(benchmark="write", variant=variant, target=target)
        for target in TARGETS
        for variant in ("fresh", "overwrite", "direct")
        # There is no medium behind tmpfs to go to directly.
        if (target, variant) != ("tmpfs", "direct")
    ]
    return blocks


def round_blocks(plan: FloorPlan, round_: int) -> list[Block]:
    """The blocks of a round in the order of measurement: the same plan gives the same order."""
    blocks = [block for block in all_blocks() if block.benchmark in plan.benchmarks]
    random.Random(f"{plan.seed}/{round_}").shuffle(blocks)
    return blocks


def describe(plan: FloorPlan) -> Iterable[str]:
    """The plan as lines for `--dry-run`."""
    blocks = round_blocks(plan, 0)
    yield (
        f"{plan.repeats} rounds of {len(blocks)} blocks; {plan.mib} MiB are armed, files of "
        f"{plan.write_mib} MiB, at most {plan.samples} samples per block; seed {plan.seed}"
    )
    yield from (block.label for block in all_blocks() if block in blocks)
