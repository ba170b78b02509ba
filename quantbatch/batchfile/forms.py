"""Whether answers and arguments have the form that their request asked for."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from quantbatch import structured
from quantbatch.wants import Grammar


def read_json(text: str) -> Any:  # noqa: ANN401 - any JSON
    """Read JSON that a line of a batch file holds as text.

    Raises:
        ValueError: It is none, or it is nested too deeply, or has half of a surrogate pair.
    """
    try:
        found = json.loads(text)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text in it has half of a surrogate pair") from error
    return found


def grammar_of(schema: dict[str, Any]) -> Grammar:
    """Return what a JSON schema allows."""
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))


@lru_cache(maxsize=1024)
def problem(grammar: Grammar) -> str:
    """Say why a grammar can't be used; else nothing. Files repeat the same few again and again."""
    return structured.problem(grammar)


def arguments_fault(schema: dict[str, Any], arguments: object) -> str:
    """Say why the arguments of a call have not the form of their schema; else nothing."""
    found = structured.fault(grammar_of(schema), json.dumps(arguments, ensure_ascii=False))
    return found.reason if found else ""
