"""The Ray actor: one copy of the model, answering several chunks at once."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from quantbatch import rows as row_layout
from quantbatch import tasks
from quantbatch.answers.cache import AnswerCache
from quantbatch.answers.keys import Keys
from quantbatch.engine import echo
from quantbatch.engine.dedup import Deduplicated
from quantbatch.errors import JobError, Stopped
from quantbatch.gate import NoDoor
from quantbatch.lastwords import LastWords, within
from quantbatch.model.checkpoint import find_checkpoint
from quantbatch.model.sizes import gib
from quantbatch.prompts.rendering import sample_seed
from quantbatch.prompts.tokens import tokenizer_of
from quantbatch.records import (
    EngineProgress,
    Failure,
    ReplicaStats,
    Request,
    RequestId,
    pack,
    to_token_lists,
    unpack,
)
from quantbatch.runner import Runner
from quantbatch.spec import ContinuousEngine, EchoEngine, LlamaCppEngine, Sampling, StaticEngine
from quantbatch.suspects import Death
from quantbatch.wants import Write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pyarrow as pa

    from quantbatch.answers.cache import Space
    from quantbatch.engine import Engine
    from quantbatch.gate import Door
    from quantbatch.records import Answer
    from quantbatch.spec import JobSpec
    from quantbatch.wants import Ask


logger = logging.getLogger(__name__)

LEAST_REPEATS = 0.01
"""Share of a replica's requests that equal others from which on their answers are kept for other
replicas: it takes 45 us to keep one and find none (measured), and at least ten milliseconds of a
model to make one."""
MOST_SAMPLINGS = 1024
"""Different settings of rows that are remembered."""


@dataclass(frozen=True)
class ReplicaJob:
    """What all replicas of a job need to know; small, because Ray keeps it for restarts."""

    spec: JobSpec
    device: str
    """`cuda` or `cpu`."""
    max_tokens: int
    """Longest prompt and answer together, in tokens."""
    driver_folder: str
    """Working directory of the driver, for a model path that is relative to it."""
    answers: Space | None = None
    """Where answers are kept across jobs, or for the job itself."""


class LoadedEngine(NamedTuple):
    """An engine that is ready to work."""

    engine: Engine
    planned_bytes: int = 0
    """What `peak_bytes` was planned to be."""
    peak_bytes: Callable[[], int] = int
    """Returns the most memory that model and work took so far."""
    progress: Callable[[], EngineProgress] = EngineProgress
    """Returns what the engine did since the last call."""


def load_engine(job: ReplicaJob) -> LoadedEngine:
    """Load the model and build the engine that the spec names.

    Raises:
        JobError: The model can't be loaded, or does not fit.
    """
    match job.spec.engine:
        case EchoEngine() as options:
            return _echo(job, options)
        case StaticEngine() | ContinuousEngine() as options:
            # Threads of a forward that find nothing to do wait spinning, 1000 times longer than it
            # pays: where cores are shared, steps then take 10 times as long (measured; with a short
            # spin 0 to 30 % less CPU at the same speed). libgomp reads it when torch is loaded.
            os.environ.setdefault("GOMP_SPINCOUNT", "2000")
            # Without it the allocator leaves up to a megabyte behind a tensor: 2.7 % of the weights
            # of a 1.1B model at 4 bits (H100, measured; with it, what was planned to the megabyte).
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
            # torch is imported there, in the actor, and nowhere else.
            from quantbatch.engine import loading

            found = loading.load(
                job.spec,
                options,
                device=job.device,
                max_tokens=job.max_tokens,
                folder=job.driver_folder,
            )
            return LoadedEngine(found.engine, found.planned_bytes, found.peak_bytes, found.progress)
        case LlamaCppEngine() as options:
            # So is llama.cpp.
            from quantbatch.engine import llama_loading

            engine, plan, peak_bytes = llama_loading.load(
                job.spec,
                options,
                device=job.device,
                max_tokens=job.max_tokens,
                folder=job.driver_folder,
            )
            return LoadedEngine(engine, plan.total, peak_bytes)


def _echo(job: ReplicaJob, options: EchoEngine) -> LoadedEngine:
    checkpoint = find_checkpoint(job.spec.model.seen_from(job.driver_folder))
    tokenizer = tokenizer_of(checkpoint)
    size = echo.DEFAULT_BATCH_SIZE if options.batch_size == "auto" else options.batch_size

    def decode(answers: list[Sequence[int]]) -> list[str]:
        return tokenizer.batch_decode([list(answer) for answer in answers])

    hidden_size = checkpoint.text_config.get("hidden_size", 1)
    return LoadedEngine(
        echo.EchoEngine(decode, batch_size=size, step_s=options.step_s, hidden_size=hidden_size)
    )


class Replica:
    """Holds a model and answers chunks; Ray Data makes one in each actor of the pool.

    A model that can't be loaded is no exception here, since Ray would try for ever or bury the
    reason: the replica answers every chunk with that failure, and the driver ends the job with it.

    Args:
        job: What all replicas of the job need to know.
        door: Asked before each chunk.
    """

    def __init__(self, job: ReplicaJob, door: Door | None = None) -> None:
        started = time.perf_counter()
        self._door = door or NoDoor()
        # Tasks that name single tokens look the tokenizer up from here.
        model = job.spec.model.seen_from(job.driver_folder)
        self._spec = job.spec.model_copy(update={"model": model})
        self._broken: JobError | None = None
        self._samplings: dict[str, Sampling] = {}
        self._answers = AnswerCache(job.answers) if job.answers else None
        self._keys = Keys()
        self._asked = self._cached = 0
        """Requests that may have equal ones, and those whose answers were kept."""
        self._stats = ReplicaStats(replica=uuid.uuid4().hex[:8], device=job.device)
        self._words = LastWords(self._door.name) if self._door.name else None
        self.before = self._words.before if self._words else Death()
        """How the process of this name before this one ended."""
        try:
            self._knock()
            with within(job.spec.limits.load_timeout_s, self._words):
                loaded = load_engine(job)
        except JobError as error:
            self._broken = error
            return
        self._peak_bytes, self._progress = loaded.peak_bytes, loaded.progress
        limit_s = job.spec.limits.step_timeout_s
        watch = self._words.watchdog(limit_s) if self._words else None
        self._runner = Runner(loaded.engine, self._leave, watch)
        self._copied = _copied(loaded.engine)
        self._door.ready()
        load_s = time.perf_counter() - started
        self._stats = dataclasses.replace(
            self._stats, load_s=load_s, planned_bytes=loaded.planned_bytes
        )

    def _knock(self) -> None:
        """Tell the gate that this process starts.

        Raises:
            Stopped: Too many before it died.
        """
        if reason := self._door.starts(self.before):
            hint = (
                "see what the machine's memory, the card and its driver say; then the same command"
            )
            raise Stopped(reason, f"{hint} continues the job")

    def _leave(self, code: int, reason: str) -> None:
        if self._words:
            self._words.say(reason)
        os._exit(code)

    async def __call__(self, block: pa.Table) -> pa.Table:
        """Answer one chunk; several calls run at once and share the engine's batch."""
        chunk, rows = unpack(block)
        facts = row_layout.facts_of(rows)
        if facts.trouble or facts.held_back:
            return block
        if self._broken:
            return pack(chunk, row_layout.failed(facts.shard, self._broken))
        if not await asyncio.to_thread(self._door.begin, chunk):
            return pack(chunk, row_layout.held_back(facts.shard))
        answered = await self._answered(chunk, rows)
        await asyncio.to_thread(self._door.end, chunk, answered=True)
        facts = dataclasses.replace(facts, replica=self._measured())
        return pack(chunk, row_layout.with_facts(answered, facts))

    async def _answered(self, chunk: int, rows: pa.Table) -> pa.Table:
        requests = self._requests(chunk, rows)
        keys = self._keys_of(requests)
        hits = await self._kept_answers(keys)
        rest = [request for request in requests if request.id not in hits]
        answers = hits | await asyncio.wrap_future(self._runner.submit(rest))
        await self._keep(rest, answers, keys)
        by_row: list[list[Answer]] = [[] for _ in range(rows.num_rows)]
        for request in requests:
            by_row[request.id.row].append(answers[request.id])
        paid = {request.id.row for request in rest}
        cached = [bool(found) and row not in paid for row, found in enumerate(by_row)]
        return row_layout.answered(
            rows, by_row, self._spec, cached if self._spec.answers_cache else None
        )

    def _keys_of(self, requests: Sequence[Request]) -> dict[RequestId, bytes]:
        """Return the keys of the requests whose answers may be kept; none without a cache."""
        if self._answers is None:
            return {}
        found = ((request.id, self._keys.of(request)) for request in requests)
        return {id: key for id, key in found if key is not None}

    async def _kept_answers(self, keys: Mapping[RequestId, bytes]) -> dict[RequestId, Answer]:
        """Return the answers that the job's cache has."""
        if self._answers is None:
            return {}
        self._asked += len(keys)
        found = await asyncio.to_thread(self._answers.find, list(set(keys.values())))
        hits = {
            id: dataclasses.replace(found[key], id=id) for id, key in keys.items() if key in found
        }
        self._cached += len(hits)
        return hits

    async def _keep(
        self,
        requests: Sequence[Request],
        answers: Mapping[RequestId, Answer],
        keys: Mapping[RequestId, bytes],
    ) -> None:
        """Put new answers in the job's cache, before the chunk is committed: it is what was paid
        for.
        """
        if self._answers is None or not self._is_worth_it():
            return
        new = {
            keys[request.id]: answers[request.id]
            for request in requests
            if request.id in keys and not isinstance(answers[request.id], Failure)
        }
        await asyncio.to_thread(self._answers.keep, new)

    def _is_worth_it(self) -> bool:
        """Tell whether answers are kept: always for later jobs, else if enough have been of use."""
        if self._spec.answers_cache is not None:
            return True
        return self._copied() + self._cached > LEAST_REPEATS * self._asked

    def _requests(self, chunk: int, rows: pa.Table) -> list[Request]:
        """Return the requests of each row that has no error yet: one for each of its samples."""
        return [
            request
            for row, (row_id, prompt, ask, error) in enumerate(
                zip(
                    rows["row_id"].to_pylist(),
                    to_token_lists(rows["prompt_ids"]),
                    row_layout.asks_of(rows),
                    rows["error_type"],
                    strict=True,
                )
            )
            if prompt is not None and not error.is_valid
            for request in requests_of(
                RequestId(chunk, row),
                row_id,
                tuple(prompt),
                dataclasses.replace(ask, want=tasks.want(self._spec, ask)),
                self._sampling(ask),
            )
        ]

    def _sampling(self, ask: Ask) -> Sampling:
        """Return a row's sampling; equal ones are one object, which engines compare quickly."""
        if not ask.sampling:
            return self._spec.sampling
        key = json.dumps(ask.sampling, sort_keys=True)
        if key not in self._samplings:
            if len(self._samplings) > MOST_SAMPLINGS:
                self._samplings.clear()
            self._samplings[key] = sampling_of(self._spec.sampling, ask)
        return self._samplings[key]

    def _measured(self) -> ReplicaStats:
        peak_bytes = self._peak_bytes()
        if not self._stats.peak_bytes and self._stats.device != "cpu":
            _compare_with_plan(self._stats.planned_bytes, peak_bytes)
        self._stats = dataclasses.replace(
            self._stats, busy_s=self._runner.busy_s, peak_bytes=peak_bytes
        )
        progress = self._progress()
        if self._answers is not None:
            totals = progress.totals | {"from_cache": self._cached}
            progress = dataclasses.replace(progress, totals=totals)
        return dataclasses.replace(self._stats, engine=progress)


