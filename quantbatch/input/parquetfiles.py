"""Rows of a Parquet file, read forward.

Parquet can be entered only at the beginning of a row group, and pyarrow writes a million rows in
one. A cursor decodes a row group once, a thousand rows at a time, for all the slices that come in
order; a slice further on is reached by decoding and dropping what lies between, at millions of
rows a second.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from quantbatch.errors import InputError, RowError
from quantbatch.input.schemas import check_count, plain_schema

if TYPE_CHECKING:
    from quantbatch.records import Slice
    from quantbatch.storage import Store

_BATCH_ROWS = 1024
_BATCH_BYTES = 2 << 20
"""Rows that are decoded at once, and fewer where a thousand of them are larger than this: a row
group of 1,000 rows of 100 kB took 216 MiB of a process, and so 70 MiB (measured). A page is always
decompressed whole; pyarrow writes pages of 1 MB, but never of fewer than 1,024 rows."""
_SMALL_GROUP_BYTES = 64 << 20
"""Row groups up to this size, uncompressed, are fetched whole: one request on S3 instead of one for
each column."""
_BUFFER_BYTES = 1 << 20
"""What is fetched at once of each column of a larger row group."""


MAX_FOOTER_BYTES = 1 << 28
"""Largest footer: some 10,000 columns in 100 row groups have 100 MB."""
MAX_ROWS = 1 << 31
"""Most rows of a file. A few bytes of a footer can claim any number, and each would be planned."""
MAX_EXPANSION = 1000
MAX_EXPANDED_BYTES = 1 << 30
"""A column of a row group may not have both this size and this many times its compressed one."""


def parquet_facts(store: Store, name: str, size: int) -> tuple[int, pa.Schema]:
    """Return the number of rows and the columns, from the footer alone.

    Raises:
        InputError: The footer is not one that a writer of Parquet makes of rows.
    """
    with store.open(name) as stream:
        if size > MAX_FOOTER_BYTES:
            _check_footer(stream, name)
        metadata = pq.read_metadata(stream)
        check_count(metadata.num_columns, name)
        _check_sizes(metadata, name)
        return metadata.num_rows, plain_schema(metadata.schema.to_arrow_schema(), name)


def _check_footer(stream: IO[bytes], name: str) -> None:
    stream.seek(-8, 2)
    length = int.from_bytes(stream.read(4), "little")
    if length > MAX_FOOTER_BYTES:
        problem = f"{name}: its footer has {length:,} bytes, more than {MAX_FOOTER_BYTES:,}"
        raise InputError(problem, "write it with fewer columns or larger row groups")
    stream.seek(0)


def _check_sizes(metadata: pq.FileMetaData, name: str) -> None:
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows or sum(rows) > MAX_ROWS:
        problem = (
            f"{name}: its footer claims {metadata.num_rows:,} rows, in groups of {sum(rows):,}"
        )
        raise InputError(problem, "the file is damaged: write it again")
    for group in groups:
        if group.total_byte_size < MAX_EXPANDED_BYTES:
            continue
        for number in range(group.num_columns):
            column = group.column(number)
            full, packed = column.total_uncompressed_size, column.total_compressed_size
            if full > max(MAX_EXPANDED_BYTES, MAX_EXPANSION * packed):
                raise InputError(
                    f"{name}: its column {column.path_in_schema} expands from {packed:,} bytes to"
                    f" {full:,}",
                    "if that is meant, write the file with smaller row groups",
                )


def without_bad_text(table: pa.Table, piece: Slice) -> tuple[pa.Table, dict[int, RowError]]:
    """Make null the rows that have a string which is not UTF-8, with an error for each.

    Parquet's writers and readers don't look, and such a string raises wherever it is used.

    Raises:
        pyarrow.ArrowInvalid: The table is damaged in another way.
    """
    bad: dict[int, str] = {}
    for name in table.column_names:
        try:
            table[name].validate(full=True)
        except pa.ArrowInvalid:
            rows = [row for row in range(table.num_rows) if not _decodes(table[name], row)]
            if not rows:
                raise
            bad = dict.fromkeys(rows, name) | bad
    if not bad:
        return table, {}
    rows_kept = [None if row in bad else row for row in range(table.num_rows)]
    return table.take(pa.array(rows_kept, pa.int64())), {
        row: RowError(
            "bad_text",
            f"row {piece.first_row + row} of {piece.file}: "
            f"the column {name} has a string that is not UTF-8",
        )
        for row, name in sorted(bad.items())
    }


def _decodes(column: pa.ChunkedArray, row: int) -> bool:
    try:
        column[row].as_py()
    except UnicodeDecodeError:
        return False
    return True


def _rows_at_once(rows: int, total_bytes: int) -> int:
    """Return how many rows of a row group to decode at once, from its size uncompressed."""
    return max(1, min(_BATCH_ROWS, rows * _BATCH_BYTES // max(1, total_bytes)))


class ParquetCursor:
    """A Parquet file that is read forward, from slice to slice.

    Args:
        store: The store that it lies in.
        name: Its key.
        columns: Names of the columns to read; those that the file lacks are left out.
    """

    def __init__(self, store: Store, name: str, columns: Sequence[str]) -> None:
        self._stream = store.open(name)
        try:
            self._open(columns)
        except BaseException:
            self._stream.close()
            raise

    def _open(self, columns: Sequence[str]) -> None:
        metadata = pq.read_metadata(self._stream)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._starts = list(itertools.accumulate((g.num_rows for g in groups), initial=0))
        self._batch_rows = [_rows_at_once(g.num_rows, g.total_byte_size) for g in groups]
        small = max((g.total_byte_size for g in groups), default=0) <= _SMALL_GROUP_BYTES
        self._file = pq.ParquetFile(
            self._stream,
            metadata=metadata,
            pre_buffer=small,
            # Where a writer left checksums, a damaged page is known as such.
            page_checksum_verification=True,
            buffer_size=0 if small else _BUFFER_BYTES,
        )
        there = set(metadata.schema.to_arrow_schema().names)
        self._columns = [name for name in columns if name in there]
        self._start_at(0)

    def _start_at(self, group: int) -> None:
        self._row = self._starts[group]
        self._rest: pa.RecordBatch | None = None
        self._batches = self._decode(group)

    def _decode(self, group: int) -> Iterator[pa.RecordBatch]:
        for number in range(group, len(self._starts) - 1):
            yield from self._file.iter_batches(
                self._batch_rows[number],
                row_groups=[number],
                columns=self._columns,
                use_threads=False,
            )

    def group_of(self, row: int) -> tuple[int, int]:
        """Return where the row group of a row begins and ends."""
        group = bisect.bisect_right(self._starts, row) - 1
        return self._starts[group], self._starts[group + 1]

    def take(self, piece: Slice) -> list[pa.RecordBatch]:
        """Return the rows of a slice.

        Raises:
            InputError: The file ends before the slice does.
        """
        group = bisect.bisect_right(self._starts, piece.first_row) - 1
        if not self._starts[group] <= self._row <= piece.first_row:
            self._start_at(group)
        for _ in self._forward(piece.first_row - self._row):
            pass
        batches = list(self._forward(piece.rows))
        if sum(batch.num_rows for batch in batches) < piece.rows:
            raise InputError(f"{piece.file}: has fewer rows than were planned")
        return batches

    def _forward(self, rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the next rows, in parts."""
        while rows > 0:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            if batch is None:
                return
            self._rest = batch.slice(rows) if batch.num_rows > rows else None
            part = batch.slice(0, rows)
            self._row += part.num_rows
            rows -= part.num_rows
            yield part

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._stream.close()
