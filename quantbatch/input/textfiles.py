r"""Text files as records: where each row of a JSON lines or CSV file begins and ends.

A row of JSON lines is a line that is not blank. A row of CSV is a record of RFC 4180, which may
hold line breaks within quotes; the first record is the header. Where a record ends is found as
Python's csv module finds it: a quote opens a quoted field only at the field's beginning, so that
`5" pipe` is text and not the start of a field that swallows the rest of the file.

Lines end with \n or \r\n. Nothing but one record, and one buffer, is ever in memory.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pyarrow as pa
from typing_extensions import override

from quantbatch.errors import InputError, RowError
from quantbatch.input.formats import codec_of
from quantbatch.input.schemas import check_names

if TYPE_CHECKING:
    from quantbatch.records import Slice
    from quantbatch.storage import Store

MAX_RECORD_BYTES = 1 << 28
"""Longest record; a longer one is a file of another kind, or a quote that is never closed."""
MAX_EXPANSION = 200
MAX_EXPANDED_BYTES = 1 << 28
"""Compressed text may not expand beyond both. That of people expands 3 to 10 times, records of a
machine up to some 50, a file of one letter 1,030 with gzip."""
_BUFFER_BYTES = 1 << 20
_BYTE_ORDER_MARK = codecs.BOM_UTF8
_OTHER_KINDS = {
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "compressed with gzip, but its name does not end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd, but its name does not end in .zst",
    codecs.BOM_UTF16_LE: "UTF-16; only UTF-8 can be read",
    codecs.BOM_UTF16_BE: "UTF-16; only UTF-8 can be read",
}

# The module refuses fields over 128 KiB unless told otherwise, and a prompt may be one.
csv.field_size_limit(MAX_RECORD_BYTES)


class Mark(NamedTuple):
    """Where a row begins in a text file."""

    row: int
    byte_offset: int
    """In the text after decompression."""
    line: int
    """From 1."""


class Record(NamedTuple):
    """One row as it stands in the file."""

    byte_offset: int
    line: int
    data: bytes
    """With its line break."""

    @property
    def end(self) -> int:
        """Offset of the byte after it."""
        return self.byte_offset + len(self.data)


class _Expanded(io.RawIOBase):
    """Decompressed text, of which there is no end if somebody means harm: a file of 10 MB can hold
    10 GB (gzip) and more (zstd).
    """

    def __init__(self, stream: pa.CompressedInputStream, name: str, packed: int) -> None:
        super().__init__()
        self._stream, self._name, self._packed = stream, name, packed
        self._left = max(MAX_EXPANDED_BYTES, MAX_EXPANSION * packed)

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        data: bytes = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise InputError(
                f"{self._name}: its {self._packed:,} bytes expand to more than {MAX_EXPANSION}"
                f" times as many, and {MAX_EXPANDED_BYTES:,}",
                "if that is meant, unpack the file",
            )
        buffer[: len(data)] = data
        return len(data)

    @override
    def close(self) -> None:
        self._stream.close()
        super().close()


@dataclass(frozen=True)
class TextFile:
    """A file of JSON lines or CSV."""

    store: Store
    name: str
    delimiter: str | None
    """Between the fields of CSV; None for JSON lines."""

    def where(self, record: Record) -> str:
        """Name a record for a person."""
        return f"line {record.line} of {self.name}"

    def open(self) -> io.BufferedReader:
        """Open the file's text for reading, decompressed."""
        raw = self.store.open(self.name, sequential=True)
        codec = codec_of(self.name)
        if codec:
            packed = raw.seek(0, os.SEEK_END)
            raw.seek(0)
            opened = _Expanded(pa.CompressedInputStream(raw, codec), self.name, packed)
            return io.BufferedReader(opened, _BUFFER_BYTES)
        return io.BufferedReader(cast("io.RawIOBase", raw), _BUFFER_BYTES)

    def begin(self, stream: io.BufferedReader) -> tuple[list[str], Mark]:
        """Read up to the first row.

        Args:
            stream: The file, just opened.

        Returns:
            The names of the columns (none for JSON lines) and the place of the first row.

        Raises:
            InputError: It is no text, or a CSV header lacks something.
        """
        start = stream.peek(4)
        for magic, kind in _OTHER_KINDS.items():
            if start.startswith(magic):
                raise InputError(f"{self.name}: is {kind}")
        if self.delimiter is None:
            return [], Mark(0, 0, 1)
        header = next(self.records(stream, Mark(0, 0, 1)), None)
        if header is None:
            raise InputError(f"{self.name}: has no header line")
        try:
            names = split_fields(header, self)
        except RowError as error:
            raise InputError(f"{self.name}: the header: {error.message}") from error
        self._check_header(names)
        return names, Mark(0, header.end, header.line + header.data.count(b"\n"))

    def _check_header(self, names: list[str]) -> None:
        check_names(names, self.name)
        if "" in names:
            raise InputError(
                f"{self.name}: column {names.index('') + 1} has no name in the header",
                "pandas writes such a column for its index: write the file with index=False",
            )

    def records(self, stream: io.BufferedReader, start: Mark) -> Iterator[Record]:
        """Yield the records from a place on.

        Args:
            stream: The file, opened, and at that place.
            start: The place.
        """
        lines = self._lines(stream, start)
        if self.delimiter is None:
            return (line for line in lines if not line.data.isspace())
        return self._csv_records(lines)

    def _lines(self, stream: io.BufferedReader, start: Mark) -> Iterator[Record]:
        _, offset, number = start
        for data in iter(functools.partial(stream.readline, MAX_RECORD_BYTES + 1), b""):
            if len(data) > MAX_RECORD_BYTES:
                raise self._too_long(number)
            if offset == 0 and data.startswith(_BYTE_ORDER_MARK):
                offset, data = len(_BYTE_ORDER_MARK), data[len(_BYTE_ORDER_MARK) :]
            yield Record(offset, number, data)
            offset, number = offset + len(data), number + 1

    def _csv_records(self, lines: Iterator[Record]) -> Iterator[Record]:
        assert self.delimiter is not None, "JSON lines have no quoted fields"
        for first in lines:
            if _ends(first.data, self.delimiter, in_quotes=False):
                if first.data.strip(b"\r\n"):
                    yield first
                continue
            parts, size = [first.data], len(first.data)
            for line in lines:
                parts.append(line.data)
                size += len(line.data)
                if size > MAX_RECORD_BYTES:
                    raise self._too_long(first.line)
                if _ends(line.data, self.delimiter, in_quotes=True):
                    break
            else:
                raise InputError(
                    f"{self.name}: a quoted field that begins in line {first.line} never ends",
                    "quotes within a quoted field must be doubled",
                )
            yield Record(first.byte_offset, first.line, b"".join(parts))

    def _too_long(self, line: int) -> InputError:
        return InputError(f"{self.name}: line {line} is longer than {MAX_RECORD_BYTES:,} bytes")


