"""Calls of tools in an answer's text, for the families whose way of writing them is known. Pure.

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them (Qwen)
    mistral   [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
    llama     {"name": ..., "parameters": {...}} and nothing else (Llama 3.1)

Which one a model writes is told by its chat template. `[TOOL_CALLS]` is a special token, which the
text of an answer does not show: a list of calls alone is taken for one, too.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, NamedTuple

from quantbatch.structured import parse_json

Family = Literal["hermes", "mistral", "llama"]
_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


class ToolCall(NamedTuple):
    """One call."""

    name: str
    arguments: str
    """As JSON text."""


def family_of(chat_template: str) -> Family | None:
    """Tell how a model writes calls; None if that is not known."""
    if "<tool_call>" in chat_template:
        # Qwen3-Coder and others put XML of their own into these tags.
        return None if "<function=" in chat_template else "hermes"
    if "[TOOL_CALLS]" in chat_template:
        return None if "[ARGS]" in chat_template else "mistral"
    if '"parameters": ' in chat_template and "<|start_header_id|>" in chat_template:
        return "llama"
    return None


def parse(family: Family, text: str) -> list[ToolCall]:
    """Return the calls in an answer, none if it makes none.

    Raises:
        ValueError: It begins a call that is none.
    """
    match family:
        case "hermes":
            if text.count("<tool_call>") != text.count("</tool_call>"):
                raise ValueError("a <tool_call> has no end")
            return [_call(parse_json(found), "arguments") for found in _HERMES.findall(text)]
        case "mistral":
            before, mark, found = text.rpartition("[TOOL_CALLS]")
            if not mark and not re.match(r'\s*\[\s*\{\s*"', before or found):
                return []
            calls = parse_json(found)
            if not isinstance(calls, list):
                raise ValueError("the calls are no list")
            return [_call(call, "arguments") for call in calls]
        case "llama":
            bare = text.strip().removeprefix("<|python_tag|>")
            return [_call(parse_json(bare), "parameters")] if bare.startswith("{") else []


def _call(found: Any, arguments: str) -> ToolCall:  # noqa: ANN401 - any JSON
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ValueError("a call without a name")
    values = found.get(arguments, {})
    if not isinstance(values, dict):
        raise ValueError(f"{arguments} of the call of {found['name']!r} are no object")
    return ToolCall(found["name"], json.dumps(values, ensure_ascii=False))
