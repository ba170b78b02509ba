"""Whether an answer has the form that its request asked for, from the text alone."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantbatch.wants import Grammar

MOST_CHARACTERS = 400


def problem(schema: dict[str, Any]) -> str:
    """Say why something is no JSON schema; else nothing."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return f"{error.json_path}: {error.message}"[:MOST_CHARACTERS]
    return ""


def fault(grammar: Grammar, text: str) -> str:
    """Say why a text is not of the form that was asked for; else nothing."""
    assert grammar.kind == "json_schema", "all that a response_format can ask for"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    return value_fault(grammar.text, value)


def value_fault(schema: str, value: object) -> str:
    """Say why a value has not the form of a schema; else nothing."""
    from jsonschema.exceptions import best_match

    wrong = best_match(_validator(schema).iter_errors(value))
    return f"{wrong.json_path}: {wrong.message}"[:MOST_CHARACTERS] if wrong else ""


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:  # noqa: ANN401 - has no types
    """Return what checks values; it never fetches what `$ref` names elsewhere."""
    from jsonschema import Draft202012Validator
    from referencing import Registry

    return Draft202012Validator(json.loads(schema), registry=Registry())
