"""A job, its input and its output in memory, and processes that work on it with the real code.

What a simulated process runs is `quantbatch.pipeline.run` and `quantbatch.retry.retry` themselves.
Replaced are their ways to the outside: stores by `memory`, Ray by tasks of the scheduler that read,
answer and commit chunks (`receipts`), the model by `engine`, threads by tasks, random names and
the time by ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import uuid
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch import gc, pipeline, preflight, retry, rows, stages
from quantbatch.errors import JobError, in_the_end
from quantbatch.input import sources
from quantbatch.ledger import Ledger
from quantbatch.preflight import Job
from quantbatch.records import Status, pack
from quantbatch.spec import JobSpec
from tests.faults import engine
from tests.faults.checker import Checker
from tests.faults.memory import Fault, Killed, MemoryStore, Objects, Write, nothing_wrong
from tests.faults.scheduler import Choices, InlineThreads, Process, Scheduler, SimThreads

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

    from quantbatch.records import Chunk, Receipt
    from quantbatch.report import RunReport
    from quantbatch.spec import Storage

IN, OUT = "s3://simulated/in", "s3://simulated/out"
WORKERS = 2
"""Chunks that a driver has in flight."""
TRIES = 3
"""Workers that a chunk may end, before its driver gives up."""

SPEC = JobSpec.model_validate(
    {
        "name": "simulated",
        "input": {"uri": IN, "rows_per_chunk": 3},
        "model": {"id": "m", "bits": 4},
        "engine": {"kind": "echo"},
        "prompt": {"template": "{{ text }}"},
        "output": {"uri": OUT, "rows_per_part": 5, "compression": "snappy"},
        "limits": {"max_error_rate": 1.0},
    }
).resolved()


def spec_of_another_job() -> JobSpec:
    """Return a job that is not ours, on the same output."""
    sampling = SPEC.sampling.model_copy(update={"seed": 1})
    return SPEC.model_copy(update={"sampling": sampling})


def input_file(name: str, count: int, note: str = "text") -> bytes:
    """Return a file of the input; its rows tell what they are."""
    sink = io.BytesIO()
    texts = [f"{note} {name}:{row}" for row in range(count)]
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), sink)
    return sink.getvalue()


_latest: list[World] = []
"""The world that ran last: the one that the product's code sees."""

FILES = {"a.parquet": 5, "b.parquet": 4, "empty.parquet": 0}
"""Rows of each file of the job: two shards of two chunks each."""
LATER = {"c.parquet": 2}
"""Files that come later, for --extend."""


