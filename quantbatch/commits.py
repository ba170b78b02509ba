"""One chunk's and one shard's way to the output: their keys and records, to commit, to publish.

The protocol that these obey is told in `ledger`.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from quantbatch import rows as row_layout
from quantbatch.batchfile import lines
from quantbatch.errors import Refused
from quantbatch.records import Counts, Receipt
from quantbatch.retries import Retries, begun, commits_folder
from quantbatch.storage import PRIVATE, redact, scratch_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from quantbatch.plan import Shard
    from quantbatch.storage import Store

JOB = f"{PRIVATE}/job.json"
ROWS_PER_GROUP = 65_536
"""Rows of one Parquet row group of the output: a chunk's few hundred would make slow files."""

BYTES_PER_GROUP = 64 << 20
"""And fewer where rows are large: a row group is in memory while a shard is published."""


def data_key(chunk: int, attempt: str) -> str:
    """Key of the rows that one attempt computed."""
    return f"{PRIVATE}/data/{chunk:08d}-{attempt}.parquet"


def commit_key(chunk: int, retry: int = 0) -> str:
    """Key of a chunk's commit record, that of the job itself or of a retry."""
    folder = commits_folder(retry) if retry else f"{PRIVATE}/commits"
    return f"{folder}/{chunk:08d}.json"


def shard_key(shard: int) -> str:
    """Key of a published shard's record."""
    return f"{PRIVATE}/shards/{shard:06d}.json"


RecordT = TypeVar("RecordT", "Commit", "Published")


class OutputFormat(NamedTuple):
    """How output files are written."""

    schema: pa.Schema
    """Its metadata carries fingerprint and versions."""
    prefix: str
    compression: str
    lines: bool = False
    """Whether readers see lines (`batchfile.lines`), made from the same committed rows."""


