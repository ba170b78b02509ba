"""From a spec to an engine with a loaded model: what fits, how many rows, and which engine can.

Imports torch; a replica calls it in its own process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from quantbatch.engine import calibration
from quantbatch.engine.attention import UnsupportedModelError
from quantbatch.engine.continuous import ContinuousEngine, EngineLimits
from quantbatch.engine.dedup import Deduplicated
from quantbatch.engine.static import StaticEngine
from quantbatch.errors import DoesNotFit
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.kv import unpackable
from quantbatch.model.memory import Work, plan_memory
from quantbatch.model.sizes import gib
from quantbatch.prompts.tokens import tokenizer_of
from quantbatch.records import EngineProgress
from quantbatch.spec import ContinuousEngine as ContinuousOptions
from quantbatch.weights import dtypes, fused, peak
from quantbatch.weights import loading as weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quantbatch.engine import Engine
    from quantbatch.model.memory import MemoryPlan
    from quantbatch.spec import JobSpec
    from quantbatch.spec import StaticEngine as StaticOptions
    from quantbatch.weights.loading import LoadedModel

logger = logging.getLogger(__name__)

REFILL_SHARE = 1 / 8
"""On a card rows are admitted when this share of the batch has left: a step with prompts can't be
replayed from a graph, and its cost is shared by those that come together."""


class Loaded(NamedTuple):
    """A loaded engine; what a replica needs of it is `replica.LoadedEngine`."""

    engine: Engine
    planned_bytes: int
    peak_bytes: Callable[[], int]
    progress: Callable[[], EngineProgress]
    model: LoadedModel
    """The model that the engine runs."""

    def close(self) -> None:
        """Give the model back as it was loaded; nothing may be asked of the engine afterwards."""
        inner = self.engine.engine if isinstance(self.engine, Deduplicated) else self.engine
        if isinstance(inner, ContinuousEngine):
            inner.close()


def load(
    spec: JobSpec,
    options: ContinuousOptions | StaticOptions,
    *,
    device: str,
    max_tokens: int,
    folder: str,
) -> Loaded:
    """Load a job's model and make its engine.

    Args:
        spec: The job.
        options: Its engine.
        device: `cuda` or `cpu`.
        max_tokens: Longest prompt and answer together, in tokens.
        folder: What a relative path of the model is relative to.

    Raises:
        JobError: The model can't be loaded, or does not fit.
    """
    if device == "cpu":
        # torch would take every core of the machine for each replica on it.
        torch.set_num_threads(max(1, int(spec.cluster.cpus_per_replica)))
    model = spec.model.seen_from(folder)
    checkpoint = open_checkpoint(model, dtypes.capability(device))
    model = dtypes.resolve(checkpoint, model, device)
    longest_prompt = max_tokens - spec.sampling.max_new_tokens
    kind = torch.device(device).type
    work = Work.of(spec, checkpoint, max_input_tokens=longest_prompt, device=kind)
    device_bytes = peak.device_bytes(device, spec.cluster.gpus_per_replica)
    plan = plan_memory(checkpoint, model, work, device_bytes)
    measured = peak.PeakMemory(device, cards=work.cards)
    loaded = weights.load(checkpoint, model, device, card_layers=plan.card_layers)
    if kind == "cuda" and options.fused_4bit:
        fused.use_where_faster(loaded.model)
    tokenizer = tokenizer_of(checkpoint)
    made: _Made | None = None
    if isinstance(options, ContinuousOptions):
        made = _continuous_or_none(
            loaded.model, tokenizer, plan, options, work, checkpoint.text_config
        )
    if made is None:
        plan = plan_memory(checkpoint, model, replace(work, step_tokens=None), device_bytes)
        static = StaticEngine(loaded.model, tokenizer, batch_size=plan.batch_size)
        made = _Made(static, EngineProgress)
    if options.deduplicate:
        made = _deduplicated(made)
    # What is measured on a card is what torch took: the context is beside it.
    planned_bytes = plan.total if device_bytes is None else plan.total - plan.overhead_bytes
    return Loaded(made.engine, planned_bytes, measured.peak_bytes, made.progress, loaded)


class _Made(NamedTuple):
    engine: Engine
    progress: Callable[[], EngineProgress]


def _continuous_or_none(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: MemoryPlan,
    options: ContinuousOptions,
    work: Work,
    config: Mapping[str, Any],
) -> _Made | None:
    """Make the continuous engine, or say why the static one has to do."""
    name = type(model).__name__
    try:
        if plan.step_tokens is None:
            raise UnsupportedModelError(unpackable(config, work.max_tokens))
        engine = _continuous(model, tokenizer, plan, options, work.max_tokens)
    except UnsupportedModelError as error:
        logger.warning("%s runs on the static engine, which is slower: %s", name, error)
        return None
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"the KV cache of {gib(plan.kv_bytes)} does not fit beside the model: {error}",
            "another process may use the card; see cluster.gpus_per_replica",
        ) from error
    return _Made(engine, engine.telemetry.take)


def _continuous(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: MemoryPlan,
    options: ContinuousOptions,
    max_tokens: int,
) -> ContinuousEngine:
    limits = limits_of(plan, share_prefixes=options.share_prefixes)
    if plan.device_bytes is None and options.batch_size == "auto":
        rows = _calibrated(model, tokenizer, limits)
        limits = replace(limits, rows=rows, kv_tokens=rows * max_tokens)
    return ContinuousEngine(model, tokenizer, limits)


def limits_of(plan: MemoryPlan, *, share_prefixes: bool) -> EngineLimits:
    """Return the limits of a continuous engine that keeps to a plan.

    Args:
        plan: A plan for this engine.
        share_prefixes: Whether the common beginning of prompts is computed once.
    """
    assert plan.step_tokens is not None
    return EngineLimits(
        rows=plan.batch_size,
        kv_tokens=plan.kv_tokens,
        step_tokens=plan.step_tokens,
        refill_share=0.0 if plan.device_bytes is None else REFILL_SHARE,
        share_prefixes=share_prefixes,
    )


def _calibrated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: EngineLimits
) -> int:
    embeddings: Any = model.get_input_embeddings()
    most = calibration.SIZES[-1]
    trial = replace(
        limits,
        rows=most,
        kv_tokens=most * calibration.ROW_TOKENS,
        step_tokens=most * calibration.PROMPT_TOKENS,
        share_prefixes=False,
    )
    engine = ContinuousEngine(model, tokenizer, trial)
    try:
        rows = calibration.best_size(
            lambda size: calibration.time_step(engine, size, embeddings.num_embeddings)
        )
    finally:
        engine.close()
    logger.info("calibrated: %d rows decoded together", rows)
    return rows


def _deduplicated(made: _Made) -> _Made:
    wrapped = Deduplicated(made.engine)

    def with_copies() -> EngineProgress:
        found = made.progress()
        return replace(found, totals=found.totals | {"copied_answers": wrapped.copied})

    return _Made(wrapped, with_copies)
