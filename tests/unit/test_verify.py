"""Outputs made by the ledger on a local disk, then damaged: `verify` has to notice each damage."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch import rows
from quantbatch.commits import commit_chunk, publish_shard
from quantbatch.errors import InputError
from quantbatch.input import listing, sources
from quantbatch.input.sources import read_slice
from quantbatch.ledger import Ledger
from quantbatch.plan import make_plan
from quantbatch.records import Completion, Failure, FinishReason, RequestId, TokenLogprobs
from quantbatch.reread import WINDOW
from quantbatch.spec import JobSpec
from quantbatch.verify import Verdict, verify
from quantbatch.verify_rows import MAX_SEARCHES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quantbatch.errors import RowError
    from quantbatch.records import Answer, Chunk


def make_spec(folder: Path, **changes: object) -> JobSpec:
    fields = {
        "name": "test",
        "input": {"uri": str(folder / "in"), "rows_per_chunk": 4},
        "model": {"id": "m", "bits": 4},
        "prompt": {"template": "{{ text }}"},
        "output": {"uri": str(folder / "out"), "rows_per_part": 10},
    }
    return JobSpec.model_validate(fields | changes)


def write_input(folder: Path, name: str, count: int, start: int = 0) -> None:
    path = folder / "in" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(start, start + count)
    table = pa.table(
        {
            "text": [f"{name} {n}" for n in numbers],
            "score": pa.array([float("nan") if n % 5 == 0 else n / 2 for n in numbers]),
            "tags": [[{"tag": str(n)}] if n % 3 else None for n in numbers],
        }
    )
    pq.write_table(table, path)


def answer(spec: JobSpec, *, shards: set[int] | None = None) -> Ledger:
    """Do what the pipeline does, without Ray: for all shards, or some of them."""
    listed = listing.list_input(spec.input)
    ledger = Ledger.open(spec, "digest")
    if ledger.plan is None:
        ledger.freeze(make_plan(spec, listed))
    elif set(ledger.plan.known_files) != {file.name for file in listed.files}:
        known = ledger.plan.known_files
        new = tuple(file for file in listed.files if file.name not in known)
        ledger.freeze(make_plan(spec, listed._replace(files=new), after=ledger.plan))
    plan = ledger.plan
    assert plan
    kept = rows.kept_columns(spec.output, plan.schema, listed.partition_keys)
    target = ledger.output_format(rows.output_schema(spec, kept, plan.schema))
    for shard in ledger.unpublished():
        chunks = plan.chunks_of(shard)
        newest = ledger.retries.newest(chunks)
        published = publish_shard(ledger.store, shard, chunks, target, newest)
        ledger.record_published(published)
    for chunk in list(ledger.undone()):
        if shards is None or chunk.shard in shards:
            table = answers(spec, listed, chunk, kept, plan.schema)
            receipt = commit_chunk(ledger.store, chunk.id, table, target)
            for shard in ledger.record(receipt):
                chunks = plan.chunks_of(shard)
                ledger.record_published(publish_shard(ledger.store, shard, chunks, target))
    if ledger.finished:
        ledger.succeed()
    return ledger


def answers(
    spec: JobSpec, listed: listing.Listing, chunk: Chunk, kept: list[str], schema: pa.Schema
) -> pa.Table:
    """Return a chunk as a replica hands it on; its third row has an error."""
    found = [
        read_slice(listed.store, piece, spec.input, schema, listing.partition_of(piece.file))
        for piece in chunk.slices
    ]
    table = pa.concat_tables([slice.table for slice in found])
    ids = rows.row_ids(chunk)
    if spec.input.key:
        ids = table[spec.input.key]
    count = chunk.rows
    samples, tokens = spec.sampling.n, (TokenLogprobs(-0.5, ((5, -0.5), (7, -1.5))),) * 2
    done: list[list[Answer]] = [
        [
            Completion(
                RequestId(chunk.id, row, sample), f"answer {row}", (5, 6), FinishReason.STOP, tokens
            )
            for sample in range(samples)
        ]
        for row in range(count)
    ]
    if count > 2:
        done[2][-1] = Failure(RequestId(chunk.id, 2, samples - 1), "model", "ValueError: no")
    before = 0
    errors: dict[int, RowError] = {}
    for slice in found:
        errors |= {before + row: error for row, error in slice.errors.items()}
        before += slice.table.num_rows
    for row in errors:
        done[row] = []
    prompts = pa.array([[1]] * count, pa.list_(pa.int32()))
    rendered = rows.rendered(table.select(kept), ids, prompts, errors)
    rendered = rows.with_facts(rendered, rows.ChunkFacts(chunk.shard, count))
    return rows.answered(rendered, done, spec)


def found(verdict: Verdict) -> dict[str, int]:
    return {problem.kind: problem.count for problem in verdict.problems}


def examples(verdict: Verdict, kind: str) -> tuple[str, ...]:
    return next(problem.examples for problem in verdict.problems if problem.kind == kind)


@pytest.fixture(autouse=True, scope="module")
def without_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    for number, count in enumerate([7, 12, 2]):
        write_input(tmp_path, f"{number}.parquet", count)
    return make_spec(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job: files of 10, 10 and 1 rows."""
    folder = tmp_path_factory.mktemp("finished")
    for number, count in enumerate([7, 12, 2]):
        write_input(folder, f"{number}.parquet", count)
    answer(make_spec(folder))
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished output, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_a_finished_job_is_proven(spec: JobSpec, out: Path) -> None:
    verdict = verify(spec)
    assert found(verdict) == {}
    assert (verdict.outcome, verdict.exit_code) == ("proven", 0)
    assert (verdict.rows_in, verdict.files_in) == (21, 3)
    assert (verdict.rows_out, verdict.files_out, verdict.rows_left) == (21, 3, 0)
    assert verdict.counts.error == 4
    assert json.loads((out / "_SUCCESS").read_text())["counts"] == verdict.counts.to_json()


