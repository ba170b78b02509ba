"""`make demo`: collect docstrings, run configs/quickstart.yaml over them, and tell how it went.

A demo that is killed continues where it was; one that was finished starts afresh.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as ds
from collect import docstrings, is_held_out, write_shards
from rich.console import Console
from rich.table import Table

from quantbatch.console import live_progress, report_table
from quantbatch.pipeline import run
from quantbatch.specfile import load_spec

SPEC = Path("configs/quickstart.yaml")


def main() -> None:
    """Run the demo."""
    console = Console()
    spec = load_spec(SPEC)
    output = Path(spec.output.uri)
    if (output / "_SUCCESS").exists():
        shutil.rmtree(output.parent)
    folder = Path(str(spec.input.uri))
    if not folder.exists():
        rows = [row for row in docstrings() if is_held_out(row.docstring)]
        files = write_shards(folder, rows)
        console.print(f"collected {len(rows):,} docstrings in {len(files)} files in {folder}")

    with live_progress() as progress:
        report = run(spec, progress=progress)

    table = report_table(report)
    right, asked = accuracy(output)
    table.add_row("accuracy", f"{right / asked:.1%} of {asked:,} docstrings that it never saw")
    console.print(table)
    console.print(next_steps())


def accuracy(output: Path) -> tuple[int, int]:
    """Return how many rows name the right package, and how many there are."""
    answers = ds.dataset(output, format="parquet").to_table(columns=["package", "completion"])
    right = pc.equal(pc.utf8_trim_whitespace(answers["completion"]), answers["package"])
    return pc.sum(pc.fill_null(right, False)).as_py(), answers.num_rows


def next_steps() -> Table:
    """Return what to try next."""
    table = Table(title="Try next", show_header=False, box=None, title_justify="left")
    for command, why in (
        (f".venv/bin/quantbatch verify {SPEC}", "prove that every row is answered once"),
        (f".venv/bin/quantbatch sample {SPEC} -n 5", "see prompts and answers"),
        (
            f".venv/bin/quantbatch run {SPEC} --set model.bits=8 "
            "--set output.uri=out/quickstart/int8",
            "the same at 8 bits",
        ),
    ):
        table.add_row(command, why)
    return table


if __name__ == "__main__":
    main()
