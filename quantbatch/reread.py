"""The rows of an input a second time, for `verify`: in order, with the values that its output must
carry.

Written apart from `sources.py`, the plan and the pipeline on purpose, with other means (Python's
csv and json modules on whole files, pyarrow's batches from a file's beginning): what those have
wrong must not be wrong here in the same way. Only which files belong to an input, and which files
of an output readers see, is taken from where it is defined.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quantbatch.input import formats, listing

if TYPE_CHECKING:
    from quantbatch.input.listing import InputFile
    from quantbatch.spec import Input
    from quantbatch.storage import Store

WINDOW = 8192
"""Rows that are read, looked at and compared at once."""
ROW_ID = "\0id"
"""Name of the column of ids in what is read again: no sane column of a user's."""
_BROKEN = ["\udc80"]
"""Stands for a CSV record that can't be read: as one that is not UTF-8."""
_MAX_FIELD_CHARS = 1 << 30


class Unreadable(Exception):  # noqa: N818 - a fact about a file, which `verify` reports
    """A file can't be read, or not to its end."""


class Buffer:
    """Rows of a stream that are looked at before they are taken."""

    def __init__(self, batches: Iterator[pa.Table]) -> None:
        self._batches = batches
        self._held: pa.Table | None = None
        self.taken = 0
        """Rows taken so far."""

    def peek(self) -> pa.Table | None:
        """Return the next rows, at least `WINDOW` unless the stream ends; None at its end."""
        while self._held is None or self._held.num_rows < WINDOW:
            more = next(self._batches, None)
            if more is None:
                break
            self._held = more if self._held is None else pa.concat_tables([self._held, more])
        return self._held if self._held is not None and self._held.num_rows else None

    def take(self, count: int) -> None:
        """Go on by so many of the rows that `peek` returned."""
        assert self._held is not None, "rows are looked at before they are taken"
        self._held = self._held.slice(count)
        self.taken += count


def parquet_batches(store: Store, key: str, columns: list[str] | None) -> Iterator[pa.Table]:
    """Yield the rows of a Parquet file.

    Args:
        store: Where it is.
        key: Its name.
        columns: Names of the columns to read, of which the file may lack some; None is all.

    Raises:
        Unreadable: The file is damaged.
    """
    with open_parquet(store, key) as file:
        names = file.schema_arrow.names
        wanted = names if columns is None else [name for name in columns if name in names]
        for batch in file.iter_batches(WINDOW, columns=wanted):
            yield pa.Table.from_batches([batch])


