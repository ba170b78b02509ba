"""Pooled hidden states as vectors of fixed size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from quantbatch.records import Embedded, Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from quantbatch.records import Answer
    from quantbatch.spec import Embed

_TYPES = {"float32": pa.float32(), "float16": pa.float16()}


def size(task: Embed) -> int:
    """Return the length of a vector."""
    assert task.dimensions != "auto", "set by `preflight`, which knows the model"
    return task.dimensions


def fields(task: Embed) -> list[pa.Field]:
    """Return the columns that the task adds to a row."""
    return [pa.field("embedding", pa.list_(_TYPES[task.dtype], size(task)))]


def failure(task: Embed, answer: Answer) -> Failure | None:
    """Return why a vector can't be given out: float16 ends at 65,504."""
    assert isinstance(answer, Embedded)
    if np.isfinite(_vector(task, answer)).all():
        return None
    why = "the vector does not fit into float16: use task.normalize, or task.dtype float32"
    return Failure(answer.id, "overflow", why)


def columns(task: Embed, answers: Sequence[Sequence[Answer]]) -> list[pa.Array]:
    """Turn the answers of a chunk into the task's column.

    Args:
        task: The job's.
        answers: The answer of each row; none for a row without one.
    """
    length = size(task)
    vectors = np.zeros((len(answers), length), task.dtype)
    for row, found in enumerate(answers):
        if found:
            assert isinstance(found[0], Embedded)
            vectors[row] = _vector(task, found[0])
    missing = pa.array([not found for found in answers], pa.bool_())
    values = pa.array(vectors.reshape(-1), _TYPES[task.dtype])
    return [pa.FixedSizeListArray.from_arrays(values, length, mask=missing)]


def _vector(task: Embed, answer: Embedded) -> NDArray[np.floating]:
    vector = np.array(answer.vector[: size(task)], np.float64)
    length = float(np.linalg.norm(vector))
    if task.normalize and length > 0:
        vector /= length
    with np.errstate(over="ignore"):
        return vector.astype(task.dtype)
