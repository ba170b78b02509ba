"""Input files -> a frozen list of shards and chunks.

A shard is a run of consecutive input (several small files, or a slice of a large one) that becomes
one output file; a chunk is a run of rows of one shard. Both are listed once, when a job is first
planned, and frozen beside the output with the size and version of each file: a resumed job never
scans its input again, and notices input that changed or came later. New files become a further
generation of the same plan, with shards and chunks numbered on from the last.

A frozen generation is one Parquet object: a row for each slice of each chunk, and in its metadata
the schema and the files that have no rows or could not be read. 100 million rows in 1,000 files are
98,000 slices, 2 MB as an object and about 10 MB in memory.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quantbatch.errors import InputError
from quantbatch.input import listing, sources
from quantbatch.records import Chunk, Slice

if TYPE_CHECKING:
    from quantbatch.input.listing import InputFile, Listing
    from quantbatch.input.sources import FileFacts
    from quantbatch.spec import JobSpec

MIN_ROWS_PER_CHUNK = 64
MAX_ROWS_PER_CHUNK = 2048
MAX_CHUNKS = 200_000
"""Beyond this the chunks of a job grow: listing commits on S3 takes about a second per 5,000 of
them."""
CHUNKS_WANTED = 64
"""A small job has about this many chunks, so that several replicas share it evenly."""
FOOTERS_AT_ONCE = 16
"""Threads that read footers: 1,000 of them on S3 took 11.5 s with 16 (measured)."""

_SLICES = pa.schema(
    [
        ("shard", pa.int32()),
        ("chunk", pa.int32()),
        ("file", pa.string()),
        ("first_row", pa.int64()),
        ("rows", pa.int64()),
        ("mark_row", pa.int64()),
        ("byte_offset", pa.int64()),
        ("line", pa.int64()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("partition", pa.string()),
    ]
)


class Shard(NamedTuple):
    """A run of input that becomes one output file."""

    id: int
    partition: str
    """Hive folders of its rows, such as `day=2026-01-01`; the output keeps them."""
    first_chunk: int
    chunks: int
    rows: int

    @property
    def key(self) -> str:
        """Key of its output file."""
        name = f"part-{self.id:06d}.parquet"
        return f"{self.partition}/{name}" if self.partition else name


class KnownFile(NamedTuple):
    """A file as it was planned."""

    size: int
    etag: str
    problem: str = ""
    """Why the file could not be read; empty if it could."""


@dataclass(frozen=True)
class Plan:
    """Every chunk of a job, in input order."""

    root: str
    schema: pa.Schema
    """Columns of the input, those of Hive partitions included."""
    rows_per_chunk: int
    slices: pa.Table
    """One row for each slice of each chunk."""
    without_rows: Mapping[str, KnownFile]
    """Files that are empty or could not be read."""

    @cached_property
    def rows(self) -> int:
        """Rows of all chunks."""
        return pc.sum(self.slices["rows"]).as_py() or 0

    @cached_property
    def chunks(self) -> int:
        """Number of chunks; they are numbered from 0."""
        return (pc.max(self.slices["chunk"]).as_py() + 1) if self.slices.num_rows else 0

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards; they are numbered from 0."""
        grouped = (
            self.slices.group_by("shard", use_threads=False)
            .aggregate(
                [("partition", "first"), ("chunk", "min"), ("chunk", "max"), ("rows", "sum")]
            )
            .sort_by("shard")
        )
        return tuple(
            Shard(
                r["shard"],
                r["partition_first"],
                r["chunk_min"],
                r["chunk_max"] - r["chunk_min"] + 1,
                r["rows_sum"],
            )
            for r in grouped.to_pylist()
        )

    @cached_property
    def known_files(self) -> Mapping[str, KnownFile]:
        """Every file of the plan, by its name relative to the root."""
        grouped = self.slices.group_by("file").aggregate([("size", "min"), ("etag", "min")])
        planned = {r["file"]: KnownFile(r["size_min"], r["etag_min"]) for r in grouped.to_pylist()}
        return planned | dict(self.without_rows)

    @property
    def partition_keys(self) -> tuple[str, ...]:
        """Names of the columns that come from folders."""
        folders = self.slices["partition"].unique().to_pylist()
        pairs = (pair for folder in folders for pair in listing.partition_of(f"{folder}/file"))
        return tuple(dict.fromkeys(key for key, _ in pairs))

    @property
    def unreadable(self) -> dict[str, str]:
        """Files that could not be read, with the reason."""
        return {name: file.problem for name, file in self.without_rows.items() if file.problem}

    def chunks_of(self, shard: Shard) -> range:
        """Return the numbers of a shard's chunks."""
        return range(shard.first_chunk, shard.first_chunk + shard.chunks)

    def each_chunk(self) -> Iterator[Chunk]:
        """Yield all chunks in input order, a few at a time in memory."""
        pieces: list[Slice] = []
        at = (-1, -1)
        for batch in self.slices.to_batches(max_chunksize=8192):
            for row in batch.to_pylist():
                here = (row.pop("chunk"), row.pop("shard"))
                if here != at and pieces:
                    yield Chunk(*at, tuple(pieces))
                    pieces = []
                at = here
                pieces.append(Slice(**row))
        if pieces:
            yield Chunk(*at, tuple(pieces))

    def followed_by(self, later: Plan) -> Plan:
        """Return this plan with a later generation after it.

        A file that could not be read when this plan was made may have rows in the later one.
        """
        mended = later.known_files.keys()
        still = {name: file for name, file in self.without_rows.items() if name not in mended}
        return Plan(
            self.root,
            self.schema,
            self.rows_per_chunk,
            pa.concat_tables([self.slices, later.slices]),
            still | dict(later.without_rows),
        )

    def to_bytes(self) -> bytes:
        """Return the plan as one Parquet object."""
        facts = {
            "root": self.root,
            "rows_per_chunk": self.rows_per_chunk,
            "schema": base64.b64encode(self.schema.serialize()).decode(),
            "without_rows": self.without_rows,
        }
        sink = pa.BufferOutputStream()
        table = self.slices.replace_schema_metadata({"quantbatch": json.dumps(facts)})
        pq.write_table(table, sink, compression="zstd")
        data: bytes = sink.getvalue().to_pybytes()
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Read what `to_bytes` wrote."""
        table = pq.read_table(pa.BufferReader(data))
        facts = json.loads(table.schema.metadata[b"quantbatch"])
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(facts["schema"])))
        without_rows = {name: KnownFile(*file) for name, file in facts["without_rows"].items()}
        slices = table.replace_schema_metadata(None).cast(_SLICES)
        return cls(facts["root"], schema, facts["rows_per_chunk"], slices, without_rows)


def make_plan(spec: JobSpec, listing: Listing, *, after: Plan | None = None) -> Plan:
    """Read the footers of the listed files and divide their rows.

    Args:
        spec: The job.
        listing: The files to plan.
        after: The plan that this one continues: its numbers go on, and its schema holds.

    Raises:
        InputError: There are no rows at all, or the files' columns don't go together.
    """
    facts, without_rows = _inspect(spec, listing)
    readable = {file: found for file, found in facts.items() if found.rows}
    found_schemas = [(file, found.schema) for file, found in (readable or facts).items()]
    schema = _frozen_schema(found_schemas, after) if after else sources.unify_schemas(found_schemas)
    rows = sum(found.rows for found in readable.values())
    per_chunk = after.rows_per_chunk if after else _rows_per_chunk(spec, rows)
    shards = _shards(readable, spec.output.rows_per_part)
    first = (len(after.shards), after.chunks) if after else (0, 0)
    slices = _slices(shards, readable, per_chunk, first)
    return Plan(listing.store.uri, schema, per_chunk, slices, without_rows)


def _frozen_schema(files: Sequence[tuple[InputFile, pa.Schema]], first: Plan) -> pa.Schema:
    """Return the frozen schema, if later files go with it: an output has one schema for ever."""
    for file, columns in files:
        for column in sources.unify_schemas([(file, columns)]):
            index = first.schema.get_field_index(column.name)
            expected = first.schema.field(index).type if index >= 0 else "absent"
            if index < 0 or not _fits(column.type, expected):
                raise InputError(
                    f"{file.name}: its column {column.name!r} is {column.type}, and in the input "
                    f"as it was first planned it is {expected}",
                    "leave the file out, or answer it with another output.uri",
                )
        if {key for key, _ in file.partition} != set(first.partition_keys):
            raise InputError(
                f"{file.name}: its key=value folders differ from those of the files planned first",
                "leave the file out, or answer it with another output.uri",
            )
    return first.schema


def _fits(later: pa.DataType, first: pa.DataType) -> bool:
    """Tell whether every value of a later file's type is one of the frozen type."""
    pair = [pa.schema([("x", first)]), pa.schema([("x", later)])]
    try:
        return bool(pa.unify_schemas(pair, promote_options="permissive").field("x").type == first)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return False