def edit(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(path)
    pq.write_table(change(table).cast(table.schema), path)


def reordered(*order: int) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.take(list(order))


def replaced(column: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        at = table.schema.get_field_index(column)
        field = table.schema.field(column)
        return table.set_column(at, field, pa.array(values, field.type))

    return change


PART = "part-000001.parquet"


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (
            reordered(0, 1, 2, 3, 5, 6, 7, 8, 9),
            {
                "rows that are missing": 1,
                "files of the wrong length": 1,
                "counts that are wrong": 1,
            },
        ),
        (
            reordered(0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9),
            {
                "rows that are there twice": 1,
                "files of the wrong length": 1,
                "counts that are wrong": 1,
            },
        ),
        (
            reordered(0, 1, 2, 3, 3, 5, 6, 7, 8, 9),
            {"rows that are there twice": 1, "rows that are missing": 1},
        ),
        (reordered(0, 1, 3, 2, 4, 5, 6, 7, 8, 9), {"rows out of order": 1}),
        (reordered(9, 1, 2, 3, 4, 5, 6, 7, 8, 0), {"rows out of order": 2}),
        (replaced("text", 4, "another"), {"values that differ from the input's": 1}),
        (replaced("text", 4, None), {"values that differ from the input's": 1}),
        (replaced("score", 2, 7.25), {"values that differ from the input's": 1}),
        (replaced("tags", 4, [{"tag": "x"}]), {"values that differ from the input's": 1}),
        (
            replaced("row_id", 4, "1.parquet:99"),
            {"rows that the input does not have": 1, "rows that are missing": 1},
        ),
        (
            replaced("row_id", 4, "0.parquet:0"),
            {"rows that are there twice": 1, "rows that are missing": 1},
        ),
        (
            replaced("status", 0, "fine"),
            {"rows with an unknown status": 1, "counts that are wrong": 1},
        ),
        (
            replaced("completion", 0, None),
            {"rows whose status and answer contradict each other": 1},
        ),
        (
            replaced("status", 2, "ok"),
            {"rows whose status and answer contradict each other": 1, "counts that are wrong": 1},
        ),
    ],
)
def test_a_changed_file_is_noticed(
    spec: JobSpec,
    out: Path,
    change: Callable[[pa.Table], pa.Table],
    problems: dict[str, int],
) -> None:
    edit(out / PART, change)
    verdict = verify(spec)
    assert verdict.exit_code == 1
    assert found(verdict) == problems


@pytest.mark.parametrize(
    ("sampling", "columns"),
    [
        ({}, {}),
        ({"n": 3, "temperature": 1.0}, {"completion": "list<string>"}),
        ({"logprobs": 0}, {"logprobs": "list<float>"}),
        (
            {"n": 2, "temperature": 1.0, "logprobs": 2},
            {
                "completion_tokens": "list<int32>",
                "token_ids": "list<list<int32>>",
                "logprobs": "list<list<float>>",
                "top_logprobs": "list<list<list<struct<token_id: int32, logprob: float>>>>",
            },
        ),
    ],
)
def test_columns_of_every_kind_are_proven(
    tmp_path: Path, sampling: dict[str, object], columns: dict[str, str]
) -> None:
    write_input(tmp_path, "0.parquet", 12)
    spec = make_spec(tmp_path, sampling=sampling)
    answer(spec)
    verdict = verify(spec)
    assert found(verdict) == {}
    assert verdict.outcome == "proven"
    assert verdict.counts.completion_tokens == 10 * 2 * spec.sampling.n
    types = pq.read_schema(tmp_path / "out" / "part-000000.parquet")
    for name, kind in columns.items():
        assert str(types.field(name).type).replace("element: ", "").replace("item: ", "") == kind
    other = make_spec(tmp_path, sampling={} if "n" in sampling else {"n": 2, "temperature": 1.0})
    assert "columns that are missing or of another type" in found(verify(other))


