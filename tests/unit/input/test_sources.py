"""Files -> rows: what is right is read exactly, what is wrong is named."""

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from quantbatch.errors import InputError, StorageError
from quantbatch.input import jsonlines, parquetfiles, sources, textfiles
from quantbatch.input.listing import InputFile, Listing, list_input, partition_of
from quantbatch.input.sources import (
    FileFacts,
    SliceRows,
    inspect,
    mark_before,
    read_slice,
    unify_schemas,
)
from quantbatch.records import Slice
from quantbatch.spec import Input
from quantbatch.storage import FileInfo, LocalStore, Store


class Files:
    """The readable half of a store, in memory."""

    uri = "memory"

    def __init__(self, **contents: bytes) -> None:
        self.contents = contents

    def open(self, key: str, *, sequential: bool = False) -> io.BytesIO:
        del sequential
        return io.BytesIO(self.contents[key])

    def info(self, key: str) -> FileInfo:
        data = self.contents[key]
        return FileInfo(key, len(data), str(hash(data)))


def slices(store: Store, name: str, facts: FileFacts, rows_per_slice: int) -> Iterator[Slice]:
    info = store.info(name)
    for first in range(0, facts.rows, rows_per_slice):
        mark = mark_before(facts.marks, first)
        rows = min(rows_per_slice, facts.rows - first)
        yield Slice(name, first, rows, *mark, size=info.size, etag=info.etag)


class Opened:
    """A file of the input with its facts and schema."""

    def __init__(self, store: Store, name: str, **options: str) -> None:
        self.store = store
        self.name = name
        self.input = Input.model_validate({"uri": "x"} | options)
        info = store.info(name)
        self.file = InputFile(name, info.size, info.etag, partition_of(name))
        self.facts = inspect(store, self.file, self.input)
        self.schema = unify_schemas([(self.file, self.facts.schema)])

    def slices(self, rows_per_slice: int = 10_000) -> list[Slice]:
        return list(slices(self.store, self.name, self.facts, rows_per_slice))

    def read(self, piece: Slice, columns: Sequence[str] | None = None) -> SliceRows:
        found = read_slice(
            self.store, piece, self.input, self.schema, self.file.partition, columns=columns
        )
        assert found.table.num_rows == piece.rows
        if columns is None:
            assert found.table.schema == self.schema
        found.table.validate(full=True)
        return found

    def all(self, rows_per_slice: int = 10_000) -> SliceRows:
        """Read slice by slice and put together."""
        found = [self.read(piece) for piece in self.slices(rows_per_slice)]
        errors = {
            number * rows_per_slice + row: error
            for number, part in enumerate(found)
            for row, error in part.errors.items()
        }
        return SliceRows(pa.concat_tables([part.table for part in found]), errors)


def text(content: str | bytes, name: str = "a.jsonl", **options: str) -> Opened:
    data = content.encode() if isinstance(content, str) else content
    return Opened(Files(**{name: data}), name, **options)  # type: ignore[arg-type]


def parquet(folder: Path, table: pa.Table, name: str = "a.parquet", **options: int) -> Opened:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return Opened(LocalStore(str(folder)), name)


def problem(content: str | bytes, name: str = "a.jsonl", **options: str) -> str:
    with pytest.raises(InputError) as caught:
        text(content, name, **options)
    return caught.value.problem


def text_unless(why: str, content: str | bytes, name: str) -> Opened | None:
    """Open a file, or return None if it can't be read for a reason that is fine."""
    try:
        return text(content, name)
    except InputError as error:
        if why not in error.problem:
            raise
        return None


def errors(opened: Opened) -> dict[int, str]:
    return {row: f"{e.kind}: {e.message}" for row, e in opened.all().errors.items()}


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


# ----------------------------------------------------------------------------------- JSON lines

