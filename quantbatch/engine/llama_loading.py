"""From a spec to an engine with a packed GGUF file; a replica calls it in its own process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import llama_cpp
import torch

from quantbatch.engine.dedup import Deduplicated
from quantbatch.engine.llama_cpp import LlamaCppEngine, PackedModel
from quantbatch.errors import ModelError
from quantbatch.model import hub
from quantbatch.model.checkpoint import open_packed_gguf
from quantbatch.model.llama_memory import padded_row, plan_llama_cpp
from quantbatch.model.memory import Work
from quantbatch.prompts.tokens import tokenizer_of
from quantbatch.weights import peak

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from quantbatch.engine import Engine
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.memory import MemoryPlan
    from quantbatch.spec import JobSpec
    from quantbatch.spec import LlamaCppEngine as LlamaCppOptions


def load(
    spec: JobSpec, options: LlamaCppOptions, *, device: str, max_tokens: int, folder: str
) -> tuple[Engine, MemoryPlan, Callable[[], int]]:
    """Load a job's GGUF file and make its engine.

    Args:
        spec: The job.
        options: Its engine.
        device: `cuda` or `cpu`.
        max_tokens: Longest prompt and answer together, in tokens.
        folder: What a relative path of the model is relative to.

    Returns:
        The engine, what it was planned to take, and what returns the most memory that it took: 0 on
        a card, where only llama.cpp knows.

    Raises:
        JobError: The file can't be loaded, or does not fit.
    """
    on_card = device != "cpu"
    if on_card and not llama_cpp.llama_supports_gpu_offload():
        raise ModelError(
            "llama-cpp-python is built without CUDA here",
            'build it with CMAKE_ARGS="-DGGML_CUDA=on", or run on CPUs: cluster.gpus_per_replica 0',
        )
    threads = max(1, int(spec.cluster.cpus_per_replica))
    torch.set_num_threads(threads)
    checkpoint = open_packed_gguf(spec.model.seen_from(folder))
    longest_prompt = max_tokens - spec.sampling.max_new_tokens
    work = Work.of(spec, checkpoint, max_input_tokens=longest_prompt, device=device)
    device_bytes = peak.device_bytes(device, spec.cluster.gpus_per_replica)
    plan = plan_llama_cpp(checkpoint, options, work, device_bytes)
    assert plan.step_tokens is not None
    measured = peak.PeakMemory("cpu")
    model = PackedModel(
        _file(checkpoint),
        rows=plan.batch_size,
        row_tokens=padded_row(max_tokens),
        step_tokens=plan.step_tokens,
        threads=threads,
        on_card=on_card,
    )
    engine: Engine = LlamaCppEngine(model, tokenizer_of(checkpoint))
    if options.deduplicate:
        engine = Deduplicated(engine)
    return engine, plan, int if on_card else measured.peak_bytes


def _file(checkpoint: Checkpoint) -> Path:
    if checkpoint.commit:
        return hub.fetch_whole(checkpoint.id, checkpoint.gguf, checkpoint.commit)
    return checkpoint.folder / checkpoint.gguf
