"""Rows of JSON lines: parsing, guessing column types, and filling columns of known types.

Types are guessed from the first rows of a file: integers and floats together are double, and what
goes together in no other way (a number here and a string there, integers beyond 64 bits, objects
nested very deeply or with thousands of keys) is a string. A string column takes any value: strings
as they are, all others as JSON text. So a column that turns out mixed only after the guess still
loses nothing. Keys that first occur after the guess are not columns.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from quantbatch.errors import RowError
from quantbatch.input.schemas import MAX_COLUMNS
from quantbatch.input.textfiles import not_utf8

if TYPE_CHECKING:
    from quantbatch.input.textfiles import Record, TextFile

_MAX_DEPTH = 16
"""Objects and lists nested deeper than this are JSON text: Python's recursion, and readers of
Parquet, have limits."""
_SHOWN = 80
"""Characters of a value that an error message shows."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_INT64 = range(-(2**63), 2**63)
_decode = json.JSONDecoder().decode

_KINDS = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a truth value",
    type(None): "null",
}

Row = dict[str, Any]


class _Misfit(Exception):  # noqa: N818 - it says what a value is
    """A value that a type has no room for."""


class Filled(NamedTuple):
    """A column, and the rows whose values did not fit and are null in it."""

    values: pa.Array
    misfits: list[int]


