"""START READING HERE: `run` is the whole job, and reads as what it does.

Around it: `preflight.py` finds out all that can be refused before a GPU is asked for; `ledger.py`
says what is done and makes it count; `rounds.py` sends the chunks that are left through Ray until
none is; `stages.py` and `replica.py` are what happens to a chunk there, in Ray's processes;
`cluster.py` is all that we ask of Ray itself.
"""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from quantbatch import cluster
from quantbatch.answers import packs
from quantbatch.commits import publish_newest
from quantbatch.draining import Drain
from quantbatch.errors import Stopped, StorageError
from quantbatch.leases import Driver, Leases
from quantbatch.preflight import Job, prepare, require_fit
from quantbatch.progress import Silent
from quantbatch.report import Outcome, RunFigures, RunReport
from quantbatch.rounds import Rounds
from quantbatch.storage import probe, redact

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from concurrent.futures import Future

    from quantbatch.commits import Published
    from quantbatch.plan import Plan, Shard
    from quantbatch.progress import Progress
    from quantbatch.records import Chunk, Receipt
    from quantbatch.spec import JobSpec

logger = logging.getLogger(__name__)

PUBLISHED_AT_ONCE = 2
"""Shards that are published at the same time: one is read while the other is written."""


def run(spec: JobSpec, *, extend: bool = False, progress: Progress | None = None) -> RunReport:
    """Answer every row of a job's input exactly once.

    A run that ends at any moment, however, is continued by calling this again: committed rows stay
    as they are, and readers see no others. Calling it for a finished job does nothing.

    Args:
        spec: The job.
        extend: Add input files that came after the job was planned, instead of refusing them.
        progress: Told what happens.

    Raises:
        JobError: The job can't start or go on; `exit_code` tells the kinds of trouble apart.
    """
    progress = progress or Silent()
    figures = RunFigures()
    job = prepare(spec, extend=extend)
    figures.plan_s = figures.elapsed_s
    progress.planned(job)
    if job.ledger.succeeded() and job.new_generation is None:
        return _report(job, figures, nothing_to_do=True)

    probe(job.ledger.store)
    with contextlib.ExitStack() as held:
        if job.new_generation is not None:
            held.enter_context(cluster.joined(job.spec.cluster))
            if not _claim(job, job.new_generation):
                return run(
                    spec, extend=extend, progress=progress
                )  # a rival's was first: look again
        publisher = held.enter_context(Publisher(job))
        publisher.publish(*job.ledger.unpublished())
        leases = Leases(job.ledger.store, Driver.this())
        found = receipts(job, job.ledger.undone, figures, progress, leases)
        for receipt in held.enter_context(contextlib.closing(found)):
            publisher.publish(*job.ledger.record(receipt))
            progress.committed(receipt, figures)
        publisher.publish(*job.ledger.unpublished())  # shards that a rival left half done
    if job.answers:
        packs.tidy(job.answers)
    return _report(job, figures)


def _claim(job: Job, plan: Plan) -> bool:
    """Make the output this job's, by freezing its plan; not if a rival driver was first.

    From then on the output is of this model in these bits. So it is first seen whether they fit the
    cluster's cards: a user who is told of others must be free to take them.
    """
    require_fit(job, cluster.card_names(job.spec.cluster))
    return job.ledger.freeze(plan)


def receipts(
    job: Job,
    undone: Callable[[], Iterable[Chunk]],
    figures: RunFigures,
    progress: Progress,
    leases: Leases | None = None,
) -> Generator[Receipt]:
    """Have chunks answered on a cluster; yield what became of each, once it is committed.

    Args:
        job: The job.
        undone: Returns the chunks that are not committed, whenever it is called.
        figures: Of the run.
        progress: Told what happens.
        leases: See `Rounds`.

    Raises:
        JobError: A chunk could not be answered, for a reason that concerns the job.
    """
    if next(iter(undone()), None) is None:
        return
    drain = Drain(job.spec.limits.drain_s, progress.stopping)
    with cluster.connected(job.spec.cluster) as device, drain.listening():
        figures.cluster_s = figures.elapsed_s
        require_fit(job, cluster.card_names(job.spec.cluster))
        progress.started(device)
        with cluster.explained(), leases.beating() if leases else contextlib.nullcontext():
            rounds = Rounds(job, undone, device=device, drain=drain, leases=leases)
            for receipt in rounds.receipts():
                job.unreadable.update(receipt.unreadable)
                figures.record(receipt)
                yield receipt


class Publisher:
    """Publishes whole shards in threads of the driver, while others are still being answered.

    Not in Ray's processes: one started for it at a job's end takes longer than the work, which is
    copying. Memory is bounded by a row group for each thread.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._threads = ThreadPoolExecutor(PUBLISHED_AT_ONCE, "publish")
        self._under_way: list[Future[Published]] = []
        self._begun: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for what was begun; after an exception, only for what is being written now."""
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._note()

    def publish(self, *shards: Shard) -> None:
        """Begin to publish shards, and note which are done by now."""
        ledger, target = self._job.ledger, self._job.target
        for shard in shards:
            if shard.id in self._begun:
                continue
            self._begun.add(shard.id)
            chunks, retries = self._job.plan.chunks_of(shard), ledger.retries
            self._under_way.append(
                self._threads.submit(publish_newest, ledger.store, shard, chunks, target, retries)
            )
        self._note()

    def _note(self) -> None:
        done = [future for future in self._under_way if future.done()]
        self._under_way = [future for future in self._under_way if future not in done]
        for future in done:
            try:
                self._job.ledger.record_published(future.result())
            except StorageError as error:
                raise Stopped(error.problem, error.hint) from error


def _report(job: Job, figures: RunFigures, *, nothing_to_do: bool = False) -> RunReport:
    """Close the job if all of its input is answered, and say how it stands."""
    ledger = job.ledger
    if not ledger.finished:
        left = sum(1 for _ in ledger.undone())
        raise Stopped(f"{left:,} chunks were not answered", "the same command continues the job")
    if not job.missing and not nothing_to_do:
        try:
            ledger.succeed()
        except StorageError as error:
            raise Stopped(error.problem, error.hint) from error
    figures.total_s = figures.elapsed_s
    report = RunReport(
        name=job.spec.name,
        outcome=outcome(job, nothing_to_do=nothing_to_do),
        output=redact(ledger.store.uri),
        counts=ledger.counts,
        parts=len(ledger.published),
        unreadable=job.unreadable,
        run=figures,
    )
    if not nothing_to_do:
        try:
            ledger.summarize(report.to_json() | {"timeline": figures.timeline_json()})
        except StorageError as error:
            logger.warning("the job is done, but its report could not be kept: %s", error.problem)
    return report


def outcome(job: Job, *, nothing_to_do: bool = False) -> Outcome:
    """Tell how a job stands whose rows are all answered."""
    counts = job.ledger.counts
    wrong = counts.error + counts.invalid
    if job.unreadable or counts.unread:
        return Outcome.INPUT_UNREADABLE
    if wrong > job.spec.limits.max_error_rate * counts.rows:
        return Outcome.TOO_MANY_ERRORS
    return Outcome.NOTHING_TO_DO if nothing_to_do else Outcome.DONE