scalars = {
    "number": st.integers(-(2**63), 2**63 - 1),
    "real": st.floats(allow_nan=False),
    "truth": st.booleans(),
    "several": st.lists(st.text(max_size=3), max_size=3),
    "inner": st.fixed_dictionaries({"a": st.integers(0, 9), "b": st.text(max_size=3)}),
}
objects = st.fixed_dictionaries(
    {"text": st.none() | st.text()}, optional={name: st.none() | v for name, v in scalars.items()}
)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_json_lines_are_read_as_the_json_module_reads_them(data: st.DataObject) -> None:
    written = data.draw(st.lists(objects, min_size=1, max_size=12))
    ends = data.draw(st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"]))
    ascii_only = data.draw(st.booleans())
    content = ends.join(json.dumps(row, ensure_ascii=ascii_only) for row in written)
    content = data.draw(st.sampled_from(["", "\ufeff", "\n"])) + content
    content += data.draw(st.sampled_from(["", ends]))
    opened = text(content)
    assert opened.facts.rows == len(written)
    found = opened.all(data.draw(st.integers(1, 15)))
    assert not found.errors
    expected = [{name: row.get(name) for name in opened.schema.names} for row in written]
    assert set(opened.schema.names) == {name for row in written for name in row}
    assert found.table.to_pylist() == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.binary(max_size=12) | st.just(b'{"a": 1}'), max_size=12), st.integers(1, 5))
def test_any_bytes_give_each_line_one_row(parts: list[bytes], rows_per_slice: int) -> None:
    content = b"\n".join(parts) or b"\n"
    opened = text_unless(" is ", content, "a.jsonl")
    if opened is None:
        return
    wanted = [part for part in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if part.strip()]
    assert opened.facts.rows == len(wanted)
    if wanted:
        found = opened.all(rows_per_slice)
        assert set(found.errors) == {i for i, part in enumerate(wanted) if not _is_object(part)}


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except ValueError:
        return False


def test_types_of_json_columns() -> None:
    opened = text(
        lines(
            {"a": 1, "b": 1, "c": None, "d": 1, "e": 2**63, "f": True, "g": {}, "h": []},
            {"a": 2, "b": 1.5, "c": None, "d": "x", "e": 1, "f": 1, "g": {}, "h": [1, "y"]},
            {"i": {"k": [{"l": 1}, {"l": 2.5}]}},
        )
    )
    assert opened.facts.schema.field("c").type == pa.null()
    inner = pa.struct([("k", pa.list_(pa.struct([("l", pa.float64())])))])
    string = pa.string()
    expected = [pa.int64(), pa.float64(), string, string, string, string, string]
    assert opened.schema.types == [*expected, pa.list_(string), inner]
    assert opened.all().table.to_pylist()[1] == {
        "a": 2, "b": 1.5, "c": None, "d": "x", "e": "1", "f": "1", "g": "{}", "h": ["1", "y"],
        "i": None,
    }  # fmt: skip


def test_messages_keep_their_structure() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    opened = text(lines({"messages": messages}, {"messages": messages[:1]}))
    assert opened.all().table["messages"].to_pylist() == [messages, messages[:1]]


def test_a_string_column_takes_any_value_as_json_text() -> None:
    rows = [{"a": "x"}] * 1000 + [{"a": 5}, {"a": {"b": "é"}}, {"a": [None]}, {"a": None}]
    found = text(lines(*rows)).all()
    assert not found.errors
    assert found.table["a"].to_pylist()[1000:] == ["5", '{"b": "é"}', "[null]", None]


