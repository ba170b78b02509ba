"""What a replica of the engine llama_cpp takes: the tensors as they are, and a 16-bit cache."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quantbatch.errors import DoesNotFit
from quantbatch.model import gguf, workspace
from quantbatch.model.footprint import ITEM_BYTES
from quantbatch.model.kv import kv_shape
from quantbatch.model.memory import CPU_PROCESS_BYTES, CUDA_CONTEXT_BYTES, RESERVE, MemoryPlan
from quantbatch.model.sizes import gib

if TYPE_CHECKING:
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.memory import Work
    from quantbatch.spec import LlamaCppEngine

ROWS = (16, 8, 4, 2, 1)
"""Rows at once with llama.cpp, the first that fits. Placeholder, not measured."""
ROW_STEP = 256
"""llama.cpp gives a row's cache a multiple of this many tokens (`llama-context.cpp`)."""
STEP_TOKENS = 512
"""Tokens of a step, if the spec does not say."""


def padded_row(max_tokens: int) -> int:
    """Return the tokens that llama.cpp has room for in a row's cache."""
    return -(-max_tokens // ROW_STEP) * ROW_STEP


def plan_llama_cpp(
    checkpoint: Checkpoint, options: LlamaCppEngine, work: Work, device_bytes: int | None
) -> MemoryPlan:
    """Plan a replica.

    What computing takes is a guide: llama.cpp says it only once it has reserved it.

    Raises:
        DoesNotFit: Not even one row, or not as many as asked for, have room.
    """
    sizes = (work.batch_size,) if work.batch_size else ROWS
    step_tokens = STEP_TOKENS if options.step_tokens == "auto" else options.step_tokens
    work = replace(work, step_tokens=step_tokens)
    plans = [_plan(checkpoint, work, rows, device_bytes) for rows in sizes]
    for plan in plans:
        if plan.fits:
            return plan
    least = plans[-1]
    assert least.device_bytes is not None
    raise DoesNotFit(
        f"{checkpoint.gguf} does not fit: with {least.batch_size} rows it needs {gib(least.total)}"
        f" and there are {gib(least.device_bytes)}",
        "a file with fewer bits, a smaller engine.max_input_tokens or engine.batch_size",
    )


def _plan(checkpoint: Checkpoint, work: Work, rows: int, device_bytes: int | None) -> MemoryPlan:
    config, item_bytes = checkpoint.config, ITEM_BYTES["float32"]
    shape = kv_shape(config, ITEM_BYTES["float16"])
    step_tokens = max(work.step_tokens or 0, rows)
    kv_tokens = rows * padded_row(work.max_tokens)
    computed = workspace.activation_bytes(config, step_tokens, item_bytes)
    return MemoryPlan(
        weight_bytes=gguf.stored_bytes(checkpoint.tensors),
        kv_bytes_per_token=shape.bytes_per_token,
        kv_bytes=kv_tokens * shape.bytes_per_token,
        workspace_bytes=computed + workspace.logit_bytes(config, rows, greedy=work.greedy),
        overhead_bytes=CPU_PROCESS_BYTES if device_bytes is None else CUDA_CONTEXT_BYTES,
        reserve_bytes=int(RESERVE * computed),
        batch_size=rows,
        kv_tokens=kv_tokens,
        step_tokens=step_tokens,
        device_bytes=device_bytes,
    )