def _copied(engine: Engine) -> Callable[[], int]:
    """Return what tells how many requests were answered with the answer to an equal one."""
    return lambda: engine.copied if isinstance(engine, Deduplicated) else 0


def requests_of(
    id: RequestId, row_id: str, prompt: tuple[int, ...], ask: Ask, sampling: Sampling
) -> Iterator[Request]:
    """Yield all requests of a row: each sample of each of its prompts, and what it asks beside.

    Args:
        id: Of the first.
        row_id: The row's, on which its seeds depend.
        prompt: Its own prompt.
        ask: What it asks for.
        sampling: Its sampling, see `sampling_of`.
    """
    samples = sampling.n if isinstance(ask.want, Write) else 1
    prompts = (prompt, *ask.more_prompts)
    for sample, ids in enumerate(ids for ids in prompts for _ in range(samples)):
        seed = sample_seed(sampling.seed, row_id, sample)
        yield Request(id._replace(sample=sample), ids, sampling, seed, want=ask.want)
    if ask.beside:
        last = id._replace(sample=samples * len(prompts))
        yield Request(last, ask.beside.prompt_ids, sampling, 0, want=ask.beside.want)


def sampling_of(usual: Sampling, ask: Ask) -> Sampling:
    """Return a row's sampling: the job's, but for what the row asks for itself."""
    if not ask.sampling:
        return usual
    return Sampling.model_validate(usual.model_dump() | ask.sampling)


def _compare_with_plan(planned_bytes: int, peak_bytes: int) -> None:
    """Say after a card's first chunk how far its memory is from the plan."""
    if not planned_bytes:
        return
    logger.log(
        logging.WARNING if peak_bytes > planned_bytes else logging.INFO,
        "memory of the card: %s planned, %s taken (%+.1f %%)",
        gib(planned_bytes),
        gib(peak_bytes),
        100 * (peak_bytes / planned_bytes - 1),
    )
