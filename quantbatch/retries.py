"""Which rows of a finished job are answered again: a part of the records beside an output.

    OUT/_quantbatch/retries/<n>.parquet        claimed: the frozen list of rows, and what with
    OUT/_quantbatch/again/<n>/<chunk>.json     claimed: the attempt that counts from then on
    OUT/_quantbatch/retries/<n>.done.json      put last: all of the above is published

A retry is a further attempt of some chunks. Its data files hold whole chunks, with the rows of the
attempt before it where the list does not name them, so a shard is published from the newest attempt
of each of its chunks, as ever. Retries follow one another: the next list is claimed when the one
before it is done, and so the attempt that a chunk had before is the same for everybody.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from quantbatch.errors import Refused
from quantbatch.records import Again
from quantbatch.storage import PRIVATE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from quantbatch.storage import Store

FOLDER = f"{PRIVATE}/retries"
_ROWS = pa.schema([("chunk", pa.int32()), ("row", pa.int32())])
_NAME = re.compile(r"(\d{4})(\.parquet|\.done\.json)")


def list_key(number: int) -> str:
    """Key of a retry's frozen list."""
    return f"{FOLDER}/{number:04d}.parquet"


def done_key(number: int) -> str:
    """Key of the record that ends a retry."""
    return f"{FOLDER}/{number:04d}.done.json"


def commits_folder(number: int) -> str:
    """Folder of the commit records of a retry."""
    return f"{PRIVATE}/again/{number:04d}"


@dataclass(frozen=True)
class Retry:
    """A frozen list of rows that are answered again."""

    number: int
    """Counted from 1: 0 stands for the job itself."""
    asked: Mapping[str, Any]
    """`statuses`, and `changes`: the fields of the spec that differ, with their values."""
    rows: pa.Table
    """Chunk and row within it, in order."""
    done: bool = False

    @cached_property
    def by_chunk(self) -> dict[int, list[int]]:
        """The rows of each chunk that has any."""
        found: dict[int, list[int]] = {}
        for batch in self.rows.to_batches():
            columns = (batch["chunk"].to_pylist(), batch["row"].to_pylist())
            for chunk, row in zip(*columns, strict=True):
                found.setdefault(chunk, []).append(row)
        return found

    def to_bytes(self, **notes: Any) -> bytes:  # noqa: ANN401 - any JSON value
        """Return the list as one Parquet object, with notes for whoever looks into it."""
        sink = pa.BufferOutputStream()
        facts = json.dumps({"asked": self.asked, **notes})
        table = self.rows.replace_schema_metadata({"quantbatch": facts})
        pq.write_table(table, sink, compression="zstd")
        data: bytes = sink.getvalue().to_pybytes()
        return data

    @classmethod
    def from_bytes(cls, number: int, data: bytes, *, done: bool = False) -> Retry:
        """Read what `to_bytes` wrote.

        Raises:
            Refused: It is damaged.
        """
        try:
            table = pq.read_table(pa.BufferReader(data))
            asked = json.loads(table.schema.metadata[b"quantbatch"])["asked"]
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            raise Refused(
                f"{list_key(number)}: damaged: {error}",
                "restore it from a copy: it says which rows were answered again",
            ) from error
        return cls(number, asked, table.replace_schema_metadata(None), done)


def begun(store: Store) -> dict[int, bool]:
    """Return the numbers of the retries on an output, in order, and whether each is done."""
    names = (info.key.removeprefix(f"{FOLDER}/") for info in store.list(FOLDER))
    found = [match for name in names if (match := _NAME.fullmatch(name))]
    done = {int(match[1]) for match in found if match[2] == ".done.json"}
    numbers = sorted(int(match[1]) for match in found if match[2] == ".parquet")
    return {number: number in done for number in numbers}


def list_of(rows: Iterable[tuple[int, int]]) -> pa.Table:
    """Return pairs of chunk and row as a retry keeps them."""
    pairs = list(rows)
    columns = [pa.array([pair[place] for pair in pairs], pa.int32()) for place in (0, 1)]
    return pa.table(columns, schema=_ROWS)


@dataclass
class Retries:
    """All retries of a job, the oldest first."""

    known: list[Retry] = field(default_factory=list)
    committed: set[int] = field(default_factory=set)
    """Chunks of the last one, if it is not done, that have its commit record."""

    @classmethod
    def load(cls, store: Store) -> Retries:
        """Read the retries of the job on an output."""
        retries = cls(
            [
                Retry.from_bytes(number, store.read(list_key(number)), done=done)
                for number, done in begun(store).items()
            ]
        )
        if retries.open:
            keys = store.list(commits_folder(retries.open.number))
            retries.committed = {int(info.key.rpartition("/")[2][:-5]) for info in keys}
        return retries

    @property
    def begun(self) -> dict[int, bool]:
        """What `begun` returned when these were read."""
        return {retry.number: retry.done for retry in self.known}

    def with_done(self, number: int) -> Retries:
        """Return these with one of them done, which leaves none open."""
        return Retries([replace(r, done=r.done or r.number == number) for r in self.known])

    @property
    def open(self) -> Retry | None:
        """The last one, if it is not done."""
        return self.known[-1] if self.known and not self.known[-1].done else None

    def newest(self, chunks: Iterable[int]) -> dict[int, int]:
        """Return the number of the retry whose attempt counts for each chunk, where one does.

        Those of the retry that is not done count when all of its chunks among the given ones are
        committed: a shard is published with all of its rows that are answered again, or with none.
        """
        chunks, count = list(chunks), len(self.known)
        if self.open and not self.committed.issuperset(self.open.by_chunk.keys() & set(chunks)):
            count -= 1
        found = {chunk: self._base(chunk, count) for chunk in chunks}
        return {chunk: number for chunk, number in found.items() if number}

    def is_behind(self, chunks: Sequence[int], number: int) -> bool:
        """Tell whether a retry that is done has rows of chunks, and comes after a given one."""
        later = (each for each in self.known if each.done and each.number > number)
        return any(chunk in each.by_chunk for each in later for chunk in chunks)

    def again(self, retry: Retry, chunk: int) -> Again:
        """Return what a chunk's further attempt has to know."""
        base = self._base(chunk, self.known.index(retry))
        return Again(retry.number, base, tuple(retry.by_chunk[chunk]))

    def _base(self, chunk: int, before: int) -> int:
        """Return the last retry of a chunk among the first `before` ones; 0 if there is none."""
        tried = (each.number for each in reversed(self.known[:before]) if chunk in each.by_chunk)
        return next(tried, 0)
