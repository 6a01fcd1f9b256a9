"""The kinds of workload as the guests' C code knows them: a header, written when it is compiled.

Each is spelled once, in `lab.scenario.workload.WorkloadKind`; its place there is its number.
"""

from pathlib import Path

from lab.guests import common, protocol
from lab.scenario.guests import GuestLimits


def kinds_header(limits: GuestLimits) -> str:
    """Return the header for a guest with these limits."""
    kinds = protocol.KINDS
    lacking = [f"UINT64_C(1) << KIND_{kind.upper()}" for kind in kinds if kind in limits.lacks]
    return "\n".join(
        [
            "#include <stdint.h>",
            "enum kind {",
            *(f"    KIND_{kind.upper()} = {number}," for number, kind in enumerate(kinds)),
            "};",
            f"enum {{ KIND_COUNT = {len(kinds)} }};",
            "#define KIND_NAMES {" + ", ".join(f'"{kind}"' for kind in kinds) + "}",
            "/* A bit for each kind that the guest does not do. */",
            f"#define KINDS_LACKING ({' | '.join(lacking) or 'UINT64_C(0)'})",
            "",
        ]
    )


def include_options(folder: Path, limits: GuestLimits) -> tuple[str, ...]:
    """Write the header into a folder; return the options for it and for what guests share."""
    (folder / "kinds.h").write_text(kinds_header(limits))
    return (f"-I{folder}", f"-I{common.FOLDER}")