def test_a_sample_too_few_is_noticed(tmp_path: Path) -> None:
    write_input(tmp_path, "0.parquet", 12)
    spec = make_spec(tmp_path, sampling={"n": 3, "temperature": 1.0})
    answer(spec)
    path = tmp_path / "out" / "part-000000.parquet"
    edit(path, replaced("completion", 4, ["one", "two"]))
    assert examples(verify(spec), "rows without their 3 answers") == ("0.parquet:4",)


def test_examples_name_the_rows(spec: JobSpec, out: Path) -> None:
    edit(out / PART, replaced("text", 4, "another"))
    assert examples(verify(spec), "values that differ from the input's") == ("text of 1.parquet:7",)


def test_a_short_file_is_noticed(spec: JobSpec, out: Path) -> None:
    edit(out / PART, lambda table: table.slice(0, 6))
    verdict = verify(spec)
    assert found(verdict)["rows that are missing"] == 4
    assert found(verdict)["files of the wrong length"] == 1
    assert examples(verdict, "files of the wrong length") == (f"{PART}: 6 rows, 10 were said",)


@pytest.mark.parametrize("keep", [0, 100, -20])
def test_a_damaged_file_is_noticed(spec: JobSpec, out: Path, keep: int) -> None:
    path = out / PART
    path.write_bytes(path.read_bytes()[:keep])
    verdict = verify(spec)
    assert found(verdict)["files that are damaged"] == 1
    assert found(verdict)["rows that are missing"] == 10


def test_a_flipped_byte_in_the_pages_is_noticed(spec: JobSpec, out: Path) -> None:
    path = out / PART
    pq.write_table(pq.read_table(path), path, compression="none", write_page_checksum=True)
    data = path.read_bytes()
    at = data.index(b"answer 1")
    path.write_bytes(data[:at] + b"banana 1" + data[at + 8 :])
    assert found(verify(spec))["files that are damaged"] == 1


def test_a_removed_file_is_noticed(spec: JobSpec, out: Path) -> None:
    (out / PART).unlink()
    verdict = verify(spec)
    assert found(verdict) == {
        "files that are gone": 1,
        "rows that are missing": 10,
        "counts that are wrong": 1,
    }


def test_the_last_file_removed_is_noticed(spec: JobSpec, out: Path) -> None:
    (out / "part-000002.parquet").unlink()
    assert {"files that are gone", "rows that are missing"} <= set(found(verify(spec)))


