"""Vectors and scores to columns."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from quantbatch.records import Answer, Embedded, Failure, RequestId, Scored, Status
from quantbatch.spec import JobSpec
from quantbatch.tasks import columns, result
from quantbatch.wants import Ask

ID = RequestId(0, 0)


def spec_of(kind: str, **task: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "n", "input": {"uri": "i"}, "model": {"id": "m"}, "output": {"uri": "o"},
            "prompt": {"template": "{{ t }}"}, "task": {"kind": kind} | task,
        }
    )  # fmt: skip


def test_vectors_have_the_length_1_and_a_fixed_size() -> None:
    spec = spec_of("embed", dimensions=2)
    answers: list[list[Answer]] = [
        [Embedded(ID, (3.0, 4.0, 9.0))],
        [],
        [Failure(ID, "model", "no")],
    ]
    [column] = columns(spec, [Ask()] * 3, answers)
    assert column.type == pa.list_(pa.float32(), 2)
    assert column.to_pylist() == [pytest.approx([0.6, 0.8]), None, None]


def test_no_vector_at_all_is_a_column_too() -> None:
    [column] = columns(spec_of("embed", dimensions=3), [Ask()], [[]])
    assert column.to_pylist() == [None]


def test_what_float16_can_t_hold_is_an_error_row() -> None:
    spec = spec_of("embed", dimensions=1, dtype="float16", normalize=False)
    answers: list[list[Answer]] = [[Embedded(ID, (70_000.0,))], [Embedded(ID, (2.0,))]]
    found = [result(spec, Ask(), each) for each in answers]
    assert [each.status for each in found] == [Status.ERROR, Status.OK]
    assert found[0].failure is not None
    assert found[0].failure.kind == "overflow"
    [column] = columns(spec, [Ask()] * 2, answers)
    assert column.type == pa.list_(pa.float16(), 1)
    assert column.to_pylist() == [None, [2.0]]


def test_scores_are_summed_and_given_per_token_if_asked() -> None:
    answers: list[list[Answer]] = [[Scored(ID, (-1.0, -3.0))], []]
    asks = [Ask(about=[7, 8]), Ask()]
    logprob, perplexity, tokens = columns(spec_of("score"), asks, answers)
    assert logprob.to_pylist() == [-4.0, None]
    assert perplexity.to_pylist() == [pytest.approx(7.389056), None]
    assert tokens.to_pylist() == [2, None]
    *_, ids, each = columns(spec_of("score", per_token=True), asks, answers)
    assert (ids.to_pylist(), each.to_pylist()) == ([[7, 8], None], [[-1.0, -3.0], None])


def test_a_hopeless_text_has_a_finite_perplexity() -> None:
    _, perplexity, _ = columns(spec_of("score"), [Ask()], [[Scored(ID, (-5000.0,))]])
    assert perplexity[0].as_py() < float("inf")