def test_what_is_wrong_with_a_line_is_that_row_s_error() -> None:
    deep = "[" * 100_000
    content = b"\n".join(
        [
            b'{"a": 1}', b'{"a": ', b"[1]", b'"text"', b"17", b"null", b"true", b"",
            b'{"a": "\xff"}', b'{"a": "\\ud800"}', b'{"\\udfff": 1}', b'{"a": "\\ud83d\\ude00"}',
            b'{"a": %s}' % deep.encode(), b'{"a": %s}' % (b"1" * 5000), b'{"a": "\x01"}',
            b'{"a": 2}',
        ]
    )  # fmt: skip
    assert errors(text(content)) == {
        1: "bad_json: line 2 of a.jsonl: is not JSON at column 6: Expecting value",
        2: "bad_json: line 3 of a.jsonl: is a list, where an object must be",
        3: "bad_json: line 4 of a.jsonl: is a string, where an object must be",
        4: "bad_json: line 5 of a.jsonl: is a number, where an object must be",
        5: "bad_json: line 6 of a.jsonl: is null, where an object must be",
        6: "bad_json: line 7 of a.jsonl: is a truth value, where an object must be",
        7: "bad_json: line 9 of a.jsonl: byte 8 of the row is not UTF-8 (0xff)",
        8: r"bad_json: line 10 of a.jsonl: a string has half of a surrogate pair (\ud800)",
        9: r"bad_json: line 11 of a.jsonl: a string has half of a surrogate pair (\udfff)",
        11: "bad_json: line 13 of a.jsonl: is nested too deeply",
        12: "bad_json: line 14 of a.jsonl: Exceeds the limit (4300 digits) for integer string "
        "conversion: value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit",
        13: "bad_json: line 15 of a.jsonl: is not JSON at column 8: Invalid control character at",
    }


@pytest.mark.parametrize(
    ("good", "bad", "shown", "kind"),
    [
        (1, "abc", '"abc"', "int64"),
        (1, 1.5, "1.5", "int64"),
        (1, True, "true", "int64"),
        (1, 2**63, "9223372036854775808", "int64"),
        (1.5, True, "true", "double"),
        (1.5, 2**53 + 1, "9007199254740993", "double"),
        (1.5, 2**70, "1180591620717411303424", "double"),
        (True, 1, "1", "bool"),
        (["x"], "abc", '"abc"', "list<item: string>"),
        ([1], [1.5], "[1.5]", "list<item: int64>"),
        ({"b": 1}, [], "[]", "struct<b: int64>"),
        ({"b": 1}, {"b": "x" * 99}, '{"b": "' + "x" * 70 + "...", "struct<b: int64>"),
    ],
)
def test_a_value_that_does_not_fit(good: object, bad: object, shown: str, kind: str) -> None:
    rows = [{"a": good, "z": 1}] * 1000 + [{"a": bad, "z": 2}, {"a": good, "z": 3}, {"z": "q"}]
    opened = text(lines(*rows))
    found = opened.all()
    assert {row: str(error) for row, error in found.errors.items()} == {
        1000: f"wrong_type: line 1001 of a.jsonl: the column a has {shown}, which is not {kind}",
        1002: 'wrong_type: line 1003 of a.jsonl: the column z has "q", which is not int64',
    }
    nothing = {"a": None, "z": None}
    assert found.table.slice(1000).to_pylist() == [nothing, {"a": good, "z": 3}, nothing]


def test_a_deeply_nested_value_is_text_and_stops_nothing() -> None:
    deep = json.loads("[" * 200 + "]" * 200)
    found = text(lines({"a": deep})).all()
    assert not found.errors
    value, depth = found.table["a"].to_pylist()[0], 0
    while isinstance(value, list):
        (value,), depth = value, depth + 1
    assert value == "[" * (200 - depth) + "]" * (200 - depth)
    assert depth == 16


def test_whole_numbers_written_as_reals_fit_integers() -> None:
    rows = [{"a": 1}] * 1000 + [{"a": 2.0}]
    assert text(lines(*rows)).all().table["a"].to_pylist()[-1] == 2


def test_columns_of_no_json_type_take_nulls_only() -> None:
    when = pa.timestamp("us")
    assert jsonlines.fill_column([None, 5, "x"], when).misfits == [1, 2]


