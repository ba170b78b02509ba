"""Rows spread over an input, rendered as the job renders them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch.compare.rows import spread_rows
from quantbatch.errors import InputError, SpecError
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.prompts.tokens import load_tokenizer
from quantbatch.sample import sample
from quantbatch.spec import JobSpec
from tests.unit.compare.test_candidates import MODEL

if TYPE_CHECKING:
    from pathlib import Path


def spec_of(folder: Path, **changes: Any) -> JobSpec:
    fields = {
        "name": "test",
        "input": {"uri": str(folder / "in")},
        "model": {"id": str(MODEL)},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_new_tokens": 8},
        "output": {"uri": str(folder / "out")},
    }
    return JobSpec.model_validate(fields | changes)


def write(folder: Path, sizes: list[int], **columns: list[object]) -> None:
    (folder / "in").mkdir()
    first = 0
    for number, size in enumerate(sizes):
        rows = range(first, first + size)
        table: dict[str, list[object]] = {
            "text": [f"row {row}" for row in rows],
            "label": [f" l{row} " for row in rows],
        }
        table |= {name: values[first : first + size] for name, values in columns.items()}
        pq.write_table(pa.table(table), folder / "in" / f"{number}.parquet")
        first += size


def spread(spec: JobSpec, count: int, gold: str | None = None) -> Any:
    return spread_rows(spec, open_checkpoint(spec.model), count, gold)


def test_they_are_evenly_spread_over_all_files(tmp_path: Path) -> None:
    write(tmp_path, [7, 1, 92])
    spec = spec_of(tmp_path, input={"uri": str(tmp_path / "in"), "rows_per_chunk": 3})
    found = spread(spec, 10, "label")
    assert [row.gold for row in found.rows] == [f"l{row}" for row in range(5, 100, 10)]
    assert [row.id for row in found.rows][:3] == ["0.parquet:5", "2.parquet:7", "2.parquet:17"]
    assert (found.asked, found.in_input, found.left_out) == (10, 100, {})
    text = load_tokenizer(MODEL).decode(found.rows[1].prompt_ids)
    assert "row 15" in text


def test_all_of_a_small_input_are_those_of_the_job(tmp_path: Path) -> None:
    write(tmp_path, [3, 4])
    spec = spec_of(tmp_path)
    found = spread(spec, 300)
    assert [(row.id, row.prompt_ids) for row in found.rows] == [
        (row.row_id, row.prompt_ids) for row in sample(spec, 7)
    ]


def test_text_files_are_entered_at_their_marks(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lines = ["text,n", *(f'"a\nrow {row}",{row}' for row in range(5000))]
    (tmp_path / "in" / "a.csv").write_text("\n".join(lines))
    found = spread(spec_of(tmp_path), 5, "n")
    assert [row.gold for row in found.rows] == ["500", "1500", "2500", "3500", "4500"]


def test_rows_without_a_prompt_are_counted(tmp_path: Path) -> None:
    texts: list[object] = ["a", None, "b " * 900, "c"]
    write(tmp_path, [4], text=texts)
    found = spread(spec_of(tmp_path), 4)
    assert [row.id for row in found.rows] == ["0.parquet:0", "0.parquet:3"]
    assert sum(found.left_out.values()) == 2
    assert "prompt_too_long" in found.left_out


def test_mistakes_are_said(tmp_path: Path) -> None:
    write(tmp_path, [4], text=[None] * 4)
    with pytest.raises(InputError, match="none of 4 rows has a prompt"):
        spread(spec_of(tmp_path), 4)
    with pytest.raises(SpecError, match="--rows is 0"):
        spread(spec_of(tmp_path), 0)
    with pytest.raises(SpecError) as caught:
        spread(spec_of(tmp_path), 4, "lable")
    (problem,) = caught.value.problems
    assert problem.problem == "--gold uses the column 'lable', which the input lacks"
    assert problem.hint.startswith("did you mean 'label'?")
