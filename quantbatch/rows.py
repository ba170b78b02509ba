"""The columns of a chunk on its way from the input to the output.

    after rendering   in.<kept column>..., row_id, prompt_ids, ask, error_type, error_message
    after answering   in.<kept column>..., row_id, status, error_type, error_message, <the task's>,
                      prompt_tokens, cached where a cache of answers is used
    in the output     <kept column>..., <prefix>row_id, <prefix>status, ..., <prefix>attempt

On the way the kept columns carry `in.` before their names, so that no name of the user's meets one
of ours. What the stages need to know of the chunk itself travels as `ChunkFacts` in the schema's
metadata.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quantbatch import tasks
from quantbatch.errors import InputError, JobError, SpecError
from quantbatch.records import Again, Counts, ReplicaStats, Status, Trouble
from quantbatch.wants import read_ask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantbatch.errors import RowError
    from quantbatch.records import Answer, Chunk
    from quantbatch.spec import JobSpec, Output
    from quantbatch.wants import Ask

KEPT = "in."
UNREADABLE_FILE = "unreadable_file"
"""`error_type` of rows whose file was planned and then can't be read."""
_METADATA_KEY = b"quantbatch"


@dataclass(frozen=True)
class ChunkFacts:
    """What travels with the rows of a chunk."""

    shard: int
    rows: int
    """Rows that there have to be: those of the plan, or those of a retry."""
    trouble: Trouble | None = None
    """Why the chunk could not be answered; its rows are then absent."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Files whose rows could not be read, with the reason."""
    replica: ReplicaStats = field(default_factory=ReplicaStats)
    again: Again | None = None
    """Which rows of the chunk these are, if they are answered again."""
    prompts: str = ""
    """Digest of the rendered prompts, see `prompts_digest`."""
    held_back: bool = False
    """Whether the run takes no more chunks; the rows are then absent."""
    commits: bool = True
    """Whether the answers count: not if only some of the rows were tried, see `suspects`."""


def with_facts(rows: pa.Table, facts: ChunkFacts) -> pa.Table:
    """Attach facts to a chunk's rows."""
    return rows.replace_schema_metadata({_METADATA_KEY: json.dumps(dataclasses.asdict(facts))})


def facts_of(rows: pa.Table) -> ChunkFacts:
    """Return the facts that `with_facts` attached."""
    found = json.loads(rows.schema.metadata[_METADATA_KEY])
    nested = {
        "replica": ReplicaStats.from_json(found["replica"]),
        "trouble": found["trouble"] and Trouble(*found["trouble"]),
        "again": found["again"] and _again(*found["again"]),
    }
    return ChunkFacts(**found | nested)


def _again(retry: int, base: int, places: Sequence[int]) -> Again:
    return Again(retry, base, tuple(places))


def failed(shard: int, error: JobError) -> pa.Table:
    """Return what stands for a chunk that could not be answered."""
    trouble = Trouble(error.exit_code, error.problem, error.hint)
    return with_facts(pa.table({}), ChunkFacts(shard, 0, trouble))


def held_back(shard: int) -> pa.Table:
    """Return what stands for a chunk that came when the run took no more."""
    return with_facts(pa.table({}), ChunkFacts(shard, 0, held_back=True))


def row_ids(chunk: Chunk) -> pa.Array:
    """Return `<file>:<row number>` for each row of a chunk."""
    parts = []
    for piece in chunk.slices:
        numbers = pa.array(np.arange(piece.first_row, piece.first_row + piece.rows)).cast(
            pa.string()
        )
        parts.append(pc.binary_join_element_wise(piece.file, numbers, ":"))
    return pa.concat_arrays(parts)


