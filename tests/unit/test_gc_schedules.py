"""`gc` beside rival drivers, in an order that a seed decides: 500 schedules; and two mutants of it.

Each process is a thread that hands on at every call of the store, so that one runs at a time. After
each claim and each delete all attempts that records name must have their files; at the end, when
nobody works any more, there must be no others.
"""

from __future__ import annotations

import functools
import hashlib
import io
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch import again, commits, gc, job_record, ledger
from quantbatch.commits import Commit, commit_chunk
from quantbatch.errors import JobError
from quantbatch.ledger import Ledger
from quantbatch.spec import JobSpec
from quantbatch.storage import FileInfo
from tests.unit import test_again
from tests.unit.test_ledger import make_spec, opened, target_of

if TYPE_CHECKING:
    from tests.conftest import Count

SCHEDULES = 500
Jobs = tuple[JobSpec, list[dict[str, bytes]]]


class KilledError(BaseException):
    """Ends a process where it is."""


class Processes:
    """Threads of which one runs at a time."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self._stay = self.dice.choice([0.0, 0.6, 0.9])
        """How likely a process goes on by itself: then others sleep for long."""
        self._turns: dict[int, threading.Semaphore] = {}
        self._mine = threading.local()
        self._over = threading.Event()
        self.errors: list[BaseException] = []

    def run(self, works: list[Callable[[], object]]) -> None:
        """Run all of them to their ends."""
        self._turns = {number: threading.Semaphore(0) for number in range(len(works))}
        threads = [threading.Thread(target=self._run, args=each) for each in enumerate(works)]
        for thread in threads:
            thread.start()
        self._next()
        assert self._over.wait(60)
        for thread in threads:
            thread.join()

    def _run(self, number: int, work: Callable[[], object]) -> None:
        self._mine.number = number
        self._turns[number].acquire()
        try:
            work()
        except (KilledError, JobError):
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by the test
            self.errors.append(error)
        del self._turns[number]
        self._next()

    def _next(self) -> None:
        if self._turns:
            self.dice.choice(list(self._turns.values())).release()
        else:
            self._over.set()

    def switch(self) -> None:
        """Let somebody else go on, or ourselves."""
        mine = self._turns.get(getattr(self._mine, "number", -1))
        if mine is not None and self.dice.random() >= self._stay:
            self._next()
            mine.acquire()


@dataclass
class MemoryStore:
    """A store in memory; a process may be killed before one of its calls."""

    objects: dict[str, bytes]
    processes: Processes
    dies_at: int = -1
    uri: str = "memory"
    calls: int = field(default=0)

    def _turn(self) -> None:
        self.processes.switch()
        self.calls += 1
        if self.calls == self.dies_at:
            raise KilledError

    def read(self, key: str) -> bytes:
        self._turn()
        try:
            return self.objects[key]
        except KeyError:
            raise FileNotFoundError(key) from None

    def open(self, key: str, *, sequential: bool = False) -> IO[bytes]:
        del sequential
        return io.BytesIO(self.read(key))

    def info(self, key: str) -> FileInfo:
        data = self.read(key)
        return FileInfo(key, len(data), hashlib.sha256(data).hexdigest(), 0.0)

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        self._turn()
        found = [key for key in sorted(self.objects) if key.startswith(f"{prefix}/")]
        return iter([FileInfo(key, len(self.objects[key]), "", 0.0) for key in found])

    def put(self, key: str, data: bytes) -> None:
        self._turn()
        self.objects[key] = data

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def claim(self, key: str, data: bytes) -> bytes:
        self._turn()
        found = self.objects.setdefault(key, data)
        self._check()
        self._turn()  # the answer comes later
        return found

    def delete(self, key: str) -> None:
        self._turn()
        self.objects.pop(key, None)
        self._check()

    def _check(self) -> None:
        lost = named(self.objects) - data_files(self.objects)
        assert not lost, f"named, and gone: {lost}"


def data_files(objects: dict[str, bytes]) -> set[str]:
    return {key for key in objects if key.startswith("_quantbatch/data/")}


def named(objects: dict[str, bytes]) -> set[str]:
    records = [
        Commit.from_bytes(data)
        for key, data in objects.items()
        if key.startswith(("_quantbatch/commits/", "_quantbatch/again/"))
    ]
    return {commits.data_key(record.chunk, record.attempt) for record in records}


class Inline:
    """Stands for a pool of threads."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Callable[..., Any], *items: Any) -> Iterator[Any]:
        return iter([function(*each) for each in zip(*items, strict=False)])


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """A spec, and the objects of its job: just planned, and finished with two error rows."""
    folder = tmp_path_factory.mktemp("gc")
    (folder / "in").mkdir()
    pq.write_table(pa.table({"text": ["x"] * 9}), folder / "in" / "a.parquet")
    spec = make_spec(folder, output={"uri": str(folder / "planned"), "rows_per_part": 5})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        opened(spec)
        finished = test_again.job_in(folder / "finished")
    found = []
    for root in (folder / "planned", Path(finished.output.uri)):
        files = [path for path in root.rglob("*") if path.is_file()]
        found.append({path.relative_to(root).as_posix(): path.read_bytes() for path in files})
    identity = b"".join(objects["_quantbatch/job.json"] for objects in found)
    assert identity
    return finished, found


