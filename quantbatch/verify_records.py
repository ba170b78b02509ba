"""The files that readers see against what was committed, for `verify`.

The two ends of a job can't tell whether an answer is the one that a replica gave. The records in
between can: a commit record has the digest of the rows of the attempt that counts, and the record
of a published file that of the file as it was put. So the bytes of each file are read once more and
their digest is compared. Where it differs, or none was noted, the rows are compared with those of
the committed attempts, which must have the digests of their commit records: which row is another
one is worth knowing. (Rival drivers of different versions may write the same rows in other bytes,
and the one's record beside the other's file is told as a difference too.) Such a file is written
again by the next run if its record under `_quantbatch/shards` is removed.

Only the forms of the records are taken from where they are defined; what follows from them is
written out here again.
"""

from __future__ import annotations

import functools
import hashlib
import io
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from quantbatch.commits import Commit, Published, commit_key, data_key, record_of, shard_key
from quantbatch.errors import Refused
from quantbatch.plan import Plan
from quantbatch.reread import Buffer, Unreadable
from quantbatch.reread_lines import errors_beside, is_lines, part_batches
from quantbatch.retries import Retries
from quantbatch.storage import PRIVATE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantbatch.storage import Store
    from quantbatch.verify_problems import Problems
    from quantbatch.verify_rows import Part

_BLOCK_BYTES = 8 << 20
_OTHER_BYTES = "files that are not as they were published"
_OTHER_ROWS = "rows that are not those of the committed attempt"


class Committed:
    """Compares files with what the records say of them.

    Args:
        store: The output's.
        problems: Takes what is wrong.
        prefix: That of the columns that the job adds.
    """

    def __init__(self, store: Store, problems: Problems, prefix: str) -> None:
        self._store = store
        self._problems = problems
        self._row_id = f"{prefix}row_id"

    def check(self, part: Part) -> bool:
        """Tell whether a file, whose form is right, is as it was committed; note it if not."""
        record = self._record(part)
        if record is not None:
            self._note_if_stale(part, record)
            if record.digests and self._are_the_bytes(part, record):
                return True
        if self._retries.open and not (odd := self._odd_rows(part, None)):
            # A driver may have ended after it put the file and before it put the file's record.
            return odd == []
        odd = self._odd_rows(part, record.retry if record else None)
        if record and record.digests:
            self._problems.note(_OTHER_BYTES, part.key)
        for id in odd or ():
            self._problems.note(_OTHER_ROWS, id)
        return odd == [] and not (record and record.digests)

    # ---- bytes

    def _record(self, part: Part) -> Published | None:
        try:
            return record_of(Published, self._store.read(shard_key(part.number)))
        except (FileNotFoundError, Refused):
            return None  # not published yet; that it is damaged is noted where all are read

    def _are_the_bytes(self, part: Part, record: Published) -> bool:
        keys = [part.key, *([errors_beside(part.key)] if is_lines(part.key) else [])]
        return {k: d for k in keys if (d := self._digest(k))} == dict(record.digests)

    def _digest(self, key: str) -> str | None:
        digest = hashlib.sha256()
        try:
            with self._store.open(key, sequential=True) as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
        except FileNotFoundError:
            return None
        return digest.hexdigest()

    # ---- rows

    def _note_if_stale(self, part: Part, record: Published) -> None:
        """Note a file without the rows that a later retry, which is done, answered again."""
        chunks = self._chunks(part) if self._retries.known else None
        for retry in reversed(self._retries.known if chunks else ()):
            later = retry.done and retry.number > record.retry
            if later and any(chunk in retry.by_chunk for chunk in chunks or ()):
                said = f"{part.key}: retry {retry.number} answered rows of it again"
                self._problems.note("files of an older retry", said)
                return

    def _odd_rows(self, part: Part, retry: int | None) -> list[str] | None:
        """Return the ids of the rows of a file that are not those of an attempt that counts.

        Args:
            part: The file.
            retry: The last retry of which it has rows; None if that is not known.
        """
        chunks = self._chunks(part)
        if chunks is None or is_lines(part.key):
            return None
        seen = Buffer(part_batches(self._store, part.key, None))
        odd: list[str] = []
        for chunk in chunks:
            committed = self._rows_of(chunk, retry)
            if committed is None:
                return None
            odd += _odd_rows(committed, seen, self._row_id)
        return odd

    def _rows_of(self, chunk: int, retry: int | None) -> pa.Table | None:
        """Return the rows that count for a chunk; None, having noted why, if they can't be had."""
        number = self._retry_of(chunk, retry)
        key = commit_key(chunk, number)
        try:
            commit = record_of(Commit, self._store.read(key))
            key = data_key(chunk, commit.attempt)
            data = self._store.read(key)
        except FileNotFoundError:
            self._problems.note("attempts that are gone", key)
            return None
        except Refused as error:
            self._problems.note("records that are damaged", f"{key}: {error.problem}")
            return None
        if hashlib.sha256(data).hexdigest() != commit.sha256:
            self._problems.note("attempts that are not what was committed", key)
            return None
        return pq.read_table(io.BytesIO(data))

    def _retry_of(self, chunk: int, last: int | None) -> int:
        if last is None:
            return self._retries.newest([chunk]).get(chunk, 0)
        numbers = (r.number for r in self._retries.known if chunk in r.by_chunk)
        return max((number for number in numbers if number <= last), default=0)

    # ---- records of the whole job

    def _chunks(self, part: Part) -> range | None:
        """Return the chunks of a file's shard; None if the plan has no such shard."""
        if self._plan is None or part.number >= len(self._plan.shards):
            return None
        return self._plan.chunks_of(self._plan.shards[part.number])

    @cached_property
    def _plan(self) -> Plan | None:
        key = f"{PRIVATE}/plan"
        plans = []
        try:
            for key in sorted(info.key for info in self._store.list(f"{PRIVATE}/plan")):
                plans.append(Plan.from_bytes(self._store.read(key)))
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            self._problems.note("records that are damaged", f"{key}: {error}")
        return functools.reduce(Plan.followed_by, plans) if plans else None

    @cached_property
    def _retries(self) -> Retries:
        try:
            return Retries.load(self._store)
        except Refused as error:
            self._problems.note("records that are damaged", error.problem)
            return Retries()


def _odd_rows(committed: pa.Table, seen: Buffer, row_id: str) -> Iterator[str]:
    """Yield the ids of the rows of a chunk that are others than those that come next in a file."""
    while committed.num_rows:
        found = seen.peek()
        if found is None:
            raise Unreadable("ends before its rows do")
        count = min(found.num_rows, committed.num_rows)
        here, there = found.slice(0, count), committed.slice(0, count)
        if not here.equals(there):
            pairs = zip(here.to_pylist(), there.to_pylist(), strict=True)
            # As text, because NaN is not equal to itself.
            yield from (str(b[row_id]) for a, b in pairs if a != b and repr(a) != repr(b))
        seen.take(count)
        committed = committed.slice(count)