def parse(record: Record, file: TextFile) -> Row:
    """Return the object that a line holds.

    Raises:
        RowError: It is not UTF-8, not JSON, not an object, or has half of a surrogate pair.
    """
    try:
        text = record.data.decode()
        value = _decode(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RowError("bad_json", f"{file.where(record)}: {_reason(error)}") from error
    if not isinstance(value, dict):
        kind = _KINDS[type(value)]
        raise RowError("bad_json", f"{file.where(record)}: is {kind}, where an object must be")
    return value


def _reason(error: ValueError | RecursionError) -> str:
    match error:
        case UnicodeDecodeError():
            return not_utf8(error)
        case UnicodeEncodeError():
            half = error.object[error.start].encode("unicode_escape").decode()
            return f"a string has half of a surrogate pair ({half})"
        case json.JSONDecodeError():
            column = min(error.pos, len(error.doc.rstrip())) + 1
            return f"is not JSON at column {column}: {error.msg}"
        case RecursionError():
            return "is nested too deeply"
        case _:  # an integer of more than 4,300 digits
            return str(error)


def read_json(
    records: Sequence[Record], schema: pa.Schema, file: TextFile
) -> tuple[dict[str, pa.Array], dict[int, RowError]]:
    """Return the columns of a schema from lines, and an error for each line that is broken.

    A row with an error is null in every column.
    """
    rows: list[Row] = []
    errors: dict[int, RowError] = {}
    for index, record in enumerate(records):
        try:
            rows.append(parse(record, file))
        except RowError as error:
            errors[index] = error
            rows.append({})
    columns, misfits = _columns(rows, schema)
    if misfits:
        for index, name in misfits.items():
            what = f"the column {name} has {_shown(rows[index][name])}"
            message = (
                f"{file.where(records[index])}: {what}, which is not {schema.field(name).type}"
            )
            errors[index] = RowError("wrong_type", message)
        kept = [{} if index in misfits else row for index, row in enumerate(rows)]
        columns, _ = _columns(kept, schema)
    return columns, dict(sorted(errors.items()))


def _columns(rows: list[Row], schema: pa.Schema) -> tuple[dict[str, pa.Array], dict[int, str]]:
    """Return the columns, and for each row with a misfit the first column that has it."""
    columns: dict[str, pa.Array] = {}
    misfits: dict[int, str] = {}
    for field in schema:
        filled = fill_column([row.get(field.name) for row in rows], field.type)
        columns[field.name] = filled.values
        misfits = dict.fromkeys(filled.misfits, field.name) | misfits
    return columns, misfits


def fill_column(values: list[Any], data_type: pa.DataType) -> Filled:
    """Put parsed values in a column, exactly: pyarrow by itself turns 1.5 into 1 and true into 1.0
    when it is told the type.
    """
    if set(map(type, values)) <= _exact_types(data_type):
        try:
            return Filled(pa.array(values, data_type), [])
        except (pa.ArrowInvalid, OverflowError):
            pass  # an integer is out of range: find out which
    fit = _fitter(data_type)
    fitted: list[Any] = []
    misfits = []
    for index, value in enumerate(values):
        try:
            fitted.append(fit(value))
        except (_Misfit, RecursionError):
            misfits.append(index)
            fitted.append(None)
    return Filled(pa.array(fitted, data_type), misfits)


@functools.lru_cache(maxsize=256)
def _exact_types(data_type: pa.DataType) -> frozenset[type]:
    """Return the types of values that pyarrow takes for a type without changing them."""
    types = pa.types
    if types.is_string(data_type) or types.is_large_string(data_type):
        return frozenset({str, type(None)})
    if types.is_integer(data_type):
        return frozenset({int, type(None)})
    if types.is_floating(data_type):
        return frozenset({int, float, type(None)})
    return frozenset({bool, type(None)} if types.is_boolean(data_type) else {type(None)})


@functools.lru_cache(maxsize=256)
def _fitter(data_type: pa.DataType) -> Callable[[Any], Any]:
    """Return a function that makes of a parsed value what pyarrow takes, or raises _Misfit."""
    types = pa.types
    if types.is_string(data_type) or types.is_large_string(data_type):
        return _fit_text
    if types.is_list(data_type) or types.is_large_list(data_type):
        return functools.partial(_fit_list, _fitter(data_type.value_type))
    if types.is_struct(data_type):
        fields = {field.name: _fitter(field.type) for field in data_type}
        return functools.partial(_fit_object, fields)
    return functools.partial(_fit_scalar, data_type, _exact_types(data_type))


def _fit_text(value: Any) -> str | None:  # noqa: ANN401 - any JSON value
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _fit_list(fit: Callable[[Any], Any], value: Any) -> list[Any] | None:  # noqa: ANN401
    if value is None:
        return None
    if not isinstance(value, list):
        raise _Misfit
    return [fit(item) for item in value]


def _fit_object(fields: dict[str, Callable[[Any], Any]], value: Any) -> Row | None:  # noqa: ANN401
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _Misfit
    return {name: fit(value.get(name)) for name, fit in fields.items()}


def _fit_scalar(data_type: pa.DataType, exact: frozenset[type], value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, float) and value.is_integer() and pa.types.is_integer(data_type):
        value = int(value)
    if type(value) not in exact:
        raise _Misfit
    try:
        pa.scalar(value, data_type)
    except (pa.ArrowInvalid, OverflowError) as error:
        raise _Misfit from error
    return value


def infer_schema(rows: Sequence[Row]) -> pa.Schema:
    """Return the columns of some rows, in the order in which their keys occur."""
    return pa.schema([(field.name, field.type) for field in _struct_of(rows, 0)])


def _struct_of(rows: Sequence[Row], depth: int) -> pa.DataType:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.struct([(name, infer_type((r.get(name) for r in rows), depth)) for name in names])


def infer_type(values: Iterable[Any], depth: int = 0) -> pa.DataType:
    """Return the narrowest type that holds all of some parsed values."""
    present = [value for value in values if value is not None]
    kinds = set(map(type, present))
    if not kinds:
        return pa.null()
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64() if all(map(_INT64.__contains__, present)) else pa.string()
    if kinds <= {int, float}:
        return pa.float64()
    if kinds == {dict} and depth < _MAX_DEPTH and len(set().union(*present)) <= MAX_COLUMNS:
        return _struct_of(present, depth + 1)
    if kinds == {list} and depth < _MAX_DEPTH:
        return pa.list_(infer_type((item for value in present for item in value), depth + 1))
    return pa.string()


def _shown(value: Any) -> str:  # noqa: ANN401 - any JSON value
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "a value that is nested too deeply to show"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