def test_a_file_of_blank_lines_has_no_rows() -> None:
    opened = text("\n \n\r\n")
    assert opened.facts == FileFacts(0, pa.schema([]), ())


# ------------------------------------------------------------------------------------------ CSV

# Python's csv writer leaves a carriage return unquoted unless it quotes everything.
characters = st.sampled_from('a",;\n é\u2028\0\t')
cells = {
    csv.QUOTE_ALL: st.text(characters | st.characters(codec="utf-8"), max_size=8),
    csv.QUOTE_MINIMAL: st.text(
        characters | st.characters(codec="utf-8", exclude_characters="\r"), max_size=8
    ),
}


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_csv_is_read_as_the_csv_module_reads_it(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 4))
    quoting: Any = data.draw(st.sampled_from([*cells]))
    row = st.lists(cells[quoting], min_size=width, max_size=width)
    written = data.draw(st.lists(row, max_size=10))
    delimiter = data.draw(st.sampled_from(",;\t|]^"))
    sink = io.StringIO(newline="")
    ends = data.draw(st.sampled_from(["\n", "\r\n"]))
    writer = csv.writer(sink, delimiter=delimiter, lineterminator=ends, quoting=quoting)
    names = [f"n{i}" for i in range(width)]
    writer.writerows([names, *written])
    content = data.draw(st.sampled_from(["", "\ufeff", ends])) + sink.getvalue()
    opened = text(content, "a.csv", delimiter=delimiter)
    assert opened.facts.rows == len(written)
    if written:
        found = opened.all(data.draw(st.integers(1, 25)))
        assert not found.errors
        assert [list(row.values()) for row in found.table.to_pylist()] == written


@settings(deadline=None, max_examples=300)
@given(st.text(st.sampled_from('aé",\n'), max_size=30), st.integers(1, 4))
def test_any_csv_is_cut_where_the_csv_module_cuts_it(body: str, rows_per_slice: int) -> None:
    content = "x,y\n" + body
    expected = [row for row in csv.reader(io.StringIO(content, newline="")) if row][1:]
    opened = text_unless("never ends", content, "a.csv")
    if opened is None:
        return
    assert opened.facts.rows == len(expected)
    if expected:
        found = opened.all(rows_per_slice)
        assert set(found.errors) == {i for i, row in enumerate(expected) if len(row) != 2}
        for row, values in zip(found.table.to_pylist(), expected, strict=True):
            assert list(row.values()) == (values if len(values) == 2 else [None, None])


def test_what_is_wrong_with_a_record_is_that_row_s_error() -> None:
    content = b'a,b\n1,2\n3\n"x\ny",4\n5,6,7\n\n8,\xff\n9,a\rb\n10,\x00\n'
    opened = text(content, "a.csv")
    assert errors(opened) == {
        1: "bad_csv: line 3 of a.csv: 1 fields, where the header has 2",
        3: "bad_csv: line 6 of a.csv: 3 fields, where the header has 2",
        4: "bad_csv: line 8 of a.csv: byte 3 of the row is not UTF-8 (0xff)",
        5: "bad_csv: line 9 of a.csv: new-line character seen in unquoted field",
    }
    assert [*opened.all().table["a"].to_pylist()] == ["1", None, "x\ny", None, None, None, "10"]
    assert opened.schema.types == [pa.string(), pa.string()]


def test_a_quote_within_text_is_text() -> None:
    found = text('a,b\n5" pipe,x\n6" pipe,y\n', "a.csv").all()
    assert found.table.to_pylist() == [{"a": '5" pipe', "b": "x"}, {"a": '6" pipe', "b": "y"}]


def test_fields_may_be_long() -> None:
    assert text(f"a\n{'x' * 300_000}\n", "a.csv").all().table["a"][0].as_py() == "x" * 300_000


