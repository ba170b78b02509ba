"""Answer rows of a finished job again, such as those with an error: `quantbatch retry`.

The statuses and the changed fields of the spec say what a retry is. Which rows it concerns is
frozen when it begins (see `retries`); from then on it is a run like any other, of those rows only,
and a retry that ended on the way is continued by the same command. While it goes on readers see
each file as it was, or with all of the file's rows that were answered again.

A row that had an answer keeps it if the further attempt ends as an error. The `attempt` of a row
tells which one it is from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import json
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from quantbatch import again, pipeline, sizing, tasks
from quantbatch.answers import packs
from quantbatch.checks import check_tokens, input_limit
from quantbatch.errors import DoesNotFit, Refused
from quantbatch.job_record import read_job
from quantbatch.preflight import prepare
from quantbatch.progress import Silent
from quantbatch.report import RunFigures, RunReport
from quantbatch.spec import JobSpec
from quantbatch.storage import open_store, redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quantbatch.preflight import Job
    from quantbatch.progress import Progress
    from quantbatch.records import Status
    from quantbatch.retries import Retry

MAY_CHANGE = ("sampling.*", "engine.*")
"""Fields that decide answers and that a retry may have other values for."""
NEVER = ("sampling.n", "sampling.logprobs")
"""Of those, the ones that decide the output's columns: all its rows have the same."""


def retry(
    spec: JobSpec, statuses: Sequence[Status], *, progress: Progress | None = None
) -> RunReport:
    """Answer the rows with some statuses again.

    Args:
        spec: The job; fields of `sampling` and `engine` may differ from those that it ran with.
        statuses: Which rows.
        progress: Told what happens.

    Raises:
        JobError: The job is not finished, the retry can't start or go on.
    """
    progress = progress or Silent()
    figures = RunFigures()
    begun = _as_begun(spec)
    # Files that came later are another matter: the rows are those of the frozen plan.
    job = prepare(begun, extend=True)
    ledger = job.ledger
    if ledger.plan is None or not ledger.finished:
        raise Refused(
            f"{redact(ledger.store.uri)}: the job is not finished",
            "quantbatch run finishes it; then its rows can be tried again",
        )
    asked = _asked(job, spec, statuses)
    job = _changed(dataclasses.replace(job, plan=ledger.plan), spec)
    figures.plan_s = figures.elapsed_s
    found = again.claimed(ledger, asked, job.spec)
    if found is not None:
        _answer(job, found, figures, progress)
    figures.total_s = figures.elapsed_s
    report = RunReport(
        name=spec.name,
        outcome=pipeline.outcome(job, nothing_to_do=found is None),
        output=redact(ledger.store.uri),
        counts=ledger.counts,
        parts=len(ledger.published),
        unreadable=job.unreadable,
        run=figures,
    )
    if found is not None:
        ledger.summarize(report.to_json() | {"timeline": figures.timeline_json()})
    return report


def _as_begun(spec: JobSpec) -> JobSpec:
    """Return a spec with what the job on its output was begun with, where a retry may differ."""
    store = open_store(spec.output.uri, spec.output.storage)
    record = read_job(store)
    if record is None:
        raise Refused(f"{redact(store.uri)}: no job has begun here", "quantbatch run begins it")
    try:
        first = JobSpec.model_validate(record["spec"])
    except (ValidationError, KeyError) as error:
        raise Refused(
            f"{redact(store.uri)}: its records are of another version of quantbatch",
            "try its rows again with that version",
        ) from error
    return spec.model_copy(update={"sampling": first.sampling, "engine": first.engine})


def _asked(job: Job, spec: JobSpec, statuses: Sequence[Status]) -> dict[str, Any]:
    """Return what a retry is, in JSON types: its statuses, and the fields that differ."""
    before, now = job.spec.deciding(), spec.deciding()
    own = {name for name in before.keys() | now.keys() if _matches(name, MAY_CHANGE)}
    changes = {name: now.get(name) for name in sorted(own) if before.get(name) != now.get(name)}
    for name in changes:
        if _matches(name, NEVER):
            raise Refused(
                f"{name} was {json.dumps(before[name])}: it decides the columns of the output",
                "leave it, or answer the rows in another job with another output.uri",
            )
    return {"statuses": sorted(status.value for status in statuses), "changes": changes}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _changed(job: Job, spec: JobSpec) -> Job:
    """Return a job with the sampling and the engine of a retry, if its task can be done with
    them, and if that fits.
    """
    changed = job.spec.model_copy(update={"sampling": spec.sampling, "engine": spec.engine})
    check_tokens(changed, job.checkpoint)
    tasks.check(changed, job.plan.schema.names)
    limit = input_limit(changed, job.checkpoint)
    fitting = sizing.fit(changed, job.checkpoint, limit, job.card)
    if isinstance(fitting.misfit, DoesNotFit):
        raise fitting.misfit
    return dataclasses.replace(job, spec=changed, memory=fitting.plan, max_input_tokens=limit)


def _answer(job: Job, found: Retry, figures: RunFigures, progress: Progress) -> None:
    """Answer the rows of a retry that are left, publish their shards, and close it."""
    ledger = job.ledger
    chunks = list(again.undone(ledger, found))
    rows = sum(len(found.by_chunk[chunk.id]) for chunk in chunks)
    progress.planned(job, rows)
    with contextlib.ExitStack() as held:
        publisher = held.enter_context(pipeline.Publisher(job))
        publisher.publish(*again.due(ledger, found, job.plan.shards))
        undone = functools.partial(again.undone, ledger, found)
        receipts = pipeline.receipts(job, undone, figures, progress)
        for receipt in held.enter_context(contextlib.closing(receipts)):
            publisher.publish(*again.record(ledger, found, receipt))
            progress.committed(receipt, figures)
    if job.answers:
        packs.tidy(job.answers)
    again.close(ledger, found, succeeded=not job.missing)
