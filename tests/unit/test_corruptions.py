"""Every way to spoil a finished output that we could think of, each noticed by `verify` and told.

The job has Hive folders, error rows, and a retry behind it. A kind of damage is a function that
spoils a copy of the job's folder, with the kinds of problems that `verify` must name, and no
others.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch import again, rows
from quantbatch.commits import commit_chunk, publish_shard
from quantbatch.input import listing
from quantbatch.ledger import Ledger
from quantbatch.verify import verify
from tests.unit import test_verify
from tests.unit.test_verify import make_spec, reordered, replaced, write_input

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quantbatch.spec import JobSpec

    Damage = Callable[[Path], None]

    from tests.conftest import Count

FIRST, SECOND, LAST = (
    "day=1/part-000000.parquet",
    "day=1/part-000001.parquet",
    "day=2/part-000002.parquet",
)
BEFORE = "before"
"""Folder that keeps the output as it was before the retry."""


def edited(name: str, change: Callable[[pa.Table], pa.Table]) -> Damage:
    """Rewrite a file of the output as if a careless tool had: sound Parquet, other rows."""

    def spoil(job: Path) -> None:
        path = job / "out" / name
        table = pq.read_table(path, partitioning=None)
        pq.write_table(change(table).cast(table.schema), path, write_page_checksum=True)

    return spoil


def exchanged(column: str, a: int, b: int) -> Callable[[pa.Table], pa.Table]:
    """Exchange two values of a column."""

    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        one, other = values[a], values[b]
        return replaced(column, a, other)(replaced(column, b, one)(table))

    return change


def in_success(change: Callable[[dict[str, Any]], None]) -> Damage:
    """Change the manifest."""

    def spoil(job: Path) -> None:
        path = job / "out" / "_SUCCESS"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return spoil


def cut(name: str, keep: int) -> Damage:
    """Cut a file."""

    def spoil(job: Path) -> None:
        path = job / "out" / name
        path.write_bytes(path.read_bytes()[:keep])

    return spoil


def flipped(where: str) -> Damage:
    """Flip a bit in the values of a page, or in the statistics before them."""

    def spoil(job: Path) -> None:
        path = job / "out" / SECOND
        column = pq.read_metadata(path).row_group(0).column(0)
        start = column.data_page_offset
        end = column.dictionary_page_offset + column.total_compressed_size
        data = bytearray(path.read_bytes())
        data[end - 3 if where == "values" else data.index(b"day=1/b", start, end)] ^= 1
        path.write_bytes(bytes(data))

    return spoil


def files_exchanged(job: Path) -> None:
    paths = [job / "out" / name for name in (FIRST, SECOND)]
    contents = [path.read_bytes() for path in paths]
    for path, data in zip(paths, reversed(contents), strict=True):
        path.write_bytes(data)


def other_job(job: Path) -> None:
    path = job / "out" / SECOND
    table = pq.read_table(path, partitioning=None)
    note = {"quantbatch": '{"fingerprint": "of another job"}'}
    pq.write_table(table.replace_schema_metadata(note), path)


def column_lost(job: Path) -> None:
    path = job / "out" / SECOND
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["tags"]), path)


def older_file(job: Path) -> None:
    shutil.copy(job / BEFORE / SECOND, job / "out" / SECOND)


def older_file_and_record(job: Path) -> None:
    """What a driver leaves that slept through a later retry, and then put its own."""
    older_file(job)
    record = "_quantbatch/shards/000001.json"
    shutil.copy(job / BEFORE / record, job / "out" / record)


def moved(job: Path) -> None:
    (job / "out" / SECOND).rename(job / "out" / "day=2" / Path(SECOND).name)


def copied(source: str, target: str) -> Damage:
    def spoil(job: Path) -> None:
        shutil.copy(job / "out" / source, job / "out" / target)

    return spoil


def removed(name: str) -> Damage:
    return lambda job: (job / name).unlink()


def more_input(name: str, count: int, start: int = 0) -> Damage:
    """Write an input file anew, or another one."""
    return lambda job: write_input(job, name, count, start)


BYTES = "files that are not as they were published"
COUNTS = "counts that are wrong"
LENGTH = "files of the wrong length"
MISSING = "rows that are missing"
NOT_COMMITTED = "rows that are not those of the committed attempt"
CONTRADICTION = "rows whose status and answer contradict each other"
VALUES = "values that differ from the input's"

DAMAGE: dict[str, tuple[Damage, set[str]]] = {
    "a row is missing": (
        edited(SECOND, reordered(0, 1, 2, 3, 5, 6, 7, 8)),
        {MISSING, LENGTH, COUNTS},
    ),
    "a row is there twice": (
        edited(SECOND, reordered(0, 1, 2, 3, 3, 4, 5, 6, 7, 8)),
        {"rows that are there twice", LENGTH, COUNTS},
    ),
    "a row in the place of another": (
        edited(SECOND, reordered(0, 1, 1, 3, 4, 5, 6, 7, 8)),
        {"rows that are there twice", MISSING},
    ),
    "two rows are exchanged": (
        edited(SECOND, reordered(0, 1, 3, 2, 4, 5, 6, 7, 8)),
        {"rows out of order"},
    ),
    "a kept value is another": (edited(SECOND, replaced("text", 4, "another")), {VALUES}),
    "a kept value is gone": (edited(SECOND, replaced("tags", 4, None)), {VALUES}),
    "an answer is another": (
        edited(SECOND, replaced("completion", 4, "another")),
        {BYTES, NOT_COMMITTED},
    ),
    "the answers of two rows are exchanged": (
        edited(SECOND, exchanged("completion", 3, 4)),
        {BYTES, NOT_COMMITTED},
    ),
    "an error's message is another": (
        edited(LAST, replaced("error_message", 2, "ValueError: yes")),
        {BYTES, NOT_COMMITTED},
    ),
    "an attempt that was not committed": (
        edited(SECOND, replaced("attempt", 4, "0123456789ab")),
        {BYTES, NOT_COMMITTED},
    ),
    "a file of attempts from before a retry": (older_file, {BYTES, NOT_COMMITTED, COUNTS}),
    "the same with its record": (older_file_and_record, {"files of an older retry", COUNTS}),
    "tokens are miscounted": (
        edited(SECOND, replaced("prompt_tokens", 4, 99)),
        {BYTES, NOT_COMMITTED, COUNTS},
    ),
    "a bit of a page's values is flipped": (
        flipped("values"),
        {"files that are damaged", MISSING, COUNTS},
    ),
    "a bit that no reader looks at is flipped": (flipped("statistics"), {BYTES}),
    "a file is cut": (cut(SECOND, -20), {"files that are damaged", MISSING, COUNTS}),
    "a file is empty": (cut(SECOND, 0), {"files that are damaged", MISSING, COUNTS}),
    "a status is none": (
        edited(SECOND, replaced("status", 0, "fine")),
        {"rows with an unknown status", COUNTS},
    ),
    "a status is another": (
        edited(SECOND, replaced("status", 0, "truncated")),
        {BYTES, NOT_COMMITTED, COUNTS},
    ),
    "an answer without the status for it": (
        edited(SECOND, replaced("status", 0, "error")),
        {CONTRADICTION, COUNTS},
    ),
    "a status without its answer": (
        edited(SECOND, replaced("completion", 0, None)),
        {CONTRADICTION},
    ),
    "an error without its reason": (
        edited(LAST, replaced("error_type", 2, None)),
        {CONTRADICTION},
    ),
    "a row has another id": (
        edited(SECOND, replaced("row_id", 4, "day=1/b.parquet:99")),
        {"rows that the input does not have", MISSING},
    ),
    "wrong counts in the manifest": (
        in_success(lambda found: found["counts"].update(ok=found["counts"]["ok"] + 1)),
        {COUNTS},
    ),
    "a wrong number of rows in the manifest": (
        in_success(lambda found: found["files"][1].update(rows=10)),
        {LENGTH},
    ),
    "the manifest is another job's": (
        in_success(lambda found: found.update(fingerprint="of another job")),
        {"manifests of another job"},
    ),
    "the manifest is damaged": (
        cut("_SUCCESS", 30),
        {"records that are damaged", "manifests of another job"},
    ),
    "a file is missing": (removed(f"out/{SECOND}"), {"files that are gone", MISSING, COUNTS}),
    "the last file is missing": (
        removed(f"out/{LAST}"),
        {"files that are gone", "input files without an answer", COUNTS},
    ),
    "a file too many": (
        copied(SECOND, "day=2/part-000009.parquet"),
        {"files that are not the job's", "rows that are there twice", COUNTS},
    ),
    "a file with a name of its own": (
        copied(SECOND, "day=1/copy.parquet"),
        {"files that are not the job's"},
    ),
    "a file in another folder": (
        moved,
        {"files in the wrong folder", "files that are gone", "files that are not the job's"},
    ),
    "a file of another job": (other_job, {"files of another job"}),
    "files have changed places": (files_exchanged, {"rows out of order", LENGTH}),
    "a column is lost": (column_lost, {"files that are damaged", MISSING, COUNTS}),
    "a row came to the input": (more_input("day=1/b.parquet", 13), {MISSING}),
    "the input is another": (more_input("day=1/b.parquet", 12, start=1), {VALUES}),
    "an input file came": (more_input("day=1/d.parquet", 3), {"input files without an answer"}),
    "an input file is gone": (
        removed("in/day=1/b.parquet"),
        {"rows that the input does not have"},
    ),
}


def retry_errors(spec: JobSpec) -> None:
    """Answer the rows with an error again, as `retry` does, without Ray."""
    ledger = Ledger.open(spec, "digest")
    assert ledger.plan
    listed = listing.list_input(spec.input)
    kept = rows.kept_columns(spec.output, ledger.plan.schema, listed.partition_keys)
    target = ledger.output_format(rows.output_schema(spec, kept, ledger.plan.schema))
    found = again.claimed(ledger, {"statuses": ["error"], "changes": {}}, spec)
    assert found
    for chunk in list(again.undone(ledger, found)):
        assert chunk.again
        whole = test_verify.answers(spec, listed, chunk, kept, ledger.plan.schema)
        # The rows before them have answers: those become theirs, but for an error that stays.
        before = 0 if chunk.shard == 2 else 1
        places = pa.array([place - before for place in chunk.again.rows])
        facts = rows.ChunkFacts(chunk.shard, len(places), again=chunk.again)
        table = whole.take(places)
        for name in ("in.text", "in.score", "in.tags", "row_id"):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, name, whole[name].take(pa.array(chunk.again.rows)))
        receipt = commit_chunk(ledger.store, chunk.id, rows.with_facts(table, facts), target)
        for shard in again.record(ledger, found, receipt):
            chunks = ledger.plan.chunks_of(shard)
            newest = ledger.retries.newest(chunks)
            ledger.record_published(publish_shard(ledger.store, shard, chunks, target, newest))
    again.close(ledger, found, succeeded=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished job: files of 10, 9 and 3 rows, and an error in the first that came to stay."""
    folder = tmp_path_factory.mktemp("finished")
    for name, count in (("day=1/a", 7), ("day=1/b", 12), ("day=2/c", 3)):
        write_input(folder, f"{name}.parquet", count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        spec = make_spec(folder)
        test_verify.answer(spec)
        shutil.copytree(folder / "out", folder / BEFORE)
        retry_errors(spec)
        yield folder


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """A copy of the job, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "job"))


@pytest.fixture(scope="module")
def noticed() -> list[str]:
    """Names of the kinds of damage that were noticed."""
    return []


def test_there_are_enough_kinds() -> None:
    assert len(DAMAGE) >= 30


def test_a_file_that_was_changed_is_mended_by_a_run_without_its_record(
    finished: Path, job: Path
) -> None:
    edited(SECOND, replaced("completion", 4, "another"))(job)
    (job / "out" / "_quantbatch/shards/000001.json").unlink()
    spec = make_spec(finished, output={"uri": str(job / "out"), "rows_per_part": 10})
    assert {problem.kind for problem in verify(spec).problems} == {NOT_COMMITTED}
    test_verify.answer(spec)
    assert verify(spec).outcome == "proven"


def test_the_job_itself_is_proven(job: Path) -> None:
    verdict = verify(make_spec(job))
    assert (verdict.outcome, verdict.problems) == ("proven", ())
    assert (verdict.files_out, verdict.files_as_committed) == (3, 3)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed(job: Path, kind: str, noticed: list[str]) -> None:
    spoil, problems = DAMAGE[kind]
    spoil(job)
    verdict = verify(make_spec(job))
    assert {problem.kind for problem in verdict.problems} == problems
    assert verdict.exit_code == 1
    assert all(problem.examples[0] for problem in verdict.problems)
    noticed.append(kind)


def test_so_many_kinds_were_noticed(noticed: list[str], count: Count) -> None:
    """Last in this file: says how many of its tests ran and passed."""
    count(f"corruptions={len(DAMAGE)} noticed={len(noticed)}")
