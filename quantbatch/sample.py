"""The first rows of a job, rendered and answered in this process; nothing is written.

The rows go through the functions that a run uses, so their prompts, token counts and seeds are
those of the run. Of the several answers that `sampling.n` may ask for, the first is shown.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from quantbatch import checks, rows, sizing, tasks
from quantbatch.errors import InputError, SpecError
from quantbatch.input import listing, sources
from quantbatch.model.checkpoint import find_checkpoint
from quantbatch.prompts.renderers import renderer_of
from quantbatch.prompts.rendering import check_prompt
from quantbatch.prompts.templates import missing_column
from quantbatch.prompts.tokens import tokenizer_of
from quantbatch.records import Chunk, Request, RequestId, Slice
from quantbatch.replica import ReplicaJob, load_engine, requests_of, sampling_of
from quantbatch.runner import Runner
from quantbatch.spec import Generate
from quantbatch.wants import USUAL, read_ask

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from quantbatch.errors import RowError
    from quantbatch.input.listing import Listing
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.records import Answer
    from quantbatch.spec import JobSpec
    from quantbatch.wants import Ask


@dataclass(frozen=True)
class Head:
    """The first rows of an input."""

    table: pa.Table
    row_ids: list[str]
    errors: dict[int, RowError]
    """What is wrong with rows that could not be read, by their place in the table."""


@dataclass(frozen=True)
class Sampled:
    """One row of a sample."""

    row_id: str
    prompt_ids: tuple[int, ...] = ()
    prompt: str = ""
    """The whole prompt as the model gets it, with the tokens of its chat template."""
    error: RowError | None = None
    """Why there is no prompt."""
    ask: Ask = USUAL
    """What the row asks for."""
    answer: Answer | None = None
    """None if it was not asked for, or there is an error."""
    cells: Mapping[str, Any] = field(default_factory=dict)
    """What its columns would hold, where the task is not to generate."""


def check(spec: JobSpec, rows_wanted: int) -> tuple[Checkpoint, Head]:
    """Check a spec against its model's files and the first rows of its input, reading no more.

    Raises:
        JobError: The job could not run.
    """
    checks.check_places(spec)
    card = sizing.card_of(spec)
    checkpoint = sizing.open_model(spec, card)
    checks.check_tokens(spec, checkpoint)
    checks.check_tools(spec, checkpoint)
    limit = checks.input_limit(spec, checkpoint)
    listed = listing.list_input(spec.input)
    head = first_rows(spec, listed, rows_wanted)
    check_prompt(spec.prompt, head.table.schema.names, checkpoint.chat_template)
    checks.check_task_columns(spec, head.table.schema)
    spec = checks.with_dimensions(spec, checkpoint)
    checks.check_labels(spec, checkpoint, limit)
    tasks.check(spec, head.table.schema.names)
    checks.warn_of_long_forms(spec, checkpoint)
    kept = rows.kept_columns(spec.output, head.table.schema, listed.partition_keys)
    rows.output_schema(spec, kept, head.table.schema)
    return checkpoint, head


def first_rows(spec: JobSpec, listed: Listing, count: int) -> Head:
    """Read the first rows of an input, looking into no more files than they are in.

    Raises:
        InputError: No file has a row that can be read.
    """
    tables: list[pa.Table] = []
    ids: list[str] = []
    errors: dict[int, RowError] = {}
    problem = InputError("the input has no rows", "correct input.uri")
    for file in listed.files:
        try:
            facts = sources.inspect(listed.store, file, spec.input)
        except InputError as error:
            problem = error
            continue
        piece = Slice(
            file.name, 0, min(count - len(ids), facts.rows), etag=file.etag, size=file.size
        )
        if piece.rows:
            schema = sources.unify_schemas([(file, facts.schema)])
            found = sources.read_slice(listed.store, piece, spec.input, schema, file.partition)
            errors |= {len(ids) + row: error for row, error in found.errors.items()}
            tables.append(found.table)
            ids += _row_ids(spec, piece, found.table)
        if len(ids) == count:
            break
    if not tables:
        raise problem
    return Head(pa.concat_tables(tables, promote_options="permissive"), ids, errors)


def _row_ids(spec: JobSpec, piece: Slice, table: pa.Table) -> list[str]:
    by_place: list[str] = rows.row_ids(Chunk(0, 0, (piece,))).to_pylist()
    if spec.input.key is None:
        return by_place
    if spec.input.key not in table.schema.names:
        raise SpecError(missing_column("input.key", spec.input.key, table.schema.names))
    keys = table[spec.input.key].cast(pa.string()).to_pylist()
    return [place if key is None else key for key, place in zip(keys, by_place, strict=True)]


def sample(spec: JobSpec, count: int) -> list[Sampled]:
    """Render the first rows of a job.

    Raises:
        JobError: The job could not run.
    """
    spec = spec.resolved()
    checkpoint, head = check(spec, count)
    tokenizer = tokenizer_of(checkpoint)
    renderer = renderer_of(
        spec,
        tokenizer,
        max_prompt_tokens=checks.input_limit(spec, checkpoint),
        too_long=spec.engine.too_long,
    )
    prompts = renderer.render(head.table)
    asked = tasks.asked(spec, head.table)
    errors = {**asked.errors, **prompts.errors, **head.errors}
    own = asked.asks if prompts.asks is None else prompts.asks
    texts = [None] * head.table.num_rows if own is None else own.to_pylist()
    asks = [read_ask(text) for text in texts]
    found = []
    for index, (row_id, ids) in enumerate(
        zip(head.row_ids, prompts.token_ids.to_pylist(), strict=True)
    ):
        if index in errors:
            found.append(Sampled(row_id, error=errors[index]))
        else:
            text = tokenizer.decode(ids, skip_special_tokens=False)
            found.append(Sampled(row_id, tuple(ids), str(text), ask=asks[index]))
    return found


def answer(
    spec: JobSpec, sampled: list[Sampled], *, device: str, folder: Path
) -> Iterator[Sampled]:
    """Answer sampled rows with the job's engine, all at once.

    Args:
        spec: The job.
        sampled: Rows as `sample` returns them.
        device: `cuda` or `cpu`.
        folder: What a relative path of the model is relative to.

    Raises:
        JobError: The model can't be loaded, or does not fit.
    """
    spec = spec.resolved()
    checkpoint = find_checkpoint(spec.model)
    spec = checks.with_dimensions(spec, checkpoint)
    requests = [
        request
        for index, row in enumerate(sampled)
        if row.error is None
        for request in _requests(spec, index, row)
    ]
    limit = checks.input_limit(spec, checkpoint)
    job = ReplicaJob(spec, device, limit + spec.answer_tokens, str(folder))
    answers = Runner(load_engine(job).engine).submit(requests).result() if requests else {}
    for index, row in enumerate(sampled):
        own = [answers[request.id] for request in requests if request.id.row == index]
        yield replace(row, answer=next(iter(own), None), cells=_cells(spec, row.ask, own))


def _requests(spec: JobSpec, index: int, row: Sampled) -> Iterator[Request]:
    sampling = sampling_of(spec.sampling, row.ask)
    ask = replace(row.ask, want=tasks.want(spec, row.ask))
    found = requests_of(RequestId(0, index), row.row_id, row.prompt_ids, ask, sampling)
    return itertools.islice(found, 1 if isinstance(spec.task, Generate) else None)


def _cells(spec: JobSpec, ask: Ask, answers: list[Answer]) -> dict[str, Any]:
    if isinstance(spec.task, Generate) or not answers:
        return {}
    names = [described.name for described in tasks.fields(spec)]
    columns = tasks.columns(spec, [ask], [answers])
    status = tasks.result(spec, ask, answers).status
    cells = {name: column[0].as_py() for name, column in zip(names, columns, strict=True)}
    return {"status": status.value} | cells


def best_device(spec: JobSpec) -> str:
    """Return what this machine has to run a job's engine on: `cuda` or `cpu`."""
    if spec.engine.kind == "echo" or spec.cluster.gpus_per_replica == 0:
        return "cpu"
    import torch  # takes seconds, and an engine without a model does without it

    return "cuda" if torch.cuda.is_available() else "cpu"
