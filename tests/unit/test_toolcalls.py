"""Calls of tools, as families of models write them."""

from __future__ import annotations

import pytest

from quantbatch.toolcalls import Family, ToolCall, family_of, parse

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
