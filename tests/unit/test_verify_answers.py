"""What `verify` notices in the columns of labels and vectors."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from quantbatch import tasks
from quantbatch.spec import JobSpec
from quantbatch.verify_answers import odd_rows, of_answers

GOOD = {"status": "ok", "error_type": None, "label": "a", "probabilities": {"a": 0.75, "b": 0.25}}
UNSURE = GOOD | {"status": "invalid", "error_type": "unsure", "label": None}
FAILED = {"status": "error", "error_type": "model", "label": None, "probabilities": None}


def odd(rows: list[dict[str, Any]], task: dict[str, Any]) -> dict[str, list[int]]:
    """Return the numbers of odd rows by what is wrong with them."""
    spec = JobSpec.model_validate(
        {
            "name": "n", "input": {"uri": "i"}, "model": {"id": "m"}, "output": {"uri": "o"},
            "prompt": {"template": "{{ t }}"}, "task": task,
        }
    )  # fmt: skip
    types = of_answers(spec) | {"status": pa.string(), "error_type": pa.string()}
    columns = {
        name: pa.chunked_array([pa.array([row.get(name) for row in rows], kind)])
        for name, kind in types.items()
    }
    found = odd_rows(spec, columns)
    return {
        kind: [i for i, is_odd in enumerate(marks.to_pylist()) if is_odd]
        for kind, marks in found.items()
        if any(marks.to_pylist())
    }


LABELS = {"kind": "classify", "labels": ["a", "b"]}
CONTRADICTION = "rows whose status and answer contradict each other"


def test_right_rows_are_not_odd() -> None:
    assert odd([GOOD, UNSURE, FAILED], LABELS) == {}


def test_wrong_labels_and_probabilities_are_noticed() -> None:
    rows = [
        GOOD | {"label": "c"},
        GOOD | {"probabilities": {"a": 0.7, "b": 0.2}},
        GOOD | {"probabilities": {"a": 1.5, "b": -0.5}},
        UNSURE | {"label": "a"},
        GOOD | {"label": None},
        GOOD | {"probabilities": None},
        FAILED | {"probabilities": {"a": 1.0, "b": 0.0}},
    ]
    found = odd(rows, LABELS)
    assert found["rows whose label is none of theirs"] == [0]
    assert found["rows whose probabilities are none"] == [1, 2]
    assert found["rows with a label though they are unsure, or without"][:2] == [3, 4]
    assert found[CONTRADICTION] == [5, 6]


def test_vectors_that_have_not_the_length_1_are_noticed() -> None:
    task = {"kind": "embed", "dimensions": 2}
    rows: list[dict[str, Any]] = [
        {"status": "ok", "embedding": vector} for vector in ([0.6, 0.8], [0.6, 0.6], [0.0, 0.0])
    ]
    rows.append({"status": "error", "error_type": "model", "embedding": None})
    assert odd(rows, task) == {"rows whose vector has not the length 1": [1]}
    assert odd(rows, task | {"normalize": False}) == {}


FLAT = {"type": "object", "properties": {"stars": {"type": "integer"}, "by": {"type": "string"}}}


@pytest.mark.parametrize(
    "schema",
    [
        FLAT,
        {"allOf": [FLAT]},
        {"anyOf": [{"type": "null"}, FLAT]},
        {"$ref": "#/$defs/R", "$defs": {"R": FLAT}},
        {"oneOf": [{"$ref": "#/$defs/R"}], "$defs": {"R": {"allOf": [FLAT]}}},
    ],
)
def test_properties_are_found_where_the_task_finds_them(schema: dict[str, Any]) -> None:
    spec = JobSpec.model_validate(
        {
            "name": "n", "input": {"uri": "i"}, "model": {"id": "m"},
            "output": {"uri": "o", "explode": True}, "prompt": {"template": "{{ t }}"},
            "task": {"kind": "generate", "response": {"json_schema": schema}},
        }
    )  # fmt: skip
    written = {field.name: field.type for field in tasks.fields(spec)}
    assert of_answers(spec) == written
    assert [*written][-2:] == ["stars", "by"]
    text = ['{"stars": 2, "by": "x"}']
    columns = {
        "status": ["ok"], "error_type": [None], "completion": text, "stars": [2], "by": ["y"],
    }  # fmt: skip
    found = odd_rows(
        spec, {name: pa.chunked_array([pa.array(each)]) for name, each in columns.items()}
    )
    assert found["rows whose columns are not what their answer says"].to_pylist() == [True]
