"""Text: each row's completion as it comes, or several of them.

Where a row has several samples (`sampling.n`), each column holds a list with one item for each of
them. A row one of whose samples failed has no answer: a reader who counts on n answers finds n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from quantbatch.records import Completion, Failure, FinishReason, Status
from quantbatch.spec import Generate
from quantbatch.tasks import formed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.records import Answer
    from quantbatch.spec import JobSpec
    from quantbatch.wants import Ask

_CALLS = pa.list_(pa.struct([("name", pa.string()), ("arguments", pa.string())]))
_TOP = pa.list_(pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())]))
"""The likeliest tokens in the place of one."""


OWN_COLUMNS = frozenset(
    {
        *("row_id", "status", "error_type", "error_message", "prompt_tokens", "attempt"),
        *("completion", "finish_reason", "completion_tokens"),
        *("token_ids", "logprobs", "top_logprobs", "cached"),
    }
)
"""Columns that a job may add beside the properties of a schema."""


def fields(spec: JobSpec) -> list[pa.Field]:
    """Return the columns that the task adds to a row."""
    sampling = spec.sampling
    types = {
        "completion": pa.string(),
        "finish_reason": pa.string(),
        "completion_tokens": pa.int32(),
    }
    if sampling.logprobs is not None:
        types |= {"token_ids": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32())}
    if sampling.logprobs:
        types["top_logprobs"] = pa.list_(_TOP)
    types |= {field.name: field.type for field in formed.exploded(spec)}
    if isinstance(spec.task, Generate) and spec.task.calls_tools:
        types["tool_calls"] = _CALLS
    several = sampling.n > 1
    return [pa.field(name, pa.list_(kind) if several else kind) for name, kind in types.items()]


def status(samples: Sequence[Answer]) -> Status:
    """Tell what became of a row that has these samples."""
    if failure(samples):
        return Status.ERROR
    cut = any(
        isinstance(each, Completion) and each.finish_reason is FinishReason.LENGTH
        for each in samples
    )
    return Status.TRUNCATED if cut else Status.OK


def failure(samples: Sequence[Answer]) -> Failure | None:
    """Return why a row has no answer; of several samples, which one has none."""
    failed = [each for each in samples if isinstance(each, Failure)]
    return _first(failed, len(samples))


def fault(spec: JobSpec, ask: Ask, samples: Sequence[Answer]) -> Failure | None:
    """Return why a row's answer is not of the form that was asked for; of several, which one."""
    found = [formed.verdict(spec, ask, sample).failure for sample in samples]
    return _first([each for each in found if each], len(samples))


def _first(failed: Sequence[Failure], samples: int) -> Failure | None:
    if not failed or samples == 1:
        return failed[0] if failed else None
    first, others = failed[0], len(failed) - 1
    which = f"sample {first.id.sample} of {samples}"
    more = f" (and {others} more)" if others else ""
    return Failure(first.id, first.kind, f"{which}{more}: {first.message}")


def columns(
    spec: JobSpec, asks: Sequence[Ask], answers: Sequence[Sequence[Answer]]
) -> list[pa.Array]:
    """Turn the answers of a chunk into the task's columns, in the order of `fields`.

    Args:
        spec: The job.
        asks: What each row asked for.
        answers: The samples of each row, in their order; none for a row without an answer.
    """
    done = [
        [_values(spec, ask, sample) for sample in _completions(samples)]
        for ask, samples in zip(asks, answers, strict=True)
    ]
    several = spec.sampling.n > 1
    return [
        pa.array([_cell(field.name, row, several=several) for row in done], field.type)
        for field in fields(spec)
    ]


def _completions(samples: Sequence[Answer]) -> list[Completion]:
    """Return a row's samples, or none if one of them failed."""
    done = [each for each in samples if isinstance(each, Completion)]
    return done if len(done) == len(samples) else []


def _cell(name: str, samples: Sequence[dict[str, Any]], *, several: bool) -> Any:  # noqa: ANN401 - of any column
    if not samples:
        return None
    values = [sample.get(name) for sample in samples]
    return values if several else values[0]


def _values(spec: JobSpec, ask: Ask, sample: Completion) -> dict[str, Any]:
    """Return a sample's value in each column; absent where it has none."""
    values: dict[str, Any] = {
        "completion": sample.text,
        "finish_reason": sample.finish_reason.value,
        "completion_tokens": len(sample.token_ids),
        "token_ids": sample.token_ids,
    }
    if sample.logprobs is not None:  # an engine without a model has none
        values["logprobs"] = [token.logprob for token in sample.logprobs]
        values["top_logprobs"] = [token.top for token in sample.logprobs]
    if spec.output.explode or (isinstance(spec.task, Generate) and spec.task.calls_tools):
        values |= formed.verdict(spec, ask, sample).values or {}
    return values
