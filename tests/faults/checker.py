"""What has to be true of an output: after every change of an object, and at the end.

It knows the protocol's promises and the layout of the records, and computes what has to be there on
its own: from the frozen plan, the lists of retries, and what becomes of a row (`engine.fate`).

After each change: a frozen or claimed object never changes; a commit record names a file that is
there, whole, with the right rows; a file that a commit record names is never changed or removed; a
file that readers see is whole, is made of committed attempts, and of one state of the retries; a
shard's record and `_SUCCESS` come after the files that they name. At the end: all of it is the
newest, the counts are those of the rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from quantbatch import rows as row_layout
from quantbatch.plan import Plan
from quantbatch.records import Status
from tests.faults.engine import fate, text_of

if TYPE_CHECKING:
    from quantbatch.plan import Shard
    from quantbatch.records import Chunk, Receipt
    from tests.faults.memory import Objects, Write

JOB, SUCCESS = "_quantbatch/job.json", "_SUCCESS"
_COMMIT = re.compile(r"_quantbatch/(?:commits|again/(\d{4}))/(\d{8})\.json")
_SHARD = re.compile(r"_quantbatch/shards/(\d{6})\.json")
_PLAN = re.compile(r"_quantbatch/plan/\d{4}\.parquet")
_LIST = re.compile(r"_quantbatch/retries/(\d{4})\.parquet")
_DATA = re.compile(r"_quantbatch/data/.*")
_PART = re.compile(r"part-(\d{6})\.parquet")


@functools.lru_cache(maxsize=4096)
def _table(data: bytes) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False).replace_schema_metadata()


@functools.lru_cache(maxsize=1024)
def _plan(*generations: bytes) -> Plan:
    return functools.reduce(Plan.followed_by, [Plan.from_bytes(data) for data in generations])


@functools.lru_cache(maxsize=1024)
def _chunks(*generations: bytes) -> list[Chunk]:
    return list(_plan(*generations).each_chunk())


@functools.lru_cache(maxsize=1024)
def _listed(data: bytes) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row in _table(data).to_pylist():
        found.setdefault(row["chunk"], []).append(row["row"])
    return found


class Checker:
    """Looks at an output; an AssertionError says what is wrong with it."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.changed_input = False
        """Whether rows may have an error because their file was another for a while."""
        self.looked = 0
        """Changes of objects that were looked at."""
        self.referenced: set[str] = set()
        """Data files that a commit record names."""

    # ---- after each change

    def changed(self, write: Write) -> None:
        """Look at an object that was just written or removed."""
        self.looked += 1
        key, before, after = write
        frozen = key == JOB or any(p.fullmatch(key) for p in (_COMMIT, _PLAN, _LIST, _DATA))
        if frozen and before is not None and after is not None:
            assert before == after, f"{key} was replaced"
        if after is None:
            self._removed(key)
        elif match := _COMMIT.fullmatch(key):
            self._committed(int(match[2]), int(match[1] or 0))
        elif match := _PART.fullmatch(key):
            self._visible(int(match[1]))
        elif match := _SHARD.fullmatch(key):
            self._told_of_a_shard(key, int(match[1]))
        elif key == SUCCESS:
            self._succeeded(json.loads(after))

    def _removed(self, key: str) -> None:
        assert key not in self.referenced, f"{key} is what a commit record names, and was removed"
        mine = (key == JOB, key == SUCCESS, _COMMIT.fullmatch(key), _PART.fullmatch(key))
        more = (_PLAN.fullmatch(key), _LIST.fullmatch(key), _SHARD.fullmatch(key))
        assert not any(mine + more), f"{key} was removed"

    def _committed(self, chunk: int, retry: int) -> None:
        record = json.loads(self._data(_commit_key(chunk, retry)))
        key = f"_quantbatch/data/{chunk:08d}-{record['attempt']}.parquet"
        assert key in self._objects.found, f"chunk {chunk} is committed and {key} is not there"
        data = self._data(key)
        assert hashlib.sha256(data).hexdigest() == record["sha256"], f"{key} is not what was hashed"
        self.referenced.add(key)
        table = _table(data)
        expected = self.chunks[chunk].rows
        assert table.num_rows == record["rows"] == expected, (
            f"{key}: {table.num_rows} of {expected}"
        )
        self._answers_are_right(chunk, retry, table, record["attempt"])
        assert counts_of(table).items() <= record["counts"].items(), f"{key}: its counts are wrong"

    def _answers_are_right(self, chunk: int, retry: int, table: pa.Table, attempt: str) -> None:
        """Compare the rows of an attempt with what had to become of them."""
        ids = row_layout.row_ids(self.chunks[chunk]).to_pylist()
        seed = self._seed(retry)
        listed = self.lists[retry].get(chunk, []) if retry else range(len(ids))
        base = self._attempt(chunk, self._level(chunk, retry - 1)) if retry else None
        before = base.to_pylist() if base else [None] * len(ids)
        for place, (id, row, old) in enumerate(zip(ids, table.to_pylist(), before, strict=True)):
            status = fate(int(id.rpartition(":")[2]), retry)
            had_one = old is not None and old["status"] != Status.ERROR
            if place not in listed or (old and had_one and status is Status.ERROR):
                assert row == old, f"{id}: not answered again, and now {row}"
                continue
            if self.changed_input and (
                row == old or row["error_type"] == row_layout.UNREADABLE_FILE
            ):
                continue
            assert row["row_id"] == id, f"{row['row_id']} in the place of {id}"
            assert row["text"] == f"text {id}", f"{id}: of another input: {row['text']}"
            assert row["status"] == status, f"{id}: {row['status']} in retry {retry}"
            assert row["attempt"] == attempt, f"{id}: is of attempt {row['attempt']}"
            answer = row["completion"]
            right = (
                answer is None
                if status is Status.ERROR
                else answer.startswith(text_of(id, retry, seed))
            )
            assert right, f"{id}: {answer}"

    def _seed(self, retry: int) -> int:
        """Return the seed that answers of a retry are made with; it may have another."""
        seed: int = json.loads(self._data(JOB))["identity"]["sampling.seed"]
        if retry:
            notes = pq.read_schema(pa.BufferReader(self._data(self._keys(_LIST)[retry - 1])))
            changes = json.loads(notes.metadata[b"quantbatch"])["asked"]["changes"]
            seed = changes.get("sampling.seed", seed)
        return seed

    def _visible(self, shard: int) -> None:
        assert shard < len(self.plan.shards), f"part {shard} is of no plan"
        assert self.state_of(shard) is not None, (
            f"part {shard}: its rows are those of no state of the job"
        )

    def _told_of_a_shard(self, key: str, shard: int) -> None:
        record = json.loads(self._data(key))
        assert record["key"] == _part(shard), f"{key}: {record}"
        assert _part(shard) in self._objects.found, f"{key}: its file is not there"

    def _succeeded(self, document: dict[str, Any]) -> None:
        for file in document["files"]:
            assert file["file"] in self._objects.found, f"_SUCCESS names {file['file']}: not there"
            rows = _table(self._data(file["file"])).num_rows
            assert rows == file["rows"], f"_SUCCESS: {file}, there are {rows}"
        named = sum(file["rows"] for file in document["files"])
        plans = [self._data(key) for key in self._keys(_PLAN)]
        whole = [_plan(*plans[: count + 1]).rows for count in range(len(plans))]
        assert named in whole, f"_SUCCESS tells of {named} rows, the plan has {whole}"

    def told(self, receipt: Receipt, chunk: Chunk) -> None:
        """Look at what a driver is told of a chunk."""
        retry = chunk.again.retry if chunk.again else 0
        table = self._attempt(chunk.id, retry)
        assert table is not None, f"chunk {chunk.id} is not committed, and its driver believes it"
        if not retry:
            said = receipt.counts.to_json().items()
            assert counts_of(table).items() <= said, f"its driver was told others of {chunk.id}"

    # ---- at the end

    def finished(self) -> None:
        """Look at the output of a job whose processes are done, and nothing is left to do."""
        seen = [_table(self._data(key)) for key in self._keys(_PART)]
        assert len(seen) == len(self.plan.shards), f"{len(seen)} of {len(self.plan.shards)} files"
        ids = [id for table in seen for id in table["row_id"].to_pylist()]
        due = [id for chunk in self.chunks for id in row_layout.row_ids(chunk).to_pylist()]
        assert ids == due, (
            f"rows: {Counter(ids) - Counter(due)} too many, {Counter(due) - Counter(ids)} lost"
        )
        newest = len(self.lists) - 1
        for shard in self.plan.shards:
            wanted = self._made_of(shard, newest)
            assert wanted is not None
            assert _table(self._data(_part(shard.id))).equals(wanted), (
                f"part {shard.id} is of retry {self.state_of(shard.id)}, not of {newest}"
            )
        success = json.loads(self._data(SUCCESS))
        counts = counts_of(pa.concat_tables(seen))
        assert counts.items() <= success["counts"].items(), "counts of _SUCCESS are others"
        assert [file["file"] for file in success["files"]] == list(map(_part, range(len(seen))))

    def orphans(self) -> list[str]:
        """Return the data files that no commit record names."""
        return [key for key in self._keys(_DATA) if key not in self.referenced]

    # ---- what is there

    def state_of(self, shard: int) -> int | None:
        """Return the last retry as of which a file that readers see is; None if of no state."""
        seen = _table(self._data(_part(shard)))
        for retry in reversed(range(len(self.lists))):
            made = self._made_of(self.plan.shards[shard], retry)
            if made is not None and seen.equals(made):
                return retry
        return None

    @property
    def planned(self) -> bool:
        """Whether there is a frozen plan."""
        return bool(self._keys(_PLAN))

    @property
    def plan(self) -> Plan:
        """The frozen plan."""
        return _plan(*(self._data(key) for key in self._keys(_PLAN)))

    @property
    def chunks(self) -> list[Chunk]:
        """Its chunks."""
        return _chunks(*(self._data(key) for key in self._keys(_PLAN)))

    @property
    def lists(self) -> list[dict[int, list[int]]]:
        """Rows that each retry answers again, by chunk; the first is the job itself, with none."""
        return [{}, *(_listed(self._data(key)) for key in self._keys(_LIST))]

    def _keys(self, pattern: re.Pattern[str]) -> list[str]:
        return sorted(key for key in self._objects.found if pattern.fullmatch(key))

    def _data(self, key: str) -> bytes:
        return self._objects.found[key]

    def _level(self, chunk: int, retry: int) -> int:
        """Return the last retry of a chunk up to some number."""
        return max((n for n in range(1, retry + 1) if chunk in self.lists[n]), default=0)

    def _attempt(self, chunk: int, retry: int) -> pa.Table | None:
        """Return the rows that a commit record names; None if there is no record."""
        key = _commit_key(chunk, retry)
        if key not in self._objects.found:
            return None
        attempt = json.loads(self._data(key))["attempt"]
        data = f"_quantbatch/data/{chunk:08d}-{attempt}.parquet"
        assert data in self._objects.found, f"chunk {chunk} is committed and {data} is gone"
        return _table(self._data(data))

    def _made_of(self, shard: Shard, retry: int) -> pa.Table | None:
        """Return a shard's rows as of a retry; None if not all of them are committed."""
        chunks = self.plan.chunks_of(shard)
        tables = [self._attempt(chunk, self._level(chunk, retry)) for chunk in chunks]
        return None if None in tables else pa.concat_tables(tables)


def counts_of(table: pa.Table) -> dict[str, int]:
    """Count rows by status, and tokens, as records name them."""
    statuses = Counter(table["status"].to_pylist())
    return {
        **{str(status): statuses[str(status)] for status in Status},
        "prompt_tokens": sum(filter(None, table["prompt_tokens"].to_pylist())),
        "completion_tokens": sum(filter(None, table["completion_tokens"].to_pylist())),
        "unread": table["error_type"].to_pylist().count(row_layout.UNREADABLE_FILE),
    }


def _commit_key(chunk: int, retry: int) -> str:
    folder = f"again/{retry:04d}" if retry else "commits"
    return f"_quantbatch/{folder}/{chunk:08d}.json"


def _part(shard: int) -> str:
    return f"part-{shard:06d}.parquet"
