"""The patch series: which patches, applied how, and checked how."""

import hashlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.errors import BuildError, LabError
from lab.host.tools import require_tools, run_tool
from lab.qemu.source import Progress, obtain_source, qemu_cache, unpack

SERIES_DIR = Path(__file__).parent / "patches"


@dataclass(frozen=True, kw_only=True)
class PatchCheck:
    """What became of one patch on the pristine source.

    ``problem`` says why it does not apply, and is empty when it does. ``errors`` and ``warnings``
    are checkpatch.pl's counts, ``report`` is what it wrote.
    """

    name: str
    problem: str
    errors: int
    warnings: int
    report: str

    @property
    def clean(self) -> bool:
        """Whether it applies and checkpatch.pl has nothing to say."""
        return not (self.problem or self.errors or self.warnings)


def read_series(folder: Path = SERIES_DIR) -> list[Path]:
    """Return the patches in the order they apply.

    :raise BuildError: when the series names a file that is not there.
    """
    lines = folder.joinpath("series").read_text(encoding="utf-8").splitlines()
    names = [name for line in lines if (name := line.partition("#")[0].strip())]
    patches = [folder / name for name in names]
    missing = [patch.name for patch in patches if not patch.is_file()]
    if missing:
        raise BuildError(f"the series names patches that are not there: {' '.join(missing)}")
    return patches


def series_sha256(patches: Sequence[Path]) -> str:
    """Identify a series: the names and contents of its patches, in order."""
    digest = hashlib.sha256()
    for patch in patches:
        content = hashlib.sha256(patch.read_bytes()).hexdigest()
        digest.update(f"{patch.name} {content}\n".encode())
    return digest.hexdigest()


async def apply_patch(tree: Path, patch: Path, log: Path) -> None:
    """Apply one patch with no fuzz: a patch that only nearly fits may land in the wrong place.

    :raise BuildError: when it does not apply.
    """
    command = ["patch", "-p1", "--fuzz=0", "--forward", "--batch", "--no-backup-if-mismatch"]
    # A dry run first: `patch` leaves the hunks that do fit when another one does not.
    await run_tool([*command, "--dry-run", "-i", patch], log=log, cwd=tree)
    await run_tool([*command, "-i", patch], log=log, cwd=tree)


async def apply_series(tree: Path, patches: Sequence[Path], log: Path) -> None:
    """Apply all patches in order.

    :raise BuildError: naming the first that does not apply.
    """
    for patch in patches:
        try:
            await apply_patch(tree, patch, log)
        except BuildError as error:
            raise BuildError(f"{patch.name} does not apply: {error.cause}", error.remedy) from error


async def check_series(progress: Progress | None = None) -> list[PatchCheck]:
    """Apply each patch to the pristine source and run the source's own checkpatch.pl on it.

    A patch that does not apply is reported and those after it are tried all the same, so that one
    call shows everything.

    :raise LabError: when the source cannot be obtained.
    """
    require_tools(["patch", "perl"])
    report = progress or (lambda message: None)
    checks: list[PatchCheck] = []
    with tempfile.TemporaryDirectory(prefix="check-", dir=qemu_cache()) as folder:
        log = Path(folder) / "check.log"
        source = await obtain_source(log, report)
        tree = Path(folder) / "tree"
        report(f"unpack QEMU {source.version}")
        await unpack(source, tree, log)
        for patch in read_series():
            report(f"check {patch.name}")
            problem = ""
            try:
                await apply_patch(tree, patch, log)
            except LabError as error:
                problem = error.cause
            # Nobody signs off patches that are not submitted.
            lines = await run_tool(
                ["perl", "scripts/checkpatch.pl", "--no-signoff", patch],
                log=log,
                cwd=tree,
                accept=(0, 1),
            )
            text = "\n".join(lines)
            total = re.search(r"^total: (\d+) errors, (\d+) warnings", text, re.MULTILINE)
            if total is None:
                raise BuildError(f"checkpatch.pl could not read {patch.name}: {text[-300:]}")
            checks.append(
                PatchCheck(
                    name=patch.name,
                    problem=problem,
                    errors=int(total[1]),
                    warnings=int(total[2]),
                    report=text,
                )
            )
    return checks
