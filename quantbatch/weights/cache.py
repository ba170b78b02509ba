"""Quantized weights that are kept: the first job quantizes, later replicas and jobs load.

    CACHE/<key>/record-<version>.json   claimed: names the attempt that counts, and its files
    CACHE/<key>/<attempt>/*             one name for each attempt: safetensors and config.json

The key is the SHA-256 of all that decides the bytes, and the record holds that in clear. A writer
puts its files under a name of its own, and then claims the record of the next version; what the
record says afterwards is what counts. Nothing is ever written over.

*Damage.* Every load checks all files by their digests. If one is damaged or gone, the model is
quantized again and stored as a new attempt, with a record of the next version: readers take the
highest. The races:

- Two notice the damage of version 1 and both claim version 2: one gets it, and the other removes
  its own files, to which nothing will ever refer. Both have their model in memory anyway.
- A slow writer comes with version 2 when version 3 is there: as above, its claim is not ours.
- A claim fails, and nobody knows whether it took effect: the files stay, since they may count.
- A reader of version 1 goes on undisturbed: its files stay for a week. If it finds damage, it looks
  once more for a higher version before it says so.
- Files are removed a week after they last counted: those of an older record, a week after the next
  record's attempt began; those that no record names, a week after their own did. An attempt's name
  begins with its time. A writer that took longer than a week would claim a record without files:
  that is damage, and noticed.

So the worst that two writers can do to each other is to do the same work twice.

On a CPU, weights stay mapped from the file that they were loaded from, and replicas of a node share
that memory. On a local disk a removed file lives on until nobody has it mapped; on NFS it does not
if another node removed it, which is what the week is for.

A cache on S3 is fetched once for a node (`copies.py`). What goes wrong with a cache never fails a
job: it goes on without, and says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbatch.errors import ModelError, StorageError
from quantbatch.model.sizes import gib
from quantbatch.storage import local_folder, open_store, redact, scratch_folder
from quantbatch.weights import copies
from quantbatch.weights.copies import DamagedError, StoredFile
from quantbatch.weights.identity import identity, no_use_for
from quantbatch.weights.node import locked, node_folder
from quantbatch.weights.pretrained import LOADING_ERRORS, quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.spec import Model
    from quantbatch.storage import Store

logger = logging.getLogger(__name__)

FILE_BYTES = 500_000_000
"""Largest file of an entry but for single tensors: bounds the memory that writing takes, and gives
several threads something to fetch and check."""
KEPT_FOR = timedelta(days=7)
"""How long files are kept that do not count (any more)."""
_RECORD = re.compile(r"record-(\d{6})\.json")
_ATTEMPT_TIME = "%Y%m%dT%H%M%SZ"


class Record(NamedTuple):
    """Which attempt counts, in one version of an entry."""

    version: int
    attempt: str
    files: tuple[StoredFile, ...]
    of: dict[str, Any]
    """What the key stands for."""

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def to_bytes(self) -> bytes:
        """Return the record as JSON."""
        files = [file._asdict() for file in self.files]
        return json.dumps(self._asdict() | {"files": files}, sort_keys=True, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """Read what `to_bytes` wrote.

        Raises:
            DamagedError: It was something else.
        """
        try:
            found = json.loads(data)
            files = tuple(
                StoredFile(str(f["name"]), int(f["size"]), str(f["sha256"])) for f in found["files"]
            )
            record = cls(int(found["version"]), str(found["attempt"]), files, dict(found["of"]))
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedError(f"its record is {data[:40]!r}") from error
        if any("/" in name or name.startswith(".") for name in (record.attempt, *_names(record))):
            raise DamagedError("its record names files elsewhere")
        return record


def _names(record: Record) -> Iterator[str]:
    return (file.name for file in record.files)


class Found(NamedTuple):
    """What came of a look into the cache."""

    model: PreTrainedModel | None
    """None: quantize."""
    version: int | None = None
    """Of the record to claim for a model that was quantized; None: don't store it."""


class NoEntryError(Exception):
    """There is no entry (version 0), or its newest version is damaged."""

    def __init__(self, version: int, damage: str) -> None:
        super().__init__(damage)
        self.version = version


class Stored(NamedTuple):
    """What the cache has after storing."""

    record: Record
    ours: bool
    """Whether this attempt counts, and not another's."""


