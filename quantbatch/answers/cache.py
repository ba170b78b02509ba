"""Answers that jobs share: what one has paid for, a later one takes.

    CACHE/<space>/about.json                 what the space is of: a model, in some bits
    CACHE/<space>/<time>-<id>.parquet        the answers of one chunk, by the keys of their requests
    CACHE/<space>/<time>-<id>.pack.parquet   those of many such files, which its footer names

The space is the SHA-256 of what decides an answer beside its request. Every file has a name of its
own and is never written over; two that hold the same answer do no harm, and who comes first does
not matter. A pack counts from when it is there: readers then pass over the files that it names,
which stay for a day, so that a reader who knows only them goes on undisturbed (`packs.py`).

A replica learns the keys of all files when its first chunk comes, and looks for new files now and
then, so it also finds what other replicas of the same job, and attempts before a crash, have done.

A job without a cache has a space of its own beside its records (`OF_JOB`), for as long as it runs:
rows that are the same are answered once, whichever replica has them, before and after a crash.

What goes wrong here never fails a job: a file that is damaged or gone is a miss, and a cache that
can't be reached is left alone for a while.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
import uuid
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from quantbatch.answers import tables
from quantbatch.answers.index import MOST_KEYS, Index, Place
from quantbatch.errors import StorageError
from quantbatch.reread import Unreadable, open_parquet
from quantbatch.storage import PRIVATE, open_store, redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from quantbatch.records import Answer
    from quantbatch.spec import JobSpec
    from quantbatch.storage import Store

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the files."""
OF_JOB = f"{PRIVATE}/answers"
"""Where a job's own space is, in its output."""
TIME = "%Y%m%dT%H%M%SZ"
PACK = ".pack.parquet"
ROWS_PER_GROUP = 2048
"""Answers that are read together: what one chunk asks for was often stored by one chunk."""
GROUPS_HELD = 16
READS_AT_ONCE = 16
LOOK_EVERY_S = 30.0
"""Seconds between two looks for new files, unless looking takes long."""
LOOK_SHARE = 1 / 20
"""Most of its time that a replica spends on looking."""
REST_S = 60.0
"""How long a cache that can't be reached is left alone."""


class Space(NamedTuple):
    """A part of a cache: the answers of one model."""

    store: Store
    about: dict[str, Any]
    """What decides an answer beside its request, in JSON types."""
    under: str = ""
    """A folder of the store that it is in."""

    @classmethod
    def of(cls, spec: JobSpec, model_digest: str, output: Store) -> Space | None:
        """Return the space of a job: in its cache, else in its output; None if equal requests are
        to be answered each for itself.

        Which of the engines ran a model is not in it, nor are versions of libraries: they decide no
        more than ties.

        Raises:
            StorageError: No store is known for the cache's URI.
        """
        kind = spec.engine.kind
        deciding = ("model.quantization", "model.dtype", "model.trust_remote_code")
        about = {
            "format": FORMAT,
            "model": model_digest,
            "by": kind if kind in ("echo", "llama_cpp") else "transformers",
            **{k: v for k, v in sorted(spec.deciding().items()) if k.startswith(deciding)},
        }
        if spec.answers_cache is None:
            return (
                cls(output, about, OF_JOB) if getattr(spec.engine, "deduplicate", False) else None
            )
        return cls(open_store(spec.answers_cache.uri, spec.answers_cache.storage), about)

    @property
    def is_of_job(self) -> bool:
        """Whether nobody needs it when its job is done."""
        return self.under == OF_JOB

    @property
    def name(self) -> str:
        """What a user knows it by."""
        return OF_JOB if self.is_of_job else "answers_cache"

    @property
    def folder(self) -> str:
        """Its folder: SHA-256 of what it is about, as hex."""
        digest = hashlib.sha256(self.to_bytes()).hexdigest()
        return f"{self.under}/{digest}" if self.under else digest

    def to_bytes(self) -> bytes:
        """Return what it is about as JSON."""
        return json.dumps(self.about, sort_keys=True).encode()


class _File(NamedTuple):
    name: str
    ends: np.ndarray[Any, np.dtype[np.int64]]
    """Where its row groups end, in rows."""


class _Seen(NamedTuple):
    """A file that was looked into."""

    name: str
    keys: bytes
    ends: np.ndarray[Any, np.dtype[np.int64]]


