"""Calls of tools in an answer's text, for the families whose way of writing them is known, and how
to have nothing but calls written. Pure.

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them (Qwen)
    mistral   [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
    llama     {"name": ..., "parameters": {...}} and nothing else (Llama 3.1)

Which one a model writes is told by its chat template. `[TOOL_CALLS]` is a special token, which the
text of an answer does not show: a list of calls alone is taken for one, too.

Where calls are forced (`forced`), each is written as these models were taught to write it, with the
arguments by the schema of its function. `[TOOL_CALLS]` can't be forced: a grammar is about text.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from quantbatch.structured import WHITE_SPACE, parse_json
from quantbatch.wants import Grammar

if TYPE_CHECKING:
    from collections.abc import Sequence

Family = Literal["hermes", "mistral", "llama"]
_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


class ToolCall(NamedTuple):
    """One call."""

    name: str
    arguments: str
    """As JSON text."""


class Choice(NamedTuple):
    """Which calls an answer has to consist of."""

    name: str | None = None
    """That of a function; None is any."""
    once: bool = False
    """Whether there may be no more than one."""


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


def beside(family: Family, text: str) -> str:
    """Return what an answer says beside its calls."""
    match family:
        case "hermes":
            return _HERMES.sub("", text).strip()
        case "mistral":
            return text.rpartition("[TOOL_CALLS]")[0].strip()
        case "llama":
            return ""


def forced(family: Family | None, tools: Sequence[dict[str, Any]], choice: Choice) -> Grammar:
    """Return the form of an answer that consists of calls; whether it compiles is not looked at.

    Args:
        family: How the model writes calls.
        tools: {type: function, function: {name, description, parameters}} each.
        choice: Which of them.

    Raises:
        ValueError: It can't be forced.
    """
    if family is None or family == "mistral":
        raise ValueError("how this model writes calls of tools is not known, or can't be forced")
    functions = [_function(tool) for tool in tools]
    chosen = [each for each in functions if choice.name in (None, each["name"])]
    if not chosen:
        names = ", ".join(each["name"] for each in functions)
        raise ValueError(f"no tool is called {choice.name!r}, they are {names or 'none'}")
    lines = [f"any: {' | '.join(f'call{number}' for number in range(len(chosen)))}"]
    for number, each in enumerate(chosen):
        lines += _rules(family, number, each)
    if family == "hermes":
        more = "" if choice.once or choice.name else r' ("\n" call)*'
        lines += [f"start: call{more}", r'call: "<tool_call>\n" any "\n</tool_call>"']
    else:
        lines.append("start: any")
    return Grammar("grammar", "\n".join(lines))


def _rules(family: Family, number: int, function: dict[str, Any]) -> list[str]:
    """Return the rules of one function's call."""
    key = "parameters" if family == "llama" else "arguments"
    begin = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{key}": '
    schema = {"type": "object", **(function["parameters"] or {})}
    spaced = {**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}
    return [
        f'call{number}: {json.dumps(begin, ensure_ascii=False)} arguments{number} "}}"',
        f"arguments{number}: %json {json.dumps(spaced, ensure_ascii=False)}",
    ]


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    match tool:
        case {"type": "function", "function": {"name": str(name), **others}} if name:
            if isinstance(others.get("parameters", {}), dict | None):
                return {"name": name, "parameters": others.get("parameters")}
    raise ValueError("a tool that is to be called is no {type: function, function: {name: ...}}")
