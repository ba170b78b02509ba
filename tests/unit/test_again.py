"""Rows of a finished job that are answered again, without Ray: what is asked, who wins, what
readers see when a store fails at any call.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch import again, rows
from quantbatch.commits import commit_chunk, publish_newest, publish_shard
from quantbatch.errors import Refused, StorageError
from quantbatch.ledger import Ledger
from quantbatch.records import Completion, Failure, FinishReason, RequestId
from quantbatch.verify import verify
from tests.unit.test_ledger import FailingStore, make_spec, opened, target_of

if TYPE_CHECKING:
    from quantbatch.records import Answer, Chunk, Receipt
    from quantbatch.retries import Retry
    from quantbatch.spec import JobSpec

ASKED: dict[str, Any] = {"statuses": ["error"], "changes": {}}


def answers(chunk: Chunk, note: str, failing: tuple[int, ...] = (), cut: int = -1) -> pa.Table:
    """Return a chunk, or the rows of it that are answered again, as a replica hands it on.

    Args:
        chunk: Which.
        note: Part of each answer.
        failing: Places in the chunk whose rows have no answer.
        cut: Place in the chunk of a row whose answer is cut.
    """
    places = chunk.again.rows if chunk.again else range(chunk.rows)
    ids = rows.row_ids(chunk).take(pa.array(places))
    done: list[list[Answer]] = []
    for row, (place, id) in enumerate(zip(places, ids.to_pylist(), strict=True)):
        reason = FinishReason.LENGTH if place == cut else FinishReason.STOP
        answer = Completion(RequestId(chunk.id, row), f"{note} {id}", (5,), reason)
        failure = Failure(RequestId(chunk.id, row), "model", f"{note} failed")
        done.append([failure if place in failing else answer])
    prompts = pa.array([[1, 2]] * len(places), pa.list_(pa.int32()))
    kept = pa.table({"text": ["x"] * len(places)})
    facts = rows.ChunkFacts(chunk.shard, len(places), again=chunk.again)
    rendered = rows.with_facts(rows.rendered(kept, ids, prompts, {}), facts)
    return rows.answered(rendered, done, make_spec(Path()))


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """A job of 9 rows in chunks of 4 and shards of 5; row 2 of each long chunk fails."""
    return job_in(tmp_path)


def job_in(folder: Path) -> JobSpec:
    (folder / "in").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["x"] * 9}), folder / "in" / "a.parquet")
    spec = make_spec(folder, output={"uri": str(folder / "out"), "rows_per_part": 5})
    ledger = opened(spec)
    for chunk in list(ledger.undone()):
        failing = (2,) if chunk.rows > 2 else ()
        answered = answers(chunk, "first", failing, cut=1)
        receipt = commit_chunk(ledger.store, chunk.id, answered, target_of(ledger))
        for shard in ledger.record(receipt):
            publish(ledger, shard.id)
    ledger.succeed()
    return spec


def publish(ledger: Ledger, shard: int) -> None:
    assert ledger.plan
    found = ledger.plan.shards[shard]
    chunks = ledger.plan.chunks_of(found)
    newest = ledger.retries.newest(chunks)
    target = target_of(ledger)
    ledger.record_published(publish_shard(ledger.store, found, chunks, target, newest))


def commit(ledger: Ledger, chunk: Chunk, note: str, failing: tuple[int, ...] = ()) -> Receipt:
    return commit_chunk(ledger.store, chunk.id, answers(chunk, note, failing), target_of(ledger))


def begin(ledger: Ledger, asked: dict[str, Any] | None = None) -> Retry:
    found = again.claimed(ledger, asked or ASKED, ledger.spec)
    assert found
    return found


def retry(ledger: Ledger, note: str = "second", asked: dict[str, Any] | None = None) -> None:
    """Do what `retry` does, without Ray."""
    found = again.claimed(ledger, asked or ASKED, ledger.spec)
    if found is None:
        return
    assert ledger.plan
    for shard in again.due(ledger, found, ledger.plan.shards):
        publish(ledger, shard.id)
    for chunk in list(again.undone(ledger, found)):
        receipt = commit(ledger, chunk, note)
        for shard in again.record(ledger, found, receipt):
            publish(ledger, shard.id)
    again.close(ledger, found, succeeded=True)


def reopened(spec: JobSpec) -> Ledger:
    return Ledger.open(spec, "digest")


def output(spec: JobSpec) -> pa.Table:
    return pq.ParquetDataset(spec.output.uri).read()


def proven(spec: JobSpec) -> None:
    verdict = verify(spec)
    assert verdict.outcome == "proven", verdict


def test_rows_with_errors_are_answered_and_others_stay(spec: JobSpec) -> None:
    before = output(spec).to_pylist()
    assert [row["status"] for row in before].count("error") == 2
    retry(reopened(spec))
    after = output(spec).to_pylist()
    for old, new in zip(before, after, strict=True):
        if old["status"] == "error":
            assert (new["status"], new["row_id"]) == ("ok", old["row_id"])
            assert new["completion"] == f"second {new['row_id']}"
            assert new["attempt"] != old["attempt"]
        else:
            assert new == old
    proven(spec)
    ledger = reopened(spec)
    assert ledger.counts.error == 0
    assert ledger.succeeded()
    assert again.claimed(ledger, ASKED, spec) is None, "nothing is left to try"


def test_files_without_such_rows_are_not_written_again(spec: JobSpec, tmp_path: Path) -> None:
    retry(reopened(spec))
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    ledger = reopened(spec)
    found = begin(ledger, {"statuses": ["truncated"], "changes": {}})
    assert found.number == 2
    first = next(again.undone(ledger, found))
    assert first.again is not None
    assert (first.again.base, first.again.rows) == (1, (1,)), "it builds on the first retry"
    commit(ledger, first, "third")
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}


def test_a_second_retry_keeps_what_the_first_answered(spec: JobSpec) -> None:
    retry(reopened(spec))
    retry(reopened(spec), "third", {"statuses": ["truncated"], "changes": {}})
    notes = [row["completion"].split()[0] for row in output(spec).to_pylist()]
    of_a_chunk = ["first", "third", "second", "first"]
    assert notes == [*of_a_chunk, "first", *of_a_chunk]
    assert {row["status"] for row in output(spec).to_pylist()} == {"ok"}
    proven(spec)


def test_an_answer_is_not_given_up_for_an_error(spec: JobSpec) -> None:
    before = output(spec).to_pylist()
    ledger = reopened(spec)
    found = begin(ledger, {"statuses": ["error", "truncated"], "changes": {}})
    for chunk in list(again.undone(ledger, found)):
        for shard in again.record(ledger, found, commit(ledger, chunk, "second", (1, 2))):
            publish(ledger, shard.id)
    again.close(ledger, found, succeeded=True)
    for old, new in zip(before, output(spec).to_pylist(), strict=True):
        if old["status"] == "error":
            assert new["error_message"] == "second failed"
        else:
            assert new == old
    proven(spec)


def test_another_retry_waits_until_the_open_one_is_finished(spec: JobSpec) -> None:
    begin(reopened(spec))
    with pytest.raises(Refused, match="retry 1 is not finished"):
        again.claimed(reopened(spec), {"statuses": ["truncated"], "changes": {}}, spec)
    changes = {"sampling.max_new_tokens": 9}
    with pytest.raises(Refused, match="retry 1 is not finished"):
        again.claimed(reopened(spec), {"statuses": ["error"], "changes": changes}, spec)
    assert begin(reopened(spec)).number == 1
    proven(spec)


def test_rivals_work_on_one_list_and_the_first_commit_counts(spec: JobSpec) -> None:
    one, other = reopened(spec), reopened(spec)
    ours, theirs = begin(one), begin(other)
    assert ours.rows == theirs.rows
    chunks, same = list(again.undone(one, ours)), list(again.undone(other, theirs))
    assert chunks == same
    for mine, yours in zip(chunks, same, strict=True):
        again.record(one, ours, commit(one, mine, "one"))
        again.record(other, theirs, commit(other, yours, "other"))
    assert one.plan
    for shard in again.due(one, ours, one.plan.shards):
        publish(one, shard.id)
    seen = output(spec)
    for shard in again.due(other, theirs, one.plan.shards):
        publish(other, shard.id)
    assert output(spec) == seen
    assert [t for t in seen["completion"].to_pylist() if t.startswith("other")] == []
    again.close(one, ours, succeeded=True)
    again.close(other, theirs, succeeded=True)
    proven(spec)
    data = list(one.store.list("_quantbatch/data"))
    assert len(data) == 3 + len(chunks), "the attempts that lost are gone"


def test_a_shard_is_published_again_from_its_newest_attempts(spec: JobSpec) -> None:
    """Its record is lost, and `run` publishes it: the retry's rows stay."""
    retry(reopened(spec))
    seen = output(spec)
    ledger = reopened(spec)
    ledger.store.delete("_quantbatch/shards/000000.json")
    later = reopened(spec)
    for shard in later.unpublished():
        publish(later, shard.id)
    later.succeed()
    assert output(spec) == seen
    proven(spec)


