"""Who owns an output, what of it is done, and what readers may see: the commit protocol.

    OUT/[day=.../]part-<shard>.parquet             visible to readers: whole shards only; or
                  part-<shard>.jsonl and, of requests that failed, part-<shard>.errors.jsonl
    OUT/_SUCCESS                                   JSON manifest, when all of the input is answered
    OUT/_quantbatch/job.json                       claimed by the first driver: fingerprint, spec,
    versions
    OUT/_quantbatch/plan/<generation>.parquet      claimed: the frozen chunk list
    OUT/_quantbatch/data/<chunk>-<attempt>.parquet one name for each attempt
    OUT/_quantbatch/commits/<chunk>.json           claimed: names the attempt that counts
    OUT/_quantbatch/shards/<shard>.json            put after the shard's file: its rows and counts
    OUT/_quantbatch/retries/, again/               rows that are answered again: see `retries`
    OUT/_quantbatch/drivers/, leases/              who works on what, to spare double work: `leases`
    OUT/_quantbatch/summary.json                   report of the latest run

A chunk is done when its commit record exists. Many attempts may compute it (a retry after a crash,
a second driver); each writes its own data file and then claims the record, and what the record says
afterwards is what counts, whatever the store answered. A shard is published from commit records
alone, so whoever publishes it writes the same rows. Nothing here depends on time, on a lock, or on
a process saying goodbye. How a chunk is committed and a shard published is in `commits`.

The row-count law: a chunk is committed only with as many rows as the plan gives it, and a shard is
published only with the sum of those of its chunks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from quantbatch.commits import (
    JOB,
    Commit,
    OutputFormat,
    Published,
    record_of,
    rows_key,
    to_json,
)
from quantbatch.errors import Refused
from quantbatch.job_record import FORMAT, read_job, refuse_other_job, refuse_strangers
from quantbatch.plan import Plan
from quantbatch.records import Counts, Receipt
from quantbatch.retries import Retries, begun
from quantbatch.spec import JobSpec
from quantbatch.storage import PRIVATE, open_store, redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from quantbatch.plan import Shard
    from quantbatch.records import Chunk
    from quantbatch.storage import Store

READS_AT_ONCE = 16
SUMMARY = f"{PRIVATE}/summary.json"
SUCCESS = "_SUCCESS"


def plan_key(generation: int) -> str:
    """Key of one generation of the frozen plan."""
    return f"{PRIVATE}/plan/{generation:04d}.parquet"


@dataclass
class Ledger:
    """The driver's view of an output: what it belongs to and how far it is."""

    store: Store
    spec: JobSpec
    identity: dict[str, Any]
    """What decides the output: the spec's deciding fields and the model's digest. Of a job that has
    begun, as it was recorded then: its fingerprint stays, whatever fields a spec has since."""
    plan: Plan | None = None
    generations: int = 0
    commits: dict[int, Counts] = field(default_factory=dict)
    """Committed chunks of shards that are not published."""
    published: dict[int, Published] = field(default_factory=dict)
    retries: Retries = field(default_factory=Retries)

    @classmethod
    def open(cls, spec: JobSpec, model_digest: str) -> Ledger:
        """Look at the output, without writing to it.

        Raises:
            Refused: It belongs to another job, or its records are of another format.
        """
        store = open_store(spec.output.uri, spec.output.storage)
        ledger = cls(store, spec, spec.deciding() | {"model.digest": model_digest})
        job = read_job(store)
        if job is None:
            refuse_strangers(store)
            return ledger
        refuse_other_job(store, job, ledger.identity)
        ledger.identity = job["identity"]
        ledger._load()
        return ledger

    def freeze(self, plan: Plan) -> bool:
        """Make the output ours and add a generation to its plan.

        Returns:
            Whether this is the plan now; not if a rival driver was first with another one.
        """
        job = json.loads(self.store.claim(JOB, to_json(self._job_record())))
        refuse_other_job(self.store, job, self.identity)
        self.identity = job["identity"]
        ours = plan.to_bytes()
        if self.store.claim(plan_key(self.generations), ours) != ours:
            return False
        self._load_plan()
        return True

    def undone(self) -> Iterator[Chunk]:
        """Yield the chunks that no commit record names, in input order."""
        for chunk in self._plan.each_chunk():
            if chunk.shard not in self.published and chunk.id not in self.commits:
                yield chunk

    def look_again(self) -> None:
        """Note what rivals have committed and published meanwhile."""
        self._load_progress(self._plan)

    def unpublished(self) -> list[Shard]:
        """Return the shards whose chunks are all committed but which readers don't see yet, or see
        as they were before a retry that is done: by a driver that slept through it.
        """
        stale = self._stale()
        return [
            s
            for s in self._plan.shards
            if (s.id in stale if s.id in self.published else self._whole(s))
        ]

    def _stale(self) -> frozenset[int]:
        """Return the published shards whose files are not as a retry that is done left them: a
        driver that slept through it put them, see `publish_newest`.
        """
        retried = [s for s in self._plan.shards if s.id in self.published and self._behind(s, 0)]
        with ThreadPoolExecutor(READS_AT_ONCE, "files") as pool:
            stale = pool.map(self._is_stale, retried)
            return frozenset(shard.id for shard, is_so in zip(retried, stale, strict=True) if is_so)

    def _is_stale(self, shard: Shard) -> bool:
        record = self.published[shard.id]
        if self._behind(shard, record.retry):
            return True
        try:
            size = self.store.info(record.key).size
        except FileNotFoundError:
            return True
        return size != record.size >= 0

    def _behind(self, shard: Shard, retry: int) -> bool:
        return self.retries.is_behind(self._plan.chunks_of(shard), retry)

    def record(self, receipt: Receipt) -> tuple[Shard, ...]:
        """Note a committed chunk; return its shard if that is now whole, else nothing."""
        self.commits[receipt.chunk] = receipt.counts
        shard = self._plan.shards[receipt.shard]
        return (shard,) if self._whole(shard) else ()

    def rows_of(self, shard: Shard) -> list[str]:
        """Return the keys of the Parquet files that hold the rows of a published shard."""
        key = self.published[shard.id].key
        if key == shard.key:
            return [key]
        chunks = self._plan.chunks_of(shard)
        newest = self.retries.newest(chunks)
        return [rows_key(self.store, chunk, newest.get(chunk, 0)) for chunk in chunks]

    def record_published(self, published: Published) -> None:
        """Note a published shard; its chunks need no memory any more."""
        self.published[published.shard] = published
        for chunk in self._plan.chunks_of(self._plan.shards[published.shard]):
            self.commits.pop(chunk, None)

    @property
    def _plan(self) -> Plan:
        assert self.plan is not None, "the plan is frozen before anything is recorded"
        return self.plan

    def _whole(self, shard: Shard) -> bool:
        return all(chunk in self.commits for chunk in self._plan.chunks_of(shard))

    @property
    def counts(self) -> Counts:
        """Rows by status and tokens, over all that is committed."""
        published = (shard.counts for shard in self.published.values())
        return sum(published, Counts()) + sum(self.commits.values(), Counts())

    @property
    def finished(self) -> bool:
        """Tell whether every shard of the plan is published."""
        shards = self.plan.shards if self.plan else ()
        return bool(shards) and all(shard.id in self.published for shard in shards)

    def succeed(self) -> None:
        """Tell readers that all of the input is answered, unless there is more of it meanwhile.

        Another driver may have gone further, to new files or through a retry, and put its manifest
        before we put ours. So who puts one looks before and after it whether that is so.
        """
        assert self.finished
        while self.finished:
            if self._is_newest():
                manifest = to_json(self._manifest())
                if _read(self.store, SUCCESS) != manifest:
                    self.store.put(SUCCESS, manifest)
                if self._is_newest():
                    return
            self._load()

    def _is_newest(self) -> bool:
        """Tell whether plan and retries are still what they were when we looked at the output."""
        generations = sum(1 for _ in self.store.list(f"{PRIVATE}/plan"))
        return generations == self.generations and begun(self.store) == self.retries.begun

    def _manifest(self) -> dict[str, Any]:
        files = [
            {"file": shard.key, "rows": shard.counts.rows, "sha256": shard.digests.get(shard.key)}
            for _, shard in sorted(self.published.items())
        ]
        return {
            "format": FORMAT,
            "name": self.spec.name,
            "fingerprint": self.fingerprint,
            "counts": self.counts.to_json(),
            "files": files,
        }

    def summarize(self, report: Mapping[str, Any]) -> None:
        """Keep the report of the latest run beside the output."""
        self.store.put(SUMMARY, to_json(report))

    def succeeded(self) -> bool:
        """Tell whether the manifest covers the whole plan, so that nothing is left to do."""
        found = read_document(self.store, SUCCESS) or {}
        if not self.finished or len(found.get("files", ())) != len(self.published):
            return False
        if self._stale():
            return False
        # Until a retry is done its answers are in files and not in the manifest's counts.
        return self.retries.open is not None or found.get("counts") == self.counts.to_json()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the output, as hex."""
        return hashlib.sha256(to_json(self.identity)).hexdigest()

    def output_format(self, schema: pa.Schema) -> OutputFormat:
        """Return how this job's files are written."""
        note = {"fingerprint": self.fingerprint, "versions": versions()}
        output = self.spec.output
        schema = schema.with_metadata({"quantbatch": json.dumps(note, sort_keys=True)})
        lines = output.format == "openai-batch"
        return OutputFormat(schema, output.prefix, output.compression, lines)

    def _job_record(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.spec.name,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "spec": self.spec.resolved().model_dump(mode="json"),
            "versions": versions(),
            "created": int(time.time()),
            "claim": uuid.uuid4().hex,
        }

    def _load(self) -> None:
        """Look at how far the job is.

        At its retries first: what is published then is as new as they are, or newer, which
        `_is_newest` notices. The other way round old files would be taken for those of a new retry.
        """
        self.published, self.commits = {}, {}
        self.retries = Retries.load(self.store)
        self._load_plan()
        if self.plan:
            self._load_progress(self.plan)

    def _load_plan(self) -> None:
        keys = sorted(info.key for info in self.store.list(f"{PRIVATE}/plan"))
        plans = [_plan_of(self.store, key) for key in keys]
        self.plan = functools.reduce(Plan.followed_by, plans) if plans else None
        self.generations = len(plans)

    def _load_progress(self, plan: Plan) -> None:
        known = frozenset(self.published)
        for data in self._read_all(f"{PRIVATE}/shards", lambda shard: shard not in known):
            shard = record_of(Published, data)
            if shard.shard < len(plan.shards):  # a rival may be ahead with a further generation
                self.record_published(shard)
        done = {c for s in plan.shards if s.id in self.published for c in plan.chunks_of(s)}
        done |= self.commits.keys()
        for data in self._read_all(f"{PRIVATE}/commits", lambda chunk: chunk not in done):
            commit = record_of(Commit, data)
            if commit.chunk < plan.chunks:
                self.commits[commit.chunk] = commit.counts

    def _read_all(self, prefix: str, wanted: Callable[[int], bool]) -> Iterator[bytes]:
        """Read the records under a prefix whose numbers are wanted, several at once."""
        names = ((i.key, PurePosixPath(i.key).stem) for i in self.store.list(prefix))
        keys = [key for key, name in names if name.isdigit() and wanted(int(name))]
        with ThreadPoolExecutor(READS_AT_ONCE, "records") as pool:
            yield from pool.map(self.store.read, keys)


def versions() -> dict[str, str]:
    """Return the versions of what decides an answer; models can be compared without Ray."""
    names = ("quantbatch", "torch", "transformers", "tokenizers", "bitsandbytes", "ray", "pyarrow")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except FileNotFoundError:
        return None


def _plan_of(store: Store, key: str) -> Plan:
    data = store.read(key)
    try:
        return Plan.from_bytes(data)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise Refused(
            f"{redact(store.uri)}/{key} is damaged: {error}",
            "restore it from a copy, or choose another output.uri and run the job again",
        ) from error


def read_document(store: Store, key: str) -> dict[str, Any] | None:
    """Read a JSON object that is written anew when it is needed; None if it is gone or damaged."""
    try:
        found = json.loads(_read(store, key) or b"null")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
