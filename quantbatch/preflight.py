"""Everything that can be known, and refused, before a GPU is asked for.

`prepare` looks at the spec, the model's files, the output and the input, and changes none of them.
What it returns is all that a run, a plan or a sample needs.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from quantbatch import rows, sizing, storage, structured, tasks
from quantbatch.answers.cache import Space
from quantbatch.errors import DoesNotFit, InputError, JobError, Refused, SpecError
from quantbatch.input import keys, listing
from quantbatch.ledger import Ledger
from quantbatch.lengths import sample_lengths
from quantbatch.plan import Plan, make_plan
from quantbatch.prompts import rendering
from quantbatch.prompts.asking import Asker
from quantbatch.prompts.templates import missing_column
from quantbatch.prompts.tokens import counting_tokenizer
from quantbatch.replica import ReplicaJob
from quantbatch.spec import BatchRequests, Classify, Embed, Generate, Score
from quantbatch.stages import ReadJob

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quantbatch.input.listing import InputFile, Listing
    from quantbatch.ledger import OutputFormat
    from quantbatch.lengths import Lengths
    from quantbatch.model.cards import Card
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.memory import MemoryPlan
    from quantbatch.spec import JobSpec

logger = logging.getLogger(__name__)

BYTES = [bytes([byte]) for byte in range(256)]
MAX_AUTO_INPUT_TOKENS = 8192
"""Longest prompt that `max_input_tokens: auto` lets in: at 256 KiB a token, which is what a 32B
model's cache takes, 8,192 tokens are 2 GiB of a card."""


@dataclass(frozen=True)
class Job:
    """A job that may start: nothing about it is known to be wrong."""

    spec: JobSpec
    checkpoint: Checkpoint
    ledger: Ledger
    plan: Plan
    new_generation: Plan | None
    """What the output's frozen plan lacks; None if the output has the whole plan."""
    memory: MemoryPlan | None
    """None for an engine without a model, or if the model does not fit."""
    misfit: DoesNotFit | None
    """Why the model does not fit the card; `prepare` raises it."""
    card: Card | None
    """The card that `memory` is planned for; None if it is not known, or there is none."""
    chosen_for: FirstLook | None
    """What `model.bits: auto` was chosen for; None if there was nothing to choose."""
    max_input_tokens: int
    kept: tuple[str, ...]
    target: OutputFormat
    root: str
    """The input's root as it is now; a moved job finds its input in the new place."""
    missing: bool
    """Whether there are input files that could not be planned: their rows have no answers."""
    unreadable: dict[str, str]
    """Input files that are there and can't be read, with the reason; a run adds what it finds."""

    @property
    def read_job(self) -> ReadJob:
        """What the tasks that read and render need to know."""
        return ReadJob(
            self.spec,
            self.root,
            self.plan.schema,
            self.kept,
            self.max_input_tokens,
            os.getcwd(),  # noqa: PTH109
        )

    def replica_job(self, device: str) -> ReplicaJob:
        """What the replicas need to know."""
        max_tokens = self.max_input_tokens + self.spec.answer_tokens
        folder = os.getcwd()  # noqa: PTH109
        return ReplicaJob(self.spec, device, max_tokens, folder, answers=self.answers)

    @property
    def answers(self) -> Space | None:
        """Where the job keeps answers for later ones; None if it does not."""
        return Space.of(self.spec, self.checkpoint.digest)


def prepare(spec: JobSpec, *, extend: bool = False) -> Job:
    """Check everything about a job that can be checked without a GPU; write nothing.

    Args:
        spec: The job.
        extend: Add input files that came after the job was first planned, instead of refusing them.

    Raises:
        JobError: The job can't run, with the reason and the remedy.
    """
    job = examine(spec, extend=extend)
    if job.misfit:
        raise job.misfit
    return job


