"""Free text: each row's completion as it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from quantbatch.records import Completion, Failure, FinishReason, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

FIELDS = (
    pa.field("completion", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("completion_tokens", pa.int32()),
)
"""Columns that the task adds to a row."""


def status(answer: Completion | Failure) -> Status:
    """Tell what became of a row."""
    match answer:
        case Failure():
            return Status.ERROR
        case Completion(finish_reason=FinishReason.LENGTH):
            return Status.TRUNCATED
        case Completion():
            return Status.OK


def columns(answers: Sequence[Completion | Failure | None]) -> list[pa.Array]:
    """Turn the answers of a chunk into the task's columns, in the order of `FIELDS`; None is no
    answer.
    """
    done = [answer if isinstance(answer, Completion) else None for answer in answers]
    return [
        pa.array([a and a.text for a in done], pa.string()),
        pa.array([a and a.finish_reason.value for a in done], pa.string()),
        pa.array([a and len(a.token_ids) for a in done], pa.int32()),
    ]
