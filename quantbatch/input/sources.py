"""Input files -> rows: what a file holds (`inspect`), and a slice of it (`read_slice`).

What is wrong with one row is a RowError in `SliceRows.errors`, of the kind `bad_json`, `bad_csv`,
`bad_text` (a string in Parquet that is not UTF-8) or `wrong_type` (a value of JSON that its column
has no room for). What is wrong with a file is an InputError that names it.

A slice is read by a cursor that stays open, one in a process, for the slice that comes next: within
a row group of Parquet, and in compressed text, going on costs nothing and beginning anew costs all
that lies before. Reading a file of n slices in order is then linear, however many processes share
them, and a slice out of order is right all the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from quantbatch.errors import InputError, JobError, RowError, StorageError
from quantbatch.input.formats import Format, codec_of, format_of
from quantbatch.input.jsonlines import Row, infer_schema, parse, read_json
from quantbatch.input.parquetfiles import ParquetCursor, parquet_facts, without_bad_text
from quantbatch.input.requestfiles import REQUESTS, unnamed_requests
from quantbatch.input.schemas import check_count, unify_schemas
from quantbatch.input.textfiles import Mark, TextCursor, TextFile, read_csv

if TYPE_CHECKING:
    from quantbatch.input.listing import InputFile, Partition
    from quantbatch.records import Slice
    from quantbatch.spec import Input
    from quantbatch.storage import Store

__all__ = [
    "FileFacts",
    "Mark",
    "SliceRows",
    "inspect",
    "mark_before",
    "read_near",
    "read_slice",
    "unify_schemas",
]

MARK_STRIDE = 1024
"""Rows between two marks of a text file: reading a slice skips fewer rows than this."""
SAMPLE_ROWS = 1000
"""Rows that the column types of JSON lines are guessed from."""


@dataclass(frozen=True)
class FileFacts:
    """What planning needs to know of a file."""

    rows: int
    schema: pa.Schema
    """The columns that are in the file, with plain types; not those of its folders."""
    marks: tuple[Mark, ...] = ()
    """Places of the rows 0, MARK_STRIDE, 2 * MARK_STRIDE, ... of a text file."""


@dataclass(frozen=True)
class SliceRows:
    """The rows of a slice, in order."""

    table: pa.Table
    errors: dict[int, RowError] = field(default_factory=dict)
    """What is wrong with rows that could not be read, by their number in the slice; they are null
    in every column but those of folders."""


def mark_before(marks: Sequence[Mark], row: int) -> Mark:
    """Return the last mark at or before a row; a file without marks is entered at its beginning."""
    return marks[min(row // MARK_STRIDE, len(marks) - 1)] if marks else Mark(0, 0, 1)


def inspect(store: Store, file: InputFile, input: Input) -> FileFacts:
    """Count a file's rows and name its columns.

    Of Parquet only the footer is read. Text is read once, in bounded memory. All columns of CSV are
    strings: types guessed from a part of each file would differ from file to file, and turn the
    postcode 01067 into a number; an empty field is an empty string. For the types of JSON lines see
    `jsonlines`.

    Raises:
        InputError: The file can't be read, with the reason.
        StorageError: The store failed; the file may be sound.
    """
    if file.size == 0:
        raise InputError(f"{file.name}: is empty (0 bytes)")
    with _explained(file.name, trouble=StorageError):
        kind = format_of(file.name, input)
        if kind == "parquet":
            return FileFacts(*parquet_facts(store, file.name, file.size))
        found = _inspect_text(_text_file(store, file.name, kind, input))
        return replace(found, schema=REQUESTS) if kind == "openai-batch" else found


def _text_file(store: Store, name: str, kind: Format, input: Input) -> TextFile:
    if kind in ("jsonl", "openai-batch"):
        return TextFile(store, name, None)
    if input.delimiter in '"\r\n':
        raise InputError(f"input.delimiter: {input.delimiter!r} can't delimit fields")
    return TextFile(store, name, input.delimiter)


def _inspect_text(file: TextFile) -> FileFacts:
    marks: list[Mark] = []
    sample: list[Row] = []
    row = -1
    with file.open() as stream:
        names, first = file.begin(stream)
        for row, record in enumerate(file.records(stream, first)):
            if row % MARK_STRIDE == 0:
                marks.append(Mark(row, record.byte_offset, record.line))
            if file.delimiter is None and row < SAMPLE_ROWS:
                with contextlib.suppress(RowError):
                    sample.append(parse(record, file))
    if not names:
        check_count(len({key for parsed in sample for key in parsed}), file.name)
    schema = pa.schema([(n, pa.string()) for n in names]) if names else infer_schema(sample)
    return FileFacts(row + 1, schema, tuple(marks))


def read_slice(
    store: Store,
    piece: Slice,
    input: Input,
    schema: pa.Schema,
    partition: Partition = (),
    *,
    columns: Sequence[str] | None = None,
) -> SliceRows:
    """Read a run of rows of one file.

    Args:
        store: The store at the input's root.
        piece: Which rows.
        input: The spec of the input.
        schema: Columns of the whole input, as `unify_schemas` gives them; those that the file lacks
            are null.
        partition: Columns from the file's folders.
        columns: Names of the columns to read, in the order to return them; None is all. What is
            wrong with a value is found only in columns that are read.

    Raises:
        InputError: The file can't be read, or is not as it was planned.
    """
    assert piece.rows > 0, f"an empty slice of {piece.file}"
    with (
        _explained(piece.file, trouble=InputError),
        _cursor(store, piece, input, _names_in_file(schema, partition, columns)) as cursor,
    ):
        _check_version(store, piece)
        return _rows_of(cursor, piece, schema, partition, columns)


def _names_in_file(
    schema: pa.Schema, partition: Partition, columns: Sequence[str] | None
) -> tuple[str, ...]:
    folders = dict(partition)
    return tuple(n for n in (schema.names if columns is None else columns) if n not in folders)


def _rows_of(
    reader: _Reader,
    piece: Slice,
    schema: pa.Schema,
    partition: Partition,
    columns: Sequence[str] | None,
) -> SliceRows:
    """Read a slice's rows, and give them the columns of the file's folders."""
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    folders = dict(partition)
    in_file = pa.schema([column for column in wanted if column.name not in folders])
    found = _read(reader, piece, in_file)
    arrays = [
        found.table[column.name]
        if column.name not in folders
        else pa.repeat(pa.scalar(folders[column.name], column.type), piece.rows)
        for column in wanted
    ]
    return SliceRows(_table(arrays, wanted, piece.rows), found.errors)


def read_near(
    store: Store,
    pieces: Sequence[Slice],
    input: Input,
    schema: pa.Schema,
    partition: Partition = (),
    *,
    rows_each: int,
) -> Iterator[SliceRows]:
    """Yield some rows for each of several slices of one file, from nearby places where reading
    begins cheaply: the beginning of a row group, a marked row, or that of compressed text.

    Args:
        store: The store at the input's root.
        pieces: Slices of one file, in order.
        input: The spec of the input.
        schema: Columns to read.
        partition: Columns from the file's folders.
        rows_each: Rows for each slice; where several begin at one place, there are as many more,
            and fewer where the file has fewer.

    Raises:
        InputError: The file can't be read, or is not as it was planned.
    """
    whole = pieces[0].file
    names = _names_in_file(schema, partition, None)
    with (
        _explained(whole, trouble=InputError),
        contextlib.closing(
            _open_reader(store, whole, format_of(whole, input), input, names)
        ) as reader,
    ):
        _check_version(store, pieces[0])
        by_start: dict[int, list[Slice]] = {}
        for piece in pieces:
            place = _cheap_start(reader, piece)
            by_start.setdefault(place.first_row, []).append(place)
        for places in by_start.values():
            rows = min(max(place.rows for place in places), rows_each * len(places))
            yield _rows_of(reader, replace(places[0], rows=rows), schema, partition, None)


def _cheap_start(reader: _Reader, piece: Slice) -> Slice:
    """Return all rows from where reading begins cheaply, as far as they are known to be there."""
    if isinstance(reader, ParquetCursor):
        start, end = reader.group_of(piece.first_row)
        return replace(piece, first_row=start, rows=end - start)
    end = piece.first_row + piece.rows
    if codec_of(piece.file):
        return replace(piece, first_row=0, rows=end, mark_row=0, byte_offset=0, line=1)
    return replace(piece, first_row=piece.mark_row, rows=end - piece.mark_row)


def _check_version(store: Store, piece: Slice) -> None:
    """Refuse another version of the file than the planned one.

    It is called while the file is open, so that no other version can come in between.
    """
    if not piece.etag:
        return
    now = store.info(piece.file)
    if (now.etag, now.size) != (piece.etag, piece.size):
        raise InputError(
            f"{piece.file}: changed since it was planned",
            "restore the file, or answer the new one with another output.uri",
        )


class _TextReader(NamedTuple):
    """A text file that is being read."""

    file: TextFile
    cursor: TextCursor
    kind: Format

    def close(self) -> None:
        self.cursor.close()


_Reader = ParquetCursor | _TextReader


class _ReaderKey(NamedTuple):
    """What a reader can serve."""

    uri: str
    name: str
    etag: str
    kind: Format
    delimiter: str
    columns: tuple[str, ...]
    """Those that Parquet is read for."""
    process: int
    """A forked process shares its parent's place in an open file, and must not read there."""