class Commit(NamedTuple):
    """A commit record: the attempt that counts for a chunk."""

    chunk: int
    attempt: str
    rows: int
    sha256: str
    """Of the data file, as hex."""
    counts: Counts
    prompts: str = ""
    """Digest of the prompts of the rows that this attempt answered, see `rows.prompts_digest`."""

    def to_bytes(self) -> bytes:
        """Return the record as JSON."""
        return to_json(self._asdict() | {"counts": self.counts.to_json()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Commit:
        """Read what `to_bytes` wrote."""
        return cls(**_fields_of(cls, data))


class Published(NamedTuple):
    """A shard record: a file that readers see."""

    shard: int
    key: str
    counts: Counts
    retry: int = 0
    """The last retry of which it has rows."""
    digests: Mapping[str, str] = {}
    """SHA-256 of each of its files as it was put, as hex: one of Parquet, one or two of lines.
    None in a record that was written before there were any."""
    size: int = -1
    """Bytes of the file as it was put; -1 in a record that was written before it was noted."""

    def to_bytes(self) -> bytes:
        """Return the record as JSON."""
        return to_json(self._asdict() | {"counts": self.counts.to_json()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Published:
        """Read what `to_bytes` wrote."""
        return cls(**_fields_of(cls, data))


def _fields_of(kind: type[RecordT], data: bytes) -> dict[str, Any]:
    """Return a record's fields; those that a later version added say nothing to this one."""
    found = json.loads(data)
    found["counts"] = Counts(**found["counts"])
    return {name: found[name] for name in kind._fields if name in found}


def commit_chunk(store: Store, chunk: int, answered: pa.Table, target: OutputFormat) -> Receipt:
    """Write the rows of one chunk and make them count, unless another attempt already does.

    Idempotent: called again, also elsewhere at the same time, it ends with one record for the
    chunk.
    """
    facts = row_layout.facts_of(answered)
    assert answered.num_rows == facts.rows, (
        f"chunk {chunk}: {answered.num_rows} of {facts.rows} rows"
    )
    attempt = uuid.uuid4().hex[:12]
    table = row_layout.output(answered, target.schema, target.prefix, attempt)
    counts = row_layout.counts_of(answered)
    again = facts.again
    if again:
        before = _committed_rows(
            store, record_of(Commit, store.read(commit_key(chunk, again.base)))
        )
        table = row_layout.replaced(before, again.rows, table, target.prefix)
        counts = row_layout.counts_of(row_layout.ours(table, target.prefix))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=target.compression)
    data = sink.getvalue().to_pybytes()
    store.put(data_key(chunk, attempt), data)
    sha256 = hashlib.sha256(data).hexdigest()
    ours = Commit(chunk, attempt, table.num_rows, sha256, counts, facts.prompts)
    key = commit_key(chunk, again.retry if again else 0)
    theirs = record_of(Commit, store.claim(key, ours.to_bytes()))
    if theirs.attempt != attempt:
        # The record is never replaced, so nothing will ever refer to our file.
        store.delete(data_key(chunk, attempt))
    return Receipt(
        chunk,
        facts.shard,
        row_layout.counts_of(answered) if again else theirs.counts,
        unreadable=facts.unreadable,
        replica=facts.replica,
    )


def publish_newest(
    store: Store, shard: Shard, chunks: Sequence[int], target: OutputFormat, retries: Retries
) -> Published:
    """Publish a shard, and again as long as a retry went further meanwhile.

    A file that readers see can be replaced by whoever is late: a driver may sleep in its put while
    others finish the job and a whole retry of it, and then put the older rows over the newer ones.
    A store has no put that would refuse this (If-Match is not everywhere). So whoever published a
    shard looks at the retries afterwards, and puts it right before it goes on. The last put of a
    file is then followed by a look that found nothing newer, or by the publishing of a retry that
    was committed after that look; either way the newest rows stay.

    What is left is a driver that is killed between its late put and its look. The next run finds
    the shard's record to be of an older retry, or the file to have another size than the record of
    the newer one says, and publishes the shard again (`Ledger.unpublished`); `verify`, which
    compares digests, finds it also if the sizes are the same.

    Args:
        store: The output's.
        shard: Which.
        chunks: Its chunks.
        target: How files are written.
        retries: As they are known to this driver.
    """
    newest = retries.newest(chunks)
    while True:
        published = publish_shard(store, shard, chunks, target, newest)
        last = retries.open.number if retries.open else published.retry
        if begun(store) == retries.begun and published.retry == last:
            return published
        retries = Retries.load(store)
        before, newest = newest, retries.newest(chunks)
        if newest == before:
            return published


def publish_shard(
    store: Store,
    shard: Shard,
    chunks: Sequence[int],
    target: OutputFormat,
    newest: Mapping[int, int] | None = None,
) -> Published:
    """Put the committed rows of a shard where readers see them, in input order.

    Idempotent: what it writes depends on the commit records only.

    Args:
        store: The output's.
        shard: Which.
        chunks: Its chunks.
        target: How files are written.
        newest: Number of the retry whose attempt counts, of the chunks where one does.
    """
    newest = newest or {}
    keys = [commit_key(chunk, newest.get(chunk, 0)) for chunk in chunks]
    commits = [record_of(Commit, store.read(key)) for key in keys]
    assert sum(commit.rows for commit in commits) == shard.rows, f"rows of shard {shard.id}"
    counts = sum((commit.counts for commit in commits), Counts())
    if target.lines:
        written = _write_lines(store, shard, commits)
    else:
        written = _write_parquet(store, shard, commits, target)
    retry = max((newest.get(chunk, 0) for chunk in chunks), default=0)
    published = Published(shard.id, written.key, counts, retry, written.digests, written.size)
    store.put(shard_key(shard.id), published.to_bytes())
    return published


class _Written(NamedTuple):
    """The files of a shard that were put, the one that has its rows last."""

    key: str
    digests: dict[str, str]
    size: int


def _write_parquet(
    store: Store, shard: Shard, commits: Sequence[Commit], target: OutputFormat
) -> _Written:
    # Checksums, so that a byte that flips on a disk is noticed when it is read.
    options = {"compression": target.compression, "write_page_checksum": True}
    with scratch_file() as path:
        with pq.ParquetWriter(path, target.schema, **options) as writer:
            for group in _grouped(_committed_rows(store, commit) for commit in commits):
                writer.write_table(group, row_group_size=ROWS_PER_GROUP)
        written = pq.read_metadata(path).num_rows
        assert written == shard.rows, f"shard {shard.id}: {written} of {shard.rows} rows written"
        return _put(store, {shard.key: path})


def _put(store: Store, files: Mapping[str, Path]) -> _Written:
    """Put files one after another."""
    digests, key, size = {}, "", 0
    for key, path in files.items():
        with path.open("rb") as file:
            digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        store.put_file(key, path)
    return _Written(key, digests, size)


def _write_lines(store: Store, shard: Shard, commits: Sequence[Commit]) -> _Written:
    """Write a shard's output file, and before it that of its failed requests, if there are any."""
    key = lines.output_key(shard.key)
    created: int = json.loads(store.read(JOB))["created"]
    with scratch_file() as output, scratch_file() as errors:
        with output.open("w", encoding="utf-8") as good, errors.open("w", encoding="utf-8") as bad:
            writer = lines.Lines(shard.id, created, good, bad)
            for commit in commits:
                writer.write(_committed_rows(store, commit))
        written = writer.answered + writer.failed
        assert written == shard.rows, f"shard {shard.id}: {written} of {shard.rows} rows written"
        if writer.failed:
            return _put(store, {lines.errors_key(key): errors, key: output})
        store.delete(lines.errors_key(key))
        return _put(store, {key: output})


def rows_key(store: Store, chunk: int, retry: int = 0) -> str:
    """Return the key of the rows that a chunk's commit record names."""
    return data_key(chunk, record_of(Commit, store.read(commit_key(chunk, retry))).attempt)


def _committed_rows(store: Store, commit: Commit) -> pa.Table:
    try:
        data = store.read(data_key(commit.chunk, commit.attempt))
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != commit.sha256:
        raise Refused(
            f"{redact(store.uri)}/{data_key(commit.chunk, commit.attempt)}: not what was committed",
            f"it is damaged or gone; delete it and {commit_key(commit.chunk)}, and run again",
        )
    return pq.read_table(pa.BufferReader(data))


def record_of(kind: type[RecordT], data: bytes) -> RecordT:
    """Read one of our own records."""
    try:
        return kind.from_bytes(data)
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(
            f"a {kind.__name__} record under {PRIVATE} is damaged: {data[:80]!r}",
            "delete it and run again: its chunk or shard is then done again",
        ) from error


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join consecutive tables until they make a row group."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        many = sum(t.num_rows for t in waiting) >= ROWS_PER_GROUP
        if many or sum(t.nbytes for t in waiting) >= BYTES_PER_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def to_json(document: Mapping[str, Any]) -> bytes:
    """Return a record as its object holds it."""
    return json.dumps(document, sort_keys=True, indent=1).encode()
