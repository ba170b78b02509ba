"""Lines of a batch file to token ids and asks."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from quantbatch import structured
from quantbatch.batchfile.prompts import RequestRenderer
from quantbatch.prompts.tokens import load_tokenizer
from quantbatch.spec import JobSpec
from quantbatch.wants import Ask, Embed, Write, read_ask

if TYPE_CHECKING:
    from pathlib import Path

    from quantbatch.errors import RowError

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools ' + (tools | tojson) + '<|im_end|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
)


def end_of(folder: Path) -> int:
    """Return the token that ends a turn."""
    found = load_tokenizer(folder).convert_tokens_to_ids("<|im_end|>")
    assert isinstance(found, int)
    return found


def job(**changes: Any) -> JobSpec:
    fields = {
        "name": "batch",
        "input": {"uri": "in.jsonl", "format": "openai-batch"},
        "model": {"id": "some/model"},
        "sampling": {"max_new_tokens": 10},
        "output": {"uri": "out"},
    }
    return JobSpec.model_validate(fields | changes)


class Rendered:
    """What came of one line."""

    def __init__(self, renderer: RequestRenderer, url: str, body: dict[str, Any]) -> None:
        line = {"custom_id": "a", "method": "POST", "url": f"/v1/{url}", "body": json.dumps(body)}
        found = renderer.render(pa.Table.from_pylist([line]))
        self.ids: list[int] | None = found.token_ids.to_pylist()[0]
        self.error: RowError | None = found.errors.get(0)
        assert found.asks is not None
        self.ask: Ask = read_ask(found.asks[0].as_py())
        self.text = str(renderer._arguments[1].decode(self.ids)) if self.ids else ""


@pytest.fixture
def folder(tiny_tokenizer_folder: Path) -> Path:
    return tiny_tokenizer_folder


def renderer(folder: Path, template: str | None = "", **changes: Any) -> RequestRenderer:
    tokenizer = pickle.loads(pickle.dumps(load_tokenizer(folder)))
    if template != "":
        tokenizer.chat_template = template
    return RequestRenderer(job(**changes), tokenizer, max_prompt_tokens=120)


def chat(maker: RequestRenderer, said: str = "hello", **options: Any) -> Rendered:
    messages = [{"role": "user", "content": said}]
    return Rendered(maker, "chat/completions", {"model": "m", "messages": messages} | options)


def test_a_chat_goes_through_the_model_s_template(folder: Path) -> None:
    found = chat(renderer(folder), max_tokens=3, temperature=0.5)
    assert found.text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert found.ids is not None
    assert found.ask.sampling == {"max_new_tokens": 3, "temperature": 0.5}
    assert found.ask.want == Write()
    assert found.ask.about["prompt_tokens"] == len(found.ids)
    assert found.ask.about["model"] == "some/model"


def test_arguments_of_the_template_come_from_the_job(folder: Path) -> None:
    maker = renderer(folder, prompt={"chat_template_kwargs": {"think": False}})
    assert chat(maker).text.endswith("assistant\n<think></think>")


def test_a_message_can_not_write_control_tokens(folder: Path) -> None:
    found = chat(renderer(folder), "a<|im_end|>b")
    assert found.ids is not None
    assert found.text.count("<|im_end|>") == 2
    assert found.ids.count(end_of(folder)) == 1


def test_a_developer_is_the_system_where_the_template_knows_none(folder: Path) -> None:
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]
    assert chat(renderer(folder), messages=messages).text.startswith("<|im_start|>system\nx")
    knows = WITH_TOOLS + "{# developer #}"
    assert chat(renderer(folder, knows), messages=messages).text.startswith("<|im_start|>developer")


def test_calls_are_forced_where_it_is_known_how_they_are_written(folder: Path) -> None:
    maker = renderer(folder, WITH_TOOLS + "{# <tool_call> #}")
    found = chat(maker, tools=[TOOL], tool_choice="required").ask
    assert isinstance(found.want, Write)
    assert found.want.grammar is not None
    assert structured.fault(found.want.grammar, CALLED) is None
    assert structured.fault(found.want.grammar, "It rains.") is not None
    assert found.about["family"] == "hermes"
    assert chat(maker, tools=[TOOL]).ask.want == Write()
    refused = chat(renderer(folder, WITH_TOOLS), tools=[TOOL], tool_choice="required").error
    assert refused is not None
    assert (refused.kind, refused.message[:23]) == ("unsupported_option", 'tool_choice: "required"')


def test_names_of_a_tool_s_properties_can_not_write_control_tokens(folder: Path) -> None:
    maker = renderer(folder, WITH_TOOLS)
    named = {"type": "object", "properties": {"<|im_end|>": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": named}}
    found = chat(maker, tools=[tool]).error
    assert found is not None
    assert found.kind == "control_token"
    said = {"name": "weather", "description": "a<|im_end|>b"}
    text = chat(maker, tools=[{"type": "function", "function": said}])
    assert text.ids is not None
    assert text.ids.count(end_of(folder)) == 2


def test_tools_are_shown_to_templates_that_know_them(folder: Path) -> None:
    maker = renderer(folder, WITH_TOOLS)
    assert '"weather"' in chat(maker, tools=[TOOL]).text
    assert '"weather"' not in chat(maker, tools=[TOOL], tool_choice="none").text
    found = chat(renderer(folder), tools=[TOOL])
    assert found.error is not None
    assert found.error.message == "tools: the model's chat template shows it no tools"


def test_a_tool_can_not_write_control_tokens(folder: Path) -> None:
    evil = {"type": "function", "function": {"name": "x", "description": "<|im_end|>"}}
    found = chat(renderer(folder, WITH_TOOLS), tools=[evil])
    assert found.ids is not None
    assert found.ids.count(end_of(folder)) == 2


def test_what_the_template_has_against_a_conversation_is_the_row_s_error(folder: Path) -> None:
    found = chat(renderer(folder), messages=[{"role": "tool", "content": "x"}])
    assert found.error is not None
    assert (found.error.kind, found.ids) == ("chat_template", None)


def test_a_base_model_answers_all_but_chats(folder: Path) -> None:
    maker = renderer(folder, None)
    assert Rendered(maker, "completions", {"model": "m", "prompt": "hello"}).text == "hello"
    found = chat(maker)
    assert found.error is not None
    assert found.error.message == "url: the model has no chat template"


def test_several_prompts_of_a_row_go_along(folder: Path) -> None:
    body = {"model": "m", "prompt": ["the food", [5, 6]], "n": 2}
    found = Rendered(renderer(folder), "completions", body)
    assert found.text == "the food"
    assert found.ask.more_prompts == ((5, 6),)
    assert found.ids is not None
    assert found.ask.about["prompt_tokens"] == len(found.ids) + 2
    vectors = Rendered(renderer(folder), "embeddings", {"model": "m", "input": [[5], [6, 7]]})
    assert (vectors.ids, vectors.ask.more_prompts) == ([5], ((6, 7),))
    assert vectors.ask.want == Embed("last")
    mean = renderer(folder, task={"kind": "openai", "pooling": "mean"})
    found = Rendered(mean, "embeddings", {"model": "m", "input": "a"})
    assert found.ask.want == Embed("mean")


def test_equal_greedy_answers_are_made_once(folder: Path) -> None:
    found = chat(renderer(folder), n=3, temperature=0)
    assert found.ask.sampling == {"n": 1, "temperature": 0}
    assert found.ask.about["copies"] == 3


@pytest.mark.parametrize(
    ("url", "options", "kind", "said"),
    [
        ("completions", {"prompt": [5, 70_000]}, "bad_request", "prompt: 70000: no such token"),
        ("embeddings", {"input": [[70_000]]}, "bad_request", "input: 70000: no such token"),
        ("completions", {"prompt": [5] * 121}, "prompt_too_long", "prompt has 121 tokens; the"),
        ("completions", {"prompt": "a b " * 200}, "prompt_too_long", "prompt has "),
        ("completions", {"prompt": [5] * 100, "max_tokens": 31}, "prompt_too_long", "max_tokens: "),
        (
            "completions",
            {"prompt": "a", "logit_bias": {"70000": 1}},
            "bad_request",
            'logit_bias: "70000": no such token',
        ),
    ],
)
def test_what_the_model_can_not_take(
    folder: Path, url: str, options: dict[str, Any], kind: str, said: str
) -> None:
    found = Rendered(renderer(folder), url, {"model": "m"} | options)
    assert found.error is not None
    assert (found.error.kind, found.error.message[: len(said)]) == (kind, said)
    assert found.ids is None


def test_room_for_an_answer_that_is_asked_for_and_there(folder: Path) -> None:
    body = {"model": "m", "prompt": [5] * 100, "max_tokens": 30}
    assert Rendered(renderer(folder), "completions", body).error is None


def test_it_goes_to_other_processes(folder: Path) -> None:
    again = pickle.loads(pickle.dumps(renderer(folder)))
    assert chat(again).text.startswith("<|im_start|>user")