@pytest.mark.parametrize(
    "name", ["part-000009.parquet", "copy.parquet", "notes.txt", "x/y.parquet"]
)
def test_another_file_is_noticed(spec: JobSpec, out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    shutil.copy(out / PART, out / name)
    verdict = verify(spec)
    assert examples(verdict, "files that are not the job's") == (name,)
    assert found(verdict).get("rows that are there twice", 0) == 10 * name.startswith("part")


def test_files_that_readers_skip_are_no_problem(spec: JobSpec, out: Path) -> None:
    (out / "_committed_1").write_text("")
    (out / ".part-000001.parquet.crc").write_text("")
    assert verify(spec).exit_code == 0


def test_files_that_changed_places_are_noticed(spec: JobSpec, out: Path) -> None:
    parts = [out / "part-000000.parquet", out / PART]
    contents = [part.read_bytes() for part in parts]
    for part, data in zip(parts, reversed(contents), strict=True):
        part.write_bytes(data)
    verdict = verify(spec)
    assert verdict.exit_code == 1
    assert "rows out of order" in found(verdict)


def test_a_file_of_another_job_is_noticed(spec: JobSpec, out: Path) -> None:
    table = pq.read_table(out / PART)
    pq.write_table(
        table.replace_schema_metadata({"quantbatch": '{"fingerprint": "x"}'}), out / PART
    )
    assert found(verify(spec)) == {"files of another job": 1}


def test_a_file_with_other_columns_is_noticed(spec: JobSpec, out: Path) -> None:
    table = pq.read_table(out / PART)
    pq.write_table(table.drop_columns(["tags"]), out / PART)
    verdict = verify(spec)
    assert examples(verdict, "files that are damaged") == (
        f"{PART}: has not the columns of the other files: tags",
    )


def test_wrong_counts_in_the_manifest_are_noticed(spec: JobSpec, out: Path) -> None:
    manifest = json.loads((out / "_SUCCESS").read_text())
    manifest["counts"]["ok"] += 1
    (out / "_SUCCESS").write_text(json.dumps(manifest))
    assert found(verify(spec)) == {"counts that are wrong": 1}


def test_wrong_rows_in_the_manifest_are_noticed(spec: JobSpec, out: Path) -> None:
    manifest = json.loads((out / "_SUCCESS").read_text())
    manifest["files"][0]["rows"] += 1
    (out / "_SUCCESS").write_text(json.dumps(manifest))
    assert found(verify(spec)) == {"files of the wrong length": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"counts": {"what": 1}}'])
def test_a_damaged_manifest_is_noticed(spec: JobSpec, out: Path, text: str) -> None:
    (out / "_SUCCESS").write_text(text)
    assert verify(spec).exit_code == 1


def test_input_that_changed_is_noticed(spec: JobSpec, out: Path, tmp_path: Path) -> None:
    write_input(tmp_path, "1.parquet", 12, start=1)
    assert found(verify(spec)) == {"values that differ from the input's": 36}


def test_input_that_is_gone_is_noticed(spec: JobSpec, out: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "1.parquet").unlink()
    assert found(verify(spec)) == {"rows that the input does not have": 12}


def test_input_that_came_later_is_noticed(spec: JobSpec, tmp_path: Path) -> None:
    answer(spec)
    write_input(tmp_path, "00.parquet", 3)
    verdict = verify(spec)
    assert found(verdict) == {"input files without an answer": 1}
    assert "--extend" in examples(verdict, "input files without an answer")[0]
    answer(spec)
    verdict = verify(spec)
    assert (verdict.outcome, verdict.rows_out) == ("proven", 24)


def test_unreadable_input_is_noticed(spec: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "in" / "broken.parquet").write_bytes(b"PAR1 no")
    answer(spec)
    verdict = verify(spec)
    assert found(verdict) == {"input files that can't be read": 1}
    assert verdict.exit_code == 1


def test_a_spec_that_keeps_other_columns_is_noticed(
    spec: JobSpec, out: Path, tmp_path: Path
) -> None:
    output = {"uri": str(out), "rows_per_part": 10}
    fewer = make_spec(tmp_path, output={**output, "keep": ["text"]})
    assert found(verify(fewer)) == {"columns that are too many": 2}
    more = make_spec(tmp_path, output={**output, "keep": ["text", "score", "tags", "name"]})
    assert found(verify(more)) == {"columns that are missing": 1}


def test_a_column_that_was_not_kept_is_noticed(spec: JobSpec, out: Path, tmp_path: Path) -> None:
    table = pq.read_table(tmp_path / "in" / "1.parquet")
    pq.write_table(table.append_column("late", table["text"]), tmp_path / "in" / "1.parquet")
    assert found(verify(spec)) == {"columns that are missing": 1}


@pytest.mark.parametrize("shards", [{0}, {1}, {2}, {0, 2}, {0, 1}, set[int]()])
def test_an_unfinished_job_is_right_so_far(spec: JobSpec, shards: set[int]) -> None:
    answer(spec, shards=shards)
    verdict = verify(spec)
    assert found(verdict) == {}
    assert (verdict.outcome, verdict.exit_code) == ("unfinished", 75)
    assert verdict.rows_out == sum([10, 10, 1][shard] for shard in shards)
    assert verdict.rows_left == 21 - verdict.rows_out


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (reordered(0, 1, 2, 3, 5, 6, 7, 8, 9), "rows that are missing"),
        (reordered(0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9), "rows that are there twice"),
        (lambda table: table.slice(0, 6), "files of the wrong length"),
        (lambda table: table.slice(3), "files of the wrong length"),
    ],
)
def test_a_fault_in_an_unfinished_job_is_noticed(
    spec: JobSpec, tmp_path: Path, change: Callable[[pa.Table], pa.Table], problem: str
) -> None:
    answer(spec, shards={1})
    edit(tmp_path / "out" / PART, change)
    verdict = verify(spec)
    assert problem in found(verdict)
    assert verdict.exit_code == 1