def examine(spec: JobSpec, *, extend: bool = False) -> Job:
    """Do as `prepare`, but return also a job whose model does not fit: to show what would.

    Raises:
        JobError: The job can't run for another reason.
    """
    check_places(spec)
    spec = sizing.as_begun(spec)
    card = sizing.card_of(spec)
    checkpoint = sizing.open_model(spec, card)
    check_tokens(spec, checkpoint)
    rendering.compile_templates(spec.prompt)
    rendering.require_chat_template(spec.prompt, checkpoint.chat_template)
    if isinstance(spec.task, Generate):
        rendering.require_tools(spec.task.tools, checkpoint.chat_template)
    max_input_tokens = input_limit(spec, checkpoint)
    spec = with_dimensions(spec, checkpoint)
    check_labels(spec, checkpoint, max_input_tokens)
    first = None
    if spec.model.bits == "auto":
        spec, first = _with_bits(spec, checkpoint, card, max_input_tokens)
    # Not before: bits 16 is then no longer told from bits not given.
    spec = spec.resolved()
    fitting = sizing.fit(spec, checkpoint, max_input_tokens, card)
    ledger = Ledger.open(spec, checkpoint.digest)
    listed = first.listed if first else _listing(spec, ledger)
    plan, new = _whole_plan(spec, ledger, listed, extend=extend, fresh=first and first.plan)
    _check_columns(spec, plan, checkpoint)
    _warn_of_long_forms(spec, checkpoint)
    kept = tuple(rows.kept_columns(spec.output, plan.schema, plan.partition_keys))
    target = ledger.output_format(rows.output_schema(spec, kept, plan.schema))
    if new and spec.input.key:
        keys.check_unique(listed.store, plan, spec.input)
    there = {file.name for file in listed.files}
    unreadable = {name: why for name, why in plan.unreadable.items() if name in there}
    return Job(
        spec=spec,
        checkpoint=checkpoint,
        ledger=ledger,
        plan=plan,
        new_generation=new,
        memory=fitting.plan,
        misfit=fitting.misfit,
        card=card,
        chosen_for=first,
        max_input_tokens=max_input_tokens,
        kept=kept,
        target=target,
        root=listed.store.uri,
        missing=bool(unreadable),
        unreadable=unreadable,
    )


def require_fit(job: Job, card_names: Iterable[str]) -> None:
    """Refuse a job whose model can't run on a cluster's cards, before one of them is asked for.

    Of several kinds of cards, the smallest counts: a replica may get it. A job that was planned for
    a certain card is not judged again.

    Args:
        job: The job.
        card_names: Ray's names of the cluster's cards.

    Raises:
        DoesNotFit: The model needs more than the smallest card has.
        ModelError: That card, or this installation, can't load the checkpoint as it is.
    """
    card = sizing.smallest(card_names)
    if job.card is not None or card is None:
        return
    checkpoint = job.checkpoint
    if checkpoint.quantized is not None:
        checkpoint = sizing.open_model(job.spec, card)
    misfit = sizing.fit(job.spec, checkpoint, job.max_input_tokens, card).misfit
    if misfit:
        raise DoesNotFit(f"on {card.name}, a card of the cluster: {misfit.problem}", misfit.hint)


class FirstLook(NamedTuple):
    """What was looked at to choose `model.bits`."""

    listed: Listing
    plan: Plan
    lengths: Lengths


def settled(spec: JobSpec) -> JobSpec:
    """Return a job's spec with `model.bits: auto` chosen.

    Raises:
        JobError: It can't be chosen, or the job can't run.
    """
    spec = sizing.as_begun(spec)
    if spec.model.bits != "auto":
        return spec
    card = sizing.card_of(spec)
    checkpoint = sizing.open_model(spec, card)
    spec, _ = _with_bits(spec, checkpoint, card, input_limit(spec, checkpoint))
    return spec


def _with_bits(
    spec: JobSpec, checkpoint: Checkpoint, card: Card | None, max_input_tokens: int
) -> tuple[JobSpec, FirstLook | None]:
    """Choose `model.bits: auto`, and return what was looked at for it."""
    if not sizing.needs_lengths(spec, checkpoint):
        return sizing.with_bits(spec, checkpoint, card, max_input_tokens), None
    card = sizing.known_card(card)
    listed = listing.list_input(spec.input)
    plan = make_plan(spec, listed)
    if not plan.rows:
        raise _no_rows(plan)
    _check_columns(spec, plan, checkpoint)
    lengths = sample_lengths(spec, checkpoint, plan, max_input_tokens=max_input_tokens)
    usual = lengths.usual_long()
    spec = sizing.with_bits(spec, checkpoint, card, max_input_tokens, prompt_tokens=usual)
    return spec, FirstLook(listed, plan, lengths)


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


