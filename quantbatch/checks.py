"""What can be wrong with a job, each by itself: places, columns, tokens, lengths."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pyarrow as pa

from quantbatch import storage, structured, tasks
from quantbatch.errors import InputError, JobError, Refused, SpecError
from quantbatch.input import listing
from quantbatch.plan import Plan
from quantbatch.prompts import chat, rendering, tools
from quantbatch.prompts.asking import Asker
from quantbatch.prompts.templates import missing_column
from quantbatch.prompts.tokens import counting_tokenizer
from quantbatch.spec import BatchRequests, Classify, Embed, Generate, Response, Score

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.spec import JobSpec
    from quantbatch.storage import Store

logger = logging.getLogger(__name__)

BYTES = [bytes([byte]) for byte in range(256)]
_NAME_BYTES, _PATH_BYTES, _KEY_BYTES = 255, 4095, 1024
"""Longest name, and path, that disks take (Linux: NAME_MAX and PATH_MAX), and key on S3."""
_LONGEST_NAME = "part-000000.errors.jsonl"
_SHOWN = 80
"""Characters of a column's type that a message shows."""
MAX_AUTO_INPUT_TOKENS = 8192
"""Longest prompt that `max_input_tokens: auto` lets in: at 256 KiB a token, which is what a 32B
model's cache takes, 8,192 tokens are 2 GiB of a card."""


def check_tokens(spec: JobSpec, checkpoint: Checkpoint) -> None:
    """Refuse token ids that the model does not have: they would make every row an error."""
    words = checkpoint.text_config.get("vocab_size")
    named = {
        "sampling.logit_bias": spec.sampling.logit_bias,
        "sampling.stop_token_ids": spec.sampling.stop_token_ids,
    }
    for field, token_ids in named.items():
        unknown = [token for token in token_ids if words is not None and token >= words]
        if unknown:
            raise SpecError(
                JobError(
                    f"{field}: no token {unknown[0]}, {spec.model.id} has {words:,} tokens",
                    "token ids are those of the model's own tokenizer",
                )
            )


def check_tools(spec: JobSpec, checkpoint: Checkpoint) -> None:
    """Refuse tools that the model can't be told of, and calls that can't be forced.

    Raises:
        JobError: The model's chat template knows no tools, or `task.tool_choice` can't be had.
    """
    if isinstance(spec.task, Generate):
        chat.require_tools(spec.task.tools_column or spec.task.tools, checkpoint.chat_template)
        tools.check_choice(spec.task, checkpoint.chat_template)


def check_weight_cache(spec: JobSpec) -> None:
    """Refuse a cache of weights nowhere, or in the output, which is for the job's own files."""
    if spec.model.cache is None:
        return
    cache = storage.open_store(spec.model.cache, spec.model.cache_storage).uri
    output = storage.open_store(spec.output.uri, spec.output.storage).uri
    if f"{cache}/".startswith(f"{output}/"):
        raise Refused(
            f"model.cache {spec.model.cache} lies in the output {spec.output.uri}",
            "choose another model.cache: jobs may share one",
        )


def check_answers_cache(spec: JobSpec) -> None:
    """Refuse a cache of answers nowhere, in the output, or among the input: its files would be
    taken for rows.
    """
    if spec.answers_cache is None:
        return
    given = spec.answers_cache.uri
    cache = storage.open_store(given, spec.answers_cache.storage).uri
    output = storage.open_store(spec.output.uri, spec.output.storage).uri
    uris = [spec.input.uri] if isinstance(spec.input.uri, str) else spec.input.uri
    place = f"output {spec.output.uri}" if f"{cache}/".startswith(f"{output}/") else None
    place = next((f"input {uri}" for uri in uris if listing.would_list(uri, cache)), place)
    if place:
        raise Refused(
            f"answers_cache.uri {given} lies in the {place}: its files would be taken for rows",
            "choose another folder: jobs may share one",
        )


def check_places(spec: JobSpec) -> None:
    """Refuse an output among the input, an input among the output, and a cache nowhere."""
    check_weight_cache(spec)
    check_answers_cache(spec)
    uris = [spec.input.uri] if isinstance(spec.input.uri, str) else spec.input.uri
    output = storage.open_store(spec.output.uri, spec.output.storage).uri
    for uri in uris:
        if listing.would_list(uri, output):
            raise Refused(
                f"output.uri {spec.output.uri} lies in the input {uri}: "
                "the next run would read its own answers",
                "choose an output outside the input",
            )
        root = storage.open_store(listing.input_root(uri), spec.input.storage).uri
        if f"{root}/".startswith(f"{output}/"):
            raise Refused(
                f"input.uri {uri} lies in the output {spec.output.uri}", "choose another output.uri"
            )


def check_folders(store: Store, folders: Iterable[str]) -> None:
    """Refuse input whose key=value folders can't be folders of the output, before it is answered.

    S3 takes names that disks don't.

    Args:
        store: The output.
        folders: Such as `day=2026-01-01`.

    Raises:
        InputError: One is too long, or holds a NUL.
    """
    local = isinstance(store, storage.LocalStore)
    for folder in folders:
        key = f"{folder}/{_LONGEST_NAME}"
        longest = max(len(part.encode()) for part in key.split("/"))
        whole = len(f"{store.uri}/{key}".encode())
        fits = longest <= _NAME_BYTES and whole <= _PATH_BYTES and "\0" not in key
        if not (fits if local else whole <= _KEY_BYTES):
            place = "a disk" if local else "S3"
            raise InputError(
                f"the folder {folder[:100]!r} of the input can't be one of the output"
                f" {storage.redact(store.uri)}: {place} takes no name of {longest:,} bytes in a"
                f" path of {whole:,}, and a disk no NUL",
                "rename it; or give its files as a glob that begins below it",
            )


