"""Execute notebooks: with their own parameters to refresh what is committed, with others to make
the figures of other data.

``python -m lab.report.notebooks`` re-executes every notebook in place, and refreshes what else
shows recorded data: the figures as files of their own, and the README's table.  Nothing that
depends on when or where it ran is kept, so that two executions over the same data differ only
where the figures do.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import importlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lab
from lab.display import text_table
from lab.errors import HostError, LabError, UsageError
from lab.figures.stamp import stamp_text
from lab.runs.methods import df_methods, df_readable
from lab.runs.sets import load_set

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
README = NOTEBOOKS.parent / "README.md"
#: As many as fit beside each other on a page.
README_METRICS = ("pause_ms", "duration_ms", "lost_work_ms", "fault_p50_us", "fault_p99_us")
#: A block of a text that is made from a run set, named by its path from the text's folder.
TABLE = re.compile(r"(<!-- table of (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
#: An image, and behind it the name of the figure that it is of.
FIGURE = re.compile(r"!\[[^\]]*\](\([^)]*\) <!-- figure (\w+) -->)")
CELL_TIMEOUT_S = 600
DATA_PREFIX = "../data/"
PARAMETERS_TAG = "parameters"
INJECTED_TAG = "injected-parameters"


def notebook_paths(folder: Path = NOTEBOOKS) -> list[Path]:
    """The numbered notebooks of the checkout, in order; empty where there is none."""
    return sorted(folder.glob("[0-9][0-9]-*.ipynb"))


def parameters_cell(notebook: Mapping[str, Any]) -> int:
    """Index of the one cell tagged `parameters`.  Raises UsageError when there is not exactly
    one.
    """
    found = [
        k
        for k, cell in enumerate(notebook["cells"])
        if PARAMETERS_TAG in cell.get("metadata", {}).get("tags", [])
    ]
    if len(found) != 1:
        raise UsageError(f"{len(found)} cells are tagged {PARAMETERS_TAG!r}", "tag exactly one")
    return found[0]


def sets_named(notebook: Path) -> dict[str, str]:
    """The run sets that a notebook shows by default: parameter -> name of a set in `data/`."""
    document = json.loads(notebook.read_text(encoding="utf-8"))
    source = "".join(document["cells"][parameters_cell(document)]["source"])
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        value = node.value.value if isinstance(node.value, ast.Constant) else None
        if isinstance(value, str) and value.startswith(DATA_PREFIX):
            found[node.targets[0].id] = value.removeprefix(DATA_PREFIX)
    return found


async def execute(
    source: Path,
    target: Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    timeout_s: float = CELL_TIMEOUT_S,
) -> None:
    """Execute the notebook `source` and write it, with outputs, to `target`.

    It runs in the folder of `source`.  `parameters` are set right after the cell tagged
    `parameters`, in a cell of their own.

    :raise LabError: a cell raised or took longer than `timeout_s`; `target` is then
        left as it was.
    :raise HostError: the packages for notebooks are not installed.
    """
    try:
        nbformat: Any = importlib.import_module("nbformat")
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    except ImportError as error:
        raise HostError(
            f"{error.name} is not installed", "pip install 'vm-snapshot-lab[notebooks]'"
        ) from error

    notebook = nbformat.read(source, as_version=4)
    injected = None
    if parameters:
        code = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        injected = nbformat.v4.new_code_cell(code, metadata={"tags": [INJECTED_TAG]})
        # Ids are random by default; a fixed one keeps the file the same for the same content.
        injected["id"] = INJECTED_TAG
        notebook.cells.insert(parameters_cell(notebook) + 1, injected)
    client = NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        # Only errors: the kernel's warnings are about its own set-up and would be printed here.
        extra_arguments=["--log-level=40"],
        # Timestamps would make every execution a change.
        record_timing=False,
        # When the kernel happens to send what a cell prints would be one, too.
        coalesce_streams=True,
        resources={"metadata": {"path": str(source.resolve().parent)}},
    )
    try:
        await client.async_execute(env=_environment())
    except CellExecutionError as error:
        raise LabError(
            f"{source.name}: {error.ename}: {error.evalue}", "run it by hand to see the cell"
        ) from error
    except (CellTimeoutError, DeadKernelError) as error:
        raise LabError(f"{source.name}: {error}") from error
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    nbformat.write(notebook, temporary)
    temporary.rename(target)


def _environment() -> dict[str, str]:
    """This process's environment, in which the kernel finds this very package from any folder."""
    here = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{inherited}" if inherited else here}


def save_figures(notebook: Path, folder: Path) -> list[Path]:
    """Write every PNG among a notebook's outputs to `folder`, named after it and numbered."""
    nbformat: Any = importlib.import_module("nbformat")
    written: list[Path] = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            png = output.get("data", {}).get("image/png")
            if png is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{notebook.stem}-{len(written) + 1}.png"
            path.write_bytes(base64.b64decode(png))
            written.append(path)
    return written


def with_tables(text: str, folder: Path) -> str:
    """`text` with each block between `<!-- table of SET -->` and `<!-- end of table -->` made anew:
    the summary of the run set SET, a path from `folder`, and what it was measured on.  An image
    before `<!-- figure PLOT -->` is described by the title of that figure of `lab`.

    :raise RunError: a set cannot be read.
    """

    def table(match: re.Match[str]) -> str:
        recorded = load_set(folder / match[2])
        shown = text_table(df_readable(df_methods(recorded), README_METRICS))
        stamp = stamp_text(recorded).replace(" | ", "\n")
        return f"{match[1]}```\n{shown}\n\n{stamp}\n```\n{match[3]}"

    def described(match: re.Match[str]) -> str:
        return f"![{getattr(lab, match[2]).text.title}]{match[1]}"

    return FIGURE.sub(described, TABLE.sub(table, text))


def main(argv: Sequence[str] | None = None) -> int:
    """Execute notebooks in place; with the recorded data, refresh figures and README as well."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.report.notebooks", description=main.__doc__
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--data", help="another run set for the parameter DATA")
    args = parser.parse_args(argv)
    parameters = {"DATA": args.data} if args.data else None
    for path in args.notebooks or notebook_paths():
        sys.stderr.write(f"executing {path.name}\n")
        try:
            asyncio.run(execute(path, path, parameters))
        except LabError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.exit_status
        if not args.data:
            save_figures(path, path.parent / "figures")
    if not args.data and README.exists():
        README.write_text(with_tables(README.read_text(), README.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