@contextlib.contextmanager
def open_parquet(store: Store, key: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for reading.

    Raises:
        Unreadable: It is damaged, as far as it is read.
    """
    # Pages have checksums if the writer was asked for them; then a flipped bit is noticed.
    with (
        _damage_noticed(),
        store.open(key) as raw,
        pq.ParquetFile(raw, page_checksum_verification=True) as file,
    ):
        yield file


@contextlib.contextmanager
def _damage_noticed() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, csv.Error) as error:
        raise Unreadable(str(error).strip().partition("\n")[0]) from error


class InputRows:
    """All rows of an input, file after file.

    Args:
        spec: The input.
        kept: Columns that the output keeps, with the types that they have there.
    """

    def __init__(self, spec: Input, kept: pa.Schema) -> None:
        self._spec = spec
        self.kept = kept
        listed = listing.list_input(spec)
        self._store = listed.store
        self.left: dict[str, InputFile] = {file.name: file for file in listed.files}
        """Files that were not begun yet, in the order of their names."""
        self.partition_keys = frozenset(listed.partition_keys)
        self.columns: set[str] = set()
        """Columns of the Parquet and CSV files that were begun."""
        self.unreadable: dict[str, str] = {}
        self.file: InputFile | None = None
        """The file that the next row is in."""
        self._rows: Buffer | None = None
        self._first_ids: dict[str, str | None] = {}

    def peek(self, wanted: str | None) -> pa.Table | None:
        """Return the next rows, all of one file; None at the end of the input.

        Args:
            wanted: Where a file ends, the next one is that whose first row has this id, if there
                is one: files that were added later are answered last, whatever their names.
        """
        while True:
            found = self._peek_in_file()
            if found is not None or not self.left:
                return found
            self.file = self.left.pop(self._next_name(wanted))
            self._rows = Buffer(self._read(self.file))

    def take(self, count: int) -> None:
        """Go on by so many of the rows that `peek` returned."""
        assert self._rows is not None
        self._rows.take(count)

    def is_ahead(self, ids: pa.Array) -> bool:
        """Tell whether any of these ids is among the rows to come."""
        files = list(self.left.values())
        if self.file is not None and self._rows is not None:
            files.insert(0, self.file)
        for file in files:
            skipped = self._rows.taken if self._rows is not None and file is self.file else 0
            for batch in self._ids(file):
                here = batch.slice(min(skipped, len(batch)))
                skipped -= min(skipped, len(batch))
                if pc.any(pc.is_in(here, value_set=ids)).as_py():
                    return True
        return False

    def skip_file(self) -> int:
        """Pass over what is left of the present file; return how many rows that was."""
        skipped = 0
        while (rows := self._peek_in_file()) is not None:
            self.take(rows.num_rows)
            skipped += rows.num_rows
        return skipped

    def _peek_in_file(self) -> pa.Table | None:
        if self._rows is None:
            return None
        assert self.file is not None
        try:
            return self._rows.peek()
        except Unreadable as error:
            self.unreadable[self.file.name] = str(error)
            self._rows = None
            return None

    def _next_name(self, wanted: str | None) -> str:
        names = iter(self.left)
        first = next(names)
        if wanted is None or self._first_id(first) == wanted:
            return first
        if self._spec.key is None:
            named = wanted.rpartition(":")[0]
            return named if named in self.left else first
        return next((name for name in names if self._first_id(name) == wanted), first)

    def _first_id(self, name: str) -> str | None:
        if self._spec.key is None:
            return f"{name}:0"
        if name not in self._first_ids:
            ids = next(self._ids(self.left[name]), None)
            self._first_ids[name] = ids[0].as_py() if ids is not None and len(ids) else None
        return self._first_ids[name]

    def _ids(self, file: InputFile) -> Iterator[pa.Array]:
        try:
            for batch in self._batches(file, pa.schema([])):
                yield batch[ROW_ID].combine_chunks()
        except Unreadable:
            return

    def _read(self, file: InputFile) -> Iterator[pa.Table]:
        return self._batches(file, self.kept)

    def _batches(self, file: InputFile, kept: pa.Schema) -> Iterator[pa.Table]:
        """Yield a file's rows: their ids and kept columns, null where a row can't be read."""
        if file.size == 0:
            raise Unreadable("is empty (0 bytes)")
        before = 0
        for found in self._file_batches(file, kept):
            rows = found.num_rows
            places = pa.array([f"{file.name}:{before + i}" for i in range(rows)], pa.string())
            ids = places
            if self._spec.key is not None:
                key = _column(found, self._spec.key, pa.string(), rows)
                ids = pc.coalesce(key, pa.chunked_array([places]))
            columns = {field.name: _column(found, field.name, field.type, rows) for field in kept}
            yield pa.table({ROW_ID: ids, **columns})
            before += rows

    def _file_batches(self, file: InputFile, kept: pa.Schema) -> Iterator[pa.Table]:
        names = [*kept.names, *([self._spec.key] if self._spec.key else [])]
        match formats.format_of(file.name, self._spec):
            case "parquet":
                return self._parquet(file, list(dict.fromkeys(names)))
            case "csv":
                return self._text(file, self._csv)
            case "jsonl" | "openai-batch":
                types = {field.name: field.type for field in kept}
                if self._spec.key:
                    types.setdefault(self._spec.key, pa.string())
                return self._text(file, lambda file, lines: _json_rows(lines, types))

    def _parquet(self, file: InputFile, names: list[str]) -> Iterator[pa.Table]:
        with open_parquet(self._store, file.name) as opened:
            self.columns |= set(opened.schema_arrow.names)
        yield from parquet_batches(self._store, file.name, names)

    def _text(
        self, file: InputFile, parse: Callable[[InputFile, io.TextIOWrapper], Iterator[pa.Table]]
    ) -> Iterator[pa.Table]:
        codec = formats.COMPRESSIONS.get(posixpath.splitext(file.name.lower())[1])
        with _damage_noticed(), self._store.open(file.name, sequential=True) as raw:
            data: Any = pa.CompressedInputStream(raw, codec) if codec else raw
            stream = io.BufferedReader(data)
            with io.TextIOWrapper(
                stream, "utf-8-sig", errors="surrogateescape", newline="\n"
            ) as lines:
                yield from parse(file, lines)

    def _csv(self, file: InputFile, lines: io.TextIOWrapper) -> Iterator[pa.Table]:
        csv.field_size_limit(_MAX_FIELD_CHARS)
        records = _csv_records(csv.reader(lines, delimiter=self._spec.delimiter))
        names = next(records, None)
        if names is None:
            raise Unreadable("there is no header")
        self.columns |= set(names)
        for rows in _many(records):
            whole = [row if _is_whole(row, len(names)) else [None] * len(names) for row in rows]
            arrays = [pa.array(column, pa.string()) for column in zip(*whole, strict=True)]
            yield pa.table(arrays, names=names)


def _column(table: pa.Table, name: str, data_type: pa.DataType, rows: int) -> pa.ChunkedArray:
    """Return a column as the output has it; a file may lack it, or have a narrower type."""
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(rows, data_type)])
    column = table[name]
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks])
    try:
        return column.cast(data_type)
    except pa.ArrowException as error:
        raise Unreadable(f"{name} is {column.type}, and {data_type} in the output") from error


def _csv_records(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """Yield the records that are not empty lines; one that is broken has no fields."""
    while True:
        try:
            record = next(reader, None)
        except csv.Error:
            record = _BROKEN
        if record is None:
            return
        if record:
            yield record


def _is_whole(row: list[str], fields: int) -> bool:
    return len(row) == fields and not any("\udc80" <= c <= "\udcff" for v in row for c in v)


def _json_rows(lines: io.TextIOWrapper, types: dict[str, pa.DataType]) -> Iterator[pa.Table]:
    for batch in _many(line for line in lines if line.strip(" \t\v\f\r\n")):
        rows = [_json_row(line, types) for line in batch]
        yield pa.table({n: pa.array([row.get(n) for row in rows], t) for n, t in types.items()})


def _json_row(line: str, types: dict[str, pa.DataType]) -> dict[str, Any]:
    """Return the values of a line as the output keeps them; none if the line is broken."""
    try:
        found = json.loads(line)
        json.dumps(found, ensure_ascii=False).encode()
        return {name: _json_value(found.get(name), kind) for name, kind in types.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _json_value(value: Any, kind: pa.DataType) -> Any:  # noqa: ANN401 - any JSON value
    """Return a JSON value as a column of some type keeps it.

    Raises:
        TypeError: It does not keep such a value.
    """
    match value:
        case None:
            return None
        case _ if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        case bool() if pa.types.is_boolean(kind):
            return value
        case int() | float() if pa.types.is_floating(kind) and not isinstance(value, bool):
            return float(value)
        case int() | float() if pa.types.is_integer(kind) and not isinstance(value, bool):
            if value == int(value) and -(2**63) <= value < 2**63:
                return int(value)
        case list() if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return [_json_value(item, kind.value_type) for item in value]
        case dict() if pa.types.is_struct(kind):
            return {f.name: _json_value(value.get(f.name), f.type) for f in kind}
        case _:
            pass
    raise TypeError(f"{value!r} is no {kind}")


def _many(items: Iterator[Any]) -> Iterator[list[Any]]:
    """Yield items by the window."""
    held: list[Any] = []
    for item in items:
        held.append(item)
        if len(held) == WINDOW:
            yield held
            held = []
    if held:
        yield held
