"""How a job's model meets a card: which card that is, and whether the model fits."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbatch import storage
from quantbatch.commits import JOB
from quantbatch.errors import DoesNotFit, JobError, SpecError
from quantbatch.model import cards, memory, thiscard
from quantbatch.model.checkpoint import open_checkpoint, open_packed_gguf
from quantbatch.model.llama_memory import plan_llama_cpp
from quantbatch.model.widths import useful_bits
from quantbatch.spec import Model

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantbatch.model.cards import Card
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.memory import MemoryPlan
    from quantbatch.spec import Cluster, JobSpec

logger = logging.getLogger(__name__)


def card_of(spec: JobSpec) -> Card | None:
    """Return the card that a replica would get, as far as that is known without Ray: the one that
    the spec names, else the smallest of this machine if the job would run on it.
    """
    cluster = spec.cluster
    if cluster.gpus_per_replica == 0 or spec.engine.kind == "echo":
        return None
    if cluster.card is not None:
        return cards.find(cluster.card)
    if cluster.gpu_memory_gib is not None:
        return cards.of_memory(cluster.gpu_memory_gib)
    if cluster.address or os.environ.get("RAY_ADDRESS"):
        return None
    return min(thiscard.local_cards(), key=lambda card: card.memory_gib, default=None)


def smallest(names: Iterable[str]) -> Card | None:
    """Return the smallest of some cards by Ray's names; None if none of them is known."""
    found = [card for name in names if (card := cards.find_or_none(name)) is not None]
    return min(found, key=lambda card: card.memory_gib, default=None)


def open_model(spec: JobSpec, card: Card | None) -> Checkpoint:
    """Describe a job's model as its engine is to load it.

    Raises:
        ModelError: It is not there, or can't be loaded as the spec asks.
    """
    if spec.engine.kind == "llama_cpp":
        return open_packed_gguf(spec.model)
    return open_checkpoint(spec.model, card.capability if card else None)


def share_bytes(cluster: Cluster, card: Card) -> int:
    """Return what a replica has of a card's memory."""
    return int(card.memory_bytes * min(cluster.gpus_per_replica, 1))


def work_of(spec: JobSpec, checkpoint: Checkpoint, max_input_tokens: int) -> memory.Work:
    """Return the work of one of a job's replicas."""
    device = "cuda" if spec.cluster.gpus_per_replica > 0 else "cpu"
    return memory.Work.of(spec, checkpoint, max_input_tokens=max_input_tokens, device=device)


class Fitting(NamedTuple):
    """Whether a model fits."""

    plan: MemoryPlan | None
    """None for an engine without a model, or if it does not fit."""
    misfit: DoesNotFit | None
    """Why it does not fit, and what would help."""


def fit(spec: JobSpec, checkpoint: Checkpoint, max_input_tokens: int, card: Card | None) -> Fitting:
    """Plan a replica's memory on a card; without one, there is no limit."""
    if spec.engine.kind == "echo":
        return Fitting(None, None)
    device_bytes = share_bytes(spec.cluster, card) if card else None
    work = work_of(spec, checkpoint, max_input_tokens)
    try:
        if spec.engine.kind == "llama_cpp":
            plan = plan_llama_cpp(checkpoint, spec.engine, work, device_bytes)
            return Fitting(plan, None)
        return Fitting(memory.plan_memory(checkpoint, spec.model, work, device_bytes), None)
    except DoesNotFit as error:
        return Fitting(None, error)


# ---- model.bits: auto


def as_begun(spec: JobSpec) -> JobSpec:
    """Return a spec with `model.bits: auto` as the job on its output was begun, if one was.

    What was chosen then holds for good, also on another card: an output is of one model.
    """
    if spec.model.bits != "auto":
        return spec
    store = storage.open_store(spec.output.uri, spec.output.storage)
    try:
        record = json.loads(store.read(JOB))
        begun = Model.model_validate(record["spec"]["model"])
    except FileNotFoundError:
        return spec
    except (KeyError, TypeError, ValueError):
        # Records of another version: whoever opens the ledger refuses them and says so.
        return _with(spec, bits=16)
    return _with(spec, bits=None, quantization=begun.quantization)


def needs_lengths(spec: JobSpec, checkpoint: Checkpoint) -> bool:
    """Tell whether choosing the bits takes a card and the lengths of prompts."""
    on_card = spec.cluster.gpus_per_replica > 0 and spec.engine.kind != "echo"
    return on_card and checkpoint.quantized is None


def known_card(card: Card | None) -> Card:
    """Return the card.

    Raises:
        SpecError: It is not known.
    """
    if card is None:
        raise SpecError(
            JobError(
                "model.bits: auto goes by the card, and which one replicas get is not known",
                "name it: cluster.card, such as RTX 4090, or cluster.gpu_memory_gib",
            )
        )
    return card


def with_bits(
    spec: JobSpec,
    checkpoint: Checkpoint,
    card: Card | None,
    max_input_tokens: int,
    *,
    prompt_tokens: int = 0,
) -> JobSpec:
    """Choose `model.bits: auto`: the widest of 16, 8 and 4 that fits with a useful batch.

    A checkpoint that is quantized already stays as it is. On CPUs, and without a model, it is 16:
    there is no card that fewer bits would spare, and they are slower.

    Args:
        spec: The job.
        checkpoint: The model's files.
        card: What a replica gets.
        max_input_tokens: Longest prompt that is let in.
        prompt_tokens: A usual long prompt.
    """
    if checkpoint.quantized is not None:
        return _with(spec, bits=None)
    if card is None:
        return _with(spec, bits=16)
    row_tokens = prompt_tokens + spec.answer_tokens
    bits = useful_bits(
        checkpoint,
        spec.model,
        work_of(spec, checkpoint, max_input_tokens),
        share_bytes(spec.cluster, card),
        row_tokens=row_tokens,
    )
    # If none fits, the fewest bits are those to refuse.
    logger.info("model.bits auto: %s on %s", bits or 4, card.name or f"{card.memory_gib:g} GiB")
    return _with(spec, bits=bits or 4)


def _with(spec: JobSpec, **changes: Any) -> JobSpec:  # noqa: ANN401 - fields of any type
    model = spec.model.model_copy(update=changes)
    return spec.model_copy(update={"model": model})