def rendered(
    kept: pa.Table,
    ids: pa.Array,
    prompt_ids: pa.Array,
    errors: Mapping[int, RowError],
    asks: pa.Array | None = None,
) -> pa.Table:
    """Put together the rows of a chunk as they go to a replica.

    Args:
        kept: The input columns that the output carries.
        ids: Row ids.
        prompt_ids: Token ids; those of rows with an error are left out, since no model reads them.
        errors: What is wrong with rows.
        asks: `wants.Ask` as JSON; null where a row asks for nothing of its own.
    """
    count = len(ids)
    kinds = [errors[i].kind if i in errors else None for i in range(count)]
    messages = [errors[i].message if i in errors else None for i in range(count)]
    columns = {KEPT + name: kept[name] for name in kept.column_names}
    columns |= {
        "row_id": ids,
        "prompt_ids": _without(prompt_ids, errors),
        "ask": pa.nulls(count, pa.string()) if asks is None else asks,
        "error_type": pa.array(kinds, pa.string()),
        "error_message": pa.array(messages, pa.string()),
    }
    return pa.table(columns)


def prompts_digest(prompt_ids: pa.Array) -> str:
    """Return the SHA-256 of prompts, null where a row has none, as hex.

    With it `verify --prompts` can tell that a run rendered the rows as they are rendered now: by
    the same template, with the same tokenizer, of the same values.
    """
    lengths = pc.fill_null(pc.list_value_length(prompt_ids), -1).cast(pa.int32())
    digest = hashlib.sha256(lengths.to_numpy(zero_copy_only=False))
    digest.update(pc.list_flatten(prompt_ids).cast(pa.int32()).to_numpy(zero_copy_only=False))
    return digest.hexdigest()


def _without(prompt_ids: pa.Array, errors: Mapping[int, RowError]) -> pa.Array:
    """Return prompts, null where a row has an error."""
    if not any(prompt_ids[row].is_valid for row in errors):
        return prompt_ids
    kept = pa.array([None if row in errors else row for row in range(len(prompt_ids))], pa.int64())
    return prompt_ids.take(kept)


def asks_of(rows: pa.Table) -> list[Ask]:
    """Return what each row of a chunk asks for, as `rendered` noted it."""
    return [read_ask(text) for text in rows["ask"].to_pylist()]


def answered(
    rows: pa.Table,
    answers: Sequence[Sequence[Answer]],
    spec: JobSpec,
    cached: Sequence[bool] | None = None,
) -> pa.Table:
    """Put the answers beside the rows.

    Args:
        rows: A chunk as `rendered` made it.
        answers: The samples of each row, in order; none where the row had an error before it got to
            a model.
        spec: The job.
        cached: Whether each row's answers come from the job's cache of answers; None if it has
            none.
    """
    asks = asks_of(rows)
    results = [tasks.result(spec, *each) for each in zip(asks, answers, strict=True)]
    failures = [result.failure for result in results]
    errors = [
        pa.array([failure and failure.kind for failure in failures], pa.string()),
        pa.array([failure and failure.message for failure in failures], pa.string()),
    ]
    columns = {name: rows[name] for name in rows.column_names if name.startswith(KEPT)}
    columns |= {
        "row_id": rows["row_id"],
        "status": pa.array([result.status.value for result in results], pa.string()),
        "error_type": pc.coalesce(rows["error_type"], errors[0]),
        "error_message": pc.coalesce(rows["error_message"], errors[1]),
    }
    names = [described.name for described in tasks.fields(spec)]
    columns |= dict(zip(names, tasks.columns(spec, asks, answers), strict=True))
    columns["prompt_tokens"] = _prompt_tokens(rows["prompt_ids"], asks)
    if cached is not None:
        columns["cached"] = pa.array(cached, pa.bool_())
    return pa.table(columns, metadata=rows.schema.metadata)


def _prompt_tokens(prompt_ids: pa.ChunkedArray, asks: Sequence[Ask]) -> pa.ChunkedArray:
    """Return the tokens of each row's prompts."""
    tokens = pc.list_value_length(prompt_ids)
    more = [sum(map(len, ask.more_prompts)) for ask in asks]
    return pc.add(tokens, pa.array(more, pa.int32())) if any(more) else tokens


def counts_of(rows: pa.Table) -> Counts:
    """Count the answered rows of a chunk by status, and their tokens."""
    tally = {r["values"]: r["counts"] for r in pc.value_counts(rows["status"]).to_pylist()}
    assert set(tally) <= {str(status) for status in Status}, f"unknown status in {tally}"
    has_cache = "cached" in rows.column_names
    paid = rows.filter(pc.invert(rows["cached"])) if has_cache else rows
    return Counts(
        **tally,
        unread=pc.sum(pc.equal(rows["error_type"], UNREADABLE_FILE)).as_py() or 0,
        cached=rows.num_rows - paid.num_rows,
        prompt_tokens=pc.sum(paid["prompt_tokens"]).as_py() or 0,
        completion_tokens=_total(paid["completion_tokens"])
        if "completion_tokens" in paid.column_names
        else 0,
    )


