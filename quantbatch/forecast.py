"""What `plan` says of a job beyond whether it may start: lengths, every width, and advice; and what
it says of a model alone, without a job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantbatch import sizing
from quantbatch.errors import DoesNotFit, ModelError
from quantbatch.lengths import sample_lengths
from quantbatch.model.advice import advise
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.kv import unpackable
from quantbatch.model.memory import STEP_TOKENS, Work, plan_memory
from quantbatch.model.widths import every_width, useful_bits

if TYPE_CHECKING:
    from quantbatch.lengths import Lengths
    from quantbatch.model.cards import Card
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.widths import Width
    from quantbatch.preflight import Job
    from quantbatch.spec import Model


@dataclass(frozen=True)
class Forecast:
    """What is to be expected of a job."""

    lengths: Lengths
    widths: list[Width]
    """Empty for an engine without a model."""
    row_tokens: int
    """Prompt and answer of a usual long row, for which `widths` counts the rows."""
    advice: list[str]


def look_ahead(job: Job) -> Forecast:
    """Sample a job's prompts and weigh its model up in every width.

    Raises:
        JobError: The tokenizer can't be loaded, or a store can't be reached.
    """
    spec = job.spec
    lengths = job.chosen_for.lengths if job.chosen_for else _lengths(job)
    row_tokens = lengths.usual_long() + spec.answer_tokens
    if spec.engine.kind in ("echo", "llama_cpp"):
        return Forecast(lengths, [], row_tokens, [])
    work = sizing.work_of(spec, job.checkpoint, job.max_input_tokens)
    widths = every_width(
        job.checkpoint,
        spec.model,
        work,
        sizing.share_bytes(spec.cluster, job.card) if job.card else None,
        row_tokens=row_tokens,
    )
    advice = advise(job.checkpoint, spec.model, job.card, work, widths)
    return Forecast(lengths, widths, row_tokens, advice)


def _lengths(job: Job) -> Lengths:
    return sample_lengths(job.spec, job.checkpoint, job.plan, max_input_tokens=job.max_input_tokens)


@dataclass(frozen=True)
class ModelForecast:
    """What is to be expected of a model on a card."""

    model: Model
    """With the bits that `model.bits: auto` would choose."""
    card: Card | None
    widths: list[Width]
    row_tokens: int
    advice: list[str]
    misfit: DoesNotFit | None
    """Why it fits in no width."""


def look_at_model(
    model: Model, card: Card | None, *, prompt_tokens: int, max_new_tokens: int
) -> ModelForecast:
    """Weigh a model up in every width, for the continuous engine if that can run it.

    Args:
        model: Which model.
        card: The card; None if there is none.
        prompt_tokens: Length of a prompt.
        max_new_tokens: Length of an answer.

    Raises:
        JobError: The model can't be found or loaded, or its context is shorter.
    """
    checkpoint = open_checkpoint(model, card.capability if card else None)
    row_tokens = prompt_tokens + max_new_tokens
    if checkpoint.context_tokens is not None and row_tokens > checkpoint.context_tokens:
        raise ModelError(
            f"{row_tokens:,} tokens are more than the context of {model.id},"
            f" {checkpoint.context_tokens:,}",
            "lower --prompt-tokens or --max-new-tokens",
        )
    packed = unpackable(checkpoint.text_config, row_tokens) is None
    work = Work(
        max_tokens=row_tokens,
        prompt_tokens=prompt_tokens,
        step_tokens=STEP_TOKENS["cuda"] if packed else None,
        greedy=True,
    )
    device_bytes = card.memory_bytes if card else None
    chosen, misfit = _chosen(checkpoint, model, work, device_bytes)
    widths = every_width(checkpoint, chosen, work, device_bytes, row_tokens=row_tokens)
    settled = chosen.model_copy(update={"bits": None}) if chosen.bits == "auto" else chosen
    advice = advise(checkpoint, settled, card, work, widths)
    return ModelForecast(settled, card, widths, row_tokens, advice, misfit)


def _chosen(
    checkpoint: Checkpoint, model: Model, work: Work, device_bytes: int | None
) -> tuple[Model, DoesNotFit | None]:
    """Return a model in the bits that would be chosen, and why not even those fit."""
    if device_bytes is None:
        return model.model_copy(update={"bits": "auto"}), None
    bits = None
    if checkpoint.quantized is None:
        bits = useful_bits(checkpoint, model, work, device_bytes, row_tokens=work.max_tokens) or 4
    chosen = model.model_copy(update={"bits": bits})
    try:
        plan_memory(checkpoint, chosen, work, device_bytes)
    except DoesNotFit as error:
        return chosen, error
    return chosen, None