class World:
    """All that simulated processes share."""

    def __init__(
        self, files: dict[str, int] | None = None, seed: int = 0, generation: int = 0
    ) -> None:
        self.input = Objects()
        for name, count in (FILES if files is None else files).items():
            self.input.set(name, input_file(name, count))
        self.output = Objects(watch=self._look)
        self.checker = Checker(self.output)
        self.scheduler: Scheduler | None = None
        self.generation = generation
        self.names = random.Random(f"{generation} {seed}")
        self.outlive = False
        """Whether workers go on for a while when their driver is killed."""
        self.short: set[int] = set()
        """Chunks of which an engine hands on too few rows, once each."""
        self.reports: list[RunReport] = []
        self.tidied = 0
        """How often `gc` ran."""
        self.trace: list[str] = []
        """Calls of stores that the latest processes made."""
        self.calls = 0

    def snapshot(self, seed: int = 0) -> World:
        """Return a world that goes on from here."""
        other = World({}, seed, self.generation + 1)
        for mine, theirs in ((self.input, other.input), (self.output, other.output)):
            theirs.found, theirs.written = dict(mine.found), dict(mine.written)
            theirs.clock_s = mine.clock_s
        other.checker.referenced = set(self.checker.referenced)
        return other

    def _look(self, write: Write) -> None:
        try:
            self.checker.changed(write)
        except AssertionError as error:
            if self.scheduler is None or self.scheduler.current is None:
                raise
            self.scheduler.fail(error)
            raise Killed from error

    @property
    def visible(self) -> list[str]:
        """Names of the files that readers see."""
        return [key for key in sorted(self.output.found) if not key.startswith("_")]

    # ---- running processes

    def play(self, choices: Choices, *commands: tuple[str, Callable[[], object]]) -> list[Process]:
        """Run processes side by side to their ends; each has a name and what it does."""
        _latest[:] = [self]
        self.scheduler = Scheduler(choices)
        processes = [self.scheduler.spawn(name, work) for name, work in commands]
        sources.close_readers()
        try:
            self.scheduler.run()
        finally:
            self.trace = self.scheduler.trace
            self.calls = self.scheduler.calls
            self.scheduler = None
        return processes

    def run(self, spec: JobSpec = SPEC, *, extend: bool = False) -> RunReport:
        """Do what `quantbatch run` does."""
        report = pipeline.run(spec, extend=extend)
        self.reports.append(report)
        return report

    def retry(self, *statuses: Status, spec: JobSpec = SPEC) -> RunReport:
        """Do what `quantbatch retry` does."""
        report = retry.retry(spec, statuses or [Status.ERROR])
        self.reports.append(report)
        return report

    def tidy(self) -> gc.Tidied:
        """Do what `quantbatch gc --older-than 1h` does."""
        return gc.tidy(OUT, SPEC.output.storage, older_than_s=3600.0)

    # ---- what the product's code gets instead of the outside

    def open_store(self, uri: str, storage: Storage) -> MemoryStore:
        """See `quantbatch.storage.open_store`."""
        del storage
        if uri == IN:
            return MemoryStore(IN, self.input)
        assert uri == OUT, uri
        return MemoryStore(OUT, self.output, self._turn)

    def _turn(self, name: str, key: str) -> Fault:
        if self.scheduler is None:
            return nothing_wrong(name, key)
        return self.scheduler.turn(name, key)

    def prepare(self, spec: JobSpec, *, extend: bool = False) -> Job:
        """Do what `preflight.prepare` does with an output and an input; there is no model."""
        ledger = Ledger.open(spec, "digest")
        listed = preflight._listing(spec, ledger)
        plan, new = preflight._whole_plan(spec, ledger, listed, extend=extend, fresh=None)
        target = ledger.output_format(rows.output_schema(spec, ["text"], plan.schema))
        checkpoint = cast("Any", SimpleNamespace(digest="digest"))
        return Job(
            spec=spec,
            checkpoint=checkpoint,
            ledger=ledger,
            plan=plan,
            new_generation=new,
            memory=None,
            misfit=None,
            card=None,
            chosen_for=None,
            max_input_tokens=100,
            kept=("text",),
            target=target,
            root=IN,
            missing=False,
            unreadable={},
        )

    def receipts(
        self, job: Job, undone: Callable[[], Iterable[Chunk]], *given: object
    ) -> Generator[Receipt]:
        """Do what Ray does with chunks: some at once, each by a process of its own, and again where
        that was killed.
        """
        del given
        scheduler = self.scheduler
        assert scheduler is not None
        assert scheduler.current is not None
        driver = scheduler.current.process
        left = list(undone())
        tries = dict.fromkeys((chunk.id for chunk in left), 0)
        under_way: list[_Worker] = []
        try:
            while left or under_way:
                while left and len(under_way) < WORKERS:
                    chunk = left.pop(0)
                    tries[chunk.id] += 1
                    under_way.append(_Worker(self, job, chunk, driver, tries[chunk.id]))
                scheduler.wait(lambda: any(worker.over for worker in under_way))
                worker = next(worker for worker in under_way if worker.over)
                under_way.remove(worker)
                if worker.receipt is None:
                    if worker.process.error or tries[worker.chunk.id] == TRIES:
                        raise _ChunkLost(f"chunk {worker.chunk.id}") from worker.process.error
                    left.insert(0, worker.chunk)
                    continue
                if worker.receipt.trouble:
                    raise in_the_end(*worker.receipt.trouble)
                self.checker.told(worker.receipt, worker.chunk)
                job.unreadable.update(worker.receipt.unreadable)
                yield worker.receipt
        finally:
            for worker in under_way:
                worker.process.dead = True

    def uuid4(self) -> uuid.UUID:
        """Return a name that nobody else has, the same in each repetition of a schedule."""
        return uuid.UUID(int=self.names.getrandbits(128), version=4)

    def clock(self) -> float:
        """Return the time of the processes' clocks, which is that of the store here."""
        return self.output.clock_s


