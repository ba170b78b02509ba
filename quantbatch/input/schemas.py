"""One schema for all files of an input.

Types that are only a way to store another one (dictionary, view and extension types) count as that
other one, everywhere: in what a file is said to hold, and in what reading it gives. So `inspect`,
the plan and the readers agree, and the output holds plain columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pyarrow as pa

from quantbatch.errors import InputError

if TYPE_CHECKING:
    from quantbatch.input.listing import InputFile


MAX_COLUMNS = 10_000
"""Most columns of a file. A line of JSON with a million keys is no row of a table."""


def unify_schemas(files: Iterable[tuple[InputFile, pa.Schema]]) -> pa.Schema:
    """Return the schema that the rows of all files fit in.

    Numbers, timestamps, decimals, structs and lists are promoted as `pa.unify_schemas` does in its
    permissive mode; a type that no file knows (only nulls, or objects without a key) becomes
    string. Columns are nullable and carry no metadata, in the order in which files bring them;
    columns of folders come last, as strings.

    A column that is both in a file and in a folder's name is refused: which of the two is right
    can't be known without reading all of it. pyarrow's datasets let the folder win, and fail on
    other types.

    Raises:
        InputError: Two files disagree on a type, or a file and a folder both give a column.
    """
    columns: dict[str, _Column] = {}
    folders: dict[str, str] = {}
    merged: set[pa.Schema] = set()
    for file, schema in files:
        folders |= {key: file.name for key, _ in file.partition if key not in folders}
        if schema in merged:  # 10,000 files of one schema are one merge
            continue
        merged.add(schema)
        for field in schema:
            column = columns.setdefault(field.name, _Column(field.type, file.name))
            columns[field.name] = column.merged(field, file.name)
    for key, name in folders.items():
        if key in columns:
            raise InputError(
                f"the column {key} is in {columns[key].file} and in the folders of {name}",
                "rename the column or the folders, so that it is clear which of them is meant",
            )
    known = [(name, _with_strings(column.type)) for name, column in columns.items()]
    return pa.schema([*known, *((key, pa.string()) for key in folders)])


class _Column:
    """A column's type so far, and the file that it comes from."""

    def __init__(self, data_type: pa.DataType, file: str) -> None:
        self.type = data_type
        self.file = file

    def merged(self, field: pa.Field, file: str) -> _Column:
        """Return the column with another file's type taken in."""
        if field.type == self.type:
            return self
        try:
            both = pa.unify_schemas(
                [pa.schema([(field.name, self.type)]), pa.schema([(field.name, field.type)])],
                promote_options="permissive",
            )
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise InputError(
                f"the column {field.name} is {self.type} in {self.file} and {field.type} in {file}",
                "make the files agree, or read them in two jobs",
            ) from error
        data_type = both.field(0).type
        return self if data_type == self.type else _Column(data_type, file)


def plain_schema(schema: pa.Schema, file: str) -> pa.Schema:
    """Return a file's schema with plain types, and without metadata.

    Raises:
        InputError: Two columns have one name.
    """
    check_names(schema.names, file)
    return pa.schema([(field.name, plain_type(field.type)) for field in schema])


def check_names(names: list[str], file: str) -> None:
    """Refuse two columns of one name.

    Raises:
        InputError: There are such.
    """
    check_count(len(names), file)
    (name, times), *_ = Counter(names).most_common(1) or [("", 0)]
    if times > 1:
        raise InputError(f"{file}: has the column {name} twice", "rename one of them")


def check_count(columns: int, file: str) -> None:
    """Refuse a file with far too many columns.

    Raises:
        InputError: It has more than MAX_COLUMNS.
    """
    if columns > MAX_COLUMNS:
        problem = f"{file}: has {columns:,} columns; at most {MAX_COLUMNS:,} can be read"
        raise InputError(problem, "put values that belong together in one column")


def plain_type(data_type: pa.DataType) -> pa.DataType:
    """Return the type of the values themselves, nullable at every level."""
    if isinstance(data_type, pa.BaseExtensionType):
        return plain_type(data_type.storage_type)
    if pa.types.is_dictionary(data_type):
        return plain_type(data_type.value_type)
    if data_type == pa.string_view():
        return pa.string()
    if data_type == pa.binary_view():
        return pa.binary()
    return _rebuilt(data_type)


def _rebuilt(data_type: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_struct(data_type):
        return pa.struct([(field.name, plain_type(field.type)) for field in data_type])
    if types.is_map(data_type):
        return pa.map_(plain_type(data_type.key_type), plain_type(data_type.item_type))
    if types.is_fixed_size_list(data_type):
        return pa.list_(plain_type(data_type.value_type), data_type.list_size)
    if types.is_large_list(data_type) or types.is_large_list_view(data_type):
        return pa.large_list(plain_type(data_type.value_type))
    if types.is_list(data_type) or types.is_list_view(data_type):
        return pa.list_(plain_type(data_type.value_type))
    return data_type


def _with_strings(data_type: pa.DataType) -> pa.DataType:
    """Replace what can't be written to Parquet, nulls and structs without fields, by strings."""
    types = pa.types
    if types.is_null(data_type) or (types.is_struct(data_type) and not data_type.num_fields):
        return pa.string()
    if types.is_struct(data_type):
        return pa.struct([(field.name, _with_strings(field.type)) for field in data_type])
    if types.is_list(data_type):
        return pa.list_(_with_strings(data_type.value_type))
    return data_type
