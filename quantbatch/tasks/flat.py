"""A flat JSON schema as typed columns (`output.explode`): one for each property.

Flat are texts, integers, numbers, booleans, an enum or constant of one of these, and lists of them;
each may also be null. `$ref` within the schema and `anyOf` with null, as schemas made from classes
have them, are seen through. Integers are 64 bits wide and numbers are double: a valid answer with
more is not squeezed in, it is an invalid one.
"""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa

from quantbatch.structured import local

SCALARS = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}
INT64 = range(-(2**63), 2**63)
MOST_REFERENCES = 16


def fields(schema: Any) -> list[pa.Field]:  # noqa: ANN401 - any JSON
    """Return the columns of a flat schema.

    Raises:
        ValueError: It is not flat.
    """
    whole = _seen_through(schema, schema)
    properties = whole.get("properties")
    if whole.get("type") != "object" or not isinstance(properties, dict) or not properties:
        raise ValueError("it is no object with properties")
    return [pa.field(name, _type(name, found, schema)) for name, found in properties.items()]


def _type(name: str, schema: Any, root: Any) -> pa.DataType:  # noqa: ANN401 - a part of a schema
    found = _seen_through(schema, root)
    if _kind(found) == "array" and "prefixItems" not in found:  # whose types may differ
        item = _scalar(_seen_through(found.get("items"), root))
        kind = item and pa.list_(item)
    else:
        kind = _scalar(found)
    if kind is None:
        raise ValueError(
            f"property {name!r} is no text, integer, number, boolean, enum of those or list of one"
        )
    return kind


def _scalar(schema: dict[str, Any]) -> pa.DataType | None:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return SCALARS.get(_kind(schema) or "") if values is None else _type_of(values)


def _type_of(values: list[Any]) -> pa.DataType | None:
    kinds = {type(value) for value in values if value is not None}
    known = {str: "string", bool: "boolean", int: "integer", float: "number"}
    if kinds == {int, float}:
        return SCALARS["number"]
    return SCALARS[known[kinds.pop()]] if len(kinds) == 1 and kinds <= known.keys() else None


def _kind(schema: dict[str, Any]) -> str | None:
    """Return a schema's type, null aside; None if there are several."""
    kinds = schema.get("type")
    named = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "null"]
    return named[0] if len(named) == 1 else None


def _seen_through(schema: Any, root: Any) -> dict[str, Any]:  # noqa: ANN401 - parts of a schema
    """Follow references, and alternatives of which all but one are null."""
    for _ in range(MOST_REFERENCES):
        if not isinstance(schema, dict):
            break
        choices = next((schema[key] for key in ("anyOf", "oneOf", "allOf") if key in schema), None)
        if "$ref" in schema:
            schema = local(schema["$ref"], root)
        elif choices is not None:
            others = [choice for choice in choices if choice != {"type": "null"}]
            schema = others[0] if len(others) == 1 else None
        else:
            return schema
    return {}


def cell(value: Any, kind: pa.DataType) -> Any:  # noqa: ANN401 - any JSON
    """Return a property's value as its column holds it.

    Raises:
        ValueError: It is too large for the column.
    """
    if value is None:
        return None
    if pa.types.is_list(kind):
        return [cell(each, kind.value_type) for each in value]
    if pa.types.is_int64(kind):
        if int(value) not in INT64:
            raise ValueError(f"{value} does not fit 64 bits")
        return int(value)
    if pa.types.is_float64(kind):
        return _double(value)
    return value


def _double(value: float) -> float:
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if found != value:  # exact between an integer and a double
        raise ValueError(f"an integer of {int(value).bit_length()} bits is no double")
    return found
