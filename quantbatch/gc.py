"""Takes away what no record of an output names, and none ever will: `quantbatch gc`.

An attempt's data file may be named by no record: a driver was killed between the two, or the store
lost a delete. The classic mistake is to go by age: a driver that slept for longer between the two,
in a suspended machine, wakes up and makes its record count, of a file that is gone. So these do not
go by age. An attempt can only be named by a record that does not exist yet, since records are
claimed and never change; it belongs to the job itself or to a retry, and of each a chunk has one
record. So

1. the data files are listed,
2. then the lists of retries: an attempt of a retry begins after its list is claimed, so those of
   the files seen in 1 are all among them,
3. then the records of a chunk that could name its files: that of the job, and of each retry with
   rows of it. If all of them are there, what they don't name is never named by anybody, and goes,
   however young. If one is missing, all files of the chunk stay: a run, or the retry, decides.

A driver that sleeps through this wakes up, claims a record that is somebody else's, and deletes its
file, which is gone. (Who removes a commit record by hand while such a driver sleeps, as the error
about a damaged attempt says, may be told of that error again.) What records name always stays, also
of shards that are published: a retry builds on it.

Scratch files of writes on a local disk, keys of the probe of a store, signs of life and leases of
drivers, and the parts of uploads that were never completed are nobody's after some time. These go
by age, by the store's clock: what a store says of them is compared with what it says of an object
that we put just now. If one is taken from a process that hung for longer, its write fails, its run
ends as after any trouble of a store, and the same command continues. (A lease that goes early costs
double work.)
"""

from __future__ import annotations

import re
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbatch.commits import Commit, commit_key, record_of
from quantbatch.errors import InputError, JobError, SpecError
from quantbatch.job_record import read_job
from quantbatch.retries import Retries
from quantbatch.storage import PRIVATE, open_store, redact, uploads

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from quantbatch.spec import Storage
    from quantbatch.storage import FileInfo, Store

_DATA = re.compile(rf"{PRIVATE}/data/(\d{{8}})-([0-9a-f]{{12}})\.parquet")
_PASSING = ("scratch", "probe", "drivers", "leases")
"""Folders of what is nobody's after some time."""
CALLS_AT_ONCE = 16
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Attempt(NamedTuple):
    """A data file."""

    key: str
    size: int
    chunk: int
    name: str


@dataclass
class Tidied:
    """What was removed, or would be."""

    output: str
    dry_run: bool
    removed: dict[str, list[int]] = field(default_factory=dict)
    """Sizes in bytes, by what it was."""
    undecided: int = 0
    """Data files that a run or a retry may still make count, or may not."""

    def note(self, what: str, size: int) -> None:
        """Note what goes."""
        self.removed.setdefault(what, []).append(size)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        sizes = self.removed
        return {
            "outcome": "tidied",
            "exit_code": 0,
            "output": self.output,
            "dry_run": self.dry_run,
            "removed": {w: {"objects": len(s), "bytes": sum(s)} for w, s in sizes.items()},
            "undecided": self.undecided,
        }


def age_s(text: str) -> float:
    """Read an age such as 24h, 30m or 7d, in seconds.

    Raises:
        SpecError: It is none.
    """
    found = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if found is None:
        problem = f"--older-than {text}: an age is a number and a unit, s, m, h or d"
        raise SpecError(JobError(problem, "such as --older-than 24h"))
    return int(found[1]) * float(_UNITS_S[found[2]])


