"""The log-likelihood of a text that is there already."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from quantbatch.records import Scored

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.records import Answer
    from quantbatch.spec import Score
    from quantbatch.wants import Ask

MOST_NATS = 700.0
"""Beyond e to this a perplexity is no float."""


def fields(task: Score) -> list[pa.Field]:
    """Return the columns that the task adds to a row."""
    types = {"logprob": pa.float64(), "perplexity": pa.float64(), "scored_tokens": pa.int32()}
    if task.per_token:
        types |= {"token_ids": pa.list_(pa.int32()), "token_logprobs": pa.list_(pa.float32())}
    return [pa.field(name, kind) for name, kind in types.items()]


def columns(
    task: Score, asks: Sequence[Ask], answers: Sequence[Sequence[Answer]]
) -> list[pa.Array]:
    """Turn the answers of a chunk into the task's columns, in the order of `fields`.

    Args:
        task: The job's.
        asks: What each row asked for; `about` holds the scored tokens, if they are given out.
        answers: The answer of each row; none for a row without one.
    """
    rows = [_row(ask, found) for ask, found in zip(asks, answers, strict=True)]
    return [pa.array([row.get(f.name) for row in rows], f.type) for f in fields(task)]


def _row(ask: Ask, answers: Sequence[Answer]) -> dict[str, Any]:
    if not answers:
        return {}
    (answer,) = answers
    assert isinstance(answer, Scored)
    total = float(np.sum(answer.logprobs, dtype=np.float64))
    return {
        "logprob": total,
        "perplexity": math.exp(min(-total / len(answer.logprobs), MOST_NATS)),
        "scored_tokens": len(answer.logprobs),
        "token_ids": ask.about,
        "token_logprobs": answer.logprobs,
    }
