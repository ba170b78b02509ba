"""The commit protocol on a local disk, without Ray: who wins, what readers see, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch import rows
from quantbatch.commits import Commit, commit_chunk, commit_key, data_key, publish_shard
from quantbatch.documents import describe_status
from quantbatch.errors import Refused, StorageError
from quantbatch.ledger import Ledger
from quantbatch.plan import Plan, make_plan
from quantbatch.records import Completion, Counts, Failure, FinishReason, RequestId
from quantbatch.spec import JobSpec

if TYPE_CHECKING:
    from quantbatch.commits import OutputFormat
    from quantbatch.records import Answer, Chunk
    from quantbatch.storage import Store

from quantbatch.input import listing


def make_spec(folder: Path, **changes: Any) -> JobSpec:
    fields = {
        "name": "test",
        "input": {"uri": str(folder / "in"), "rows_per_chunk": 4},
        "model": {"id": "m", "bits": 4},
        "prompt": {"template": "{{ text }}"},
        "output": {"uri": str(folder / "out"), "rows_per_part": 10},
    }
    return JobSpec.model_validate(fields | changes)


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    for number, count in enumerate([7, 12, 2]):
        table = pa.table({"text": [f"{number}-{row}" for row in range(count)]})
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
    return make_spec(tmp_path)


def plan_of(spec: JobSpec) -> Plan:
    return make_plan(spec, listing.list_input(spec.input))


def opened(spec: JobSpec) -> Ledger:
    ledger = Ledger.open(spec, "digest")
    if ledger.plan is None:
        ledger.freeze(plan_of(spec))
    return ledger


def target_of(ledger: Ledger) -> OutputFormat:
    assert ledger.plan
    schema = rows.output_schema(ledger.spec, ["text"], ledger.plan.schema)
    return ledger.output_format(schema)


def answers(chunk: Chunk, note: str = "") -> pa.Table:
    """Return a chunk as a replica hands it on; its third row has an error."""
    count = chunk.rows
    ids = rows.row_ids(chunk)
    prompts = pa.array([[1, 2]] * count, pa.list_(pa.int32()))
    kept = pa.table({"text": [f"text {id}" for id in ids.to_pylist()]})
    done: list[list[Answer]] = [
        [Completion(RequestId(chunk.id, i), f"answer {id}{note}", (5, 6, 7), FinishReason.STOP)]
        for i, id in enumerate(ids.to_pylist())
    ]
    if count > 2:
        done[2] = [Failure(RequestId(chunk.id, 2), "model", "ValueError: no")]
    rendered = rows.rendered(kept, ids, prompts, {})
    rendered = rows.with_facts(rendered, rows.ChunkFacts(chunk.shard, count))
    return rows.answered(rendered, done, make_spec(Path()))


def work(ledger: Ledger, chunks: list[Chunk]) -> None:
    """Do what the pipeline does with some chunks."""
    target = target_of(ledger)
    for chunk in chunks:
        receipt = commit_chunk(ledger.store, chunk.id, answers(chunk), target)
        for shard in ledger.record(receipt):
            publish(ledger, shard.id, target)


def publish(ledger: Ledger, shard: int, target: OutputFormat) -> None:
    assert ledger.plan
    found = ledger.plan.shards[shard]
    chunks = ledger.plan.chunks_of(found)
    ledger.record_published(publish_shard(ledger.store, found, chunks, target))


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").glob("*.parquet"))


def test_the_plan_divides_the_input_in_order(spec: JobSpec) -> None:
    plan = plan_of(spec)
    assert [(shard.rows, shard.chunks) for shard in plan.shards] == [(10, 3), (10, 3), (1, 1)]
    chunks = list(plan.each_chunk())
    assert [chunk.id for chunk in chunks] == list(range(plan.chunks)) == list(range(7))
    ids = [id for chunk in chunks for id in rows.row_ids(chunk).to_pylist()]
    expected = [f"{n}.parquet:{row}" for n, count in enumerate([7, 12, 2]) for row in range(count)]
    assert ids == expected
    assert Plan.from_bytes(plan.to_bytes()) == plan


def test_a_job_is_published_shard_by_shard(spec: JobSpec, tmp_path: Path) -> None:
    ledger = opened(spec)
    chunks = list(ledger.undone())
    work(ledger, chunks[:2])
    assert visible(tmp_path) == []
    work(ledger, chunks[2:3])
    assert visible(tmp_path) == ["part-000000.parquet"]
    work(ledger, chunks[3:])
    assert visible(tmp_path) == [f"part-{n:06d}.parquet" for n in range(3)]
    assert ledger.finished
    assert not ledger.succeeded()
    ledger.succeed()
    assert ledger.succeeded()

    table = pq.read_table(tmp_path / "out" / "part-000000.parquet")
    assert table["row_id"].to_pylist()[:3] == ["0.parquet:0", "0.parquet:1", "0.parquet:2"]
    assert table["status"].to_pylist().count("error") == 2
    assert table["error_message"][2].as_py() == "ValueError: no"
    assert table["completion"][2].as_py() is None
    assert b"fingerprint" in table.schema.metadata[b"quantbatch"]
    counts = json.loads((tmp_path / "out" / "_SUCCESS").read_text())["counts"]
    assert counts["ok"] + counts["error"] == 21
    assert counts["completion_tokens"] == 3 * counts["ok"]


def test_another_driver_goes_on_where_the_first_stopped(spec: JobSpec, tmp_path: Path) -> None:
    first = opened(spec)
    work(first, list(first.undone())[:4])
    second = Ledger.open(spec, "digest")
    assert [chunk.id for chunk in second.undone()] == [4, 5, 6]
    assert second.counts == first.counts
    assert second.counts.rows == 14
    work(second, list(second.undone()))
    assert second.finished
    rows_in = [
        id
        for path in visible(tmp_path)
        for id in pq.read_table(tmp_path / "out" / path)["row_id"].to_pylist()
    ]
    assert len(rows_in) == len(set(rows_in)) == 21


def test_a_shard_that_was_committed_but_not_published_is_published_later(spec: JobSpec) -> None:
    ledger = opened(spec)
    for chunk in list(ledger.undone())[:3]:
        commit_chunk(ledger.store, chunk.id, answers(chunk), target_of(ledger))
    later = Ledger.open(spec, "digest")
    assert [shard.id for shard in later.unpublished()] == [0]
    publish(later, 0, target_of(later))
    assert later.unpublished() == []
    assert Ledger.open(spec, "digest").published.keys() == {0}


def test_the_first_attempt_counts_and_the_other_leaves_nothing(spec: JobSpec) -> None:
    ledger = opened(spec)
    chunk = next(ledger.undone())
    target = target_of(ledger)
    first = commit_chunk(ledger.store, chunk.id, answers(chunk, " of the first"), target)
    second = commit_chunk(ledger.store, chunk.id, answers(chunk, " of the second"), target)
    assert first.counts == second.counts
    files = [info.key for info in ledger.store.list("_quantbatch/data")]
    winner = Commit.from_bytes(ledger.store.read(commit_key(chunk.id)))
    assert files == [data_key(chunk.id, winner.attempt)]
    texts = pq.read_table(Path(ledger.store.uri, files[0]))["completion"].to_pylist()
    assert texts[0].endswith("of the first")


def test_rivals_publish_the_same_bytes(spec: JobSpec, tmp_path: Path) -> None:
    ledger = opened(spec)
    work(ledger, list(ledger.undone()))
    path = tmp_path / "out" / "part-000001.parquet"
    before = path.read_bytes()
    publish(ledger, 1, target_of(ledger))
    assert path.read_bytes() == before


def test_a_short_chunk_is_never_committed(spec: JobSpec) -> None:
    ledger = opened(spec)
    chunk = next(ledger.undone())
    whole = answers(chunk)
    with pytest.raises(AssertionError, match="3 of 4 rows"):
        commit_chunk(ledger.store, chunk.id, whole.slice(0, 3), target_of(ledger))
    assert list(ledger.store.list("_quantbatch/commits")) == []


def test_a_damaged_attempt_is_never_published(spec: JobSpec, tmp_path: Path) -> None:
    ledger = opened(spec)
    work(ledger, list(ledger.undone())[:2])
    damaged = next((tmp_path / "out/_quantbatch/data").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-20] + b"\0" * 20)
    with pytest.raises(Refused, match="not what was committed"):
        work(ledger, list(ledger.undone())[:1])
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": {"template": "{{ id }}"}}, 'prompt.template was "{{ text }}", now "{{ id }}"'),
        ({"model": {"id": "m", "bits": 8}}, 'model.quantization.kind was "nf4", now "int8"'),
        ({"sampling": {"seed": 1}}, "sampling.seed was 0, now 1"),
    ],
)
def test_another_spec_is_refused(
    spec: JobSpec, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    opened(spec)
    with pytest.raises(Refused) as caught:
        Ledger.open(make_spec(tmp_path, **changes), "digest")
    assert said in caught.value.problem
    assert "output.uri" in caught.value.hint


def test_another_model_is_refused(spec: JobSpec) -> None:
    opened(spec)
    with pytest.raises(Refused, match=r"model\.digest"):
        Ledger.open(spec, "another digest")


def test_tuning_may_change(spec: JobSpec, tmp_path: Path) -> None:
    opened(spec)
    changed = make_spec(
        tmp_path,
        name="renamed",
        cluster={"replicas": 3, "chunks_in_flight": 2},
        limits={"attempts": 7},
        engine={"kind": "continuous", "batch_size": 3, "step_tokens": 64},
    )
    assert Ledger.open(changed, "digest").plan is not None


def test_a_folder_with_other_files_is_refused(spec: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.parquet").write_bytes(b"precious")
    with pytest.raises(Refused, match=r"mine\.parquet"):
        Ledger.open(spec, "digest")


def test_looking_writes_nothing(spec: JobSpec, tmp_path: Path) -> None:
    Ledger.open(spec, "digest")
    assert not (tmp_path / "out").exists()


class FailingStore:
    """Stands before a store and fails its n-th call, before or after the call has its effect."""

    def __init__(self, inner: Store, fail_at: int, *, after: bool) -> None:
        self.inner, self.fail_at, self.after = inner, fail_at, after
        self.calls = 0

    @property
    def uri(self) -> str:
        return self.inner.uri

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.inner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at and not self.after:
                raise StorageError("injected")
            result = real(*args, **kwargs)
            if self.calls == self.fail_at:
                if hasattr(result, "close"):
                    result.close()
                raise StorageError("injected")
            return result

        return call


@pytest.mark.parametrize("after", [False, True])
def test_a_failure_at_any_store_call_loses_and_doubles_nothing(tmp_path: Path, after: bool) -> None:
    """Fail the first, the second, ... call of a job, run on, look at the end state each time."""
    fail_at = 0
    while True:
        fail_at += 1
        folder = tmp_path / str(fail_at)
        (folder / "in").mkdir(parents=True)
        pq.write_table(pa.table({"text": ["x"] * 9}), folder / "in" / "a.parquet")
        spec = make_spec(folder)
        failing = run_with_a_failure(spec, fail_at, after=after)
        ledger = opened(spec)
        for shard in ledger.unpublished():
            publish(ledger, shard.id, target_of(ledger))
        work(ledger, list(ledger.undone()))
        assert ledger.finished
        ids = pq.read_table(folder / "out" / "part-000000.parquet")["row_id"].to_pylist()
        assert ids == [f"a.parquet:{row}" for row in range(9)]
        assert ledger.counts.rows == 9
        if failing.calls < fail_at:
            break
    assert fail_at > 15
    print(f"store calls failed: {fail_at - 1}, after the effect: {after}")


def run_with_a_failure(spec: JobSpec, fail_at: int, *, after: bool) -> FailingStore:
    ledger = Ledger.open(spec, "digest")
    failing = FailingStore(ledger.store, fail_at, after=after)
    ledger.store = failing
    try:
        ledger.freeze(plan_of(spec))
        work(ledger, list(ledger.undone()))
    except StorageError:
        pass
    return failing


def test_counts_add_up() -> None:
    one = Counts(ok=1, error=2, prompt_tokens=10)
    assert one + Counts(ok=1, truncated=1) == Counts(2, 1, 0, 2, 10, 0)
    assert (one + one).rows == 6


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"format": 2}', b"\xff\xfe"])
def test_a_damaged_record_of_a_job_is_one_error(spec: JobSpec, content: bytes) -> None:
    opened(spec)
    path = Path(spec.output.uri, "_quantbatch", "job.json")
    assert path.exists()
    path.write_bytes(content)
    with pytest.raises(Refused, match="json is damaged"):
        Ledger.open(spec, "digest")
    with pytest.raises(Refused, match="json is damaged"):
        describe_status(spec.output.uri, spec.output.storage)


def test_a_damaged_plan_is_one_error(spec: JobSpec) -> None:
    opened(spec)
    path = Path(spec.output.uri, "_quantbatch", "plan", "0000.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Refused, match=r"plan/0000\.parquet is damaged"):
        Ledger.open(spec, "digest")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b"\xff\xfe"])
def test_what_is_written_anew_may_be_damaged(spec: JobSpec, content: bytes) -> None:
    opened(spec)
    for name in ("_SUCCESS", "_quantbatch/summary.json"):
        Path(spec.output.uri, name).write_bytes(content)
    assert not Ledger.open(spec, "digest").succeeded()
    assert not describe_status(spec.output.uri, spec.output.storage)["last_run"]