class AnswerCache:
    """The answers of one model; any thread may call it.

    Args:
        space: Which.
        most_keys: Answers that are found at most.
    """

    def __init__(self, space: Space, most_keys: int = MOST_KEYS) -> None:
        self._store, self._folder, self._name = space.store, space.folder, space.name
        self._about = space.to_bytes()
        self._lock = threading.Lock()
        self._index = Index(most_keys)
        self._files: list[_File] = []
        self._known: set[str] = set()
        """Names that need no look any more: of files in the index, damaged or packed."""
        self._lost: set[int] = set()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._look_at = 0.0
        self._rests_until = 0.0
        self._is_described = False

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Answer]:
        """Return the answers that are kept of some keys."""
        with self._lock:
            if not keys or time.monotonic() < self._rests_until:
                return {}
            try:
                self._look()
                return self._read(keys)
            except StorageError as error:
                self._rest(error)
                return {}

    def keep(self, answers: Mapping[bytes, Answer]) -> None:
        """Store answers by their keys, as one file."""
        if not answers or time.monotonic() < self._rests_until:
            return
        table = tables.to_table(answers)
        name = f"{new_name()}.parquet"
        try:
            if not self._is_described:
                self._store.put(f"{self._folder}/about.json", self._about)
                self._is_described = True
            self._store.put(f"{self._folder}/{name}", to_parquet(table))
        except StorageError as error:
            with self._lock:
                self._rest(error)
            return
        with self._lock:
            ends = np.arange(ROWS_PER_GROUP, table.num_rows + ROWS_PER_GROUP, ROWS_PER_GROUP)
            self._add(_Seen(name, b"".join(answers), np.minimum(ends, table.num_rows)))

    def _rest(self, error: StorageError) -> None:
        self._rests_until = time.monotonic() + REST_S
        said = "%s can't be reached, going on without for a while: %s"
        logger.warning(said, self._name, error)

    # ---- which answers there are

    def _look(self) -> None:
        """Learn the keys of files that came since the last look."""
        started = time.monotonic()
        if started < self._look_at or self._index.full:
            return
        listed = (info.key.rpartition("/")[2] for info in self._store.list(self._folder))
        there = [name for name in listed if name.endswith(".parquet")]
        # Packs first, since they say which files to pass over; the newest first, since they stay
        # when the index is full.
        packs = sorted((name for name in there if name.endswith(PACK)), reverse=True)
        self._learn(packs)
        self._learn(sorted((name for name in there if not name.endswith(PACK)), reverse=True))
        took = time.monotonic() - started
        self._look_at = time.monotonic() + max(LOOK_EVERY_S, took / LOOK_SHARE)
        if self._index.full:
            said = "%s has more than %d answers: the rest is unseen"
            logger.warning(said, self._name, MOST_KEYS)

    def _learn(self, names: Iterable[str]) -> None:
        new = [name for name in names if name not in self._known]
        with ThreadPoolExecutor(READS_AT_ONCE, "answers") as pool:
            for seen in pool.map(self._look_into, new):
                if seen is not None and seen.name not in self._known:
                    self._add(seen)
        self._known.update(new)

    def _look_into(self, name: str) -> _Seen | None:
        try:
            with open_parquet(self._store, f"{self._folder}/{name}") as file:
                self._known.update(packed_in(file))
                facts = file.metadata
                sizes = [facts.row_group(group).num_rows for group in range(facts.num_row_groups)]
                column = file.read(columns=["key"])["key"].combine_chunks()
        except (Unreadable, KeyError) as error:
            self._warn(name, error)
            return None
        start = column.offset * column.type.byte_width
        size = len(column) * column.type.byte_width
        keys = column.buffers()[1].to_pybytes()[start : start + size] if size else b""
        return _Seen(name, keys, np.cumsum(sizes))

    def _add(self, seen: _Seen) -> None:
        self._index.add(len(self._files), seen.keys)
        self._files.append(_File(seen.name, seen.ends))
        self._known.add(seen.name)

    def _warn(self, name: str, error: Exception) -> None:
        where = f"{redact(self._store.uri)}/{self._folder}/{name}"
        logger.warning("%s can't be read, its answers are made again: %s", where, error)

    # ---- the answers themselves

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, Answer]:
        groups: dict[tuple[int, int], list[tuple[bytes, int]]] = {}
        for key, place in zip(keys, self._index.find(keys), strict=True):
            if place is not None:
                group, row = self._in_group(place)
                groups.setdefault((place.file, group), []).append((key, row))
        found: dict[bytes, Answer] = {}
        for (number, group), wanted in groups.items():
            found |= self._read_group(number, group, wanted)
        return found

    def _in_group(self, place: Place) -> tuple[int, int]:
        ends = self._files[place.file].ends
        group = int(np.searchsorted(ends, place.row, "right"))
        return group, place.row - (int(ends[group - 1]) if group else 0)

    def _read_group(
        self, number: int, group: int, wanted: Sequence[tuple[bytes, int]]
    ) -> dict[bytes, Answer]:
        """Return answers of one row group; none if its file is damaged or gone."""
        if number in self._lost:
            return {}
        try:
            table = self._group(number, group).take(pa.array([row for _, row in wanted]))
            if table["key"].to_pylist() != [key for key, _ in wanted]:
                raise Unreadable("its answers are those of other requests")
            answers = tables.from_table(table)
            return {key: answer for (key, _), answer in zip(wanted, answers, strict=True)}
        except (Unreadable, pa.ArrowException, ValueError, TypeError, KeyError) as error:
            self._lost.add(number)
            self._warn(self._files[number].name, error)
            return {}

    def _group(self, number: int, group: int) -> pa.Table:
        place = number, group
        if place not in self._groups:
            with open_parquet(self._store, f"{self._folder}/{self._files[number].name}") as file:
                self._groups[place] = file.read_row_group(group)
            if len(self._groups) > GROUPS_HELD:
                self._groups.popitem(last=False)
        self._groups.move_to_end(place)
        return self._groups[place]


def new_name() -> str:
    """Return the beginning of a file's name, which nobody else has; names sort by their time."""
    return f"{datetime.now(UTC).strftime(TIME)}-{uuid.uuid4().hex[:12]}"


def to_parquet(table: pa.Table) -> bytes:
    """Return answers as a file."""
    sink = pa.BufferOutputStream()
    options = {"compression": "zstd", "write_page_checksum": True}
    pq.write_table(table, sink, row_group_size=ROWS_PER_GROUP, **options)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def packed_in(file: pq.ParquetFile) -> list[str]:
    """Return the names of the files whose answers a pack holds; none for another file."""
    noted = (file.schema_arrow.metadata or {}).get(b"quantbatch")
    found: list[str] = json.loads(noted)["packs"] if noted else []
    return found
