"""What is asked of each row: one file for each kind of task, without torch and Ray.

A task says which columns it adds, what became of a row, and how answers become columns. What it
asks an engine for is in `wants`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from quantbatch.records import Failure, Status
from quantbatch.spec import BatchRequests, Generate
from quantbatch.tasks import generate, requests

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from quantbatch.records import Answer
    from quantbatch.spec import JobSpec
    from quantbatch.wants import Ask


class Result(NamedTuple):
    """What became of a row."""

    status: Status
    failure: Failure | None = None
    """Why it has no answer, or an invalid one."""


def fields(spec: JobSpec) -> list[pa.Field]:
    """Return the columns that a job's task adds to a row."""
    match spec.task:
        case Generate():
            return generate.fields(spec.sampling)
        case BatchRequests():
            return requests.fields()


def result(spec: JobSpec, ask: Ask, answers: Sequence[Answer]) -> Result:
    """Tell what became of a row.

    Args:
        spec: The job.
        ask: What the row asked for.
        answers: Its answers, in order; none if it had an error before it got to a model.
    """
    if not answers:
        return Result(Status.ERROR)
    if isinstance(spec.task, BatchRequests):
        return Result(*requests.status(ask, answers))
    samples = ask.sampling.get("n", spec.sampling.n)
    assert len(answers) == samples, "a row lacks samples"
    return Result(generate.status(answers), generate.failure(answers))


def columns(
    spec: JobSpec, asks: Sequence[Ask], answers: Sequence[Sequence[Answer]]
) -> list[pa.Array]:
    """Turn the answers of a chunk into columns, in the order of `fields`.

    Args:
        spec: The job.
        asks: What each row asked for.
        answers: The answers of each row; none for a row without one.
    """
    if isinstance(spec.task, BatchRequests):
        return requests.columns(spec, asks, answers)
    return generate.columns(answers, spec.sampling)