def _listing(spec: JobSpec, ledger: Ledger) -> Listing:
    try:
        return listing.list_input(spec.input)
    except InputError:
        # The input of a finished job may be gone: there is nothing left to ask of it.
        if not ledger.succeeded():
            raise
        root = storage.open_store(listing.input_root(spec.input.uri), spec.input.storage)
        return listing.Listing(root, ())


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


def _check_answers_cache(spec: JobSpec) -> None:
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
    _check_answers_cache(spec)
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


def _whole_plan(
    spec: JobSpec, ledger: Ledger, listed: Listing, *, extend: bool, fresh: Plan | None
) -> tuple[Plan, Plan | None]:
    """Return the plan of the whole job, and the part of it that is not frozen yet.

    Args:
        spec: The job.
        ledger: Its ledger.
        listed: The files of its input.
        extend: Add new files.
        fresh: The plan of those files, if it is made already.
    """
    if ledger.plan is None:
        plan = fresh or make_plan(spec, listed)
        if not plan.rows:
            raise _no_rows(plan)
        return plan, plan
    planned = {
        f: k for f, k in ledger.plan.known_files.items() if f not in ledger.plan.without_rows
    }
    changed = [f.name for f in listed.files if f.name in planned and f.etag != planned[f.name].etag]
    if changed:
        raise Refused(
            f"{_several(changed)} changed since the job was planned",
            "restore the file, or answer the new one with another output.uri",
        )
    new = [f for f in listed.files if f.name not in planned and _is_news(f, ledger.plan, extend)]
    if not new:
        return ledger.plan, None
    if not extend:
        raise Refused(
            f"{_several([f.name for f in new])} came or was mended after the job was planned",
            "add --extend to answer the new files too",
        )
    later = make_plan(spec, listed._replace(files=tuple(new)), after=ledger.plan)
    if (
        not later.rows
        and dict(later.without_rows).items() <= dict(ledger.plan.without_rows).items()
    ):
        return ledger.plan, None
    return ledger.plan.followed_by(later), later


def _is_news(file: InputFile, plan: Plan, extend: bool) -> bool:
    """Tell whether a file without planned rows is one to look at."""
    known = plan.without_rows.get(file.name)
    if known is None or known.etag != file.etag:
        return True
    # What was wrong may not have been the file: asked to extend, look again.
    return extend and bool(known.problem)


def _no_rows(plan: Plan) -> InputError:
    if plan.unreadable:
        name, why = next(iter(plan.unreadable.items()))
        return InputError(
            f"no file of the input can be read: {name}: {why}", "correct input.uri or the files"
        )
    return InputError(f"{storage.redact(plan.root)}: the input has no rows", "correct input.uri")


def check_task_columns(spec: JobSpec, schema: pa.Schema) -> None:
    """Refuse a task that reads a column which is not there, or is of another type.

    Raises:
        SpecError: With the column's name.
    """
    match spec.task:
        case Classify(labels_column=str(column)):
            field, right = "task.labels_column", pa.types.is_list
        case Score(continuation=str(column)):
            field, right = "task.continuation", is_text
        case _:
            return
    if column not in schema.names:
        raise SpecError(missing_column(field, column, schema.names))
    found = schema.field(column).type
    if not right(found):
        wanted = "texts" if right is is_text else "lists of texts"
        raise SpecError(JobError(f"{field}: column {column!r} holds {found}, not {wanted}"))


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a column of a type holds texts."""
    return kind in (pa.string(), pa.large_string(), pa.null())


def _warn_of_long_forms(spec: JobSpec, checkpoint: Checkpoint) -> None:
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


def _check_columns(spec: JobSpec, plan: Plan, checkpoint: Checkpoint) -> None:
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


def _several(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"{len(names):,} input file{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more})"
