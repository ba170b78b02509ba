"""Tools go through the chat template, and calls of them come back as a column."""

from __future__ import annotations

import json
import pickle
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from pydantic import ValidationError

from quantbatch import rows, structured
from quantbatch.errors import ModelError, RowError, SpecError
from quantbatch.prompts.renderers import renderer_of
from quantbatch.records import Answer, Completion, FinishReason, RequestId
from quantbatch.spec import JobSpec
from quantbatch.tasks import check
from quantbatch.wants import Ask, Write, read_ask
from tests.integration.llama import END, make_tokenizer

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


def answered(template: str, *texts: str, **changes: Any) -> pa.Table:
    renderer = renderer_of(job(**changes), tokenizer(template), max_prompt_tokens=500)
    table = pa.table({"a": ["how?"] * len(texts)})
    prompts = pickle.loads(pickle.dumps(renderer)).render(table)
    assert '"name": "weather"' in tokenizer(template).decode(prompts.token_ids[0].as_py())
    ids = pa.array([f"f:{row}" for row in range(len(texts))])
    found = rows.rendered(table, ids, prompts.token_ids, prompts.errors, prompts.asks)
    answers: list[list[Answer]] = [
        [Completion(RequestId(0, row), text, (1,), FinishReason.STOP)]
        for row, text in enumerate(texts)
    ]
    whole = rows.with_facts(found, rows.ChunkFacts(0, len(texts)))
    return rows.answered(whole, answers, job(**changes))


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


OWN = [
    json.dumps([TOOL]),
    None,
    json.dumps([TOOL | {"function": {"name": f"time{END}", "parameters": None}}]),
    "[]",
    "{",
    json.dumps([{"name": "weather"}]),
    json.dumps([{"type": "function", "function": {"name": "a", "parameters": {"type": "no"}}}]),
    json.dumps([TOOL]),
]
COLUMN = {"kind": "generate", "tools_column": "own"}


class Rendered(NamedTuple):
    """What came of rows with tools."""

    texts: list[str]
    lengths: list[int]
    """Tokens of each."""
    asks: list[Ask | None]
    errors: dict[int, RowError]


def rendered(task: dict[str, Any]) -> Rendered:
    maker = tokenizer(TEMPLATE)
    renderer = renderer_of(job(task=task), maker, max_prompt_tokens=500)
    assert renderer.columns == {"a", "own"}
    table = pa.table({"a": [f"how {row}?" for row in range(len(OWN))], "own": OWN})
    prompts = pickle.loads(pickle.dumps(renderer)).render(table)
    lists = [ids or [] for ids in prompts.token_ids.to_pylist()]
    texts = [maker.decode(ids) for ids in lists]
    assert prompts.asks is not None
    asks = [text and read_ask(text) for text in prompts.asks.to_pylist()]
    return Rendered(texts, [*map(len, lists)], asks, dict(prompts.errors))


def test_rows_bring_tools_of_their_own() -> None:
    texts, lengths, asks, errors = rendered(COLUMN)
    for row in (0, 7):
        assert '"name": "weather"' in texts[row]
        assert texts[row].endswith(f"how {row}?")
    assert (texts[1], texts[3]) == ("how 1?", "how 3?")
    # Spelled out by other tokens: data does not end a turn.
    assert f"time{END}" in texts[2]
    encoded = tokenizer(TEMPLATE)(f"time{END}", add_special_tokens=False)["input_ids"]
    assert tokenizer(TEMPLATE).eos_token_id in encoded
    assert lengths[2] > len(tokenizer(TEMPLATE)(texts[2], add_special_tokens=False)["input_ids"])
    assert asks[0] is not None
    assert asks[0].about == {"tool_calls": "hermes"}
    assert {row: error.kind for row, error in errors.items()} == dict.fromkeys(
        (4, 5, 6), "bad_tools"
    )
    assert errors[4].message.startswith("column 'own': no JSON")
    assert "tools.0" in errors[5].message
    assert "tools.0.function.parameters" in errors[6].message


@pytest.mark.parametrize(("choice", "wrong"), [("required", (1, 3)), ("weather", (1, 2, 3))])
def test_calls_of_a_row_s_own_tools_are_forced(choice: str, wrong: tuple[int, ...]) -> None:
    *_, asks, errors = rendered(COLUMN | {"tool_choice": choice})
    assert set(errors) == {*wrong, 4, 5, 6}
    assert {error.kind for error in errors.values()} == {"bad_tools"}
    assert asks[0] is not None
    assert isinstance(asks[0].want, Write)
    assert asks[0].want.grammar is not None
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
    assert structured.fault(asks[0].want.grammar, call) is None
    assert structured.fault(asks[0].want.grammar, "no") is not None


def test_what_a_choice_of_tools_can_not_be() -> None:
    required = {"kind": "generate", "tools": [TOOL], "tool_choice": "required"}
    known, unknown = tokenizer(TEMPLATE), tokenizer(TEMPLATE.replace("<tool_call>", ""))
    renderer_of(job(task=required), known, max_prompt_tokens=500)
    with pytest.raises(SpecError, match="is not known"):
        renderer_of(job(task=required), unknown, max_prompt_tokens=500)
    other = required | {"tool_choice": "time"}
    with pytest.raises(SpecError, match="no tool is called 'time', they are weather"):
        renderer_of(job(task=other), known, max_prompt_tokens=500)
    with pytest.raises(SpecError, match="no column 'own'"):
        check(job(task=COLUMN), ["a"])
    with pytest.raises(SpecError, match="llama_cpp writes free answers only"):
        check(job(task=required, engine={"kind": "llama_cpp"}), ["a"])
    for task, said in (
        (COLUMN | {"tools": [TOOL]}, "either tools or tools_column"),
        ({"kind": "generate", "tool_choice": "required"}, "needs tools"),
    ):
        with pytest.raises(ValidationError, match=said):
            job(task=task)


def test_an_answer_that_is_no_call_is_invalid_where_calls_are_forced() -> None:
    task = {"kind": "generate", "tools": [TOOL], "tool_choice": "required"}
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    found = answered(TEMPLATE, call, "It rains.", task=task)
    assert found["status"].to_pylist() == ["ok", "invalid"]
    assert found["error_type"].to_pylist() == [None, "tool_call"]
