"""The driver's part of answering rows of a finished job again: which rows, what is left of them,
which files are due. See `retries` for what is beside the output, and `retry` for the run.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quantbatch import retries
from quantbatch.errors import Refused, Stopped
from quantbatch.ledger import versions
from quantbatch.reread import Unreadable, parquet_batches
from quantbatch.retries import Retries, Retry
from quantbatch.storage import probe, redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from quantbatch.ledger import Ledger
    from quantbatch.plan import Plan, Shard
    from quantbatch.records import Chunk, Receipt
    from quantbatch.spec import JobSpec


def claimed(ledger: Ledger, asked: dict[str, Any], spec: JobSpec) -> Retry | None:
    """Return the retry to work on: the one that is open, or a new one; None if there are no rows.

    Args:
        ledger: Of a job that is finished.
        asked: What the retry is, see `Retry.asked`.
        spec: What it runs with, which is noted.

    Raises:
        Refused: Another one is open.
    """
    if ledger.retries.open is None:
        rows = retries.list_of(_rows_with(ledger, asked["statuses"]))
        if not rows.num_rows:
            return None
        probe(ledger.store)
        ours = Retry(len(ledger.retries.known) + 1, asked, rows)
        notes = {"spec": spec.model_dump(mode="json"), "versions": versions()}
        data = ours.to_bytes(**notes, claim=uuid.uuid4().hex)
        ledger.store.claim(retries.list_key(ours.number), data)
        ledger.retries = Retries.load(ledger.store)
    found = ledger.retries.open
    if found is None:
        raise Stopped("another retry was first, and is done", "the same command looks again")
    if found.asked != asked:
        raise Refused(
            f"{redact(ledger.store.uri)}: retry {found.number} is not finished; it has the"
            f" statuses {', '.join(found.asked['statuses'])} and the changes"
            f" {json.dumps(found.asked['changes'])}",
            "finish it first, with the same statuses and changes",
        )
    return found


def undone(ledger: Ledger, retry: Retry) -> Iterator[Chunk]:
    """Yield the chunks whose rows are still to be answered again, in input order."""
    for chunk in _plan(ledger).each_chunk():
        if chunk.id in retry.by_chunk and chunk.id not in ledger.retries.committed:
            yield dataclasses.replace(chunk, again=ledger.retries.again(retry, chunk.id))


def record(ledger: Ledger, retry: Retry, receipt: Receipt) -> list[Shard]:
    """Note a committed chunk; return its shard if that is now due, else nothing."""
    ledger.retries.committed.add(receipt.chunk)
    return due(ledger, retry, [_plan(ledger).shards[receipt.shard]])


def due(ledger: Ledger, retry: Retry, shards: Iterable[Shard]) -> list[Shard]:
    """Return those shards that have rows of a retry, all of them answered and not published."""

    def is_due(shard: Shard) -> bool:
        chunks = [chunk for chunk in _plan(ledger).chunks_of(shard) if chunk in retry.by_chunk]
        behind = ledger.published[shard.id].retry < retry.number
        return bool(chunks) and behind and ledger.retries.committed.issuperset(chunks)

    return [shard for shard in shards if is_due(shard)]


def close(ledger: Ledger, retry: Retry, *, succeeded: bool) -> None:
    """End a retry whose shards are all published.

    While a retry is open nobody takes the manifest's counts for those of the files; after that it
    is looked at once more, since a driver that was late may have put another.

    Args:
        ledger: The job's.
        retry: Which.
        succeeded: Whether the job has a manifest, whose counts are now others.
    """
    if succeeded:
        ledger.succeed()
    ledger.store.put(retries.done_key(retry.number), json.dumps(retry.asked).encode())
    ledger.retries = ledger.retries.with_done(retry.number)
    if succeeded and ledger.finished:
        ledger.succeed()


def _plan(ledger: Ledger) -> Plan:
    assert ledger.plan is not None, "only a job that is finished has rows to answer again"
    return ledger.plan


def _rows_with(ledger: Ledger, statuses: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield chunk and row of the rows with some statuses, in order; a column is in memory."""
    wanted = pa.array(statuses)
    lengths = _chunk_lengths(_plan(ledger))
    for shard in _plan(ledger).shards:
        counts = ledger.published[shard.id].counts.to_json()
        if not any(counts[status] for status in statuses):
            continue
        column = _statuses(ledger, shard)
        places = np.flatnonzero(pc.is_in(column, value_set=wanted).to_numpy())
        ends = np.cumsum(lengths[list(_plan(ledger).chunks_of(shard))])
        assert int(ends[-1]) == len(column), f"rows of {shard.key}"
        for place in places.tolist():
            index = int(np.searchsorted(ends, place, "right"))
            yield shard.first_chunk + index, place - (int(ends[index - 1]) if index else 0)


def _chunk_lengths(plan: Plan) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return how many rows each chunk of a plan has."""
    numbers, rows = (plan.slices[name].to_numpy() for name in ("chunk", "rows"))
    return np.bincount(numbers, weights=rows, minlength=plan.chunks).astype(np.int64)


def _statuses(ledger: Ledger, shard: Shard) -> pa.ChunkedArray:
    name = ledger.spec.output.prefix + "status"
    batches = []
    for key in ledger.rows_of(shard):
        try:
            batches += [batch[name] for batch in parquet_batches(ledger.store, key, [name])]
        except (Unreadable, FileNotFoundError) as error:
            raise Refused(
                f"{redact(ledger.store.uri)}/{key}: {error}",
                "it is damaged; delete it and its record under _quantbatch/shards, and run again",
            ) from error
    return pa.chunked_array([chunk for batch in batches for chunk in batch.chunks], pa.string())
