"""What `verify` knows of a task's columns: their types, and what has to be true of each row.

Written out here again, with no function of `tasks`: what readers are promised does not change
because the code that writes it did.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quantbatch.records import Status
from quantbatch.spec import BatchRequests, Classify, Embed, Generate, Score

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantbatch.spec import JobSpec

    Columns = Mapping[str, pa.ChunkedArray]

SUM_TOLERANCE = 1e-6
"""How far from 1 the sum of a row's probabilities may be."""
LENGTH_TOLERANCE = {"float32": 1e-3, "float16": 1e-2}
"""How far from 1 the length of a normalized vector may be."""
_ELSEWHERE = ("$ref", "anyOf", "oneOf", "allOf")
"""Keys under which a part of a schema says that another part is meant."""
_TOP = pa.list_(pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())]))
_PAIR = pa.struct([("label", pa.string()), ("probability", pa.float64())])


def of_answers(spec: JobSpec) -> dict[str, pa.DataType]:
    """Return the columns that a job's task adds to a row."""
    match spec.task:
        case Generate():
            return _of_completions(spec)
        case Classify() as task:
            one = pa.struct([(name, pa.float64()) for name in task.labels or ()])
            return {
                "label": pa.list_(pa.string()) if task.multi_label else pa.string(),
                "probabilities": one if task.labels else pa.list_(_PAIR),
                "margin": pa.float64(),
                "entropy": pa.float64(),
            }
        case Score() as task:
            tokens = {"token_ids": pa.list_(pa.int32()), "token_logprobs": pa.list_(pa.float32())}
            sums = {
                "logprob": pa.float64(),
                "perplexity": pa.float64(),
                "scored_tokens": pa.int32(),
            }
            return sums | (tokens if task.per_token else {})
        case BatchRequests():
            return {"response": pa.string(), "completion_tokens": pa.int32()}
        case Embed(dimensions="auto"):
            raise AssertionError("set from what the output has")
        case Embed(dimensions=int(size)) as task:
            kind = pa.float16() if task.dtype == "float16" else pa.float32()
            return {"embedding": pa.list_(kind, size)}
        case _:
            raise AssertionError(spec.task)


def _of_completions(spec: JobSpec) -> dict[str, pa.DataType]:
    asked = spec.sampling.logprobs
    types = {
        "completion": pa.string(),
        "finish_reason": pa.string(),
        "completion_tokens": pa.int32(),
    }
    if asked is not None:
        types |= {"token_ids": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32())}
    if asked:
        types |= {"top_logprobs": pa.list_(_TOP)}
    if isinstance(spec.task, Generate) and (spec.task.tools or spec.task.tools_column):
        call = pa.struct([("name", pa.string()), ("arguments", pa.string())])
        types["tool_calls"] = pa.list_(call)
    types |= {name: _of_property(found, _schema(spec)) for name, found in _properties(spec).items()}
    if spec.sampling.n > 1:
        types = {name: pa.list_(kind) for name, kind in types.items()}
    return types


def _schema(spec: JobSpec) -> Any:  # noqa: ANN401 - any JSON
    """Return the schema whose properties are columns; one without any, if none are."""
    response = spec.task.response if isinstance(spec.task, Generate) else None
    if not spec.output.explode or response is None or response.json_schema is None:
        return {}
    found = response.json_schema
    return json.loads(found) if isinstance(found, str) else found


def _properties(spec: JobSpec) -> dict[str, Any]:
    whole, root = _schema(spec), _schema(spec)
    while following := next((key for key in _ELSEWHERE if key in whole), None):
        whole = _followed(whole[following], root)
    found: dict[str, Any] = whole.get("properties", {})
    return found


def _followed(found: Any, root: Any) -> Any:  # noqa: ANN401 - a part of a schema
    """Return what a reference names, or the one of some alternatives that is not null."""
    if isinstance(found, str):
        return _named(found, root)
    [one] = [each for each in found if each != {"type": "null"}]
    return one


def _named(reference: str, root: Any) -> Any:  # noqa: ANN401 - a part of a schema
    for name in reference.split("/")[1:]:
        root = root[name]
    return root


def _of_property(found: Any, root: Any) -> pa.DataType:  # noqa: ANN401 - a part of a schema
    for key in _ELSEWHERE:
        if key in found:
            return _of_property(_followed(found[key], root), root)
    values = found.get("enum", [found["const"]] if "const" in found else [])
    example = next((each for each in values if each is not None), None)
    if isinstance(example, int | float) and not isinstance(example, bool):
        whole = all(isinstance(each, int | None) for each in values)
        return pa.int64() if whole else pa.float64()
    if example is not None:
        return pa.bool_() if isinstance(example, bool) else pa.string()
    kinds = found["type"] if isinstance(found["type"], list) else [found["type"]]
    [kind] = [each for each in kinds if each != "null"]
    if kind == "array":
        return pa.list_(_of_property(found["items"], root))
    scalars = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64()}
    return scalars.get(kind, pa.bool_())


