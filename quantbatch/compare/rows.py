"""Rows spread evenly over a job's input, rendered as the job renders them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from quantbatch import checks
from quantbatch.errors import InputError, JobError, SpecError
from quantbatch.input import listing, sources
from quantbatch.plan import make_plan
from quantbatch.prompts.rendering import Renderer, check_prompt
from quantbatch.prompts.templates import missing_column
from quantbatch.prompts.tokens import tokenizer_of
from quantbatch.records import Slice, to_token_lists

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from quantbatch.errors import RowError
    from quantbatch.input.listing import Listing
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.plan import Plan
    from quantbatch.spec import JobSpec


@dataclass(frozen=True)
class ComparedRow:
    """A row that every width answers."""

    id: str
    """`<file>:<row number>`."""
    prompt_ids: tuple[int, ...]
    gold: str | None = None
    """What the right answer is, without the blanks around it; None if it is not known."""


@dataclass(frozen=True)
class ComparedRows:
    """The rows of a comparison."""

    rows: tuple[ComparedRow, ...]
    asked: int
    in_input: int
    left_out: Mapping[str, int]
    """Rows that have no prompt, such as `prompt_too_long`, and how many."""


def spread_rows(
    spec: JobSpec, checkpoint: Checkpoint, count: int, gold: str | None = None
) -> ComparedRows:
    """Read and render rows spread evenly over the whole input; all of a smaller one.

    Args:
        spec: The job.
        checkpoint: Its model's files.
        count: How many rows.
        gold: Column with the right answers.

    Raises:
        JobError: The job could not run, there is no such column, or no row has a prompt.
    """
    if count < 1:
        raise SpecError(JobError(f"--rows is {count}", "300 tell label agreement within 2 points"))
    checks.check_places(spec)
    listed = listing.list_input(spec.input)
    plan = make_plan(spec, listed)
    if not plan.rows:
        raise InputError("the input has no rows that can be read", "correct input.uri")
    check_prompt(spec.prompt, plan.schema.names, checkpoint.chat_template)
    if gold is not None and gold not in plan.schema.names:
        raise SpecError(missing_column("--gold", gold, plan.schema.names))
    pieces = list(_pieces(plan, count))
    table, errors = _read(spec, plan, listed, pieces)
    prompts = _renderer(spec, checkpoint).render(table)
    errors = {**prompts.errors, **errors}
    column = table[gold].to_pylist() if gold else [None] * len(pieces)
    tokens = to_token_lists(pa.chunked_array([prompts.token_ids]))
    rows = tuple(
        ComparedRow(f"{piece.file}:{piece.first_row}", tuple(ids), _label(right))
        for row, (piece, ids, right) in enumerate(zip(pieces, tokens, column, strict=True))
        if row not in errors and ids
    )
    if not rows:
        raise InputError(f"none of {len(pieces)} rows has a prompt: {next(iter(errors.values()))}")
    return ComparedRows(rows, count, plan.rows, _tally(errors))


def _label(value: object) -> str | None:
    return None if value is None else str(value).strip()


def _tally(errors: Mapping[int, RowError]) -> dict[str, int]:
    kinds = [error.kind for error in errors.values()]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def _pieces(plan: Plan, count: int) -> Iterator[Slice]:
    """Yield slices of one row each, evenly spread over all rows, in the input's order."""
    taken = min(count, plan.rows)
    wanted = (2 * np.arange(taken) + 1) * plan.rows // (2 * taken)
    ends = np.cumsum(plan.slices["rows"].to_numpy())
    places = np.searchsorted(ends, wanted, side="right")
    for row, place in zip(wanted.tolist(), places.tolist(), strict=True):
        found = plan.slices.slice(place, 1).to_pylist()[0]
        del found["shard"], found["chunk"]
        within = Slice(**found)
        offset = row - (int(ends[place]) - within.rows)
        yield replace(within, first_row=within.first_row + offset, rows=1)


def _read(
    spec: JobSpec, plan: Plan, listed: Listing, pieces: list[Slice]
) -> tuple[pa.Table, dict[int, RowError]]:
    partitions = {file.name: file.partition for file in listed.files}
    tables: list[pa.Table] = []
    errors: dict[int, RowError] = {}
    for row, piece in enumerate(pieces):
        found = sources.read_slice(
            listed.store, piece, spec.input, plan.schema, partitions[piece.file]
        )
        tables.append(found.table)
        if found.errors:
            errors[row] = found.errors[0]
    return pa.concat_tables(tables), errors


def _renderer(spec: JobSpec, checkpoint: Checkpoint) -> Renderer:
    return Renderer(
        spec.prompt,
        tokenizer_of(checkpoint),
        max_prompt_tokens=checks.input_limit(spec, checkpoint),
        too_long=spec.engine.too_long,
    )