def _inspect(
    spec: JobSpec, listing: Listing
) -> tuple[dict[InputFile, FileFacts], dict[str, KnownFile]]:
    facts: dict[InputFile, FileFacts] = {}
    without_rows: dict[str, KnownFile] = {}

    def look(file: InputFile) -> FileFacts | InputError:
        try:
            return sources.inspect(listing.store, file, spec.input)
        except InputError as error:
            return error

    with ThreadPoolExecutor(FOOTERS_AT_ONCE, "footers") as pool:
        for file, found in zip(listing.files, pool.map(look, listing.files), strict=True):
            if isinstance(found, InputError):
                without_rows[file.name] = KnownFile(file.size, file.etag, found.problem)
                continue
            facts[file] = found
            if found.rows == 0:
                without_rows[file.name] = KnownFile(file.size, file.etag)
    return facts, without_rows


def _rows_per_chunk(spec: JobSpec, rows: int) -> int:
    if spec.input.rows_per_chunk != "auto":
        return spec.input.rows_per_chunk
    wanted = min(max(rows // CHUNKS_WANTED, MIN_ROWS_PER_CHUNK), MAX_ROWS_PER_CHUNK)
    return max(wanted, -(-rows // MAX_CHUNKS))


class _Span(NamedTuple):
    """Consecutive rows of one file that belong to one shard."""

    file: InputFile
    first_row: int
    rows: int


def _shards(facts: Mapping[InputFile, FileFacts], rows_per_part: int) -> Iterator[list[_Span]]:
    """Divide the files into runs of at most `rows_per_part` rows within one partition."""
    spans: list[_Span] = []
    room = rows_per_part
    for file, found in facts.items():
        if spans and spans[-1].file.partition != file.partition:
            yield spans
            spans, room = [], rows_per_part
        at = 0
        while at < found.rows:
            if room == 0:
                yield spans
                spans, room = [], rows_per_part
            taken = min(room, found.rows - at)
            spans.append(_Span(file, at, taken))
            at, room = at + taken, room - taken
    if spans:
        yield spans


def _slices(
    shards: Iterator[list[_Span]],
    facts: Mapping[InputFile, FileFacts],
    per_chunk: int,
    first: tuple[int, int],
) -> pa.Table:
    columns: dict[str, list[object]] = {name: [] for name in _SLICES.names}
    shard, chunk = first
    for spans in shards:
        for chunk, span in _chunked(spans, per_chunk, chunk):  # noqa: B020 - it counts on
            file = span.file
            mark = sources.mark_before(facts[file].marks, span.first_row)
            row = (
                shard,
                chunk,
                file.name,
                span.first_row,
                span.rows,
                mark.row,
                mark.byte_offset,
                mark.line,
                file.size,
                file.etag,
                file.folder,
            )
            for name, value in zip(_SLICES.names, row, strict=True):
                columns[name].append(value)
        shard, chunk = shard + 1, chunk + 1
    return pa.table(columns, schema=_SLICES)


def _chunked(spans: Sequence[_Span], per_chunk: int, chunk: int) -> Iterator[tuple[int, _Span]]:
    """Cut the spans of one shard at the ends of its chunks."""
    room = per_chunk
    for span in spans:
        at = 0
        while at < span.rows:
            if room == 0:
                chunk, room = chunk + 1, per_chunk
            taken = min(room, span.rows - at)
            yield chunk, _Span(span.file, span.first_row + at, taken)
            at, room = at + taken, room - taken