def test_columns_of_csv_come_in_any_order() -> None:
    opened = text("a,b\n1,2\n", "a.csv")
    (piece,) = opened.slices()
    assert opened.read(piece, ["b", "a"]).table.to_pylist() == [{"b": "2", "a": "1"}]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\n\n", "has no header line"),
        (b"a,b,a\n1,2,3\n", "has the column a twice"),
        (b",b\n1,2\n", "column 1 has no name in the header"),
        (b"a,\xff\n1,2\n", "the header: line 1 of a.csv: byte 3 of the row is not UTF-8 (0xff)"),
        (b'a,b\n1,2\n3,"x\n4,5\n', "a quoted field that begins in line 3 never ends"),
        (b'"a,b\n1,2\n', "a quoted field that begins in line 1 never ends"),
    ],
)
def test_csv_that_can_not_be_read(content: bytes, why: str) -> None:
    assert problem(content, "a.csv") == f"a.csv: {why}"


def test_a_delimiter_that_can_not_delimit() -> None:
    assert "can't delimit fields" in problem("a\n", "a.csv", delimiter='"')


# ---------------------------------------------------------------------------- text of either kind


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson.zst", "a.csv", "a.csv.gz"])
def test_slices_are_right_in_any_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MARK_STRIDE", 16)
    if ".csv" in name:
        plain = ("a,b\n" + "".join(f'{i},"x\n{i}"\n\n' for i in range(100))).encode()
    else:
        plain = "".join(f'\n{{"a": "{i}", "b": "x\\n{i}"}}\n' for i in range(100)).encode()
    data = {"gz": gzip.compress(plain), "st": pa.compress(plain, "zstd", asbytes=True)}
    opened = text(data.get(name[-2:], plain), name)
    assert opened.facts.rows == 100
    assert [mark.row for mark in opened.facts.marks] == [*range(0, 100, 16)]
    pieces = opened.slices(7) * 3
    random.Random(3).shuffle(pieces)
    for piece in pieces:
        rows = range(piece.first_row, piece.first_row + piece.rows)
        expected = [{"a": str(i), "b": f"x\n{i}"} for i in rows]
        assert opened.read(piece).table.to_pylist() == expected


def test_several_streams_in_one_compressed_file() -> None:
    part = gzip.compress(b'{"a": 1}\n')
    assert text(part + part, "a.jsonl.gz").all().table["a"].to_pylist() == [1, 1]


def test_line_numbers_after_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MARK_STRIDE", 4)
    opened = text('{"a": 1}\n\n' * 9 + "broken\n")
    piece = opened.slices(3)[-1]
    assert (piece.mark_row, piece.line) == (8, 17)
    assert opened.read(piece).errors[0].message.startswith("line 19 of a.jsonl")


def test_a_slice_without_marks_is_read_from_the_beginning() -> None:
    opened = text("a\n1\n2\n3\n", "a.csv")
    found = opened.read(Slice("a.csv", 1, 2))
    assert found.table["a"].to_pylist() == ["2", "3"]


@pytest.mark.parametrize(
    ("content", "name", "why"),
    [
        (b"", "a.jsonl", "is empty (0 bytes)"),
        (b"", "a.csv", "is empty (0 bytes)"),
        (b"", "a.parquet", "is empty (0 bytes)"),
        (b"PAR1....", "a.jsonl", "is a Parquet file"),
        (gzip.compress(b"{}", mtime=0), "a.jsonl", "is compressed with gzip, but its name"),
        (pa.compress(b"{}", "zstd", asbytes=True), "a.csv", "is compressed with zstd, but"),
        ('{"a": 1}'.encode("utf-16"), "a.jsonl", "is UTF-16; only UTF-8 can be read"),
        (b"{}", "a.jsonl.gz", "can't be read: zlib inflate failed: incorrect header check"),
        (gzip.compress(os.urandom(999))[:-99], "a.csv.gz", "can't be read: Truncated compressed"),
        (b"{}", "a.jsonl.zst", "can't be read: ZSTD decompress failed"),
        (b"hello world", "a.parquet", "can't be read: Parquet magic bytes not found"),
    ],
)
def test_files_that_can_not_be_read(content: bytes, name: str, why: str) -> None:
    assert problem(content, name).startswith(f"{name}: {why}")