_PAUSED: dict[_ReaderKey, _Reader] = {}
"""At most one reader, between two slices."""


def close_readers() -> None:
    """Close the file that is kept open for its next slice, if there is one."""
    while _PAUSED:
        with contextlib.suppress(KeyError):  # another thread was first
            _PAUSED.popitem()[1].close()


@contextlib.contextmanager
def _cursor(
    store: Store, piece: Slice, input: Input, columns: tuple[str, ...]
) -> Iterator[_Reader]:
    """Give the reader that the last slice left, or a new one, and keep it for the next slice."""
    kind = format_of(piece.file, input)
    read = columns if kind == "parquet" else ()
    key = _ReaderKey(store.uri, piece.file, piece.etag, kind, input.delimiter, read, os.getpid())
    # Threads may come here at once: a reader belongs to whoever popped it.
    reader = _PAUSED.pop(key, None)
    for other in list(_PAUSED):
        if left := _PAUSED.pop(other, None):
            left.close()
    if reader is None:
        reader = _open_reader(store, piece.file, kind, input, columns)
    try:
        yield reader
    except BaseException:
        reader.close()
        raise
    if not piece.etag or _PAUSED.setdefault(key, reader) is not reader:
        reader.close()


def _open_reader(
    store: Store, name: str, kind: Format, input: Input, columns: Sequence[str]
) -> _Reader:
    if kind == "parquet":
        return ParquetCursor(store, name, columns)
    file = _text_file(store, name, kind, input)
    return _TextReader(file, TextCursor(file), kind)


