"""Tools go through the chat template, and calls of them come back as a column."""

from __future__ import annotations

import pickle
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from quantbatch import rows
from quantbatch.errors import ModelError, SpecError
from quantbatch.prompts.renderers import renderer_of
from quantbatch.records import Answer, Completion, FinishReason, RequestId
from quantbatch.spec import JobSpec
from quantbatch.tasks import check
from tests.integration.llama import make_tokenizer

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> #}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def job(**changes: Any) -> JobSpec:
    fields = {
        "name": "t", "input": {"uri": "in"}, "model": {"id": "m"},
        "prompt": {"template": "{{ a }}"},
        "output": {"uri": "out"}, "task": {"kind": "generate", "tools": [TOOL]},
    }  # fmt: skip
    return JobSpec.model_validate(fields | changes)


def tokenizer(template: str) -> Any:
    made = make_tokenizer()
    made.chat_template = template
    return made


def answered(template: str, *texts: str) -> pa.Table:
    renderer = renderer_of(job(), tokenizer(template), max_prompt_tokens=500)
    table = pa.table({"a": ["how?"] * len(texts)})
    prompts = pickle.loads(pickle.dumps(renderer)).render(table)
    assert '"name": "weather"' in tokenizer(template).decode(prompts.token_ids[0].as_py())
    ids = pa.array([f"f:{row}" for row in range(len(texts))])
    found = rows.rendered(table, ids, prompts.token_ids, prompts.errors, prompts.asks)
    answers: list[list[Answer]] = [
        [Completion(RequestId(0, row), text, (1,), FinishReason.STOP)]
        for row, text in enumerate(texts)
    ]
    return rows.answered(rows.with_facts(found, rows.ChunkFacts(0, len(texts))), answers, job())


def test_calls_are_a_column() -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Rom"}}</tool_call>'
    found = answered(TEMPLATE, call, "It rains.", "<tool_call>weather</tool_call>")
    assert found["status"].to_pylist() == ["ok", "ok", "invalid"]
    assert found["error_type"].to_pylist() == [None, None, "tool_call"]
    assert found["completion"][0].as_py() == call
    called = [{"name": "weather", "arguments": '{"city": "Rom"}'}]
    assert found["tool_calls"].to_pylist() == [called, [], None]


def test_a_family_that_is_not_known_has_no_parsed_calls() -> None:
    found = answered(TEMPLATE.replace("<tool_call>", ""), "<tool_call>")
    assert found["status"].to_pylist() == ["ok"]
    assert found["tool_calls"].to_pylist() == [None]


def test_tools_that_can_not_be_told_of_are_refused() -> None:
    with pytest.raises(ModelError, match="knows no tools"):
        renderer_of(job(), tokenizer("{{ messages[0].content }}"), max_prompt_tokens=500)
    with pytest.raises(SpecError, match=r"task\.tools"):
        check(job(prompt={"template": "{{ a }}", "format": "text"}), ["a"])
    with pytest.raises(ValidationError, match="either response or tools"):
        job(task={"kind": "generate", "tools": [TOOL], "response": {"regex": "a"}})