def test_a_record_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "MAX_RECORD_BYTES", 100)
    long = "line 2 is longer than 100 bytes"
    assert problem('{"a": 1}\n' + "x" * 101) == f"a.jsonl: {long}"
    assert problem('a\n"' + "x\n" * 60 + '"\n', "a.csv") == f"a.csv: {long}"


# -------------------------------------------------------------------------------------- Parquet

EVERY_TYPE = pa.table(
    {
        "id": pa.array(range(6), pa.int32()),
        "text": ["a", None, "", "é\x00\x01", "x" * 999, "z"],
        "large": pa.array(["a"] * 6, pa.large_string()),
        "list": [[1, 2], [], None, [3], [4], [None]],
        "map": pa.array([[("a", 1)], [], None, [], [], []], pa.map_(pa.string(), pa.int64())),
        "struct": [{"a": 1, "b": [{"c": "x"}]}, None, *[{"a": 2, "b": []}] * 4],
        "choice": pa.array(["u", "v", None, "u", "u", "w"]).dictionary_encode(),
        "choices": pa.array([["u"], ["v"], [], None, [], []], pa.list_(pa.string())).cast(
            pa.list_(pa.dictionary(pa.int32(), pa.string()))
        ),
        "when": pa.array([datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)] * 6),
        "day": [datetime.date(2026, 1, 2)] * 6,
        "price": [decimal.Decimal("1.50")] * 6,
        "blob": [b"\xff\x00"] * 6,
        "json": pa.array(["{}"] * 6, pa.json_()),
        "nothing": pa.nulls(6),
        "view": pa.array(["v"] * 6, pa.string_view()),
    }
)


@pytest.mark.parametrize("rows_per_slice", [1, 4, 6])
def test_every_type_survives(tmp_path: Path, rows_per_slice: int) -> None:
    opened = parquet(tmp_path, EVERY_TYPE, row_group_size=4)
    assert opened.facts.rows == 6
    assert opened.facts.schema.field("choice").type == pa.string()
    assert opened.facts.schema.field("choices").type == pa.list_(pa.string())
    assert opened.facts.schema.field("json").type == pa.string()
    assert opened.schema.field("nothing").type == pa.string()
    assert opened.all(rows_per_slice).table.to_pylist() == EVERY_TYPE.to_pylist()


@pytest.mark.parametrize("small_group_bytes", [0, 1 << 30])
def test_parquet_slices_are_right_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_group_bytes: int
) -> None:
    monkeypatch.setattr(parquetfiles, "_SMALL_GROUP_BYTES", small_group_bytes)
    monkeypatch.setattr(parquetfiles, "_BATCH_ROWS", 32)
    numbers = list(range(1000))
    table = pa.table({"a": numbers, "b": [f"x{i}" for i in numbers], "c": numbers})
    opened = parquet(tmp_path, table, row_group_size=150)
    pieces = opened.slices(70) * 3
    random.Random(5).shuffle(pieces)
    for piece in [*opened.slices(1000), *opened.slices(1), *pieces]:
        rows = numbers[piece.first_row : piece.first_row + piece.rows]
        found = opened.read(piece, ["b", "a"]).table
        assert found.to_pydict() == {"b": [f"x{i}" for i in rows], "a": rows}


def test_empty_row_groups_and_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"a": [1, 2, 3]})
    with pq.ParquetWriter(path, table.schema) as writer:
        for part in (table.slice(0, 0), table, table.slice(0, 0), table):
            writer.write_table(part)
    opened = Opened(LocalStore(str(tmp_path)), "a.parquet")
    for rows in (1, 2, 6):
        assert opened.all(rows).table["a"].to_pylist() == [1, 2, 3, 1, 2, 3]
    assert parquet(tmp_path, table.slice(0, 0)).facts.rows == 0