def _total(counts: pa.ChunkedArray) -> int:
    """Return the sum of a column of numbers, or of lists of them: one for each sample."""
    numbers = pc.list_flatten(counts) if pa.types.is_list(counts.type) else counts
    return pc.sum(numbers).as_py() or 0


def kept_columns(output: Output, schema: pa.Schema, partition_keys: Sequence[str]) -> list[str]:
    """Return the input columns that the output carries, in the input's order.

    Columns of Hive partitions are not among them: the output keeps their folders, and a reader that
    finds such a column in a file too can't merge the two.

    Raises:
        SpecError: A column to keep does not exist.
    """
    if output.keep == "all":
        return [name for name in schema.names if name not in partition_keys]
    for name in output.keep:
        if name not in schema.names:
            raise SpecError(
                JobError(
                    f"output.keep: the input has no column {name!r}",
                    f"its columns are {', '.join(schema.names)}",
                )
            )
    return [n for n in schema.names if n in output.keep and n not in partition_keys]


def output_schema(spec: JobSpec, kept: Sequence[str], schema: pa.Schema) -> pa.Schema:
    """Return the one schema of every output file of a job.

    Raises:
        InputError: A kept column has the name of one that quantbatch adds.
    """
    ours = [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_type", pa.string()),
        pa.field("error_message", pa.string()),
        *tasks.fields(spec),
        pa.field("prompt_tokens", pa.int32()),
        *([pa.field("cached", pa.bool_(), nullable=False)] if spec.answers_cache else []),
        pa.field("attempt", pa.string(), nullable=False),
    ]
    prefix = spec.output.prefix
    ours = [described.with_name(prefix + described.name) for described in ours]
    both = sorted(set(kept) & {described.name for described in ours})
    if both:
        raise InputError(
            f"the input column {both[0]!r} has the name of a column that quantbatch adds",
            "set output.prefix, such as 'qb_', or leave the column out of output.keep",
        )
    return pa.schema([*(schema.field(name) for name in kept), *ours])


def output(rows: pa.Table, schema: pa.Schema, prefix: str, attempt: str) -> pa.Table:
    """Return answered rows as they stand in the output."""
    rows = rows.append_column("attempt", pa.repeat(attempt, rows.num_rows))
    kept = {name.removeprefix(KEPT): rows[name] for name in rows.column_names if KEPT in name[:3]}
    ours = {prefix + name: rows[name] for name in rows.column_names if KEPT not in name[:3]}
    columns = kept | ours
    return pa.table([columns[name] for name in schema.names], schema=schema)


def replaced(before: pa.Table, places: Sequence[int], after: pa.Table, prefix: str) -> pa.Table:
    """Put rows of a further attempt in the places of those before; both as `output` makes them.

    A row that had an answer keeps it where the further attempt has none.

    Args:
        before: The whole chunk.
        places: Where the rows of `after` belong, in order.
        after: The rows of the further attempt.
        prefix: That of our columns.
    """
    failed = pc.equal(after[prefix + "status"], Status.ERROR.value).to_pylist()
    had_none = pc.equal(before[prefix + "status"], Status.ERROR.value).to_pylist()
    pieces, done = [], 0
    for index, place in enumerate(places):
        if not failed[index] or had_none[place]:
            pieces += [before.slice(done, place - done), after.slice(index, 1)]
            done = place + 1
    whole = pa.concat_tables([*pieces, before.slice(done)])
    assert whole.num_rows == before.num_rows
    return whole.combine_chunks()


def ours(table: pa.Table, prefix: str) -> pa.Table:
    """Return our columns of an output's rows, by the names that they have on the way."""
    names = [name for name in table.column_names if name.startswith(prefix)]
    return pa.table({name.removeprefix(prefix): table[name] for name in names})
