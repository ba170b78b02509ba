"""Answers to columns: one answer or several to a row, with log-probabilities or without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from quantbatch import rows
from quantbatch.errors import RowError
from quantbatch.records import (
    Answer,
    Completion,
    Failure,
    FinishReason,
    RequestId,
    Status,
    TokenLogprobs,
    from_token_lists,
)
from quantbatch.spec import JobSpec, Sampling
from quantbatch.tasks import generate

if TYPE_CHECKING:
    from collections.abc import Sequence

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def said(
    row: int, sample: int = 0, *, tokens: int = 2, reason: FinishReason = STOP, known: bool = True
) -> Completion:
    """An answer whose every value tells which token of which sample of which row it is."""
    ids = [1000 * row + 100 * sample + i for i in range(tokens)]
    logprobs = tuple(TokenLogprobs(-0.5 * i, ((i, -0.5 * i), (i + 1, -8.0))) for i in ids)
    text = f"answer {row}.{sample}"
    return Completion(
        RequestId(0, row, sample), text, tuple(ids), reason, logprobs if known else None
    )


def failed(row: int, sample: int = 0, why: str = "ValueError: no") -> Failure:
    return Failure(RequestId(0, row, sample), "model", why)


def sampling(**changes: Any) -> Sampling:
    several = {"temperature": 1.0} if changes.get("n", 1) > 1 else {}
    return Sampling.model_validate(several | changes)


def table(answers: Sequence[Sequence[Answer]], chosen: Sampling) -> pa.Table:
    """Return the rows of a chunk with their answers; rows without any have an error already."""
    count = len(answers)
    errors = {
        row: RowError("null_prompt", "it is null") for row in range(count) if not answers[row]
    }
    prompts = from_token_lists([None if row in errors else [7, 8, 9] for row in range(count)])
    ids = pa.array([f"f:{row}" for row in range(count)])
    rendered = rows.rendered(pa.table({"text": ids}), ids, prompts, errors)
    facts = rows.ChunkFacts(0, count)
    return rows.answered(rows.with_facts(rendered, facts), answers, job(chosen))


def job(chosen: Sampling) -> JobSpec:
    fields = {"name": "t", "input": {"uri": "in"}, "model": {"id": "m"}, "output": {"uri": "out"}}
    return JobSpec.model_validate(fields | {"prompt": {"template": "x"}, "sampling": chosen})


def columns_of(chosen: Sampling) -> dict[str, str]:
    return {field.name: str(field.type) for field in generate.fields(job(chosen))}


TOP = "list<item: struct<token_id: int32, logprob: float>>"


def test_columns_are_those_that_were_asked_for() -> None:
    one = {"completion": "string", "finish_reason": "string", "completion_tokens": "int32"}
    tokens = {"token_ids": "list<item: int32>", "logprobs": "list<item: float>"}
    assert columns_of(sampling()) == one
    assert columns_of(sampling(logprobs=0)) == one | tokens
    top = {"top_logprobs": f"list<item: {TOP}>"}
    assert columns_of(sampling(logprobs=1)) == one | tokens | top
    for logprobs in (None, 0, 1):
        alone = columns_of(sampling(logprobs=logprobs))
        assert columns_of(sampling(n=2, logprobs=logprobs)) == {
            name: f"list<item: {kind}>" for name, kind in alone.items()
        }


def test_one_answer_to_a_row() -> None:
    found = table([[said(0)], [], [failed(2)], [said(3, reason=LENGTH, tokens=5)]], sampling())
    assert found["status"].to_pylist() == ["ok", "error", "error", "truncated"]
    assert found["completion"].to_pylist() == ["answer 0.0", None, None, "answer 3.0"]
    assert found["finish_reason"].to_pylist() == ["stop", None, None, "length"]
    assert found["completion_tokens"].to_pylist() == [2, None, None, 5]
    assert found["error_type"].to_pylist() == [None, "null_prompt", "model", None]
    assert found["error_message"].to_pylist() == [None, "it is null", "ValueError: no", None]
    counts = rows.counts_of(found)
    assert (counts.ok, counts.truncated, counts.error) == (1, 1, 2)
    assert (counts.prompt_tokens, counts.completion_tokens) == (9, 7)


def test_several_answers_to_a_row() -> None:
    answers: list[list[Answer]] = [
        [said(0, k, tokens=k + 1, reason=LENGTH if k == 1 else STOP) for k in range(3)],
        [],
        [said(2, 0), failed(2, 1), failed(2, 2, "another")],
        [said(3, k) for k in range(3)],
        [said(4, 0), said(4, 1), failed(4, 2)],
    ]
    found = table(answers, sampling(n=3))
    assert found["status"].to_pylist() == ["truncated", "error", "error", "ok", "error"]
    assert found["completion"].to_pylist() == [
        ["answer 0.0", "answer 0.1", "answer 0.2"],
        None,
        None,
        ["answer 3.0", "answer 3.1", "answer 3.2"],
        None,
    ]
    assert found["finish_reason"][0].as_py() == ["stop", "length", "stop"]
    assert found["completion_tokens"].to_pylist() == [[1, 2, 3], None, None, [2, 2, 2], None]
    assert found["error_message"].to_pylist() == [
        None,
        "it is null",
        "sample 1 of 3 (and 1 more): ValueError: no",
        None,
        "sample 2 of 3: ValueError: no",
    ]
    counts = rows.counts_of(found)
    assert (counts.ok, counts.truncated, counts.error, counts.rows) == (1, 1, 3, 5)
    assert (counts.prompt_tokens, counts.completion_tokens) == (12, 12)


def test_log_probabilities_stand_beside_their_tokens() -> None:
    found = table([[said(0)], [failed(1)], [said(2)]], sampling(logprobs=2))
    assert found["token_ids"].to_pylist() == [[0, 1], None, [2000, 2001]]
    assert found["logprobs"].to_pylist() == [[0, -0.5], None, [-1000, -1000.5]]
    assert found["top_logprobs"][0].as_py() == [
        [{"token_id": 0, "logprob": 0.0}, {"token_id": 1, "logprob": -8.0}],
        [{"token_id": 1, "logprob": -0.5}, {"token_id": 2, "logprob": -8.0}],
    ]
    assert "top_logprobs" not in table([[said(0)]], sampling(logprobs=0)).column_names


def test_log_probabilities_of_several_answers() -> None:
    chosen = sampling(n=2, logprobs=1)
    found = table([[said(0, 0, tokens=1), said(0, 1)], [said(1, 0), failed(1, 1)]], chosen)
    assert found["token_ids"].to_pylist() == [[[0], [100, 101]], None]
    assert found["logprobs"].to_pylist() == [[[0], [-50, -50.5]], None]
    assert [len(sample) for sample in found["top_logprobs"][0].as_py()] == [1, 2]


def test_an_engine_without_a_model_has_no_log_probabilities() -> None:
    found = table([[said(0, known=False)]], sampling(logprobs=1))
    assert found["token_ids"].to_pylist() == [[0, 1]]
    assert found["logprobs"].to_pylist() == found["top_logprobs"].to_pylist() == [None]


@pytest.mark.parametrize("chosen", [sampling(), sampling(n=2), sampling(n=2, logprobs=1)])
def test_a_chunk_without_an_answer_has_the_columns_too(chosen: Sampling) -> None:
    schema = rows.output_schema(job(chosen), ["text"], pa.schema([("text", pa.string())]))
    every: list[Answer] = [failed(0, sample) for sample in range(chosen.n)]
    for samples in ([], every):
        found = rows.output(table([samples], chosen), schema, "", "attempt")
        assert found.schema.equals(schema)
        assert found["completion"].to_pylist() == [None]
        assert rows.counts_of(found).completion_tokens == 0


def test_a_row_that_lacks_samples_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="lacks samples"):
        table([[said(0, 0)]], sampling(n=2))


def test_the_worst_of_its_samples_is_a_row_s_status() -> None:
    assert generate.status([said(0, 0), said(0, 1)]) is Status.OK
    assert generate.status([said(0, 0), said(0, 1, reason=LENGTH)]) is Status.TRUNCATED
    assert generate.status([failed(0, 0), said(0, 1, reason=LENGTH)]) is Status.ERROR