def test_rows_fit_the_schema_of_all_files(tmp_path: Path) -> None:
    parquet(tmp_path, pa.table({"a": pa.array([1], pa.int32()), "s": [{"x": 1}]}), "a.parquet")
    parquet(tmp_path, pa.table({"b": ["t"], "a": [2.5]}), "day=1/b.parquet")
    (tmp_path / "c.jsonl").write_text('{"a": 3, "s": {"y": "z"}}\n')
    spec = Input(uri=str(tmp_path))
    listed = list_input(spec)
    facts = [inspect(listed.store, file, spec) for file in listed.files]
    schema = unify_schemas([(f, x.schema) for f, x in zip(listed.files, facts, strict=True)])
    rows = [
        read_slice(listed.store, Slice(f.name, 0, 1), spec, schema, f.partition).table.to_pylist()
        for f in listed.files
    ]
    assert schema.names == ["a", "s", "b", "day"]
    assert rows == [
        [{"a": 1.0, "s": {"x": 1, "y": None}, "b": None, "day": None}],
        [{"a": 3.0, "s": {"x": None, "y": "z"}, "b": None, "day": None}],
        [{"a": 2.5, "s": None, "b": "t", "day": "1"}],
    ]


def test_only_columns_of_folders(tmp_path: Path) -> None:
    opened = parquet(
        tmp_path, pa.table({"a": [1, 2]}), "day=1/lang=__HIVE_DEFAULT_PARTITION__/a.parquet"
    )
    (piece,) = opened.slices()
    found = opened.read(piece, ["lang", "day"]).table
    assert found.to_pylist() == [{"lang": None, "day": "1"}] * 2


def test_folders_are_told_of_rows_that_can_not_be_read() -> None:
    found = text("broken\n" + lines({"a": 1}), "day=1/a.jsonl").all()
    assert found.table.to_pylist() == [{"a": None, "day": "1"}, {"a": 1, "day": "1"}]
    assert [*found.errors] == [0]


def test_a_column_that_the_file_lacks_is_null(tmp_path: Path) -> None:
    opened = parquet(tmp_path, pa.table({"a": [1, 2]}))
    opened.schema = pa.schema([("a", pa.int64()), ("b", pa.list_(pa.string()))])
    (piece,) = opened.slices()
    assert opened.read(piece, ["b"]).table["b"].to_pylist() == [None, None]


def test_text_in_parquet_that_is_not_utf_8(tmp_path: Path) -> None:
    good, bad = b"good", b"b\xffd"
    raw = pa.array([good, bad, good, good], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    inner = pa.StructArray.from_arrays([strings.take(pa.array([0, 2, 3, 1]))], ["b"])
    opened = parquet(tmp_path, pa.table({"a": strings, "n": [1, 2, 3, 4], "s": inner}))
    found = opened.all()
    why = "of a.parquet: the column {} has a string that is not UTF-8"
    assert {row: str(error) for row, error in found.errors.items()} == {
        1: f"bad_text: row 1 {why.format('a')}",
        3: f"bad_text: row 3 {why.format('s')}",
    }
    assert found.table["n"].to_pylist() == [1, None, 3, None]


def test_damaged_parquet(tmp_path: Path) -> None:
    table = pa.table({"a": [f"{i} {'x' * (i % 50)}" for i in range(5000)]})
    opened = parquet(tmp_path, table, row_group_size=1000)
    path = tmp_path / "a.parquet"
    whole = path.read_bytes()
    damaged = whole[:-100] + b"\xff" * 60 + whole[-40:]
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"^a.parquet: can't be read: .*thrift"):
        Opened(opened.store, "a.parquet")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(200) + whole[middle + 200 :])
    opened = Opened(opened.store, "a.parquet")  # the footer is sound
    with pytest.raises(InputError, match=r"^a.parquet: can't be read: "):
        opened.all(1000)
    assert opened.read(opened.slices(1000)[0]).table.num_rows == 1000


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array([1])] * 2, ["a", "a"])
    with pytest.raises(InputError, match=r"a.parquet: has the column a twice"):
        parquet(tmp_path, twice)


