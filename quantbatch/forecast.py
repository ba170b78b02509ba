"""What `plan` says of a job beyond whether it may start: lengths, every width, and advice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantbatch import sizing
from quantbatch.lengths import sample_lengths
from quantbatch.model.advice import advise
from quantbatch.model.widths import every_width

if TYPE_CHECKING:
    from quantbatch.lengths import Lengths
    from quantbatch.model.widths import Width
    from quantbatch.preflight import Job


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
    row_tokens = lengths.usual_long() + spec.sampling.max_new_tokens
    if spec.engine.kind == "echo":
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
