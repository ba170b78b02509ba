"""Answers of a form, forced calls of tools, requests of a batch file that are tried again: whole
jobs through a live Ray, with a tiny random model, whose answers have their form by force alone.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from openai.types.chat import ChatCompletion

from quantbatch import pipeline
from quantbatch.records import Status
from quantbatch.report import Outcome
from quantbatch.retry import retry
from quantbatch.specfile import load_spec
from tests.integration.llama import make_llama, make_tokenizer
from tests.integration.support import proven

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.support import Head

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> #}"
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        "kind": {"enum": ["good", "bad"]},
        "by": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 4}]},
    },
    "required": ["stars", "kind", "by"],
    "additionalProperties": False,
}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"properties": properties, "required": [*properties]}
    closed = parameters | {"type": "object", "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": closed}}


TOOLS = [tool("now"), tool("rain", city={"enum": ["Rom", "Bonn"]})]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_llama(
        tmp_path_factory.mktemp("model"),
        dtype=torch.float32,
        max_position_embeddings=1024,
        eos_token_id=0,
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write(folder: Path, model: Path, head: Head, **sections: Any) -> Path:
    fields: dict[str, Any] = {
        "name": "forms",
        "input": {"uri": str(folder / "in")},
        "model": {"id": str(model), "bits": 32},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_new_tokens": 200},
        "engine": {"batch_size": 8},
        "cluster": {"gpus_per_replica": 0, "address": head.address},
        "output": {"uri": str(folder / "out")},
        "limits": {"max_error_rate": 1.0},
    }
    fields |= {name: {**fields.get(name, {}), **values} for name, values in sections.items()}
    (folder / "log").write_text("")
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def answered(path: Path, folder: Path) -> list[dict[str, Any]]:
    pipeline.run(load_spec(path))
    proven(path)
    found: list[dict[str, Any]] = (
        ds.dataset(folder / "out", format="parquet").to_table().to_pylist()
    )
    return found


@pytest.mark.timeout(240)
def test_schemas_of_the_job_and_columns_from_them(
    tmp_path: Path, ray_head: Head, model: Path
) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table({"id": range(7), "text": [*"abcdef", None]})
    pq.write_table(table, tmp_path / "in" / "0.parquet")
    task = {"kind": "generate", "response": {"json_schema": SCHEMA}}
    output = {"explode": True}
    rows = answered(write(tmp_path, model, ray_head, task=task, output=output), tmp_path)
    assert [row["status"] for row in rows] == ["ok"] * 6 + ["error"]
    for row in rows[:6]:
        answer = json.loads(row["completion"])
        assert {name: row[name] for name in SCHEMA["properties"]} == answer
        assert row["kind"] in ("good", "bad")
        assert row["stars"] in range(1, 6)
    assert rows[6]["stars"] is rows[6]["kind"] is None


@pytest.mark.timeout(240)
def test_tools_of_each_row_whose_calls_are_required(
    tmp_path: Path, ray_head: Head, model: Path
) -> None:
    (tmp_path / "in").mkdir()
    # The first four rows are the same.
    own = [json.dumps(TOOLS[1:])] * 4 + [json.dumps(TOOLS[:1]), "[]", "{"]
    table = pa.table({"text": [*"aaaabcd"], "own": own})
    pq.write_table(table, tmp_path / "in" / "0.parquet")
    task = {"kind": "generate", "tools_column": "own", "tool_choice": "required"}
    rows = answered(write(tmp_path, model, ray_head, task=task), tmp_path)
    assert [row["error_type"] for row in rows[5:]] == ["bad_tools"] * 2
    assert {row["status"] for row in rows[:5]} <= {"ok", "truncated"}
    for row in rows[:5]:
        assert row["completion"].startswith("<tool_call>\n")
        if row["status"] == "ok":
            name = "rain" if row["text"] == "a" else "now"
            assert {call["name"] for call in row["tool_calls"]} == {name}
    assert len({row["completion"] for row in rows[:4]}) == 1
    kept = tmp_path / "out" / "_quantbatch" / "answers"
    assert kept.exists(), "rows repeat others"
    assert not [path for path in kept.rglob("*") if path.is_file()], "the job is done"


def line(number: int, url: str = "/v1/chat/completions", **body: Any) -> str:
    said = [{"role": "user", "content": f"row {number}"}]
    request = {"custom_id": f"r{number}", "method": "POST", "url": url}
    return json.dumps(request | {"body": {"model": "m", "messages": said, "seed": 3} | body})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.timeout(240)
def test_requests_that_failed_move_to_the_output_when_they_are_tried_again(
    tmp_path: Path, ray_head: Head, model: Path
) -> None:
    long = [{"role": "user", "content": "long " * 30}]
    now = {"type": "function", "function": {"name": "now"}}
    lines = [
        line(0, max_tokens=3),
        line(1, messages=long, max_tokens=3),
        line(2, url="/v1/audio"),
        line(3, response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}}),
        line(4, messages=long, tools=TOOLS, tool_choice=now),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    path = write(
        tmp_path, model, ray_head,
        input={"uri": str(tmp_path / "in.jsonl"), "format": "openai-batch"},
        prompt={"template": None}, engine={"max_input_tokens": 100},
    )  # fmt: skip
    pipeline.run(load_spec(path))
    proven(path)
    good, bad = (tmp_path / "out" / f"part-000000.{end}" for end in ("jsonl", "errors.jsonl"))
    before = read(good)
    assert [each["custom_id"] for each in before] == ["r0", "r3"]
    assert [each["custom_id"] for each in read(bad)] == ["r1", "r2", "r4"]
    codes = [each["response"]["body"]["error"]["code"] for each in read(bad)]
    assert codes == ["context_length_exceeded", "bad_request", "context_length_exceeded"]

    longer = load_spec(path, ["engine.max_input_tokens=800"])
    report = retry(longer, [Status.ERROR])
    assert (report.outcome, report.run.counts.rows) == (Outcome.DONE, 3)
    proven(path)
    after = read(good)
    assert [each["custom_id"] for each in after] == ["r0", "r1", "r3", "r4"]
    assert [each["custom_id"] for each in read(bad)] == ["r2"]
    assert [each for each in after if each["custom_id"] in ("r0", "r3")] == before
    called = ChatCompletion.model_validate(after[3]["response"]["body"], strict=True).choices[0]
    assert called.finish_reason == "tool_calls"
    assert called.message.tool_calls is not None
    [call] = called.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("now", "{}")
    assert json.loads(after[2]["response"]["body"]["choices"][0]["message"]["content"])