def test_a_file_that_is_gone_from_an_unfinished_job_is_noticed(
    spec: JobSpec, tmp_path: Path
) -> None:
    answer(spec, shards={0, 1})
    (tmp_path / "out" / PART).unlink()
    assert found(verify(spec)) == {"files that are gone": 1}


def test_an_output_without_a_job_cannot_be_checked(spec: JobSpec) -> None:
    with pytest.raises(InputError, match="no job has begun here"):
        verify(spec)


def test_partitions_keep_their_folders(tmp_path: Path) -> None:
    for day in ("1", "2"):
        write_input(tmp_path, f"day={day}/a.parquet", 5)
    spec = make_spec(tmp_path)
    answer(spec)
    assert verify(spec).outcome == "proven"
    first = tmp_path / "out" / "day=1" / "part-000000.parquet"
    first.rename(tmp_path / "out" / "day=2" / first.name)
    problems = found(verify(spec))
    assert problems["files in the wrong folder"] == 1
    assert problems["files that are gone"] == 1


def test_keys_are_row_ids(tmp_path: Path) -> None:
    for number, count in enumerate([7, 12, 2]):
        write_input(tmp_path, f"{number}.parquet", count)
    input = {"uri": str(tmp_path / "in"), "rows_per_chunk": 4, "key": "text"}
    spec = make_spec(tmp_path, input=input)
    answer(spec, shards={1, 2})
    assert verify(spec).outcome == "unfinished"
    write_input(tmp_path, "00.parquet", 25)
    answer(spec)
    assert verify(spec).outcome == "proven"
    edit(tmp_path / "out" / PART, reordered(0, 1, 3, 2, 4, 4, 6, 7, 8, 9))
    assert found(verify(spec)) == {
        "rows out of order": 1,
        "rows that are there twice": 1,
        "rows that are missing": 1,
    }


JSON_LINES = [
    '{"text": "a", "n": 1, "tags": [1, 2], "who": {"name": "x"}, "any": 1}',
    '{"text": "b", "n": 2.0, "tags": [], "who": null, "any": {"b": [1]}}',
    "",
    '{"text": "c", "n": ',
    '{"text": "d\\ud800", "n": 4}',
    '["no object"]',
    '{"text": "e", "n": "a word", "any": "x"}',
    '{"text": "ü", "n": 7, "late": 1, "any": true}',
    "   ",
    '{"text": null, "n": null}',
]


@pytest.mark.parametrize(
    # Types guessed from all rows (n and any are strings), and from the first one (integers).
    ("ending", "sample_rows", "errors"),
    [("jsonl", 1000, 5), ("jsonl.gz", 1000, 5), ("jsonl", 1, 7)],
)
def test_json_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, sample_rows: int, errors: int
) -> None:
    monkeypatch.setattr(sources, "SAMPLE_ROWS", sample_rows)
    (tmp_path / "in").mkdir()
    data = "\n".join(JSON_LINES).encode() + b'\n{"text": "\xff"}\n'
    path = tmp_path / "in" / f"a.{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    spec = make_spec(tmp_path)
    answer(spec)
    verdict = verify(spec)
    assert found(verdict) == {}
    assert (verdict.rows_in, verdict.counts.error) == (9, errors)
    part = tmp_path / "out" / "part-000000.parquet"
    edit(part, replaced("tags", 0, [1, 3]))
    assert examples(verify(spec), "values that differ from the input's") == (
        f"tags of a.{ending}:0",
    )


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_bytes(
        b'\xef\xbb\xbftext,n\r\n"a, ""b""\nand more",1\n\nc,2,3\nd\nbad\xff,5\n5" pipe,6\n'
    )
    spec = make_spec(tmp_path)
    answer(spec)
    verdict = verify(spec)
    assert found(verdict) == {}
    assert verdict.rows_in == 5
    edit(tmp_path / "out" / "part-000000.parquet", replaced("n", 0, "2"))
    assert found(verify(spec)) == {"values that differ from the input's": 1}


def test_a_large_gap_is_passed_over_and_not_searched_row_by_row(tmp_path: Path) -> None:
    count = 3 * WINDOW
    write_input(tmp_path, "a.parquet", count)
    spec = make_spec(
        tmp_path,
        input={"uri": str(tmp_path / "in"), "rows_per_chunk": WINDOW // 4},
        output={"uri": str(tmp_path / "out"), "rows_per_part": WINDOW // 4},
    )
    answer(spec, shards={0, 11})
    verdict = verify(spec)
    assert (verdict.outcome, verdict.rows_left) == ("unfinished", count - 2 * WINDOW // 4)
    assert MAX_SEARCHES < WINDOW