def with_dimensions(spec: JobSpec, checkpoint: Checkpoint) -> JobSpec:
    """Return a spec with `task.dimensions: auto` of an embedding chosen.

    Raises:
        SpecError: The model has fewer than are asked for, or does not say.
    """
    if not isinstance(spec.task, Embed):
        return spec
    there = checkpoint.text_config.get("hidden_size") or checkpoint.text_config.get("n_embd")
    wanted = spec.task.dimensions
    if there is None or (wanted != "auto" and wanted > there):
        has = "does not say how many it has" if there is None else f"has {there:,}"
        raise SpecError(
            JobError(
                f"task.dimensions: {wanted}, and {spec.model.id} {has}",
                "it is hidden_size in the model's config.json",
            )
        )
    if wanted != "auto":
        return spec
    return spec.model_copy(update={"task": spec.task.model_copy(update={"dimensions": there})})


def check_labels(spec: JobSpec, checkpoint: Checkpoint, max_input_tokens: int) -> None:
    """Refuse a job's labels that the model's tokenizer can't tell apart.

    Raises:
        SpecError: They have the same tokens, or none.
    """
    if isinstance(spec.task, Classify) and spec.task.labels is not None:
        tokenizer = counting_tokenizer(checkpoint)
        Asker(spec.prompt, spec.task, tokenizer, max_prompt_tokens=max_input_tokens).check()


def input_limit(spec: JobSpec, checkpoint: Checkpoint) -> int:
    """Return the longest prompt that is let in, in tokens: one that leaves room for the longest
    answer, or the longest label.
    """
    answer = spec.answer_tokens
    generates = isinstance(spec.task, Generate | BatchRequests)
    cause = "sampling.max_new_tokens" if generates else f"task {spec.task.kind}"
    context = checkpoint.context_tokens
    asked = spec.engine.max_input_tokens
    if context is None:
        if asked == "auto":
            raise SpecError(
                JobError(
                    f"engine.max_input_tokens: {spec.model.id} does not say its context's length",
                    "set engine.max_input_tokens",
                )
            )
        return asked
    room = context - answer
    if room < 1:
        raise SpecError(
            JobError(
                f"{cause}: {answer:,} leaves no room for a prompt "
                f"in a context of {context:,} tokens",
                "make it smaller" if generates else "give shorter labels",
            )
        )
    if asked == "auto":
        return min(room, MAX_AUTO_INPUT_TOKENS)
    if asked > room:
        raise SpecError(
            JobError(
                f"engine.max_input_tokens: {asked:,} and {answer:,} new tokens "
                f"exceed the context of {context:,}",
                f"at most {room:,}, or a smaller {cause}" if generates else f"at most {room:,}",
            )
        )
    return asked


def check_task_columns(spec: JobSpec, schema: pa.Schema) -> None:
    """Refuse a task that reads a column which is not there, or is of another type.

    Raises:
        SpecError: With the column's name.
    """
    match spec.task:
        case Classify(labels_column=str(column)):
            field, right, wanted = "task.labels_column", is_texts, "lists of texts"
        case Score(continuation=str(column)):
            field, right, wanted = "task.continuation", is_text, "texts"
        case Generate(response=Response(schema_column=str(column))):
            field, right, wanted = "task.response.schema_column", is_text, "JSON as text"
        case Generate(tools_column=str(column)):
            field, right, wanted = "task.tools_column", is_text, "JSON as text"
        case _:
            return
    if column not in schema.names:
        raise SpecError(missing_column(field, column, schema.names))
    found = schema.field(column).type
    if not right(found):
        shown = str(found) if len(str(found)) <= _SHOWN else f"{str(found)[:_SHOWN]}..."
        raise SpecError(JobError(f"{field}: column {column!r} holds {shown}, not {wanted}"))


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a column of a type holds texts."""
    return kind in (pa.string(), pa.large_string(), pa.null())


def is_texts(kind: pa.DataType) -> bool:
    """Tell whether a column of a type holds lists of texts; polars writes large ones."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return (is_list or pa.types.is_fixed_size_list(kind)) and is_text(kind.value_type)


def warn_of_long_forms(spec: JobSpec, checkpoint: Checkpoint) -> None:
    """Say so if no valid answer is short enough; see `structured.fewest_tokens`."""
    response = spec.task.response if isinstance(spec.task, Generate) else None
    grammar = structured.grammar_of(response) if response else None
    most = spec.sampling.max_new_tokens
    if grammar is None or structured.fewest_tokens(grammar, BYTES) <= most:
        return  # no vocabulary needs more tokens than there are bytes
    words = structured.words_of_tokenizer(counting_tokenizer(checkpoint))
    fewest = structured.fewest_tokens(grammar, words)
    if fewest > most:
        logger.warning(
            "sampling.max_new_tokens: %d, but each answer to task.response needs %d or more: all"
            " will be truncated",
            most,
            fewest,
        )


def check_columns(spec: JobSpec, plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse a prompt, a task or a key that reads columns which the input lacks.

    Raises:
        JobError: It does, or the prompt can't be rendered with this model.
    """
    rendering.check_prompt(spec.prompt, plan.schema.names, checkpoint.chat_template)
    check_task_columns(spec, plan.schema)
    tasks.check(spec, plan.schema.names)
    if spec.input.key and spec.input.key not in plan.schema.names:
        raise SpecError(
            JobError(
                f"input.key: the input has no column {spec.input.key!r}",
                f"its columns are {', '.join(plan.schema.names)}",
            )
        )