@dataclass(frozen=True)
class WeightCache:
    """The place of one model, quantized in one way, in a cache."""

    store: Store
    document: dict[str, Any]
    """All that decides the bytes."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: Model, device: str) -> WeightCache | None:
        """Return the place that a spec names; None without a cache, or without a use for it.

        Args:
            checkpoint: The model's files.
            model: How to load it, with no type left `auto` (see `dtypes.resolve`).
            device: `cpu`, `cuda` or `cuda:<number>`.

        Raises:
            StorageError: No store is known for the cache's URI.
        """
        if model.cache is None:
            return None
        store = open_store(model.cache, model.cache_storage)
        if no_use := no_use_for(checkpoint, model):
            logger.info("model.cache is not used: %s", no_use)
            return None
        return cls(store, identity(checkpoint, model, device))

    @cached_property
    def key(self) -> str:
        """SHA-256 of the document, as hex: the entry's folder."""
        canonical = json.dumps(self.document, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def uri(self) -> str:
        """The entry's folder, for messages."""
        return f"{redact(self.store.uri)}/{self.key}"

    def load(self, load_from: Callable[[Path], PreTrainedModel]) -> Found:
        """Load the entry, if it is there and whole; trouble with it is logged, never raised.

        Args:
            load_from: Loads a folder of quantized weights.
        """
        started = time.monotonic()
        try:
            with self.whole() as (record, folder):
                model = load_from(folder)
        except NoEntryError as error:
            if error.version:
                logger.warning("%s is damaged and made again: %s", self.uri, error)
            return Found(None, version=error.version + 1)
        except StorageError as error:
            logger.warning("model.cache can't be read, going on without: %s", error)
            return Found(None)
        except ModelError as error:
            # It is what was stored: made again it would be no better.
            logger.warning("%s is whole, but of no use, going on without: %s", self.uri, error)
            return Found(None)
        took = time.monotonic() - started
        logger.info("loaded %s from %s in %.1f s", gib(record.total_bytes), self.uri, took)
        return Found(model)

    @contextlib.contextmanager
    def whole(self) -> Iterator[tuple[Record, Path]]:
        """Give the newest record and a folder with its files, checked; valid in the body only.

        Raises:
            NoEntryError: There is none, or it is damaged.
            StorageError: The store can't be read.
        """
        version, damage = 0, ""
        while (newest := self._newest_version()) > version:
            version = newest
            with contextlib.ExitStack() as held:
                try:
                    record = self._record(version)
                    folder = held.enter_context(self._checked(record))
                except DamagedError as error:
                    damage = str(error)
                    continue
                yield record, folder
                return
        raise NoEntryError(version, damage)

    def _newest_version(self) -> int:
        """Return the version of the newest record; 0 if there is none."""
        return max(self._versions(), default=0)

    def _versions(self) -> list[int]:
        names = (info.key.removeprefix(f"{self.key}/") for info in self.store.list(self.key))
        return sorted(int(found[1]) for name in names if (found := _RECORD.fullmatch(name)))

    def _record(self, version: int) -> Record:
        record = Record.from_bytes(self.store.read(self._record_key(version)))
        if (record.version, record.of) != (version, self.document):
            raise DamagedError("its record is of other weights or another version")
        return record

    def _record_key(self, version: int) -> str:
        return f"{self.key}/record-{version:06d}.json"

    def _checked(self, record: Record) -> contextlib.AbstractContextManager[Path]:
        prefix = f"{self.key}/{record.attempt}"
        folder = local_folder(self.store, prefix)
        if folder is None:
            name = f"{self.key[:16]}-{record.attempt}"
            return copies.on_this_node(self.store, prefix, record.files, name)
        copies.check(folder, record.files)
        return contextlib.nullcontext(folder)

    def files(self) -> list[Path]:
        """Return the files on this node that a load would read now; none if it can't use any."""
        root = local_folder(self.store, self.key)
        if root is None:
            # What the store has is not looked at: this is asked several times a second.
            copied = node_folder("weights").glob(f"{self.key[:16]}-*/*.safetensors")
            return sorted(path for path in copied if path.parent.suffix != ".part")
        try:
            record = self._record(self._newest_version())
        except (FileNotFoundError, DamagedError, StorageError):
            return []
        return [root / record.attempt / file.name for file in record.files]

    @property
    def is_filled_here(self) -> bool:
        """Whether it is a folder that this node can write to: its replicas then wait for the first
        one to fill it, which is quicker than quantizing at the same time.
        """
        folder = local_folder(self.store, self.key)
        while folder is not None and not folder.exists():
            folder = folder.parent
        return folder is not None and os.access(folder, os.W_OK) and not self._failed_lately()

    def _failed_lately(self) -> bool:
        """Tell whether storing failed on this node in the last hour: a full disk, say. Then nobody
        waits for it.
        """
        try:
            return time.time() - self._failure.stat().st_mtime < 3600
        except (OSError, StorageError):
            return False

    @property
    def _failure(self) -> Path:
        return node_folder("turns") / f"{self.key}.failed"

    def keep(self, model: PreTrainedModel, version: int) -> None:
        """Store a quantized model unless another replica has done so, or one of this node is at it;
        trouble is logged.

        Args:
            model: As it was loaded; nothing has run on it yet.
            version: Of the record to claim, see `Found`.
        """
        started = time.monotonic()
        try:
            with locked(node_folder("turns") / f"{self.key}.store", wait=False) as ours:
                if not ours or self._newest_version() >= version:
                    return
                stored = self.put(model, version)
        except (StorageError, OSError) as error:
            logger.warning("quantized weights can't be stored in model.cache: %s", error)
            with contextlib.suppress(StorageError, OSError):
                self._failure.touch()
            return
        size, took = gib(stored.record.total_bytes), time.monotonic() - started
        logger.info("stored %s of quantized weights in %s in %.1f s", size, self.uri, took)

    def put(self, model: PreTrainedModel, version: int) -> Stored:
        """Store a quantized model, unless somebody has done so.

        Args:
            model: As it was loaded; nothing has run on it yet.
            version: Of the record to claim, see `Found`.

        Raises:
            StorageError: The store can't be written.
        """
        attempt = f"{datetime.now(UTC).strftime(_ATTEMPT_TIME)}-{uuid.uuid4().hex[:12]}"
        try:
            files = self._put_files(model, attempt)
        except StorageError:
            # No record names them, nor ever will.
            with contextlib.suppress(StorageError):
                self._delete(attempt)
            raise
        ours = Record(version, attempt, files, self.document).to_bytes()
        try:
            record = Record.from_bytes(self.store.claim(self._record_key(version), ours))
        except DamagedError as error:
            raise StorageError(f"{self.uri}: {error}", "remove that folder") from error
        with contextlib.suppress(StorageError, DamagedError, FileNotFoundError):
            # What counts is settled: tidying up may fail.
            if record.attempt != attempt:
                self._delete(attempt)
            self._sweep()
        return Stored(record, ours=record.attempt == attempt)

    def _put_files(self, model: PreTrainedModel, attempt: str) -> tuple[StoredFile, ...]:
        prefix = f"{self.key}/{attempt}"
        with scratch_folder(self.store, f"{prefix}/scratch") as scratch:
            try:
                with quiet():
                    model.save_pretrained(scratch, max_shard_size=FILE_BYTES)
            except (*LOADING_ERRORS, NotImplementedError) as error:
                raise StorageError(
                    f"{self.uri}: {type(error).__name__}: {error}", "make room, or do without"
                ) from error
            files = copies.describe_all(scratch)
            for file in files:
                self.store.take_file(f"{prefix}/{file.name}", scratch / file.name)
        return files

    def _delete(self, attempt: str) -> None:
        for info in list(self.store.list(f"{self.key}/{attempt}")):
            self.store.delete(info.key)

    def _sweep(self) -> None:
        """Remove what attempts left that do not count, when they have not for long enough."""
        counts = self._record(self._newest_version()).attempt
        ended = self._ended()
        places = (info.key.split("/") for info in self.store.list(self.key))
        for attempt in {place[1] for place in places if len(place) > 2} - {counts}:
            if ended.get(attempt, _began(attempt)) < datetime.now(UTC) - KEPT_FOR:
                self._delete(attempt)

    def _ended(self) -> dict[str, datetime]:
        """Return when attempts ceased to count: when the one of the next record began."""
        counted = []
        for version in self._versions():
            with contextlib.suppress(DamagedError):
                counted.append(self._record(version).attempt)
        return {older: _began(newer) for older, newer in itertools.pairwise(counted)}


def _began(attempt: str) -> datetime:
    """Return when an attempt began; now for a name that is none of ours."""
    try:
        return datetime.strptime(attempt.split("-")[0], _ATTEMPT_TIME).replace(tzinfo=UTC)
    except ValueError:
        return datetime.now(UTC)
