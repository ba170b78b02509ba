"""Whether answers and arguments have the form that their request asked for."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from quantbatch import structured
from quantbatch.wants import Grammar


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
