"""Each option of a body: what it becomes, or how it is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params

from quantbatch.batchfile.bodies import (
    REASONS,
    WITHOUT_EFFECT,
    Kind,
    Wanted,
    _Chat,
    _Completion,
    _Embedding,
    read_body,
    read_request,
)
from quantbatch.errors import RowError
from quantbatch.toolcalls import Choice
from quantbatch.wants import Grammar

SAID = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": SCHEMA},
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}


def chat(**options: Any) -> Wanted:
    return read_body("chat", {"model": "gpt-4o", "messages": SAID} | options)


def completion(**options: Any) -> Wanted:
    return read_body("completion", {"model": "davinci", "prompt": "hello"} | options)


def embedding(**options: Any) -> Wanted:
    return read_body("embedding", {"model": "ada", "input": "hello"} | options)


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, {}),
        ({"max_tokens": 7}, {"max_new_tokens": 7}),
        ({"max_completion_tokens": 7}, {"max_new_tokens": 7}),
        ({"max_completion_tokens": 7, "max_tokens": 7}, {"max_new_tokens": 7}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 1.5, "top_p": 0.5}, {"temperature": 1.5, "top_p": 0.5}),
        ({"n": 3}, {"n": 3}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"seed": 5}, {"seed": 5}),
        ({"seed": -1}, {"seed": 2**63 - 1}),
        ({"presence_penalty": -2}, {"presence_penalty": -2}),
        ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"logit_bias": {"50": -100, "7": 1.5}}, {"logit_bias": {"50": -100, "7": 1.5}}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 5}, {"logprobs": 5}),
        ({"logprobs": False}, {}),
        ({"temperature": None, "tools": None, "stop": None, "audio": None}, {}),
        ({"stream": False, "modalities": ["text"]}, {}),
    ],
)
def test_options_of_chats_become_sampling(
    options: dict[str, Any], sampling: dict[str, Any]
) -> None:
    assert chat(**options).sampling == sampling


def test_options_of_completions_become_sampling() -> None:
    found = completion(max_tokens=3, logprobs=2, best_of=1, echo=False, suffix="", n=1)
    assert found.sampling == {"max_new_tokens": 3, "logprobs": 2, "n": 1}
    assert completion(n=2, best_of=2).sampling == {"n": 2}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_options_without_effect_are_taken(name: str) -> None:
    assert chat(**{name: True}) == chat()
    assert completion(**{name: {"a": "b"}}) == completion()


@pytest.mark.parametrize(
    ("form", "params"),
    [
        (_Chat, chat_params.CompletionCreateParamsNonStreaming),
        (_Completion, completion_create_params.CompletionCreateParamsNonStreaming),
        (_Embedding, embedding_create_params.EmbeddingCreateParams),
    ],
)
def test_every_option_of_the_official_client_is_known(form: Any, params: Any) -> None:
    known = {*form.model_fields, *WITHOUT_EFFECT, *REASONS}
    names = set(params.__annotations__)
    assert {"model", "user"} < names
    assert names <= known


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"audio": {"voice": "x"}}, "unsupported_option", 'audio: {"voice": "x"}: answers are'),
        ({"stream": True}, "unsupported_option", "stream: true: a batch has no stream"),
        ({"modalities": ["text", "audio"]}, "unsupported_option", "modalities: "),
        ({"functions": []}, "unsupported_option", "functions: []: deprecated, use tools"),
        ({"reasoning_effort": "low"}, "unsupported_option", 'reasoning_effort: "low": '),
        ({"verbosity": "low"}, "unsupported_option", 'verbosity: "low": '),
        ({"web_search_options": {}}, "unsupported_option", "web_search_options: {}: "),
        ({"best_of": 2}, "unsupported_option", "best_of: 2: "),
        ({"echo": True}, "unsupported_option", "echo: true: "),
        ({"top_z": 4}, "unsupported_option", "top_z: 4: there is no such option"),
        ({"temperature": 2.5}, "bad_request", "temperature: 2.5: should be less than"),
        ({"temperature": "hot"}, "bad_request", 'temperature: "hot": should be a valid number'),
        ({"temperature": float("nan")}, "bad_request", "temperature: NaN: "),
        ({"top_p": 0}, "bad_request", "top_p: 0: "),
        ({"n": 0}, "bad_request", "n: 0: "),
        ({"n": True}, "bad_request", "n: true: "),
        ({"max_tokens": 0}, "bad_request", "max_tokens: 0: "),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "bad_request", "max_tokens: 5: "),
        ({"stop": ""}, "bad_request", 'stop: "": '),
        ({"stop": ["a"] * 5}, "bad_request", "stop: ["),
        ({"stop": [1]}, "bad_request", "stop: [1]: "),
        ({"seed": 1.5}, "bad_request", "seed: 1.5: "),
        ({"presence_penalty": 3}, "bad_request", "presence_penalty: 3: "),
        ({"frequency_penalty": -3}, "bad_request", "frequency_penalty: -3: "),
        ({"logit_bias": [1]}, "bad_request", "logit_bias: [1]: "),
        ({"logit_bias": {"x": 1}}, "bad_request", 'logit_bias: "x": is no token id'),
        ({"logit_bias": {"5": 101}}, "bad_request", "logit_bias.5: 101: "),
        ({"logit_bias": {"5": True}}, "bad_request", "logit_bias.5: true: "),
        ({"logprobs": 3}, "bad_request", "logprobs: 3: "),
        ({"top_logprobs": 3}, "bad_request", "top_logprobs: 3: needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "bad_request", "top_logprobs: 21: "),
        ({"response_format": {"type": "xml"}}, "unsupported_option", "response_format: "),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "bad_request",
            'response_format.json_schema: {"name": "x"}: lacks a schema',
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "bad_request",
            'response_format.json_schema.schema: {"type": 5}: $.type: ',
        ),
        ({"tools": [{}]}, "bad_request", "tools.0: {}: "),
        ({"tools": "x"}, "bad_request", 'tools: "x": '),
        ({"tools": [{"type": "custom"}]}, "unsupported_option", 'tools.0.type: "custom": '),
        ({"tool_choice": "required"}, "bad_request", 'tool_choice: "required": needs tools'),
        ({"tools": [TOOL], "tool_choice": "any"}, "unsupported_option", "tool_choice: "),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "bad_request",
            'tool_choice: {"type": "function", "function": {"name": "x"}}: names none',
        ),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "unsupported_option", "parallel_tool"),
        (
            {"tools": [TOOL], "response_format": {"type": "json_object"}},
            "unsupported_option",
            "response_format: ",
        ),
        ({"model": None}, "bad_request", "model: is missing"),
        ({"messages": None}, "bad_request", "messages: is missing"),
        ({"messages": []}, "bad_request", "messages: []: "),
        ({"messages": ["x"]}, "bad_request", 'messages.0: "x": is no object'),
        ({"messages": [{"content": "x"}]}, "bad_request", "messages.0.role: should be one of"),
        ({"messages": [{"role": "king", "content": "x"}]}, "bad_request", 'messages.0.role: "king'),
        ({"messages": [{"role": "user"}]}, "bad_request", "messages.0.content: should be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "unsupported_option",
            'messages.0.content.0.type: "image_url": only parts of text',
        ),
        (
            {"messages": [{"role": "user", "content": "x", "mood": "good"}]},
            "unsupported_option",
            'messages.0.mood: "good": ',
        ),
    ],
)
def test_what_can_t_be_honoured_is_named_with_its_value(
    options: dict[str, Any], kind: str, said: str
) -> None:
    with pytest.raises(RowError) as caught:
        chat(**options)
    assert (caught.value.kind, caught.value.message[: len(said)]) == (kind, said)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("completion", {"prompt": None}, "prompt: is missing"),
        ("completion", {"prompt": ""}, 'prompt: "": '),
        ("completion", {"prompt": []}, "prompt: []: "),
        ("completion", {"prompt": ["a", 5]}, "prompt.1: 5: "),
        ("completion", {"prompt": [5, -1]}, "prompt.0: 5: "),
        ("completion", {"suffix": "x"}, 'suffix: "x": '),
        ("completion", {"logprobs": True}, "logprobs: true: "),
        ("completion", {"tools": [TOOL]}, "tools: "),
        ("embedding", {"input": {}}, "input: {}: "),
        ("embedding", {"input": ["a"] * 2049}, "input: has 2,049 texts"),
        ("embedding", {"dimensions": 5}, "dimensions: 5: "),
        ("embedding", {"encoding_format": "hex"}, 'encoding_format: "hex": '),
        ("embedding", {"temperature": 1}, "temperature: 1: there is no such option"),
    ],
)
def test_other_bodies_are_refused_alike(kind: Kind, options: dict[str, Any], said: str) -> None:
    body = {"model": "m", "prompt" if kind == "completion" else "input": "x"} | options
    with pytest.raises(RowError) as caught:
        read_body(kind, body)
    assert caught.value.message.startswith(said)


def test_forms_of_answers() -> None:
    assert chat(response_format={"type": "text"}).grammar is None
    assert chat(response_format={"type": "json_object"}).grammar == Grammar(
        "json_schema", '{"type": "object"}'
    )
    wanted = {"name": "x", "schema": SCHEMA, "strict": True}
    found = chat(response_format={"type": "json_schema", "json_schema": wanted}).grammar
    assert found == Grammar("json_schema", json.dumps(SCHEMA))


def test_tools_are_told_unless_none_is_to_be_chosen() -> None:
    assert chat(tools=[TOOL]).tools == [TOOL]
    assert chat(tools=[TOOL]).about == {"kind": "chat", "tools": {}}
    assert chat(tools=[TOOL], tool_choice="auto", parallel_tool_calls=True).tools == [TOOL]
    assert chat(tools=[TOOL], tool_choice="none").tools is None
    assert chat(tools=[TOOL], tool_choice="auto").choice is None
    assert chat(tools=[TOOL], tool_choice="required").choice == Choice()
    once = chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    assert once.choice == Choice(once=True)
    name = TOOL["function"]["name"]
    named = {"type": "function", "function": {"name": name}}
    assert chat(tools=[TOOL], tool_choice=named).choice == Choice(name)
    assert chat(tools=[]).tools is None
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    assert chat(tools=[strict]).about["tools"] == {"weather": SCHEMA}


def test_messages_become_what_templates_take() -> None:
    messages = [
        {"role": "developer", "content": "be brief", "name": None},
        {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"], "name": "eva"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "assistant", "refusal": "no"},
    ]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"a": 1}}}
    assert chat(messages=messages).conversation == [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "a\nb", "name": "eva"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "assistant", "content": "no"},
    ]


def test_prompts_and_inputs_are_texts_or_tokens_or_lists_of_them() -> None:
    assert completion(prompt="a").prompts == ("a",)
    assert completion(prompt=["a", "b"]).prompts == ("a", "b")
    assert completion(prompt=[1, 2]).prompts == ((1, 2),)
    assert embedding(input=[[1, 2], [3]]).prompts == ((1, 2), (3,))
    assert embedding(input="a", encoding_format="base64").about["encoding"] == "base64"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": None}, "method: is missing"),
        ({"method": "GET"}, 'method: "GET": should be POST'),
        ({"url": None}, "url: is missing"),
        ({"url": "/v1/images"}, 'url: "/v1/images": should be one of /v1/chat/completions, '),
        ({"body": None}, "body: is missing"),
        ({"body": "[]"}, 'body: "[]": is no object'),
        ({"body": "hello"}, 'body: "hello": is no object'),
        ({"body": '{"model": ' + "[" * 100_000}, 'body: "{\\"model\\": [['),
        ({"body": '{"model": "\\ud800"}'}, 'body: "{\\"model\\": \\"\\\\ud800'),
        ({"body": '"' + "x" * 1_000_000 + '"'}, "body: has more than 1,000,000 bytes"),
    ],
)
def test_lines_that_lack_something(changes: dict[str, str | None], said: str) -> None:
    body = json.dumps({"model": "m", "messages": SAID})
    line: dict[str, str | None] = {"method": "post", "url": "/v1/chat/completions", "body": body}
    assert read_request(line).conversation == SAID
    with pytest.raises(RowError) as caught:
        read_request(line | changes)
    assert caught.value.message.startswith(said)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": "\\ud800"}'])
def test_arguments_that_can_not_be_read_stay_text(text: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": text}}
    body = json.dumps({"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]})
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    conversation: Any = read_request(line).conversation
    assert conversation[0]["tool_calls"][0]["function"]["arguments"] == text


def test_a_token_id_of_thousands_of_digits_is_none() -> None:
    body = json.dumps({"model": "m", "prompt": "a", "logit_bias": {"9" * 5000: 1}})
    with pytest.raises(RowError, match="is no token id"):
        read_request({"method": "POST", "url": "/v1/completions", "body": body})