def odd_rows(spec: JobSpec, ours: Columns) -> dict[str, pa.Array]:
    """Return which rows are not what they have to be, by what is wrong with them."""
    failed = pc.equal(ours["status"], Status.ERROR.value)
    invalid = pc.equal(ours["status"], Status.INVALID.value)
    explained = pc.is_valid(ours["error_type"])
    first = {
        Generate: "completion",
        BatchRequests: "response",
        Classify: "probabilities",
        Score: "logprob",
        Embed: "embedding",
    }[type(spec.task)]
    answered = pc.is_valid(ours[first])
    # An invalid row has an answer, and may say what is wrong with it.
    unexplained = pc.and_(pc.xor(failed, explained), pc.invert(invalid))
    contradictory = pc.or_(unexplained, pc.equal(failed, answered))
    found = {"rows whose status and answer contradict each other": contradictory}
    match spec.task:
        case Generate():
            return found | _odd_completions(spec, ours)
        case Classify() as task:
            return found | _odd_labels(task, ours, invalid)
        case Embed() as task if task.normalize:
            return found | _odd_vectors(task, ours)
        case _:
            return found


def _odd_completions(spec: JobSpec, ours: Columns) -> dict[str, pa.Array]:
    samples = spec.sampling.n
    if samples == 1:
        return _odd_properties(spec, ours)
    wrong = pc.not_equal(pc.list_value_length(ours["completion"]), samples)
    return {f"rows without their {samples} answers": wrong}


def _odd_properties(spec: JobSpec, ours: Columns) -> dict[str, pa.Array]:
    """Return which rows have other columns than the JSON of their answer says."""
    names = [name for name in _properties(spec) if name in ours]
    if not names:
        return {}
    said = ours["completion"].to_pylist()
    status = ours["status"].to_pylist()
    cells = zip(*(ours[name].to_pylist() for name in names), strict=True)
    odd = []
    for text, state, row in zip(said, status, cells, strict=True):
        answer = json.loads(text) if state == Status.OK else {}
        odd.append(list(row) != [answer.get(name) for name in names])
    return {"rows whose columns are not what their answer says": pa.array(odd)}


def _odd_labels(task: Classify, ours: Columns, invalid: pa.Array) -> dict[str, pa.Array]:
    found = [_shares(task, cell) for cell in ours["probabilities"].to_pylist()]
    labels = ours["label"].to_pylist()
    answered = [cell is not None for cell in found]
    return {
        "rows whose label is none of theirs": pa.array(
            [
                there and label is not None and not set(_several(label)) <= set(cell or ())
                for there, cell, label in zip(answered, found, labels, strict=True)
            ]
        ),
        "rows with a label though they are unsure, or without": pa.array(
            [
                there and (label is None) != unsure
                for there, label, unsure in zip(answered, labels, invalid.to_pylist(), strict=True)
            ]
        ),
        "rows whose probabilities are none": pa.array(
            [cell is not None and not _are_probabilities(task, cell) for cell in found]
        ),
    }


def _shares(task: Classify, cell: object) -> dict[str, float] | None:
    if isinstance(cell, list):
        return {each["label"]: each["probability"] for each in cell}
    assert cell is None or isinstance(cell, dict)
    return cell


def _several(label: str | list[str]) -> list[str]:
    return label if isinstance(label, list) else [label]


def _are_probabilities(task: Classify, shares: Mapping[str, float]) -> bool:
    values = np.array([*shares.values()], float)
    within = bool(((values >= 0) & (values <= 1)).all())  # not so of NaN
    return within and (bool(task.multi_label) or abs(values.sum() - 1) <= SUM_TOLERANCE)


def _odd_vectors(task: Embed, ours: Columns) -> dict[str, pa.Array]:
    column = ours["embedding"].combine_chunks()
    there = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.flatten().to_numpy(zero_copy_only=False).astype(float)
    lengths = np.ones(len(column))
    lengths[there] = np.linalg.norm(values.reshape(int(there.sum()), -1), axis=1)
    off = ~(np.abs(lengths - 1) <= LENGTH_TOLERANCE[task.dtype])
    return {"rows whose vector has not the length 1": pa.array(off & (lengths != 0))}
