"""What the pipeline does with a chunk before and after a replica, in Ray actors on CPUs.

Each takes and returns one chunk as `records.pack` makes it. Neither raises for what is wrong with a
row or a file: those become error rows. Trouble with the store or the model travels to the driver in
a receipt.
"""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import override

from quantbatch import rows, suspects, tasks
from quantbatch.commits import commit_chunk
from quantbatch.errors import InputError, JobError, RowError, Stopped, StorageError
from quantbatch.input import listing, sources
from quantbatch.lastwords import LastWords, within
from quantbatch.model.checkpoint import find_checkpoint
from quantbatch.prompts.renderers import renderer_of
from quantbatch.prompts.tokens import tokenizer_of
from quantbatch.records import Again, Blame, Chunk, Receipt, Slice, Trial, Trouble, pack, unpack
from quantbatch.storage import open_store
from quantbatch.suspects import Death

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantbatch.commits import OutputFormat
    from quantbatch.gate import Door
    from quantbatch.prompts.renderers import AnyRenderer
    from quantbatch.spec import JobSpec
    from quantbatch.storage import Store

_VALUES = operator.attrgetter(*Slice.__dataclass_fields__)
"""Of a slice; with `asdict` the list of a million chunks takes 30 s, so 11 (measured)."""
READING_S = 1800.0
"""Longest time that reading and rendering a chunk may take before its process is ended: what tries
again in a store, or bounds a template, gives up long before."""
_RECEIPT = pa.schema([("receipt", pa.string())])


@dataclass(frozen=True)
class ReadJob:
    """What reading and rendering need to know of a job."""

    spec: JobSpec
    root: str
    """The input's root, as the driver resolved it."""
    schema: pa.Schema
    """Columns of the input."""
    kept: tuple[str, ...]
    """Columns that go to the output."""
    max_input_tokens: int
    driver_folder: str
    """Working directory of the driver, for a model path that is relative to it."""

    @override
    def __hash__(self) -> int:
        return hash((self.spec.output.uri, self.root, self.max_input_tokens))


class Items(NamedTuple):
    """Chunks as they go into Ray."""

    rows: int
    """Rows that are to be answered."""
    items: list[dict[str, str]]
    """The rows of the Ray dataset: one for each chunk."""


def to_items(chunks: Iterable[Chunk]) -> Items:
    """Return chunks as a Ray dataset takes them."""
    rows, items = 0, []
    for c in chunks:
        rows += len(c.again.rows) if c.again else c.rows
        pieces = [_VALUES(piece) for piece in c.slices]
        items.append({"chunk": json.dumps([c.id, c.shard, pieces, c.again, c.trial])})
    return Items(rows, items)


def item_table(item: dict[str, str]) -> pa.Table:
    """Return one of `to_items` as a dataset hands it to a reader."""
    return pa.table({"chunk": [item["chunk"]]})


def _chunk(item: pa.Table) -> Chunk:
    number, shard, pieces, again, trial = json.loads(item["chunk"][0].as_py())
    if again:
        again = Again(again[0], again[1], tuple(again[2]))
    if trial:
        trial = Trial(*trial)._replace(blamed=tuple(Blame(*each) for each in trial[2]))
    return Chunk(number, shard, tuple(Slice(*piece) for piece in pieces), again, trial)


def read_and_render(chunk: Chunk, *, job: ReadJob) -> pa.Table:
    """Read the rows of one chunk and turn them into token ids."""
    try:
        table, errors, unreadable = _wanted(_read(job, chunk), chunk)
        prompts = _renderer(job).render(table)
    except JobError as error:
        return pack(chunk.id, rows.failed(chunk.shard, _resumable(error)))
    key = job.spec.input.key
    ids = rows.row_ids(chunk)
    if chunk.again:
        ids = ids.take(pa.array(chunk.again.rows))
    if key:
        # A row that can't be read has no key; its place is still its own.
        ids = pc.coalesce(table[key].cast(pa.string()), ids)
    asked = tasks.asked(job.spec, table)
    errors = {**asked.errors, **prompts.errors, **errors, **_not_tried(chunk.trial)}
    asks = asked.asks if prompts.asks is None else prompts.asks
    found = rows.rendered(table.select(job.kept), ids, prompts.token_ids, errors, asks)
    facts = rows.ChunkFacts(
        chunk.shard,
        table.num_rows,
        unreadable=unreadable,
        again=chunk.again,
        commits=chunk.trial is None or chunk.trial.commits,
        prompts=rows.prompts_digest(prompts.token_ids),
    )
    return pack(chunk.id, rows.with_facts(found, facts))


def _not_tried(trial: Trial | None) -> dict[int, RowError]:
    """Return the rows that an attempt leaves out, with what their error rows say."""
    if trial is None:
        return {}
    left_out = [*range(trial.low), *range(trial.high, trial.rows)]
    errors = dict.fromkeys(left_out, RowError(suspects.DIED, "not tried"))
    for blame in reversed(trial.blamed):
        errors |= dict.fromkeys(range(blame.low, blame.high), RowError(blame.kind, blame.message))
    return errors