@pytest.fixture
def simulated(begun: Jobs, monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Have all that opens a store get that of its process."""
    mine = threading.local()
    for module in (gc, ledger):
        monkeypatch.setattr(module, "open_store", lambda *_: mine.store)
        monkeypatch.setattr(module, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(again, "probe", lambda _: None)
    # What takes long, and is the same in each schedule.
    deciding = begun[0].deciding()
    monkeypatch.setattr(JobSpec, "deciding", lambda _: dict(deciding))
    monkeypatch.setattr(test_again, "answers", functools.cache(test_again.answers))
    monkeypatch.setattr(job_record, "_grown_identity", lambda job: job["identity"])
    monkeypatch.setattr(ledger, "versions", dict)
    monkeypatch.setattr(again, "versions", dict)
    return mine


@dataclass
class Schedule:
    """Two drivers and gc, on a job that is planned or one that is finished."""

    seed: int
    spec: JobSpec
    objects: dict[str, bytes]
    finished: bool
    mine: threading.local

    def run(self) -> None:
        """Run it to the end of the job, and look."""
        processes = Processes(self.seed)
        dice = processes.dice
        works: list[Callable[[], object]] = []
        for name in ("one", "another"):
            dies_at = dice.randrange(60) if dice.random() < 0.5 else -1
            store = MemoryStore(self.objects, processes, dies_at)
            works.append(partial(self._as, store, partial(self._drive, name)))
        for _ in range(2):
            store = MemoryStore(self.objects, processes)
            works.append(partial(self._as, store, self._tidy))
        processes.run(works)
        for error in processes.errors:
            raise error
        store = MemoryStore(self.objects, processes)
        self._as(store, partial(self._drive, "last"))
        self._as(store, self._tidy)
        assert data_files(self.objects) == named(self.objects)

    def _as(self, store: MemoryStore, work: Callable[[], object]) -> None:
        self.mine.store = store
        work()

    def _drive(self, name: str) -> None:
        found = Ledger.open(self.spec, "digest")
        if self.finished:
            test_again.retry(found, name)
            return
        target = target_of(found)
        for chunk in list(found.undone()):
            commit_chunk(found.store, chunk.id, test_again.answers(chunk, name), target)

    def _tidy(self) -> None:
        for _ in range(2):
            gc.tidy("", self.spec.output.storage, older_than_s=0)


def schedule(seed: int, jobs: Jobs, mine: threading.local) -> Schedule:
    spec, states = jobs
    finished = seed % 2 == 1
    objects = dict(states[finished])
    if not finished:  # the record of the other job, whose input has the same shape
        objects["_quantbatch/job.json"] = states[True]["_quantbatch/job.json"]
    return Schedule(seed, spec, objects, finished, mine)


@pytest.mark.timeout(300)
def test_what_counts_is_never_removed_and_the_rest_always_is(
    begun: Jobs, simulated: threading.local, count: Count
) -> None:
    for seed in range(SCHEDULES):
        try:
            schedule(seed, begun, simulated).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
    count(f"schedules={SCHEDULES} lost=0")


def by_age(records: Any, chunk: int) -> frozenset[str]:
    """The classic mistake: what no record names now is taken for old enough."""
    keys = [key for key in records._keys(chunk) if key in records._there]
    return frozenset(Commit.from_bytes(records._store.read(key)).attempt for key in keys)


def seeds_that_fail(jobs: Jobs, mine: threading.local) -> list[int]:
    failed = []
    for seed in range(60):
        with suppress(FileNotFoundError):
            try:
                schedule(seed, jobs, mine).run()
            except AssertionError:
                failed.append(seed)
    return failed


def test_going_by_age_would_be_noticed(
    begun: Jobs, simulated: threading.local, monkeypatch: pytest.MonkeyPatch, count: Count
) -> None:
    monkeypatch.setattr(gc._Records, "named", by_age)
    failed = seeds_that_fail(begun, simulated)
    count(f"mutant of gc: schedules=60 noticed in {len(failed)}")
    assert failed


def test_looking_at_records_before_files_would_be_noticed(
    begun: Jobs, simulated: threading.local, monkeypatch: pytest.MonkeyPatch, count: Count
) -> None:
    early: dict[int, Any] = {}
    records, read_job = gc._Records, job_record.read_job

    def look_early(store: Any) -> Any:
        early[id(store)] = records(store)
        return read_job(store)

    monkeypatch.setattr(gc, "read_job", look_early)
    monkeypatch.setattr(gc, "_Records", lambda store: early[id(store)])
    failed = seeds_that_fail(begun, simulated)
    count(f"mutant of gc: schedules=60 noticed in {len(failed)}")
    assert failed