@pytest.mark.parametrize("after", [False, True])
def test_a_failure_at_any_store_call_of_a_retry(tmp_path: Path, after: bool) -> None:
    """Fail the first, the second, ... call of a retry; look, finish it, look again."""
    fail_at = 0
    while True:
        fail_at += 1
        spec = job_in(tmp_path / str(fail_at))
        before = output(spec)
        ledger = reopened(spec)
        failing = FailingStore(ledger.store, fail_at, after=after)
        ledger.store = failing
        with contextlib.suppress(StorageError):
            retry(ledger, "killed")
        seen = output(spec)
        assert seen["row_id"] == before["row_id"]
        proven(spec)
        retry(reopened(spec))
        whole = output(spec)
        assert set(whole["status"].to_pylist()) == {"ok", "truncated"}
        untouched = [s != "error" for s in before["status"].to_pylist()]
        assert whole.filter(pa.array(untouched)) == before.filter(pa.array(untouched))
        assert reopened(spec).counts.rows == 9
        proven(spec)
        if failing.calls < fail_at:
            break
    assert fail_at > 15


def test_a_list_says_what_it_ran_with(spec: JobSpec) -> None:
    changed = spec.model_copy(
        update={"sampling": spec.sampling.model_copy(update={"max_new_tokens": 512})}
    )
    ledger = reopened(spec)
    asked = {"statuses": ["error"], "changes": {"sampling.max_new_tokens": 512}}
    again.claimed(ledger, asked, changed)
    noted = pq.read_schema(f"{spec.output.uri}/_quantbatch/retries/0001.parquet").metadata
    assert b'"max_new_tokens": 512' in noted[b"quantbatch"]
    assert reopened(spec).counts == ledger.counts


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"x" * 5000])
def test_a_damaged_list_is_one_error(spec: JobSpec, damage: bytes) -> None:
    ledger = reopened(spec)
    begin(ledger)
    ledger.store.put("_quantbatch/retries/0001.parquet", damage)
    with pytest.raises(Refused, match=r"retries/0001\.parquet: damaged"):
        reopened(spec)