# ------------------------------------------------------------------------------- any kind of file


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_another_version_of_the_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    def write(value: str) -> None:
        if name.endswith("parquet"):
            pq.write_table(pa.table({"a": [value] * 4}), path)
        else:
            path.write_text(f'{{"a": "{value}"}}\n' * 4 if "json" in name else f"a\n{value}\n" * 4)

    write("old")
    opened = Opened(LocalStore(str(tmp_path)), name)
    first, second = opened.slices(2)[:2]
    opened.read(first)
    write("newer")
    with pytest.raises(InputError, match=rf"^{name}: changed since it was planned"):
        opened.read(second)
    path.unlink()
    with pytest.raises(InputError, match=rf"^{name}: is not there any more"):
        opened.read(second)


def test_a_file_that_lost_rows(tmp_path: Path) -> None:
    opened = parquet(tmp_path, pa.table({"a": [1, 2]}))
    with pytest.raises(InputError, match=r"a.parquet: has fewer rows than were planned"):
        opened.read(Slice("a.parquet", 1, 2))
    with pytest.raises(InputError, match=r"a.jsonl: has fewer rows than were planned"):
        text('{"a": 1}\n').read(Slice("a.jsonl", 0, 2))
    compressed = text(gzip.compress(b'{"a": 1}\n'), "a.jsonl.gz")
    with pytest.raises(InputError, match=r"a.jsonl.gz: has fewer rows than were planned"):
        compressed.read(Slice("a.jsonl.gz", 5, 1, 5, 99))


class Unwell(Files):
    """A store whose connection breaks."""

    def __init__(self, error: Exception) -> None:
        super().__init__(**{"a.jsonl": b'{"a": 1}\n'})
        self.error = error

    @override
    def open(self, key: str, *, sequential: bool = False) -> io.BytesIO:
        raise self.error


def broken(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "planning"),
    [
        (StorageError("no answer"), StorageError),
        (ConnectionResetError("reset"), StorageError),
        (TimeoutError(), StorageError),
        (OSError(5, "Input/output error"), StorageError),
        (broken(StorageError("denied"), PermissionError()), InputError),
        (FileNotFoundError("gone"), InputError),
        (OSError("Corrupt snappy compressed data."), InputError),
    ],
)
def test_trouble_with_the_store_is_not_taken_for_a_damaged_file(
    error: Exception, planning: type[Exception]
) -> None:
    store: Any = Unwell(error)
    spec = Input(uri="x")
    with pytest.raises(planning, match=r"^a\.jsonl: "):
        inspect(store, InputFile("a.jsonl", 9, "", ()), spec)
    with pytest.raises(InputError, match=r"^a\.jsonl: "):
        read_slice(store, Slice("a.jsonl", 0, 1), spec, pa.schema([("a", pa.int64())]))


def test_reading_goes_on_where_the_last_slice_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = parquet(tmp_path, pa.table({"a": list(range(100))}))
    opens: list[str] = []
    plain_open = LocalStore.open

    def counted(self: LocalStore, key: str, *, sequential: bool = False) -> IO[bytes]:
        opens.append(key)
        return plain_open(self, key, sequential=sequential)

    monkeypatch.setattr(LocalStore, "open", counted)
    assert opened.all(10).table["a"].to_pylist() == list(range(100))
    assert opens == ["a.parquet"]
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a forked process
    opened.all(10)
    assert opens == ["a.parquet"] * 2


def test_a_listing_is_what_is_inspected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n1\n")
    listed: Listing = list_input(Input(uri=str(tmp_path)))
    assert inspect(listed.store, listed.files[0], Input(uri="x")).rows == 1
