"""All chunks that are left go through Ray, in rounds, until none is left.

A round is one Ray dataset: read and rendered, answered, committed. Ray tries nothing twice. What a
process held when it died comes again in the next round, and alone, since one of its rows may have
done it (`suspects`); what was merely lost on the way comes again with all others. So every death is
counted here, and none is repeated for ever:

    in company   each replica holds many chunks; ends early if replicas only die
    alone        chunks that were lost in company, one in each replica at a time
    searched     chunks that died alone, one after another, in halves

Nobody is searched while all that was tried last has died: first other chunks have to show that it
is not the machine.

Shards on which a rival driver works are left to it (`leases`); they come again, if they have to,
when all others are done.

A run stops, to be continued by the same command, when replicas die so often in a row that no row
can be the reason, or when rounds pass in which nothing happens at all.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import ray.data

from quantbatch import backpressure, cluster, stages
from quantbatch.errors import Stopped, StorageError, in_the_end
from quantbatch.gate import Lost
from quantbatch.gatekeeper import RemoteGate
from quantbatch.leases import Permits
from quantbatch.records import Receipt
from quantbatch.replica import Replica
from quantbatch.suspects import Death, Search, Suspects, attempts_for_a_row
from quantbatch.trials import Trials

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from quantbatch.draining import Drain
    from quantbatch.leases import Leases
    from quantbatch.preflight import Job
    from quantbatch.records import Chunk, Trial

MAX_INPUT_BLOCKS = 2000
"""Blocks in which Ray gets the chunk list. Each costs 1.7 ms before the first chunk runs (measured
on Ray 2.60), so in a big job a block holds many chunks; a reader hands them on one by one."""

PAUSES_S = (0.5, 1, 2, 4, 8)
"""Between looks at what rivals have done, when all that is left is theirs."""

LIFELESS_ROUNDS = 3
"""Rounds in a row that end because replicas only die, after which it can be no row: one with many
chunks in each replica, one with its suspects alone, one with chunks that nobody suspects."""


class Rounds:
    """Answers the chunks of a job that are left.

    Args:
        job: The job.
        undone: Returns the chunks that are not committed, whenever it is called.
        device: What replicas work on.
        drain: Ends the run when it is told to stop.
        leases: Of the output; None where all that is left is done, whoever else does it.
    """

    def __init__(
        self,
        job: Job,
        undone: Callable[[], Iterable[Chunk]],
        *,
        device: str,
        drain: Drain,
        leases: Leases | None = None,
    ) -> None:
        self._job = job
        self._undone = undone
        self._device = device
        self._drain = drain
        self._leases = leases
        self._rivals: frozenset[int] = frozenset()
        """Shards on which rivals work, as of the beginning of a round."""
        self._attempts = job.spec.limits.attempts
        self._suspects = Suspects(job.ledger.store)
        self._deaths = 0
        """Deaths in a row, over rounds and attempts."""
        self._lived = False
        """Whether any process of this run has answered anything."""
        self._idle = 0
        """Rounds in a row in which nothing happened."""

    def receipts(self) -> Generator[Receipt]:
        """Yield what became of each chunk, once it is committed.

        Raises:
            JobError: Something that concerns the job, not a chunk.
        """
        while self._any_left():
            if self._leases and not self._free(self._leases):
                return
            lost = yield from self._round(self._unsuspected)
            self._note(lost)
            alone = yield from self._round(self._not_yet_alone, in_flight=1)
            self._note(alone, died_alone=True)
            if not self._deaths or not any(self._ours(self._unsuspected)):
                yield from self._searched()

    def _any_left(self) -> bool:
        return next(iter(self._undone()), None) is not None

    def _free(self, leases: Leases) -> bool:
        """Wait until there is a chunk that no rival works on; tell whether there is one at all.

        Raises:
            Stopped: The store does not say.
        """
        pauses_s = iter(PAUSES_S)
        try:
            while left := self._shards_left():
                self._rivals, abandoned = leases.survey(left)
                if self._rivals or abandoned:
                    self._job.ledger.look_again()
                    left = self._shards_left()
                if left - self._rivals:
                    return True
                if left:
                    self._idle = 0
                    time.sleep(next(pauses_s, PAUSES_S[-1]))  # a signal ends it
        except StorageError as error:
            raise Stopped(error.problem, error.hint) from error
        return False

    def _shards_left(self) -> set[int]:
        return {chunk.shard for chunk in self._undone()}

    def _ours(self, wanted: Callable[[Chunk], object]) -> Iterator[Chunk]:
        """Yield the chunks that are left, and not to rivals, of those that are wanted."""
        free = (chunk for chunk in self._undone() if chunk.shard not in self._rivals)
        return (chunk for chunk in free if wanted(chunk))

    def _unsuspected(self, chunk: Chunk) -> bool:
        return chunk not in self._suspects

    def _not_yet_alone(self, chunk: Chunk) -> bool:
        return chunk in self._suspects and self._suspects.search(chunk) is None

    def _note(self, lost: Lost, *, died_alone: bool = False) -> None:
        if not lost.chunks:
            return
        for chunk in self._undone():
            if chunk.id in lost.chunks:
                self._suspects.note(chunk, Search.of(chunk) if died_alone else None)

    def _round(
        self, wanted: Callable[[Chunk], bool], *, in_flight: int = 0
    ) -> Generator[Receipt, None, Lost]:
        """Send chunks through a dataset; yield receipts, return what was lost."""
        rows, items = stages.to_items(self._ours(wanted))
        if not items:
            return Lost({}, 0)
        in_flight = in_flight or cluster.chunks_in_flight(
            self._job.spec.cluster, chunks=len(items), rows=rows
        )
        # A node that goes takes all of its replicas at once; that is no sign of anything.
        most_deaths = self._attempts * cluster.most_replicas(self._job.spec.cluster)
        gate = RemoteGate(most_deaths, self._permits())
        done, dropped = 0, cluster.Dropped()
        with self._drain.during(gate.close), dropped.noted():
            try:
                for receipt in self._through(items, in_flight, gate):
                    dropped.raise_fault()
                    done += receipt.committed
                    if receipt.committed:
                        yield receipt
                    gate.arrived(receipt.chunk)
                    self._drain.done(receipt.chunk)
            except cluster.DEATHS as error:
                dropped.note(error)
            dropped.raise_fault()
            lost = gate.lost()
        self._lived |= lost.lived
        self._deaths = lost.deaths if lost.lived else self._deaths + lost.deaths
        if self._deaths >= LIFELESS_ROUNDS * most_deaths:
            raise self._all_die(dropped.cause and f": {dropped.cause}")
        self._idle = 0 if done or lost.chunks else self._idle + 1
        if self._idle >= self._attempts:
            raise Stopped(
                f"nothing was answered in {self._idle} rounds: "
                f"{dropped.cause or 'no reason is known'}",
                "the same command continues the job",
            )
        return lost

    def _all_die(self, words: str) -> Stopped:
        return Stopped(
            f"processes died {self._deaths} times in a row, whatever their rows{words}",
            "see what the machine's memory, the card and its driver say; then the same command "
            "continues the job",
        )

    def _permits(self) -> Permits | None:
        if self._leases is None:
            return None
        return Permits(self._leases, tuple(s.first_chunk for s in self._job.plan.shards))

    def _searched(self) -> Generator[Receipt]:
        """Try the chunks that died alone one after another, until each is committed."""
        guilty = list(self._ours(self._suspects.search))
        if not guilty:
            return
        if self._lived:
            # So it was rows. If it is all of them from now on, the first search will tell.
            self._deaths = 0
        with Trials(self._job, self._device) as trials:
            for chunk in guilty:
                yield from self._search(chunk, trials)

    def _search(self, chunk: Chunk, trials: Trials) -> Generator[Receipt]:
        search = self._suspects.search(chunk)
        while search:
            found = self._attempt(chunk, search.trial(), trials)
            if isinstance(found, Receipt):
                search = search.survived()
            elif self._may_be_a_row(chunk, search, trials):
                search = search.died(found, most=self._attempts)
            else:
                # Whom it blamed meanwhile was as innocent as all others.
                self._suspects.note(chunk, Search.of(chunk))
                raise self._all_die(found.words)
            self._suspects.note(chunk, search)
            if isinstance(found, Receipt) and found.committed:
                yield found
                search = None
            self._drain.done(chunk.id)

    def _attempt(self, chunk: Chunk, trial: Trial, trials: Trials) -> Receipt | Death:
        """Try some rows of a chunk alone, and count deaths in a row."""
        with self._drain.during(lambda: {chunk.id}):
            found = trials.attempt(replace(chunk, trial=trial))
        if isinstance(found, Death):
            self._deaths += 1
            return found
        if found.trouble:
            raise in_the_end(*found.trouble)
        # To leave out all rows that are blamed proves nothing.
        self._lived |= trial.asks
        self._deaths = 0 if self._lived else self._deaths
        return found

    def _may_be_a_row(self, chunk: Chunk, search: Search, trials: Trials) -> bool:
        """Tell whether a row can be the reason for the last death, and not the machine.

        Of more attempts in a row than finding a row takes, each may have had a row that kills. So
        the other rows are tried in parts, of which one lives unless there is such a row in all.
        """
        if self._deaths <= attempts_for_a_row(search.rows) + self._attempts:
            return True
        parts = search.parts(self._attempts + 1)
        return any(isinstance(self._attempt(chunk, part, trials), Receipt) for part in parts)

    def _through(
        self, items: list[dict[str, str]], in_flight: int, gate: RemoteGate
    ) -> Generator[Receipt]:
        # Before the replicas wait as many chunks as they hold: enough for none to run dry.
        most_ahead = 1 + in_flight * cluster.most_replicas(self._job.spec.cluster)
        with backpressure.bounded(ray.data.DataContext.get_current(), most_ahead):
            dataset = self._dataset(items, in_flight, gate)
            blocks = dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            )
            for block in blocks:
                for receipt in stages.receipts(block):
                    if receipt.trouble:
                        raise in_the_end(*receipt.trouble)
                    yield receipt

    def _dataset(
        self, items: list[dict[str, str]], in_flight: int, gate: RemoteGate
    ) -> ray.data.Dataset:
        """Describe the way of a chunk: read and rendered, answered, committed."""
        job, spec, door = self._job, self._job.spec, gate.door()
        return (
            ray.data.from_items(items, override_num_blocks=min(len(items), MAX_INPUT_BLOCKS))
            .map_batches(
                stages.Reader,
                fn_constructor_args=[job.read_job, door],
                **cluster.reader_options(spec, self._device),
            )
            .map_batches(
                Replica,
                fn_constructor_args=[job.replica_job(self._device), door],
                **cluster.replica_options(spec, self._device, in_flight),
            )
            .map_batches(
                stages.Committer,
                fn_constructor_args=[job.ledger.store, job.target],
                **cluster.committer_options(),
            )
        )
