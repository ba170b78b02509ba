"""Everything that can be known, and refused, before a GPU is asked for.

`prepare` looks at the spec, the model's files, the output and the input, and changes none of them.
What it returns is all that a run, a plan or a sample needs.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from quantbatch import checks, rows, sizing, storage
from quantbatch.answers.cache import Space
from quantbatch.errors import DoesNotFit, InputError, Refused
from quantbatch.input import keys, listing
from quantbatch.ledger import Ledger
from quantbatch.lengths import sample_lengths
from quantbatch.plan import Plan, make_plan
from quantbatch.prompts import chat, rendering
from quantbatch.replica import ReplicaJob
from quantbatch.stages import ReadJob

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quantbatch.commits import OutputFormat
    from quantbatch.input.listing import InputFile, Listing
    from quantbatch.lengths import Lengths
    from quantbatch.model.cards import Card
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.memory import MemoryPlan
    from quantbatch.spec import JobSpec

logger = logging.getLogger(__name__)


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
        """Where answers are kept, for later jobs or for this one; None if they are not."""
        return Space.of(self.spec, self.checkpoint.digest, self.ledger.store)


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
    checks.check_places(spec)
    spec = sizing.as_begun(spec)
    card = sizing.card_of(spec)
    checkpoint = sizing.open_model(spec, card)
    checks.check_tokens(spec, checkpoint)
    rendering.compile_templates(spec.prompt)
    chat.require_chat_template(spec.prompt, checkpoint.chat_template)
    checks.check_tools(spec, checkpoint)
    max_input_tokens = checks.input_limit(spec, checkpoint)
    spec = checks.with_dimensions(spec, checkpoint)
    checks.check_labels(spec, checkpoint, max_input_tokens)
    first = None
    if spec.model.bits == "auto":
        spec, first = _with_bits(spec, checkpoint, card, max_input_tokens)
    # Not before: bits 16 is then no longer told from bits not given.
    spec = spec.resolved()
    fitting = sizing.fit(spec, checkpoint, max_input_tokens, card)
    ledger = Ledger.open(spec, checkpoint.digest)
    listed = first.listed if first else _listing(spec, ledger)
    checks.check_folders(ledger.store, {file.folder for file in listed.files})
    plan, new = _whole_plan(spec, ledger, listed, extend=extend, fresh=first and first.plan)
    checks.check_columns(spec, plan, checkpoint)
    checks.warn_of_long_forms(spec, checkpoint)
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
    spec, _ = _with_bits(spec, checkpoint, card, checks.input_limit(spec, checkpoint))
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
    checks.check_columns(spec, plan, checkpoint)
    lengths = sample_lengths(spec, checkpoint, plan, max_input_tokens=max_input_tokens)
    usual = lengths.usual_long()
    spec = sizing.with_bits(spec, checkpoint, card, max_input_tokens, prompt_tokens=usual)
    return spec, FirstLook(listed, plan, lengths)


def _listing(spec: JobSpec, ledger: Ledger) -> Listing:
    try:
        return listing.list_input(spec.input)
    except InputError:
        # The input of a finished job may be gone: there is nothing left to ask of it.
        if not ledger.succeeded():
            raise
        root = storage.open_store(listing.input_root(spec.input.uri), spec.input.storage)
        return listing.Listing(root, ())


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


def _several(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"{len(names):,} input file{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more})"
