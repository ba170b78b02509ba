"""Ten thousand tiny shards: planned, resumed and recorded in bounded time and memory; no rows."""

from __future__ import annotations

import gzip
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch.commits import Commit, Published, commit_key, shard_key
from quantbatch.documents import describe_status
from quantbatch.input import listing
from quantbatch.ledger import Ledger
from quantbatch.plan import make_plan
from quantbatch.records import Counts, Receipt
from quantbatch.verify import verify
from tests.unit.test_verify import answer, make_spec, write_input

if TYPE_CHECKING:
    from quantbatch.spec import JobSpec
    from tests.conftest import Count

SHARDS = 10_000
ONE = Counts(ok=1, prompt_tokens=2, completion_tokens=3)


class Spent:
    """CPU time and memory that a block took."""

    def __enter__(self) -> Spent:
        tracemalloc.start()
        self._began_s = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_s = time.process_time() - self._began_s
        self.peak_mib = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()


def spec_of(folder: Path) -> JobSpec:
    """Return a job with a row in each chunk, and a chunk in each shard."""
    return make_spec(
        folder,
        input={"uri": str(folder / "in"), "rows_per_chunk": 1},
        output={"uri": str(folder / "out"), "rows_per_part": 1},
    )


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    """A job of which a half is published, and a quarter committed."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "in").mkdir()
    pq.write_table(pa.table({"text": ["x"] * SHARDS}), folder / "in" / "a.parquet")
    spec = spec_of(folder)
    with Spent() as spent:
        plan = make_plan(spec, listing.list_input(spec.input))
        ledger = Ledger.open(spec, "digest")
        assert ledger.freeze(plan)
    assert (len(plan.shards), plan.chunks) == (SHARDS, SHARDS)
    assert spent.cpu_s < 20
    assert spent.peak_mib < 100
    for key in (commit_key(0), shard_key(0)):
        Path(ledger.store.uri, key).parent.mkdir(parents=True)
    for number in range(SHARDS * 3 // 4):
        commit = Commit(number, "0" * 12, 1, "0" * 64, ONE)
        Path(ledger.store.uri, commit_key(number)).write_bytes(commit.to_bytes())
    for shard in plan.shards[: SHARDS // 2]:
        published = Published(shard.id, shard.key, ONE, 0, {shard.key: "0" * 64})
        Path(ledger.store.uri, shard_key(shard.id)).write_bytes(published.to_bytes())
    return spec


def test_a_job_of_many_shards_is_resumed(half_done: JobSpec, count: Count) -> None:
    with Spent() as spent:
        ledger = Ledger.open(half_done, "digest")
        undone = [chunk.id for chunk in ledger.undone()]
        unpublished = ledger.unpublished()
    count(f"resumed: {spent.cpu_s:.1f} s, {spent.peak_mib:.0f} MiB")
    assert undone == list(range(SHARDS * 3 // 4, SHARDS))
    assert [shard.id for shard in unpublished] == list(range(SHARDS // 2, SHARDS * 3 // 4))
    assert ledger.counts.rows == SHARDS * 3 // 4
    assert spent.cpu_s < 30
    assert spent.peak_mib < 100


def test_the_rest_of_it_is_recorded(half_done: JobSpec, count: Count) -> None:
    """What a driver does with each receipt must not depend on how many shards there are."""
    ledger = Ledger.open(half_done, "digest")
    assert ledger.plan
    due = ledger.unpublished()
    with Spent() as spent:
        for number in range(SHARDS * 3 // 4, SHARDS):
            due += ledger.record(Receipt(number, number, ONE))
        for shard in due:
            ledger.record_published(Published(shard.id, shard.key, ONE))
        assert ledger.finished
    count(f"recorded: {spent.cpu_s:.1f} s, {spent.peak_mib:.0f} MiB")
    assert ledger.counts == Counts(SHARDS, 0, 0, 0, 2 * SHARDS, 3 * SHARDS)
    assert ledger.commits == {}
    assert spent.cpu_s < 10
    assert spent.peak_mib < 50


def test_its_status_is_told(half_done: JobSpec) -> None:
    with Spent() as spent:
        status = describe_status(half_done.output.uri, half_done.output.storage)
    assert (status["rows_done"], status["rows"]) == (SHARDS * 3 // 4, SHARDS)
    assert (status["files_done"], status["files"]) == (SHARDS // 2, SHARDS)
    assert spent.cpu_s < 30


EMPTY = pa.table({"text": pa.array([], pa.string()), "score": pa.array([], pa.float64())})


def write_empty(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        EMPTY.append_column("tags", pa.array([], pa.list_(pa.struct([("tag", pa.string())])))), path
    )


@pytest.mark.parametrize("key", [None, "text"])
def test_files_without_rows_are_nothing_to_answer(tmp_path: Path, key: str | None) -> None:
    for name in ("0", "2", "2b", "9"):
        write_empty(tmp_path / "in" / f"{name}.parquet")
    for name, rows in (("1", 7), ("3", 12)):
        write_input(tmp_path, f"{name}.parquet", rows)
    spec = make_spec(tmp_path, input={"uri": str(tmp_path / "in"), "rows_per_chunk": 4, "key": key})
    ledger = answer(spec)
    assert ledger.plan
    assert sorted(ledger.plan.without_rows) == [f"{n}.parquet" for n in ("0", "2", "2b", "9")]
    assert ledger.plan.unreadable == {}
    assert all(shard.rows for shard in ledger.plan.shards)
    verdict = verify(spec)
    assert (verdict.outcome, verdict.rows_in, verdict.files_in) == ("proven", 19, 6)

    write_empty(tmp_path / "in" / "later.parquet")
    write_input(tmp_path, "more.parquet", 3)
    ledger = answer(spec)
    assert verify(spec).outcome == "proven"
    assert ledger.counts.rows == 22


def test_a_folder_of_hive_without_rows_has_no_file(tmp_path: Path) -> None:
    write_empty(tmp_path / "in" / "day=1" / "a.parquet")
    write_input(tmp_path, "day=2/a.parquet", 3)
    write_empty(tmp_path / "in" / "day=3" / "a.parquet")
    spec = make_spec(tmp_path)
    answer(spec)
    assert verify(spec).outcome == "proven"
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("part*"))
    assert files == [Path("day=2/part-000000.parquet")]


@pytest.mark.parametrize(
    ("ending", "none", "some"),
    [
        ("csv", b"text\n", b"text\na\nb\n"),
        ("jsonl", b"\n\n", b'{"text": "a"}\n{"text": "b"}\n'),
        (
            "jsonl.gz",
            gzip.compress(b"\n", mtime=0),
            gzip.compress(b'{"text": "a"}\n{"text": "b"}\n', mtime=0),
        ),
    ],
)
def test_text_without_rows(tmp_path: Path, ending: str, none: bytes, some: bytes) -> None:
    (tmp_path / "in").mkdir()
    for name, data in (("a", none), ("b", some), ("c", none)):
        (tmp_path / "in" / f"{name}.{ending}").write_bytes(data)
    spec = make_spec(tmp_path)
    answer(spec)
    verdict = verify(spec)
    assert (verdict.outcome, verdict.problems) == ("proven", ())
    assert (verdict.rows_in, verdict.files_in) == (2, 3)
