"""One schema for all files."""

import pyarrow as pa
import pytest

from quantbatch.errors import InputError
from quantbatch.input.listing import InputFile, partition_of
from quantbatch.input.schemas import plain_schema, plain_type, unify_schemas


def file(name: str) -> InputFile:
    return InputFile(name, 1, "", partition_of(name))


def unified(*types: pa.DataType) -> pa.DataType:
    files = [(file(f"{i}.parquet"), pa.schema([("x", t)])) for i, t in enumerate(types)]
    return unify_schemas(files).field("x").type


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.int64(), pa.float64(), pa.float64()),
        (pa.null(), pa.string(), pa.string()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.decimal128(5, 2), pa.decimal128(9, 4), pa.decimal128(9, 4)),
        (pa.list_(pa.null()), pa.list_(pa.string()), pa.list_(pa.string())),
        (
            pa.struct([("a", pa.int64())]),
            pa.struct([("b", pa.string())]),
            pa.struct([("a", pa.int64()), ("b", pa.string())]),
        ),
        (pa.struct([]), pa.struct([("a", pa.int64())]), pa.struct([("a", pa.int64())])),
    ],
)
def test_types_are_promoted(first: pa.DataType, second: pa.DataType, both: pa.DataType) -> None:
    assert unified(first, second) == both
    assert unified(second, first).equals(both) or pa.types.is_struct(both)


@pytest.mark.parametrize("unknown", [pa.null(), pa.struct([])])
def test_what_no_file_knows_is_a_string(unknown: pa.DataType) -> None:
    assert unified(unknown) == pa.string()
    assert unified(pa.list_(unknown)) == pa.list_(pa.string())
    assert unified(pa.struct([("a", unknown)])) == pa.struct([("a", pa.string())])


def test_columns_keep_their_order_and_folders_come_last() -> None:
    found = unify_schemas(
        [
            (file("day=1/a.parquet"), pa.schema([("b", pa.int64()), ("a", pa.string())])),
            (file("lang=de/b.parquet"), pa.schema([("c", pa.bool_()), ("a", pa.string())])),
        ]
    )
    assert found.names == ["b", "a", "c", "day", "lang"]
    assert found.field("day").type == pa.string()


def test_metadata_goes_and_columns_are_nullable() -> None:
    column = pa.field("x", pa.int64(), nullable=False, metadata={"a": "b"})
    found = unify_schemas([(file("a.parquet"), pa.schema([column], metadata={"pandas": "{}"}))])
    assert found.metadata is None
    assert found.field("x").metadata is None
    assert found.field("x").nullable


def test_incompatible_types_name_the_column_and_both_files() -> None:
    schemas = [pa.schema([("x", t)]) for t in (pa.int32(), pa.int64(), pa.int64(), pa.string())]
    files = [file(f"{name}.parquet") for name in "abcd"]
    with pytest.raises(InputError) as caught:
        unify_schemas(zip(files, schemas, strict=True))
    assert caught.value.problem == ("the column x is int64 in b.parquet and string in d.parquet")


def test_a_column_in_file_and_folder_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        unify_schemas([(file("day=1/a.parquet"), pa.schema([("day", pa.string())]))])
    assert "the column day is in day=1/a.parquet and in the folders of" in caught.value.problem


def test_no_files() -> None:
    assert unify_schemas([]).names == []


@pytest.mark.parametrize(
    ("stored", "plain"),
    [
        (pa.dictionary(pa.int32(), pa.string()), pa.string()),
        (pa.list_(pa.dictionary(pa.int8(), pa.string())), pa.list_(pa.string())),
        (pa.string_view(), pa.string()),
        (pa.binary_view(), pa.binary()),
        (pa.json_(), pa.string()),
        (pa.uuid(), pa.binary(16)),
        (pa.list_(pa.field("element", pa.int8(), nullable=False)), pa.list_(pa.int8())),
        (pa.large_list(pa.string_view()), pa.large_list(pa.string())),
        (pa.list_(pa.string_view(), 2), pa.list_(pa.string(), 2)),
        (pa.map_(pa.string(), pa.string_view()), pa.map_(pa.string(), pa.string())),
        (pa.struct([("a", pa.json_())]), pa.struct([("a", pa.string())])),
        (pa.timestamp("ns", "UTC"), pa.timestamp("ns", "UTC")),
    ],
)
def test_plain_types(stored: pa.DataType, plain: pa.DataType) -> None:
    assert plain_type(stored) == plain


def test_two_columns_of_one_name() -> None:
    twice = pa.schema([("x", pa.int64()), ("x", pa.int64())])
    with pytest.raises(InputError, match=r"a.parquet: has the column x twice"):
        plain_schema(twice, "a.parquet")
