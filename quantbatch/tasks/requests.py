"""Requests of a batch file: what each row asks for is in the row; its answer is a response."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa

from quantbatch.batchfile import replies
from quantbatch.batchfile.tokens import TokenTexts
from quantbatch.model.checkpoint import find_checkpoint
from quantbatch.prompts.tokens import tokenizer_of
from quantbatch.records import Completion, Embedded, Failure, FinishReason, Status
from quantbatch.tasks.generate import failure as first_failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.records import Answer
    from quantbatch.spec import JobSpec
    from quantbatch.wants import Ask


def fields() -> list[pa.Field]:
    """Return the columns that the task adds to a row."""
    return [pa.field("response", pa.string()), pa.field("completion_tokens", pa.int32())]


def status(ask: Ask, answers: Sequence[Answer]) -> tuple[Status, Failure | None]:
    """Tell what became of a row, and why if it has no answer or an invalid one."""
    if failed := first_failure(answers):
        return Status.ERROR, failed
    done = _whole(answers)
    if any(
        isinstance(each, Completion) and each.finish_reason is FinishReason.LENGTH for each in done
    ):
        return Status.TRUNCATED, None
    if fault := replies.fault(ask, done):
        return Status.INVALID, Failure(answers[0].id, fault.kind, fault.reason)
    return Status.OK, None


def columns(
    spec: JobSpec, asks: Sequence[Ask], answers: Sequence[Sequence[Answer]]
) -> list[pa.Array]:
    """Turn the answers of a chunk into the task's columns, in the order of `fields`."""
    texts = TokenTexts(lambda: tokenizer_of(find_checkpoint(spec.model)))
    bodies: list[str | None] = []
    tokens: list[int | None] = []
    for ask, row in zip(asks, answers, strict=True):
        done = _whole(row)
        if not done or len(done) < len(row):
            bodies.append(None)
            tokens.append(None)
            continue
        body = replies.body(ask, done, texts)
        bodies.append(json.dumps(body, ensure_ascii=False, allow_nan=False))
        tokens.append(replies.completion_tokens(ask, done))
    return [pa.array(bodies, pa.string()), pa.array(tokens, pa.int32())]


def _whole(answers: Sequence[Answer]) -> list[Completion | Embedded]:
    return [answer for answer in answers if isinstance(answer, Completion | Embedded)]
