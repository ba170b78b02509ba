"""Answers that have a form: statuses, reasons, typed columns, and what is refused before a run."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from quantbatch import rows, tasks
from quantbatch.errors import SpecError
from quantbatch.records import Answer, Completion, FinishReason, RequestId, from_token_lists
from quantbatch.spec import JobSpec
from quantbatch.specfile import load_spec
from quantbatch.tasks import flat
from quantbatch.wants import Grammar, Write, read_ask

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "stars": {"type": "integer"},
        "score": {"type": ["number", "null"]},
        "urgent": {"type": "boolean"},
        "kind": {"enum": ["a", "b", None]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "size": {"anyOf": [{"$ref": "#/$defs/Size"}, {"type": "null"}]},
    },
    "$defs": {"Size": {"enum": ["S", "L"], "type": "string"}},
    "required": ["title", "stars"],
}
GOOD = {
    "title": "Grüße 😀", "stars": 5, "score": 1, "urgent": True, "kind": "a", "tags": ["x", "y"],
    "size": "L",
}  # fmt: skip


def job(response: dict[str, Any] | None, *, explode: bool = False, **changes: Any) -> JobSpec:
    fields = {
        "name": "t", "input": {"uri": "in"}, "model": {"id": "m"}, "prompt": {"template": "x"},
        "output": {"uri": "out", "explode": explode},
        "task": {"kind": "generate", "response": response},
    }  # fmt: skip
    return JobSpec.model_validate(fields | changes)


def answered(
    spec: JobSpec, texts: list[str], reason: FinishReason = STOP, schemas: list[Any] | None = None
) -> pa.Table:
    count = len(texts)
    ids = pa.array([f"f:{row}" for row in range(count)])
    prompts = from_token_lists([[7]] * count)
    asked = tasks.asked(spec, pa.table({"form": schemas or [None] * count}))
    rendered = rows.rendered(pa.table({"text": ids}), ids, prompts, dict(asked.errors), asked.asks)
    answers: list[list[Answer]] = [
        []
        if row in asked.errors
        else [Completion(RequestId(0, row), text, tuple(range(len(text))), reason)]
        for row, text in enumerate(texts)
    ]
    return rows.answered(rows.with_facts(rendered, rows.ChunkFacts(0, count)), answers, spec)


def test_wrong_answers_are_invalid_with_the_reason_and_kept() -> None:
    texts = [json.dumps(GOOD), '{"title": "a"}', "no"]
    found = answered(job({"json_schema": SCHEMA}), texts)
    assert found["status"].to_pylist() == ["ok", "invalid", "invalid"]
    assert found["error_type"].to_pylist() == [None, "schema", "schema"]
    assert "'stars' is a required property" in found["error_message"][1].as_py()
    assert found["completion"].to_pylist() == texts
    counts = rows.counts_of(found)
    assert (counts.ok, counts.invalid) == (1, 2)


@pytest.mark.parametrize(
    ("response", "good", "bad", "kind"),
    [
        ({"regex": "[0-9]+"}, "12", "12a", "regex"),
        ({"choices": ["yes", "no"]}, "yes", "Yes", "choices"),
        ({"grammar": 'start: "x"+'}, "xx", "xy", "grammar"),
        ({"json_schema": '{"type": "integer"}'}, "3", "3.5", "schema"),
    ],
)
def test_every_form(response: dict[str, Any], good: str, bad: str, kind: str) -> None:
    found = answered(job(response), [good, bad])
    assert found["status"].to_pylist() == ["ok", "invalid"]
    assert found["error_type"].to_pylist() == [None, kind]


def test_what_was_cut_off_is_truncated_and_not_parsed() -> None:
    whole = json.dumps(GOOD)
    found = answered(job({"json_schema": SCHEMA}, explode=True), [whole[:9], whole], LENGTH)
    assert found["status"].to_pylist() == ["truncated", "truncated"]
    assert found["completion"].to_pylist() == [whole[:9], whole]
    assert found["title"].null_count == 2
    assert found["error_type"].null_count == 2


def test_fields_become_typed_columns() -> None:
    spec = job({"json_schema": SCHEMA}, explode=True)
    small = {"title": "", "stars": -(2**63), "extra": 1}
    found = answered(spec, [json.dumps(GOOD), json.dumps(small), "no"])
    assert found["status"].to_pylist() == ["ok", "ok", "invalid"]
    assert {name: str(found[name].type) for name in SCHEMA["properties"]} == {
        "title": "string", "stars": "int64", "score": "double", "urgent": "bool", "kind": "string",
        "tags": "list<item: string>", "size": "string",
    }  # fmt: skip
    got = found.select(list(SCHEMA["properties"])).to_pylist()
    assert got == [GOOD, dict.fromkeys(SCHEMA["properties"]) | {"title": "", "stars": -(2**63)},
                   dict.fromkeys(SCHEMA["properties"])]  # fmt: skip
    assert isinstance(got[0]["score"], float)


@pytest.mark.parametrize("stars", [2**63, -(2**63) - 1, 10**40])
def test_an_integer_that_does_not_fit_is_no_other_number(stars: int) -> None:
    spec = job({"json_schema": SCHEMA}, explode=True)
    text = json.dumps(GOOD | {"stars": stars})
    found = answered(spec, [text])
    assert found["status"].to_pylist() == ["invalid"]
    assert found["error_type"].to_pylist() == ["schema"]
    assert "does not fit 64 bits" in found["error_message"][0].as_py()
    assert found["completion"].to_pylist() == [text]
    assert found["stars"].to_pylist() == [None]
    # Without columns there is nothing that it has to fit.
    assert answered(job({"json_schema": SCHEMA}), [text])["status"].to_pylist() == ["ok"]


@pytest.mark.parametrize("score", [2**53 + 1, 10**400])
def test_an_integer_that_no_double_holds_is_not_rounded(score: int) -> None:
    spec = job({"json_schema": SCHEMA}, explode=True)
    found = answered(
        spec, [json.dumps(GOOD | {"score": score}), json.dumps(GOOD | {"score": 2**53})]
    )
    assert found["status"].to_pylist() == ["invalid", "ok"]
    assert "is no double" in found["error_message"][0].as_py()
    assert found["score"].to_pylist() == [None, 2.0**53]


def test_an_integer_written_with_a_point_is_one() -> None:
    spec = job({"json_schema": SCHEMA}, explode=True)
    found = answered(spec, ['{"title": "a", "stars": 4.0}'])
    assert found["stars"].to_pylist() == [4]


def test_several_samples_are_lists() -> None:
    spec = job({"json_schema": SCHEMA}, explode=True, sampling={"n": 2, "temperature": 1.0})
    ids, prompts = pa.array(["f:0"]), from_token_lists([[7]])
    rendered = rows.rendered(pa.table({"text": ids}), ids, prompts, {})
    both: list[Answer] = [
        Completion(RequestId(0, 0, k), text, (1,), STOP)
        for k, text in enumerate([json.dumps(GOOD), "no"])
    ]
    found = rows.answered(rows.with_facts(rendered, rows.ChunkFacts(0, 1)), [both], spec)
    assert found["status"].to_pylist() == ["invalid"]
    assert found["error_message"][0].as_py().startswith("sample 1 of 2: no JSON")
    assert found["stars"].to_pylist() == [[5, None]]


@pytest.mark.parametrize(
    "properties",
    [
        {"a": {"type": "object"}},
        {"a": {"type": "array", "items": {"type": "array"}}},
        {"a": {"type": ["string", "integer"]}},
        {"a": {"type": "array", "items": {"type": "string"}, "prefixItems": [{"const": 1}]}},
        {"a": {"enum": ["a", 1]}},
        {"a": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
        {"a": {"$ref": "#/$defs/missing"}},
        {"a": True},
        {},
    ],
)
def test_what_is_not_flat_has_no_columns(properties: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"property 'a'|no object"):
        flat.fields({"type": "object", "properties": properties})


def test_rows_have_schemas_of_their_own() -> None:
    spec = job({"schema_column": "form"})
    one, other = '{"type": "integer"}', '{"type": "string"}'
    schemas = [one, other, "{", None, '{"type": "strin"}', "[1]"]
    found = answered(spec, ["1", "1", "", "", "", ""], schemas=schemas)
    assert found["status"].to_pylist() == ["ok", "invalid", *["error"] * 4]
    assert found["error_type"].to_pylist() == [None, "schema", *["bad_schema"] * 4]
    messages = found["error_message"].to_pylist()
    assert "no JSON" in messages[2]
    assert "it is null" in messages[3]
    assert "strin" in messages[4]
    assert "an object" in messages[5]
    asks: Any = tasks.asked(spec, pa.table({"form": schemas})).asks
    assert tasks.want(spec, read_ask(asks[0].as_py())) == Write(grammar=Grammar("json_schema", one))


@pytest.mark.parametrize("schema", [1, [1], {"type": "object"}])
def test_a_row_s_schema_that_is_no_text_is_an_error_row(schema: Any) -> None:
    found = tasks.asked(job({"schema_column": "form"}), pa.table({"form": [schema]}))
    assert found.errors[0].message == "column 'form': it is no text"


def test_the_job_s_form_counts_for_rows_without_their_own() -> None:
    spec = job({"choices": ["é", "b"]})
    assert tasks.want(spec, read_ask(None)) == Write(grammar=Grammar("choices", '["é", "b"]'))
    assert tasks.want(job(None), read_ask(None)) == Write()


@pytest.mark.parametrize(
    ("response", "changes", "field", "reason"),
    [
        ({"json_schema": {"type": "strin"}}, {}, "task.response.json_schema", "strin"),
        ({"regex": "("}, {}, "task.response.regex", "unclosed group"),
        ({"grammar": "start: x"}, {}, "task.response.grammar", "unknown name"),
        ({"schema_column": "no"}, {}, "task.response.schema_column", "no column 'no'"),
        ({"regex": "a"}, {"explode": True}, "output.explode", "json_schema"),
        (None, {"explode": True}, "output.explode", "no task.response"),
        (
            {"json_schema": {"type": "object", "properties": {"a": {"type": "object"}}}},
            {"explode": True}, "output.explode", "'a'",
        ),
        (
            {"json_schema": {"type": "object", "properties": {"status": {"type": "string"}}}},
            {"explode": True}, "output.explode", "'status'",
        ),
        (
            {"json_schema": {"type": "object", "properties": {"cached": {"type": "boolean"}}}},
            {"explode": True}, "output.explode", "'cached'",
        ),
        (
            {"json_schema": {"type": "object", "properties": {"in.a": {"type": "boolean"}}}},
            {"explode": True}, "output.explode", "'in.a'",
        ),
        ({"regex": "a"}, {"sampling": {"min_new_tokens": 1}}, "sampling.min_new_tokens", "ends"),
        ({"regex": "a"}, {"engine": {"kind": "llama_cpp"}}, "task.response", "llama_cpp"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_refused(
    response: dict[str, Any] | None, changes: dict[str, Any], field: str, reason: str
) -> None:
    with pytest.raises(SpecError) as caught:
        tasks.check(job(response, **changes), ["text", "form"])
    [problem] = caught.value.problems
    assert problem.problem.startswith(f"{field}: ")
    assert reason in problem.problem
    assert problem.hint


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("{}", "exactly one of"),
        ("{regex: a, choices: [b]}", "regex and choices"),
        ("{choices: []}", "at least 1"),
        ("{choices: [a, a]}", "twice"),
        ("{json_schema: '{'}", "no JSON"),
        ("{json_schema: '[]'}", "object"),
        ("{json_schema: {const: .nan}}", "JSON"),
    ],
)
def test_a_response_that_is_none(tmp_path: Any, response: str, reason: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "name: t\ninput: {uri: in}\nmodel: {id: m}\nprompt: {template: x}\noutput: {uri: out}\n"
        f"task:\n  kind: generate\n  response: {response}\n"
    )
    with pytest.raises(SpecError, match=reason):
        load_spec(path)


def test_the_order_of_properties_is_part_of_the_job() -> None:
    one: dict[str, Any] = {"properties": {"a": {}, "b": {}}}
    other: dict[str, Any] = {"properties": {"b": {}, "a": {}}}
    first, second = (job({"json_schema": each}).fingerprint() for each in (one, other))
    assert first != second
    assert job({"json_schema": json.dumps(one)}).fingerprint() == first