def _read(reader: _Reader, piece: Slice, schema: pa.Schema) -> SliceRows:
    """Read the columns of a schema; those that the file lacks are null."""
    if isinstance(reader, ParquetCursor):
        table = _conform(_columns_of(reader.take(piece)), schema, piece.rows)
        return SliceRows(*without_bad_text(table, piece))
    records = reader.cursor.take(piece)
    if reader.file.delimiter is None:
        arrays, errors = read_json(records, schema, reader.file)
        if reader.kind == "openai-batch":
            errors |= unnamed_requests(records, arrays, reader.file, errors)
        return SliceRows(_conform(arrays, schema, piece.rows), errors)
    fields, errors = read_csv(records, reader.cursor.columns, reader.file)
    texts = {n: pa.array(fields[n], pa.string()) for n in schema.names if n in fields}
    return SliceRows(_conform(texts, schema, piece.rows), errors)


def _columns_of(batches: Sequence[pa.RecordBatch]) -> dict[str, pa.ChunkedArray]:
    names = batches[0].schema.names
    return {name: pa.chunked_array([batch[name] for batch in batches]) for name in names}


def _conform(columns: Mapping[str, pa.Array], schema: pa.Schema, rows: int) -> pa.Table:
    arrays = [
        columns[column.name].cast(column.type)
        if column.name in columns
        else pa.nulls(rows, column.type)
        for column in schema
    ]
    return _table(arrays, schema, rows)


def _table(arrays: Sequence[pa.Array], schema: pa.Schema, rows: int) -> pa.Table:
    """Make a table that has its rows even if it has no column, as when no line of a file is
    right.
    """
    if arrays:
        return pa.table(arrays, schema=schema)
    return pa.table({"": pa.nulls(rows)}).select([])


@contextlib.contextmanager
def _explained(file: str, *, trouble: type[JobError]) -> Iterator[None]:
    """Turn what goes wrong with a file into an error that names it.

    Args:
        file: The file.
        trouble: What to raise if the store failed and the file itself may be sound.
    """
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{file}: is not there any more") from error
    except StorageError as error:
        kind = InputError if isinstance(error.__cause__, PermissionError) else trouble
        raise kind(f"{file}: {error.problem}", error.hint) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = InputError if _is_about_content(error) else trouble
        raise kind(f"{file}: can't be read: {_first_line(error)}") from error


def _is_about_content(error: Exception) -> bool:
    # pyarrow raises a bare OSError for a damaged page or stream, and UnicodeDecodeError for a
    # damaged name; an operating system's or a network's error has a number or a class of its own.
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