class TextCursor:
    """A text file that is read forward, from slice to slice."""

    def __init__(self, file: TextFile) -> None:
        self._file = file
        self._open()

    def _open(self) -> None:
        self._stream = self._file.open()
        try:
            self.columns, self._first = self._file.begin(self._stream)
        except BaseException:
            self._stream.close()
            raise
        self._start_at(self._first)

    def _start_at(self, place: Mark) -> None:
        self._next = place
        self._records = self._file.records(self._stream, place)

    def take(self, piece: Slice) -> list[Record]:
        """Return the records of a slice.

        Raises:
            InputError: The file ends before the slice does.
        """
        if not piece.mark_row <= self._next.row <= piece.first_row:
            self._go_to(piece)
        skipped = piece.first_row - self._next.row
        records = itertools.islice(self._records, skipped, skipped + piece.rows)
        found = list(records)
        if len(found) < piece.rows:
            raise _too_short(piece.file)
        if found:
            last = found[-1]
            row = piece.first_row + piece.rows
            self._next = Mark(row, last.end, last.line + last.data.count(b"\n"))
        return found

    def _go_to(self, piece: Slice) -> None:
        """Move to the slice's mark, or to the first row if that is later."""
        mark = Mark(piece.mark_row, piece.byte_offset, piece.line)
        mark = max(mark, self._first, key=lambda place: place.byte_offset)
        if self._stream.seekable():
            self._stream.seek(mark.byte_offset)
        else:
            if mark.byte_offset < self._next.byte_offset:
                self._stream.close()
                self._open()
            self._discard(mark.byte_offset - self._next.byte_offset)
        self._start_at(mark)

    def _discard(self, count: int) -> None:
        while count > 0:
            data = self._stream.read(min(count, _BUFFER_BYTES))
            if not data:
                raise _too_short(self._file.name)
            count -= len(data)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _too_short(name: str) -> InputError:
    return InputError(f"{name}: has fewer rows than were planned")


@functools.cache
def _pattern(delimiter: str, *, in_quotes: bool) -> re.Pattern[str]:
    """Return what matches a record to its end, from its beginning or from within quotes.

    Quantifiers are possessive: the match takes time linear in the record's length.
    """
    comma = re.escape(delimiter)
    quoted = rf'[^"]*+(?:""[^"]*+)*+"[^{comma}]*+'
    field = rf'(?:"{quoted}|[^"{comma}][^{comma}]*+|)'
    return re.compile((quoted if in_quotes else field) + rf"(?:{comma}{field})*+")


def _ends(line: bytes, delimiter: str, *, in_quotes: bool) -> bool:
    """Say whether a record ends with this line."""
    if b'"' not in line:
        return not in_quotes
    text = line.removesuffix(b"\n").removesuffix(b"\r").decode(errors="surrogateescape")
    return _pattern(delimiter, in_quotes=in_quotes).fullmatch(text) is not None


def split_fields(record: Record, file: TextFile) -> list[str]:
    """Return the fields of a CSV record.

    Raises:
        RowError: It is not UTF-8, or has a carriage return outside quotes.
    """
    assert file.delimiter is not None, "only CSV has fields"
    try:
        return next(csv.reader((record.data.decode(),), delimiter=file.delimiter))
    except UnicodeDecodeError as error:
        raise RowError("bad_csv", f"{file.where(record)}: {not_utf8(error)}") from error
    except csv.Error as error:
        what = str(error).partition(" - ")[0]  # then comes advice on how to open a file
        raise RowError("bad_csv", f"{file.where(record)}: {what}") from error


def not_utf8(error: UnicodeDecodeError) -> str:
    """Say which byte is not UTF-8."""
    return f"byte {error.start + 1} of the row is not UTF-8 (0x{error.object[error.start]:02x})"


def read_csv(
    records: list[Record], names: list[str], file: TextFile
) -> tuple[dict[str, list[str | None]], dict[int, RowError]]:
    """Return the fields of CSV records by column, and an error for each record that is broken."""
    rows: list[list[str | None]] = []
    errors: dict[int, RowError] = {}
    for index, record in enumerate(records):
        try:
            rows.append([*_fields(record, names, file)])
        except RowError as error:
            errors[index] = error
            rows.append([None] * len(names))
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), errors


def _fields(record: Record, names: list[str], file: TextFile) -> list[str]:
    fields = split_fields(record, file)
    if len(fields) != len(names):
        what = f"{len(fields)} fields, where the header has {len(names)}"
        raise RowError("bad_csv", f"{file.where(record)}: {what}")
    return fields