def test_a_file_put_by_a_driver_that_slept_through_a_retry_is_published_again(
    spec: JobSpec,
) -> None:
    names = ("part-000000.parquet", "_quantbatch/shards/000000.json")
    ledger = reopened(spec)
    older = {name: ledger.store.read(name) for name in names}
    retry(ledger)
    assert reopened(spec).succeeded()
    for name, data in older.items():
        ledger.store.put(name, data)
    found = {problem.kind for problem in verify(spec).problems}
    assert found == {"files of an older retry", "counts that are wrong"}

    ledger = reopened(spec)
    assert not ledger.succeeded()
    assert [shard.id for shard in ledger.unpublished()] == [0]
    publish(ledger, 0)
    assert ledger.unpublished() == []
    ledger.succeed()
    proven(spec)


def test_a_driver_that_publishes_late_puts_the_newest_rows(spec: JobSpec) -> None:
    late = reopened(spec)
    retry(reopened(spec))
    seen = output(spec)
    assert late.plan
    for shard in late.plan.shards:
        chunks = late.plan.chunks_of(shard)
        published = publish_newest(late.store, shard, chunks, target_of(late), late.retries)
        assert published.retry == 1
    assert output(spec) == seen
    proven(spec)


def test_a_driver_that_succeeds_late_puts_the_newest_counts(spec: JobSpec) -> None:
    late = reopened(spec)
    retry(reopened(spec))
    late.succeed()
    proven(spec)
    assert late.counts.error == 0


def test_an_older_file_under_a_newer_record_is_published_again(spec: JobSpec) -> None:
    """Such is left by a driver that is killed right after its late put."""
    ledger = reopened(spec)
    older = ledger.store.read("part-000000.parquet")
    retry(ledger)
    seen = output(spec)
    ledger.store.put("part-000000.parquet", older)
    later = reopened(spec)
    assert not later.succeeded()
    assert [shard.id for shard in later.unpublished()] == [0]
    publish(later, 0)
    assert output(spec) == seen
    assert reopened(spec).succeeded()
    proven(spec)


def test_counts_of_an_older_manifest_are_put_right(spec: JobSpec) -> None:
    ledger = reopened(spec)
    older = ledger.store.read("_SUCCESS")
    retry(ledger)
    ledger.store.put("_SUCCESS", older)
    later = reopened(spec)
    assert not later.succeeded()
    later.succeed()
    proven(spec)


def test_a_shard_is_published_with_all_of_a_retry_or_nothing_of_it(spec: JobSpec) -> None:
    """Its record is lost while a retry has answered rows of one of its chunks and not the other."""
    seen = output(spec)
    ledger = reopened(spec)
    asked = {"statuses": ["ok"], "changes": {}}
    found = begin(ledger, asked)
    first, *others = again.undone(ledger, found)
    assert first.shard == others[0].shard
    commit(ledger, first, "second")
    ledger.store.delete("_quantbatch/shards/000000.json")
    later = reopened(spec)
    for shard in later.unpublished():
        publish(later, shard.id)
    assert output(spec) == seen
    retry(reopened(spec), "second", asked)
    rows_now = output(spec).to_pylist()
    assert {r["completion"].split()[0] for r in rows_now if r["status"] == "ok"} == {"second"}
    proven(spec)
