"""What is refused before anything starts, and how a plan grows; with the echo engine, without
Ray."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch.errors import DoesNotFit, InputError, JobError, Refused, StorageError
from quantbatch.preflight import prepare, require_fit
from quantbatch.prequantize import prequantize
from quantbatch.spec import JobSpec

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = Path(__file__).parents[2] / "configs" / "quickstart" / "model"


def make_spec(folder: Path, **changes: Any) -> JobSpec:
    fields = {
        "name": "test",
        "input": {"uri": str(folder / "in")},
        "model": {"id": str(MODEL), "bits": 16},
        "prompt": {"template": "{{ text }}"},
        "engine": {"kind": "echo"},
        "output": {"uri": str(folder / "out")},
    }
    return JobSpec.model_validate(fields | changes)


def write(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "in" / "a.parquet", text=["x", "y"], id=[1, 2])
    return tmp_path


def frozen(spec: JobSpec) -> None:
    job = prepare(spec)
    assert job.new_generation is not None
    assert job.ledger.freeze(job.new_generation)


def test_looking_writes_nothing(folder: Path) -> None:
    prepare(make_spec(folder))
    assert not (folder / "out").exists()


def test_a_resumed_job_has_its_frozen_plan(folder: Path) -> None:
    frozen(make_spec(folder))
    job = prepare(make_spec(folder))
    assert job.new_generation is None
    assert job.plan.rows == 2


def test_paths_above_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    job = prepare(make_spec(folder, input={"uri": "../in"}, output={"uri": "../out"}))
    assert job.ledger.store.uri == str(folder / "out")


@pytest.mark.parametrize("output", ["in", "in/out", "in/../in/x", "."])
def test_output_and_input_in_one_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(Refused, match="lies in the"):
        prepare(make_spec(folder, input={"uri": "in"}, output={"uri": output}))


def test_a_rival_with_another_plan_is_noticed(folder: Path) -> None:
    early = prepare(make_spec(folder))
    write(folder / "in" / "b.parquet", text=["z"], id=[3])
    late = prepare(make_spec(folder))
    assert early.new_generation is not None
    assert late.new_generation is not None
    assert early.ledger.freeze(early.new_generation)
    assert not late.ledger.freeze(late.new_generation)
    with pytest.raises(Refused, match=r"b\.parquet"):
        prepare(make_spec(folder))


def test_a_rival_with_the_same_plan_is_no_rival(folder: Path) -> None:
    first, second = prepare(make_spec(folder)), prepare(make_spec(folder))
    assert first.new_generation is not None
    assert second.new_generation is not None
    assert first.ledger.freeze(first.new_generation)
    assert second.ledger.freeze(second.new_generation)


def test_new_files_need_extend_and_the_same_columns(folder: Path) -> None:
    frozen(make_spec(folder))
    write(folder / "in" / "b.parquet", text=["z"], id=["three"])
    with pytest.raises(Refused, match="came or was mended"):
        prepare(make_spec(folder))
    with pytest.raises(InputError, match=r"b\.parquet: its column 'id' is string.*int64"):
        prepare(make_spec(folder), extend=True)
    write(folder / "in" / "b.parquet", text=["z"], id=pa.array([3], pa.int32()))
    job = prepare(make_spec(folder), extend=True)
    assert job.plan.rows == 3
    assert job.new_generation
    assert job.new_generation.rows == 1


def test_new_folders_of_another_kind_are_refused(folder: Path) -> None:
    frozen(make_spec(folder))
    write(folder / "in" / "day=2" / "b.parquet", text=["z"], id=[3])
    with pytest.raises(InputError, match="day"):
        prepare(make_spec(folder), extend=True)


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("changed", [1, 5])
def test_files_that_changed_are_named_and_not_extended(
    folder: Path, changed: int, extend: bool
) -> None:
    """Also where new files came: those are no way around it."""
    for number in range(5):
        write(folder / "in" / f"{number}.parquet", text=["x"] * 3, id=[1, 2, 3])
    frozen(make_spec(folder))
    for number in range(changed):
        write(folder / "in" / f"{number}.parquet", text=["another"] * 3, id=[1, 2, 3])
    write(folder / "in" / "new.parquet", text=["z"], id=[4])
    with pytest.raises(Refused) as caught:
        prepare(make_spec(folder), extend=extend)
    assert caught.value.exit_code == 3
    named = {
        1: "1 input file (0.parquet) changed since the job was planned",
        5: "5 input files (0.parquet, 1.parquet, 2.parquet and 2 more) changed since the job was"
        " planned",
    }
    assert caught.value.problem == named[changed]
    assert "output.uri" in caught.value.hint


def test_extend_adds_new_files_and_nothing_else(folder: Path) -> None:
    spec = make_spec(folder, input={"uri": str(folder / "in"), "rows_per_chunk": 1})
    frozen(spec)
    before = prepare(spec)
    write(folder / "in" / "0-comes-first.parquet", text=["z"] * 3, id=[3, 4, 5])
    after = prepare(spec, extend=True)
    assert after.new_generation is not None
    assert set(after.new_generation.known_files) == {"0-comes-first.parquet"}
    chunks = list(after.plan.each_chunk())
    assert chunks[:2] == list(before.plan.each_chunk())
    assert [(chunk.id, chunk.shard) for chunk in chunks] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1)]
    assert after.plan.shards[: len(before.plan.shards)] == before.plan.shards


def test_a_mended_file_is_taken_up(folder: Path) -> None:
    (folder / "in" / "b.parquet").write_bytes(b"torn")
    frozen(make_spec(folder))
    assert list(prepare(make_spec(folder)).unreadable) == ["b.parquet"]
    assert prepare(make_spec(folder), extend=True).new_generation is None
    write(folder / "in" / "b.parquet", text=["z"], id=[3])
    with pytest.raises(Refused, match="mended"):
        prepare(make_spec(folder))
    job = prepare(make_spec(folder), extend=True)
    assert (job.plan.rows, job.unreadable) == (3, {})


def test_a_file_without_rows_that_gets_some(folder: Path) -> None:
    write(folder / "in" / "b.parquet", text=pa.array([], pa.string()), id=pa.array([], pa.int64()))
    frozen(make_spec(folder))
    write(folder / "in" / "b.parquet", text=["z"], id=[3])
    assert prepare(make_spec(folder), extend=True).plan.rows == 3


def test_a_moved_job_reads_from_the_new_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "job").mkdir()
    (folder / "in").rename(folder / "job" / "in")
    monkeypatch.chdir(folder / "job")
    spec = make_spec(folder, input={"uri": "in"}, output={"uri": "out"})
    frozen(spec)
    monkeypatch.chdir(folder)
    (folder / "job").rename(folder / "moved")
    monkeypatch.chdir(folder / "moved")
    assert prepare(spec).read_job.root == str(folder / "moved" / "in")


def test_a_link_to_nothing_is_named(folder: Path) -> None:
    (folder / "in" / "b.parquet").symlink_to(folder / "nowhere")
    with pytest.raises(StorageError, match=r"b\.parquet: a link to nothing"):
        prepare(make_spec(folder))


def test_a_name_that_is_not_text_is_one_clear_error(folder: Path) -> None:
    (folder / "in" / os.fsdecode(b"\xff.parquet")).write_bytes(b"")
    with pytest.raises(StorageError, match="not UTF-8"):
        prepare(make_spec(folder))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output": {"uri": "s3://"}}, "names no bucket"),
        ({"output": {"uri": "~nobody-here/x"}}, "home directory"),
        ({"input": {"uri": "s3://"}}, "bucket"),
    ],
)
def test_odd_places(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError, match=said):
        prepare(make_spec(folder, **changes))


def test_a_cache_nowhere_is_refused_at_once(folder: Path) -> None:
    model = {"id": str(MODEL), "bits": 4, "cache": "gopher://x/y"}
    with pytest.raises(StorageError, match="no store is known for gopher"):
        prepare(make_spec(folder, model=model))


@pytest.mark.parametrize("look", [prepare, partial(prequantize, say=print)], ids=["run", "fill"])
@pytest.mark.parametrize("cache", ["out", "out/cache"])
def test_a_cache_in_the_output_is_refused_before_it_is_filled(
    folder: Path, cache: str, look: Callable[[JobSpec], object]
) -> None:
    model = {"id": str(MODEL), "bits": 4, "cache": str(folder / cache)}
    with pytest.raises(Refused, match=r"model\.cache .* lies in the output"):
        look(make_spec(folder, model=model))
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("place", "said"), [("out", "output"), ("out/cache", "output"), ("in/cache", "input")]
)
def test_a_cache_of_answers_among_rows_is_refused(folder: Path, place: str, said: str) -> None:
    spec = make_spec(folder, answers_cache={"uri": str(folder / place)})
    with pytest.raises(Refused, match=rf"answers_cache\.uri .* lies in the {said} "):
        prepare(spec)
    prepare(make_spec(folder, answers_cache={"uri": str(folder / "cache")}))


# ---- the cluster's own cards


def test_a_job_planned_for_a_card_is_not_judged_by_the_cluster_again(folder: Path) -> None:
    static = {"engine": {"kind": "static", "batch_size": 1_000_000}}
    job = prepare(make_spec(folder, **static))
    assert job.card is None
    with pytest.raises(DoesNotFit, match="on T4, a card of the cluster") as caught:
        require_fit(job, ["L40S", "T4"])
    assert "engine.batch_size" in caught.value.hint
    require_fit(job, [])
    require_fit(job, ["AMD-Instinct-MI100"])
    named = {"cluster": {"card": "T4"}, "engine": {"kind": "static"}}
    require_fit(prepare(make_spec(folder, **named)), ["T4"])


def test_a_form_that_no_answer_is_long_enough_for_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schema = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in ("zq1xw", "qzx2j")},
        "required": ["zq1xw", "qzx2j"],
    }
    task = {"kind": "generate", "response": {"json_schema": schema}}
    prepare(make_spec(folder, task=task, sampling={"max_new_tokens": 64}))
    assert not caplog.records
    prepare(make_spec(folder, task=task, sampling={"max_new_tokens": 3}))
    [record] = caplog.records
    assert "sampling.max_new_tokens: 3" in record.getMessage()


def test_a_form_that_can_not_be_compiled_is_refused(folder: Path) -> None:
    task = {"kind": "generate", "response": {"json_schema": {"type": "strin"}}}
    with pytest.raises(JobError, match=r"task\.response\.json_schema: \$\.type: 'strin'"):
        prepare(make_spec(folder, task=task))


WANTS_TEXTS = {"kind": "classify", "labels_column": "own"}
WANTS_SCHEMA = {"kind": "generate", "response": {"schema_column": "own"}}


@pytest.mark.parametrize(
    ("own", "task", "said"),
    [
        ([["a"]], WANTS_TEXTS, ""),
        (pa.array([["a"]], pa.large_list(pa.large_string())), WANTS_TEXTS, ""),
        (pa.array([["a"]], pa.list_(pa.string(), 1)), WANTS_TEXTS, ""),
        (["a"], WANTS_TEXTS, "task.labels_column: column 'own' holds string, not lists of texts"),
        ([[1]], WANTS_TEXTS, "int64>, not lists of texts"),
        (["{}"], WANTS_SCHEMA, ""),
        ([["{}"]], WANTS_SCHEMA, "task.response.schema_column: column 'own' holds list"),
        ([{"type": "object"}], WANTS_SCHEMA, "holds struct<type: string>, not JSON as text"),
        ([[None]], {"kind": "score", "continuation": "own"}, "task.continuation: column 'own'"),
    ],
)  # fmt: skip
def test_a_task_s_column_of_another_type_is_refused(
    tmp_path: Path, own: Any, task: dict[str, Any], said: str
) -> None:
    write(tmp_path / "in" / "a.parquet", text=["x"], own=own)
    spec = make_spec(tmp_path, task=task)
    if not said:
        assert prepare(spec).plan.rows == 1
        return
    with pytest.raises(JobError) as caught:
        prepare(spec)
    assert said in caught.value.problem