def tidy(uri: str, storage: Storage, *, older_than_s: float, dry_run: bool = False) -> Tidied:
    """Remove what is left behind on the output of a job, which may be running.

    Args:
        uri: The output.
        storage: How to reach it.
        older_than_s: How old what goes by age has to be, in seconds.
        dry_run: Only tell what would be removed.

    Raises:
        InputError: No job has begun there.
        Refused: Its records are of another format, or damaged.
    """
    store = open_store(uri, storage)
    job = read_job(store)
    if job is None:
        raise InputError(f"{redact(store.uri)}: no job has begun here", "check the output's place")
    done = Tidied(redact(store.uri), dry_run)
    clock = _Clock(store)
    going = [*_orphans(store, done), *_aged(store, clock, older_than_s, done)]
    given_up = list(_given_up(store, clock, older_than_s, done))
    if not dry_run:
        with ThreadPoolExecutor(CALLS_AT_ONCE, "gc") as pool:
            list(pool.map(store.delete, going))
            list(pool.map(lambda upload: uploads.abort(store, upload), given_up))
    return done


def _orphans(store: Store, done: Tidied) -> Iterator[str]:
    """Yield the data files that no record can ever name; the order of the steps is what counts."""
    attempts = list(_attempts(store.list(f"{PRIVATE}/data")))
    records = _Records(store)
    by_chunk: dict[int, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        by_chunk[attempt.chunk].append(attempt)
    # A chunk with no more files than records has none to spare, which needs no reading of them.
    several = {c: found for c, found in by_chunk.items() if len(found) > records.count(c)}
    with ThreadPoolExecutor(CALLS_AT_ONCE, "gc") as pool:
        named = dict(zip(several, pool.map(records.named, several), strict=True))
    for chunk, found in several.items():
        names = named[chunk]
        if names is None:
            done.undecided += len(found) - records.count(chunk)
            continue
        for attempt in found:
            if attempt.name not in names:
                done.note("attempts", attempt.size)
                yield attempt.key


def _attempts(files: Iterable[FileInfo]) -> Iterator[Attempt]:
    for info in files:
        if match := _DATA.fullmatch(info.key):
            yield Attempt(info.key, info.size, int(match[1]), match[2])


class _Records:
    """The records that name attempts, as they are now; made after the attempts were listed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._retries = Retries.load(store).known
        listed = store.list(f"{PRIVATE}/commits"), store.list(f"{PRIVATE}/again")
        self._there = {info.key for found in listed for info in found}

    def _keys(self, chunk: int) -> list[str]:
        """Return the keys of the records that could name an attempt of a chunk."""
        retries = [retry.number for retry in self._retries if chunk in retry.by_chunk]
        return [commit_key(chunk, number) for number in (0, *retries)]

    def count(self, chunk: int) -> int:
        """Tell how many records of a chunk there are."""
        return sum(key in self._there for key in self._keys(chunk))

    def named(self, chunk: int) -> frozenset[str] | None:
        """Return the attempts that the records of a chunk name; None if one is not there yet."""
        keys = self._keys(chunk)
        if not self._there.issuperset(keys):
            return None
        try:
            return frozenset(record_of(Commit, self._store.read(key)).attempt for key in keys)
        except FileNotFoundError:  # removed by hand: the chunk is to be done again
            return None


def _given_up(
    store: Store, clock: _Clock, older_than_s: float, done: Tidied
) -> Iterator[uploads.Upload]:
    """Yield uploads that nobody completes any more; what their parts take is not told."""
    for upload in uploads.unfinished(store):
        if clock.now_s - upload.begun_s > older_than_s:
            done.note("uploads", 0)
            yield upload


def _aged(store: Store, clock: _Clock, older_than_s: float, done: Tidied) -> Iterator[str]:
    """Yield what is nobody's any more, by its age."""
    for folder in _PASSING:
        for info in list(store.list(f"{PRIVATE}/{folder}")):
            if clock.now_s - info.modified_s > older_than_s:
                done.note(folder, info.size)
                yield info.key


class _Clock:
    """A store's own, looked at once, and only if somebody asks: it takes a put."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @cached_property
    def now_s(self) -> float:
        """What the store's clock says now, in seconds since 1970."""
        key = f"{PRIVATE}/probe/{uuid.uuid4().hex}"
        self._store.put(key, b"what time is it?")
        now = self._store.info(key).modified_s
        self._store.delete(key)
        return now
