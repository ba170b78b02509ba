"""Answers to response bodies, read back by the official client's models."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from openai.types import Completion as TextCompletion
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from quantbatch.batchfile.lines import line_of, with_created
from quantbatch.batchfile.replies import body, calls_of, fault
from quantbatch.batchfile.tokens import TokenTexts
from quantbatch.prompts.tokens import load_tokenizer
from quantbatch.records import Completion, Embedded, FinishReason, RequestId, TokenLogprobs
from quantbatch.wants import Ask, Embed, Grammar, Write

if TYPE_CHECKING:
    from pathlib import Path

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SCHEMA = {"type": "object", "required": ["city"]}


@pytest.fixture
def texts(tiny_tokenizer_folder: Path) -> TokenTexts:
    return TokenTexts(lambda: load_tokenizer(tiny_tokenizer_folder))


def ids_of(texts: TokenTexts, text: str) -> list[int]:
    ids: list[int] = texts._tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def said(
    text: str,
    ids: list[int],
    reason: FinishReason = STOP,
    *,
    sample: int = 0,
    logprob: float | None = None,
) -> Completion:
    logprobs = None
    if logprob is not None:
        logprobs = tuple(TokenLogprobs(logprob, ((id, logprob), (5, -9.0))) for id in ids)
    return Completion(RequestId(0, 0, sample), text, tuple(ids), reason, logprobs)


def ask(kind: str, want: Any = None, **about: Any) -> Ask:
    told = {"kind": kind, "id": "abc", "model": "m", "prompt_tokens": 11} | about
    if "tools" in told:
        told = {"family": "hermes"} | told
    return Ask(want or Write(), about=told)


def chat(made: dict[str, Any]) -> ChatCompletion:
    return ChatCompletion.model_validate(with_created(made, 5), strict=True)


def test_a_chat_with_log_probabilities(texts: TokenTexts) -> None:
    ids = ids_of(texts, "friendly staff\u00e9")
    end = texts._tokenizer.eos_token_id
    answers = [
        said("friendly staff\u00e9", [*ids, end], logprob=-0.5),
        said("friendly staff\u00e9", ids, LENGTH, sample=1, logprob=-0.25),
    ]
    found = chat(body(ask("chat"), answers, texts))
    assert [choice.finish_reason for choice in found.choices] == ["stop", "length"]
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.usage is not None
    assert found.usage.completion_tokens == 2 * len(ids) + 1
    assert found.usage.total_tokens == 11 + 2 * len(ids) + 1
    for choice in found.choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content
        assert content is not None
        assert len(content) == len(ids)  # the token that ended it is not shown
        spelled = b"".join(bytes(token.bytes or []) for token in content)
        assert spelled.decode() == "friendly staff\u00e9" == choice.message.content
        assert [len(token.top_logprobs) for token in content] == [2] * len(ids)
        assert {token.logprob for token in content} <= {-0.5, -0.25}


def test_a_stop_string_is_not_shown(texts: TokenTexts) -> None:
    ids = ids_of(texts, "good") + ids_of(texts, " STOP")
    found = chat(body(ask("chat"), [said("good", ids, logprob=-1.0)], texts))
    assert found.choices[0].logprobs is not None
    content = found.choices[0].logprobs.content
    assert "".join(token.token for token in content or []) == "good"


def test_a_token_that_can_not_be_is_a_number_in_json(texts: TokenTexts) -> None:
    made = body(ask("chat"), [said("a", [60], LENGTH, logprob=float("-inf"))], texts)
    json.dumps(made, allow_nan=False)
    assert made["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999


def test_completions_of_several_prompts(texts: TokenTexts) -> None:
    ids = ids_of(texts, "the food")
    answers = [said("the food", ids, LENGTH, sample=n, logprob=-0.5) for n in range(4)]
    made = with_created(body(ask("completion"), answers, texts), 5)
    found = TextCompletion.model_validate(made, strict=True)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == "the food"
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[:2] == [0, len((logprobs.tokens or [""])[0])]
    assert logprobs.token_logprobs == [-0.5] * len(ids)


def test_one_greedy_answer_is_given_n_times(texts: TokenTexts) -> None:
    found = chat(body(ask("chat", copies=3), [said("a", [60, 61])], texts))
    assert [choice.message.content for choice in found.choices] == ["a"] * 3
    assert found.usage is not None
    assert found.usage.completion_tokens == 6


def hermes(**strict: Any) -> dict[str, Any]:
    return {"family": "hermes", "tools": strict}


@pytest.mark.parametrize("inner", ["[" * 100_000, '{"name": "f", "arguments": {"a": "\\ud800"}}'])
def test_a_call_that_can_not_be_read_is_a_fault(inner: str) -> None:
    assert "no JSON" in calls_of(hermes(), f"<tool_call>{inner}</tool_call>").fault


@pytest.mark.parametrize(
    ("family", "text", "content"),
    [
        ("hermes", f"I look. {CALL}", "I look."),
        ("llama", '{"name": "weather", "parameters": {"city": "Rome"}}', None),
        (
            "mistral",
            'So. [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]',
            "So.",
        ),
    ],
)
def test_calls_are_read_as_their_model_writes_them(
    texts: TokenTexts, family: str, text: str, content: str | None
) -> None:
    of = ask("chat", tools={"weather": SCHEMA}, family=family)
    found = chat(body(of, [said(text, [60])], texts)).choices[0]
    assert (found.message.content, found.finish_reason) == (content, "tool_calls")
    assert found.message.tool_calls is not None
    [call] = found.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rome"}')
    wrong = text.replace("city", "town")
    assert "'city' is a required property" in calls_of(of.about, wrong).fault
    unknown = calls_of(of.about | {"family": None}, text)
    assert (unknown.content, unknown.calls, unknown.fault) == (text, (), "")


def test_calls_of_tools(texts: TokenTexts) -> None:
    answer = said(f"I look. {CALL}\n{CALL}", [60])
    found = chat(body(ask("chat", tools={}), [answer], texts))
    choice = found.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    calls = choice.message.tool_calls
    assert calls is not None
    assert len({call.id for call in calls}) == 2
    first = calls[0]
    assert first.type == "function"
    assert (first.function.name, first.function.arguments) == ("weather", '{"city": "Rome"}')
    assert chat(body(ask("chat"), [answer], texts)).choices[0].message.tool_calls is None


def test_calls_that_are_none() -> None:
    for text in ("<tool_call>{</tool_call>", '<tool_call>{"a": 1}</tool_call>', "<tool_call>"):
        found = calls_of(hermes(), text)
        assert (found.content, found.calls) == (text, ())
        assert found.fault
    assert calls_of(hermes(weather=SCHEMA), CALL).fault == ""
    wrong = CALL.replace("city", "town")
    assert calls_of(hermes(weather=SCHEMA), wrong).fault.startswith("arguments of weather: ")


def test_whole_answers_are_checked_for_their_form() -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    wanted = ask("chat", Write(grammar=grammar))
    assert fault(wanted, [said('{"city": 1}', [60])]) is None
    assert fault(wanted, [said('{"city"', [60], LENGTH)]) is None  # cut, not wrong
    for text, of, reason in (
        ("{}", wanted, "'city' is a required property"),
        ('{"city"', wanted, "no JSON"),
        ("<tool_call>", ask("chat", tools={}), "has no end"),
    ):
        found = fault(of, [said(text, [60])])
        assert found is not None
        assert reason in found.reason


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_vectors_have_the_length_1(texts: TokenTexts, encoding: str) -> None:
    vectors = [(3.0, 4.0), (0.0, 0.0), (1e-3, 1e-3)]
    answers = [Embedded(RequestId(0, 0, n), v) for n, v in enumerate(vectors)]
    made = body(ask("embedding", Embed(), encoding=encoding), answers, texts)
    if encoding == "base64":
        for each in made["data"]:
            each["embedding"] = np.frombuffer(base64.b64decode(each["embedding"]), "<f4").tolist()
    found = CreateEmbeddingResponse.model_validate(made)
    assert np.allclose(found.data[0].embedding, [0.6, 0.8], atol=1e-7)
    assert found.data[1].embedding == [0.0, 0.0]
    assert np.allclose(found.data[2].embedding, [0.5**0.5] * 2, atol=1e-7)
    assert found.usage.total_tokens == 11


def test_a_model_s_failure_is_the_server_s() -> None:
    row = {"custom_id": "a", "row_id": "a", "status": "error", "error_type": "model"}
    line = json.loads(line_of(row | {"error_message": "ValueError: no", "response": None}, "x", 5))
    assert line["response"]["status_code"] == 500
    assert line["response"]["body"]["error"]["type"] == "server_error"
