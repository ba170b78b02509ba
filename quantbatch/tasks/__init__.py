"""What is asked of each row: one file for each kind of task, without torch and Ray.

A task says which columns it adds, what became of a row, and how answers become columns. What it
asks an engine for is in `wants`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from quantbatch.records import Failure, Status
from quantbatch.spec import BatchRequests, Classify, Embed, Generate, Score
from quantbatch.tasks import classify, embed, generate, requests, score

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
        case Classify() as task:
            return classify.fields(task)
        case Score() as task:
            return score.fields(task)
        case Embed() as task:
            return embed.fields(task)


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
    if isinstance(spec.task, Generate):
        samples = ask.sampling.get("n", spec.sampling.n)
        assert len(answers) == samples, "a row lacks samples"
        return Result(generate.status(answers), generate.failure(answers))
    failed = next((answer for answer in answers if isinstance(answer, Failure)), None)
    if failed:
        return Result(Status.ERROR, failed)
    match spec.task:
        case Classify() as task:
            return Result(*classify.status(task, ask, answers))
        case Score():
            return Result(Status.OK)
        case Embed() as task:
            overflow = embed.failure(task, answers[0])
            return Result(Status.ERROR if overflow else Status.OK, overflow)


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
    if isinstance(spec.task, Generate):
        return generate.columns(answers, spec.sampling)
    results = [result(spec, *each) for each in zip(asks, answers, strict=True)]
    sound = [
        [] if each.status is Status.ERROR else found
        for each, found in zip(results, answers, strict=True)
    ]
    match spec.task:
        case Classify() as task:
            return classify.columns(task, asks, sound)
        case Score() as task:
            return score.columns(task, asks, sound)
        case Embed() as task:
            return embed.columns(task, sound)