class _ChunkLost(JobError):  # noqa: N818 - as the product's own are named
    """Stands for what Ray raises when a task fails for good."""

    exit_code = 75


class _Worker:
    """A process of Ray's that answers one chunk and commits it."""

    def __init__(self, world: World, job: Job, chunk: Chunk, driver: Process, number: int) -> None:
        assert world.scheduler is not None
        self.chunk = chunk
        self.receipt: Receipt | None = None
        self._world, self._job = world, job
        self._who = f"{driver.name}.{chunk.id}.{number}"
        self.process = Process(self._who)
        self.task = world.scheduler.start(self.process, self._work, outlives=world.outlive)
        self._driver = driver

    @property
    def over(self) -> bool:
        return self.task.done

    def _work(self) -> None:
        try:
            answered = engine.answered(self._job, self.chunk, self._who)
            if self.chunk.id in self._world.short:
                self._world.short.remove(self.chunk.id)
                answered = answered.slice(0, answered.num_rows - 1)
            block = stages.commit(
                pack(self.chunk.id, answered), store=self._job.ledger.store, target=self._job.target
            )
            (self.receipt,) = stages.receipts(block)
        except Exception as error:  # noqa: BLE001 - Ray takes it to the driver
            self.process.error = error


def _to_json(document: Mapping[str, Any]) -> bytes:
    """Do what `commits.to_json` does, without line breaks: Python is then five times as fast."""
    return json.dumps(document, sort_keys=True).encode()


def _read_table(source: pa.NativeFile) -> pa.Table:
    """Do what Arrow's function does, without its threads: twice as fast for a few rows."""
    return pq.ParquetFile(source).read(use_threads=False)


def _changed(job: Job, spec: JobSpec) -> Job:
    """Do what `retry._changed` does, without a model that has to fit."""
    changed = job.spec.model_copy(update={"sampling": spec.sampling, "engine": spec.engine})
    return dataclasses.replace(job, spec=changed)


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Have the product's code run in whichever world plays."""

    def scheduler() -> Scheduler:
        found = _latest[0].scheduler
        assert found is not None
        return found

    def open_store(uri: str, storage: Storage) -> MemoryStore:
        return _latest[0].open_store(uri, storage)

    def prepare(spec: JobSpec, *, extend: bool = False) -> Job:
        return _latest[0].prepare(spec, extend=extend)

    # A spec's deciding fields are asked for at every look at an output; there are two specs here.
    deciding = JobSpec.deciding
    known = {spec.sampling.seed: deciding(spec) for spec in (SPEC, spec_of_another_job())}
    no_cluster = SimpleNamespace(joined=lambda _: contextlib.nullcontext(), card_names=lambda _: ())
    names = SimpleNamespace(uuid4=lambda: _latest[0].uuid4())
    replaced: Sequence[tuple[str, object]] = [
        *[(f"{module}.open_store", open_store) for module in ("ledger", "verify", "retry", "gc")],
        ("input.listing.open_store", open_store),
        ("stages._store", lambda _: MemoryStore(IN, _latest[0].input)),
        *[(f"{module}.ThreadPoolExecutor", InlineThreads) for module in ("ledger", "plan", "gc")],
        ("pipeline.ThreadPoolExecutor", lambda most, _: SimThreads(scheduler(), most)),
        ("pipeline.prepare", prepare),
        ("retry.prepare", prepare),
        ("pipeline.receipts", lambda *given: _latest[0].receipts(*given)),
        ("pipeline.require_fit", lambda *_: None),
        ("pipeline.cluster", no_cluster),
        ("retry._changed", _changed),
        *[(f"{module}.uuid", names) for module in ("commits", "ledger", "again", "storage", "gc")],
        ("spec.JobSpec.deciding", lambda spec: dict(known[spec.sampling.seed])),
        *[(f"{module}.to_json", _to_json) for module in ("commits", "ledger")],
        ("commits.pq.read_table", _read_table),
        ("ledger.time", SimpleNamespace(time=lambda: _latest[0].clock())),
        ("ledger.versions", dict),
        ("again.versions", dict),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replaced:
            patch.setattr(f"quantbatch.{name}", value)
        yield