class Reader:
    """`read_and_render` as an actor.

    Args:
        job: What reading needs to know.
        door: Asked before each chunk.
    """

    def __init__(self, job: ReadJob, door: Door) -> None:
        self._job = job
        self._door = door
        self._words = LastWords(door.name) if door.name else None
        # A reader that dies has a chunk: loading takes nothing that a replica does not take too.
        self.before = self._words.before if self._words else Death()
        """How the process of this name before this one ended."""
        door.starts(self.before)
        door.ready()

    def __call__(self, item: pa.Table) -> pa.Table:
        """See `read_and_render`."""
        chunk = _chunk(item)
        if not self._door.begin(chunk.id, reading=True):
            return pack(chunk.id, rows.held_back(chunk.shard))
        with within(READING_S, self._words):
            found = read_and_render(chunk, job=self._job)
        self._door.end(chunk.id, answered=False)
        return found


class _ReadRows(NamedTuple):
    """The rows of a chunk."""

    table: pa.Table
    errors: dict[int, RowError]
    unreadable: dict[str, str]


def _wanted(read: _ReadRows, chunk: Chunk) -> _ReadRows:
    """Return those rows of a chunk that are answered: all, or those of a retry."""
    assert read.table.num_rows == chunk.rows, (
        f"chunk {chunk.id}: read {read.table.num_rows} of {chunk.rows} rows"
    )
    if chunk.again is None:
        return read
    places = chunk.again.rows
    errors = {i: read.errors[place] for i, place in enumerate(places) if place in read.errors}
    return read._replace(table=read.table.take(pa.array(places)), errors=errors)


def _read(job: ReadJob, chunk: Chunk) -> _ReadRows:
    store = _store(job)
    tables: list[pa.Table] = []
    errors: dict[int, RowError] = {}
    unreadable: dict[str, str] = {}
    before = 0
    for piece in chunk.slices:
        partition = listing.partition_of(piece.file)
        try:
            if chunk.trial and chunk.again is None:
                _must_not_read(chunk.trial, before, before + piece.rows)
            found = sources.read_slice(store, piece, job.spec.input, job.schema, partition)
        except InputError as error:
            # A file that was sound when it was planned: its rows are error rows, its neighbours in
            # the shard are not held up.
            unreadable[piece.file] = error.problem
            found = _without_values(piece, job.schema, error)
        tables.append(found.table)
        errors |= {before + row: error for row, error in found.errors.items()}
        before += piece.rows
    return _ReadRows(pa.concat_tables(tables), errors, unreadable)


def _must_not_read(trial: Trial, low: int, high: int) -> None:
    """Leave out a slice that an attempt has no rows of, or whose reading kills.

    Raises:
        InputError: It is left out.
    """
    for blame in trial.blamed:
        if blame.unread and blame.low <= low and high <= blame.high:
            raise InputError(blame.message)
    if high <= trial.low or low >= trial.high:
        raise InputError("not tried")


def _without_values(piece: Slice, schema: pa.Schema, error: InputError) -> sources.SliceRows:
    nothing = pa.table([pa.nulls(piece.rows, column.type) for column in schema], schema=schema)
    reason = RowError(rows.UNREADABLE_FILE, error.problem)
    return sources.SliceRows(nothing, dict.fromkeys(range(piece.rows), reason))


def _resumable(error: JobError) -> JobError:
    """Return trouble with a store as what it is in the middle of a run: a reason to go on later."""
    if isinstance(error, StorageError):
        return Stopped(error.problem, error.hint or "the same command continues the job")
    return error


@lru_cache(maxsize=4)
def _store(job: ReadJob) -> Store:
    return open_store(job.root, job.spec.input.storage, known=True)


@lru_cache(maxsize=4)
def _renderer(job: ReadJob) -> AnyRenderer:
    """Build the renderer once in a worker process: loading a tokenizer takes seconds."""
    checkpoint = find_checkpoint(job.spec.model.seen_from(job.driver_folder))
    return renderer_of(
        job.spec,
        tokenizer_of(checkpoint),
        max_prompt_tokens=job.max_input_tokens,
        too_long=job.spec.engine.too_long,
    )


class Committer:
    """`commit` as an actor."""

    def __init__(self, store: Store, target: OutputFormat) -> None:
        self._store, self._target = store, target

    def __call__(self, block: pa.Table) -> pa.Table:
        """See `commit`; several threads may call this."""
        return commit(block, store=self._store, target=self._target)


def commit(block: pa.Table, *, store: Store, target: OutputFormat) -> pa.Table:
    """Commit the answered rows of one chunk and return its receipt."""
    chunk, answered = unpack(block)
    facts = rows.facts_of(answered)
    if facts.trouble:
        receipt = Receipt(chunk, facts.shard, trouble=facts.trouble)
    elif facts.held_back or not facts.commits:
        receipt = Receipt(chunk, facts.shard, committed=False)
    else:
        try:
            receipt = commit_chunk(store, chunk, answered, target)
        except JobError as error:
            ended = _resumable(error)
            trouble = Trouble(ended.exit_code, ended.problem, ended.hint)
            receipt = Receipt(chunk, facts.shard, trouble=trouble)
    return pa.table([pa.array([receipt.to_json()], pa.string())], schema=_RECEIPT)


def receipts(block: pa.Table) -> list[Receipt]:
    """Return the receipts in a block that `commit` made."""
    return [Receipt.from_json(text) for text in block["receipt"].to_pylist()]
