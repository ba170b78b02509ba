"""Calls of tools, as families of models write them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from quantbatch import structured
from quantbatch.toolcalls import Choice, Family, ToolCall, beside, family_of, forced, parse

HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "K\u00f6ln"}}\n</tool_call>'
ONE = ToolCall("weather", '{"city": "K\u00f6ln"}')


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{%- if tools %}<tool_call>{{ x }}</tool_call>", "hermes"),
        ("<tool_call>\n<function=name>", None),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS] [", "mistral"),
        ("[TOOL_CALLS]name[ARGS]{}", None),
        ('<|start_header_id|>{"name": x, "parameters": dictionary}', "llama"),
        ("<|im_start|>{{ message.content }}", None),
    ],
)
def test_the_template_tells_the_family(template: str, family: str | None) -> None:
    assert family_of(template) == family


@pytest.mark.parametrize(
    ("family", "text", "calls"),
    [
        ("hermes", HERMES, [ONE]),
        ("hermes", f"Let me see.\n{HERMES}\n{HERMES}", [ONE, ONE]),
        ("hermes", "It rains.", []),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', [ToolCall("now", "{}")]),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "K\u00f6ln"}}]',
            [ONE],
        ),
        ("mistral", '[{"name": "weather", "arguments": {"city": "K\u00f6ln"}}]', [ONE]),
        ("mistral", "[1] says that it rains.", []),
        ("llama", '{"name": "weather", "parameters": {"city": "K\u00f6ln"}}', [ONE]),
        ("llama", "It rains.", []),
    ],
)
def test_calls_are_found(family: Family, text: str, calls: list[ToolCall]) -> None:
    assert parse(family, text) == calls


@pytest.mark.parametrize(
    ("family", "text", "reason"),
    [
        ("hermes", '<tool_call>{"name": "weather"', "no end"),
        ("hermes", "<tool_call>weather</tool_call>", "no JSON"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "without a name"),
        ("hermes", '<tool_call>{"name": "a", "arguments": "b"}</tool_call>', "no object"),
        ("mistral", '[TOOL_CALLS] {"name": "a"}', "no list"),
        ("mistral", '[TOOL_CALLS] [{"name": "a", ', "no JSON"),
        ("llama", '{"name": "weather", "parameters": NaN}', "NaN"),
    ],
)
def test_what_is_no_call_says_why(family: Family, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(family, text)


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CITY = {
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Rom", "K\u00f6ln"]}},
}
NAME = 'the "weather" | now'
TOOLS = [tool(NAME, CITY), tool("now")]


Called = tuple[str, dict[str, Any]]
"""Name and arguments."""


def written(family: Family, *calls: Called) -> str:
    key = "parameters" if family == "llama" else "arguments"
    texts = [json.dumps({"name": n, key: a}, ensure_ascii=False) for n, a in calls]
    if family == "hermes":
        texts = [f"<tool_call>\n{text}\n</tool_call>" for text in texts]
    return "\n".join(texts)


@pytest.mark.parametrize("family", ["hermes", "llama"])
def test_forced_calls_are_all_that_an_answer_can_be(family: Family) -> None:
    rome: Called = (NAME, {"city": "Rom"})
    now: Called = ("now", {})
    any_call = forced(family, TOOLS, Choice())
    assert structured.problem(any_call) == ""
    for calls in ([rome], [(NAME, {"city": "K\u00f6ln"})], [now]):
        text = written(family, *calls)
        assert structured.fault(any_call, text) is None
        assert parse(family, text) == [
            ToolCall(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls
        ]
    others: list[list[Called]] = [[(NAME, {"city": "Bonn"})], [(NAME, {})], [("then", {})], []]
    for wrong in others:
        assert structured.fault(any_call, written(family, *wrong))
    assert structured.fault(any_call, "I look. " + written(family, now))
    several = structured.fault(any_call, written(family, rome, now))
    assert (several is None) == (family == "hermes")
    for choice in (Choice(once=True), Choice("now")):
        form = forced(family, TOOLS, choice)
        assert structured.fault(form, written(family, now)) is None
        assert structured.fault(form, written(family, now, now))
    assert structured.fault(forced(family, TOOLS, Choice("now")), written(family, rome))


@pytest.mark.parametrize(
    ("family", "tools", "choice", "reason"),
    [
        (None, TOOLS, Choice(), "not known"),
        ("mistral", TOOLS, Choice(), "can't be forced"),
        ("hermes", TOOLS, Choice("then"), f"no tool is called 'then', they are {NAME}, now"),
        ("hermes", [{"name": "now"}], Choice(), "no {type: function"),
    ],
)
def test_calls_that_can_not_be_forced(
    family: Family | None, tools: list[dict[str, Any]], choice: Choice, reason: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        forced(family, tools, choice)


def test_what_stands_beside_calls() -> None:
    assert beside("hermes", f"Let me see.\n{HERMES}\n{HERMES} So.") == "Let me see.\n\n So."
    assert beside("mistral", '[{"name": "a"}]') == beside("llama", '{"name": "a"}') == ""
