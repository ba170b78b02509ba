"""What a reader makes of a chunk that is tried alone: rows left out, files unread."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch import preflight, rows, stages
from quantbatch.input import sources
from quantbatch.records import Again, Blame, Trial, unpack
from quantbatch.spec import JobSpec
from quantbatch.suspects import DIED, HUNG

if TYPE_CHECKING:
    from quantbatch.preflight import Job
    from quantbatch.records import Chunk

MODEL = Path(__file__).parents[2] / "configs" / "quickstart" / "model"
ROWS = 10


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """One chunk of two files, with 4 and 6 rows."""
    (tmp_path / "in").mkdir()
    for name, count in (("a", 4), ("b", 6)):
        table = pa.table({"text": [f"{name} {n}" for n in range(count)]})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    fields = {
        "name": "stages",
        "input": {"uri": str(tmp_path / "in")},
        "model": {"id": str(MODEL), "bits": 16},
        "prompt": {"template": "{{ text }}"},
        "engine": {"kind": "echo"},
        "output": {"uri": str(tmp_path / "out")},
    }
    return preflight.prepare(JobSpec.model_validate(fields))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read."""
    seen: list[str] = []
    real = sources.read_slice

    def noted(store: Any, piece: Any, *rest: Any) -> Any:
        seen.append(piece.file)
        return real(store, piece, *rest)

    monkeypatch.setattr(sources, "read_slice", noted)
    return seen


def tried(job: Job, trial: Trial | None, again: Again | None = None) -> pa.Table:
    [chunk] = job.plan.each_chunk()
    chunk = dataclasses.replace(chunk, trial=trial, again=again)
    return unpack(stages.read_and_render(travelled(chunk), job=job.read_job))[1]


def travelled(chunk: Chunk) -> Chunk:
    """Return a chunk after its way through Ray."""
    sent = stages.to_items([chunk])
    assert sent.rows == (len(chunk.again.rows) if chunk.again else ROWS)
    arrived = stages._chunk(stages.item_table(sent.items[0]))
    assert arrived == chunk
    return arrived


def errors(table: pa.Table) -> dict[int, tuple[str, str]]:
    kinds, messages = table["error_type"].to_pylist(), table["error_message"].to_pylist()
    return {n: (kinds[n], messages[n]) for n in range(table.num_rows) if kinds[n]}


def test_a_chunk_without_a_trial_is_read_whole(job: Job, read: list[str]) -> None:
    table = tried(job, None)
    assert (errors(table), read) == ({}, ["a.parquet", "b.parquet"])
    assert rows.facts_of(table).commits


def test_rows_that_are_not_tried_are_left_out_and_their_files_unread(
    job: Job, read: list[str]
) -> None:
    table = tried(job, Trial(5, 8, (Blame(6, 7, HUNG, "hung"),), ROWS))
    assert set(errors(table)) == {*range(5), 6, 8, 9}
    assert errors(table)[6] == (HUNG, "hung")
    assert read == ["b.parquet"]
    assert table.num_rows == ROWS
    assert not rows.facts_of(table).commits


def test_the_last_attempt_has_all_rows_but_those_blamed(job: Job, read: list[str]) -> None:
    blamed = (Blame(2, 3, DIED, "first"), Blame(0, 4, DIED, "all the rest"))
    table = tried(job, Trial(0, ROWS, blamed, ROWS))
    assert {n: said for n, (_, said) in errors(table).items()} == {
        0: "all the rest", 1: "all the rest", 2: "first", 3: "all the rest",
    }  # fmt: skip
    assert read == ["a.parquet", "b.parquet"]
    facts = rows.facts_of(table)
    assert (facts.commits, facts.unreadable) == (True, {})


def test_a_file_whose_reading_kills_is_not_opened(job: Job, read: list[str]) -> None:
    table = tried(job, Trial(0, ROWS, (Blame(0, 4, DIED, "it kills", unread=True),), ROWS))
    assert errors(table) == dict.fromkeys(range(4), (DIED, "it kills"))
    assert read == ["b.parquet"]
    assert rows.facts_of(table).unreadable == {"a.parquet": "it kills"}


def test_places_of_a_retry_are_those_of_its_rows(job: Job, read: list[str]) -> None:
    """Row 0 of the retry is row 8 of the chunk: no file may be left out by its number."""
    again = Again(1, 0, (8, 9))
    table = tried(job, Trial(0, 1, (), 2), again)
    assert set(errors(table)) == {1}
    assert table["in.text"].to_pylist() == ["b 4", "b 5"]
    assert read == ["a.parquet", "b.parquet"]
