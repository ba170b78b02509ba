"""What is asked of each row: one file for each kind of task, without torch and Ray.

A task says which columns it adds, what became of a row, and how answers become columns. What it
asks an engine for is in `wants`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from quantbatch.records import Failure, Status
from quantbatch.spec import BatchRequests, Classify, Embed, Generate, Score
from quantbatch.tasks import classify, embed, formed, generate, requests, score
from quantbatch.tasks.formed import Asked
from quantbatch.wants import Write

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import pyarrow as pa

    from quantbatch.records import Answer
    from quantbatch.spec import JobSpec
    from quantbatch.tasks.formed import Asked
    from quantbatch.wants import Ask, Want


class Result(NamedTuple):
    """What became of a row."""

    status: Status
    failure: Failure | None = None
    """Why it has no answer, or an invalid one."""


def check(spec: JobSpec, columns: Collection[str]) -> None:
    """Refuse a task that can't be done, before the job starts.

    Args:
        spec: The job.
        columns: Names of the input's columns.

    Raises:
        SpecError: With the field and the reason.
    """
    if isinstance(spec.task, Generate):
        formed.check(spec, spec.task, columns)


def asked(spec: JobSpec, table: pa.Table) -> Asked:
    """Return what rows of the input ask for beyond the job's own settings."""
    return formed.asked(spec.task, table) if isinstance(spec.task, Generate) else Asked()


def want(spec: JobSpec, ask: Ask) -> Want:
    """Return what a row wants from an engine."""
    if isinstance(spec.task, Generate) and isinstance(ask.want, Write):
        return formed.want(spec.task, ask)
    return ask.want


def fields(spec: JobSpec) -> list[pa.Field]:
    """Return the columns that a job's task adds to a row."""
    match spec.task:
        case Generate():
            return generate.fields(spec)
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
        return _of_text(spec, ask, answers)
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


def _of_text(spec: JobSpec, ask: Ask, answers: Sequence[Answer]) -> Result:
    status = generate.status(answers)
    if status is Status.ERROR:
        return Result(status, generate.failure(answers))
    fault = generate.fault(spec, ask, answers)
    return Result(Status.INVALID, fault) if fault else Result(status)


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
        return generate.columns(spec, asks, answers)
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
