"""Free text: each row's completion as it comes, or several of them.

Where a row has several samples (`sampling.n`), each column holds a list with one item for each of
them. A row one of whose samples failed has no answer: a reader who counts on n answers finds n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from quantbatch.records import Completion, Failure, FinishReason, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.records import Answer
    from quantbatch.spec import Sampling

_TOP = pa.list_(pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())]))
"""The likeliest tokens in the place of one."""


def fields(sampling: Sampling) -> list[pa.Field]:
    """Return the columns that the task adds to a row."""
    types = {
        "completion": pa.string(),
        "finish_reason": pa.string(),
        "completion_tokens": pa.int32(),
    }
    if sampling.logprobs is not None:
        types |= {"token_ids": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32())}
    if sampling.logprobs:
        types["top_logprobs"] = pa.list_(_TOP)
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
    if not failed or len(samples) == 1:
        return failed[0] if failed else None
    first, others = failed[0], len(failed) - 1
    which = f"sample {first.id.sample} of {len(samples)}"
    more = f" (and {others} more)" if others else ""
    return Failure(first.id, first.kind, f"{which}{more}: {first.message}")


def columns(answers: Sequence[Sequence[Answer]], sampling: Sampling) -> list[pa.Array]:
    """Turn the answers of a chunk into the task's columns, in the order of `fields`.

    Args:
        answers: The samples of each row, in their order; none for a row without an answer.
        sampling: The job's.
    """
    done = [_completions(samples) for samples in answers]
    return [
        pa.array([_cell(field.name, row, sampling) for row in done], field.type)
        for field in fields(sampling)
    ]


def _completions(samples: Sequence[Answer]) -> list[Completion]:
    """Return a row's samples, or none if one of them failed."""
    done = [each for each in samples if isinstance(each, Completion)]
    return done if len(done) == len(samples) else []


def _cell(name: str, samples: Sequence[Completion], sampling: Sampling) -> Any:  # noqa: ANN401 - of any column
    if not samples:
        return None
    values = [_value(name, sample) for sample in samples]
    return values if sampling.n > 1 else values[0]


def _value(name: str, sample: Completion) -> Any:  # noqa: ANN401 - of any column
    match name:
        case "completion":
            return sample.text
        case "finish_reason":
            return sample.finish_reason.value
        case "completion_tokens":
            return len(sample.token_ids)
        case "token_ids":
            return sample.token_ids
        case _ if sample.logprobs is None:
            return None  # an engine without a model has none
        case "logprobs":
            return [token.logprob for token in sample.logprobs]
        case "top_logprobs":
            return [token.top for token in sample.logprobs]
        case _:
            raise AssertionError(name)
