"""An engine without a model, whose answers tell which attempt they are from.

What becomes of a row follows from its number, so that whoever looks at an output knows what has to
be there; the text and the number of tokens differ from process to process, so that an attempt which
lost shows where it should not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from quantbatch import rows, stages
from quantbatch.records import Completion, Failure, FinishReason, RequestId, Status

if TYPE_CHECKING:
    from quantbatch.preflight import Job
    from quantbatch.records import Answer, Chunk


def fate(row: int, retry: int) -> Status:
    """Say what becomes of a row of some number, the first time or when it is answered again."""
    if row % 8 == 6 or (retry == 0 and row % 4 == 2):
        return Status.ERROR
    return Status.TRUNCATED if retry == 0 and row % 4 == 1 else Status.OK


def text_of(id: str, retry: int, seed: int) -> str:
    """Return how the answer to a row begins."""
    return f"{id} retry {retry} seed {seed} by "


def answered(job: Job, chunk: Chunk, who: str) -> pa.Table:
    """Read a chunk, or those of its rows that are answered again, and answer them."""
    read = stages._wanted(stages._read(job.read_job, chunk), chunk)
    ids = rows.row_ids(chunk)
    if chunk.again:
        ids = ids.take(pa.array(chunk.again.rows))
    retry = chunk.again.retry if chunk.again else 0
    prompts = pa.array([[1, 2]] * len(ids), pa.list_(pa.int32()))
    rendered = rows.rendered(read.table.select(job.kept), ids, prompts, read.errors)
    facts = rows.ChunkFacts(chunk.shard, len(ids), unreadable=read.unreadable, again=chunk.again)
    answers = [
        [] if place in read.errors else [_answer(job, RequestId(chunk.id, place), id, retry, who)]
        for place, id in enumerate(ids.to_pylist())
    ]
    return rows.answered(rows.with_facts(rendered, facts), answers, job.spec)


def _answer(job: Job, request: RequestId, id: str, retry: int, who: str) -> Answer:
    status = fate(int(id.rpartition(":")[2]), retry)
    if status is Status.ERROR:
        return Failure(request, "model", f"failed for {who}")
    reason = FinishReason.LENGTH if status is Status.TRUNCATED else FinishReason.STOP
    text = text_of(id, retry, job.spec.sampling.seed) + who
    return Completion(request, text, (5,) * (1 + sum(who.encode()) % 7), reason)
