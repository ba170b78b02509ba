"""Will it fit: what a replica takes of a card, and how many rows it can run at once.

    total = weights + KV cache + workspace + overhead + reserve

The first three are computed from shapes by `footprint`; overhead is what a process
takes besides tensors (on a card, the CUDA context), and the
reserve is for fragmentation. All of it is arithmetic, so a job that can't run is refused before
anybody waits for a card, with what would help. Here it is planned for an engine that pads: the rows
of a group all take the room of the longest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from quantbatch.errors import DoesNotFit
from quantbatch.model import footprint
from quantbatch.model.checkpoint import stored_quantization
from quantbatch.model.footprint import ITEM_BYTES, Part, kv_shape, weigh, weight_dtype
from quantbatch.spec import FourBit, Int8, Unquantized

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.footprint import KvShape, Weights
    from quantbatch.spec import Model

CUDA_CONTEXT_BYTES = 512 * 2**20
"""CUDA context with cuBLAS: 0.49 GiB in an out-of-memory report from a 4090 (14.56 GiB in the
process, 14.07 of them known to torch)."""
CPU_PROCESS_BYTES = 256 * 2**20
"""What a process on a CPU grows by besides tensors: code of libraries that are first used, pages of
the mapped checkpoint, what malloc keeps. 208 MiB with the quickstart's model; 250 to 760 while
200 MiB of weights are quantized (measured). On a CPU a plan is a guide, not a promise."""
RESERVE = 0.05
"""Share of KV cache and workspace that is lost to rounding and fragmentation; weights are allocated
once. Placeholder, not measured."""

MAX_BATCH_SIZE = 64
"""More rows do not pay: a 32B model at 4 bits stops gaining at 64 (977 tokens/s, at 96 only 782; a
roofline for a 4090), and the rows of a padded group wait for the longest of them."""
DEFAULT_BATCH_SIZE = 32
"""Where no limit is known, as on a CPU: `generate` on groups of 32 rows of similar length was the
fastest of what we measured there."""

LENGTH_STEP = 64
"""Tokens; shorter rows than this are no help."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a replica takes, and how many rows it runs at once."""

    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    workspace_bytes: int
    overhead_bytes: int
    reserve_bytes: int
    batch_size: int
    device_bytes: int | None
    """Memory of the device; None if it is not known, or there is no limit to keep."""

    @property
    def total(self) -> int:
        """Everything together."""
        moving = self.kv_bytes + self.workspace_bytes + self.reserve_bytes
        return self.weight_bytes + moving + self.overhead_bytes

    @property
    def fits(self) -> bool:
        """Whether the device has room for everything."""
        return self.device_bytes is None or self.total <= self.device_bytes


def plan_memory(
    checkpoint: Checkpoint,
    model: Model,
    *,
    max_tokens: int,
    batch_size: int | None,
    device_bytes: int | None,
    prompt_tokens: int | None = None,
) -> MemoryPlan:
    """Plan a replica that answers groups of rows of the greatest length.

    Args:
        checkpoint: The model's files.
        model: How to load it.
        max_tokens: Prompt and answer of the longest row, in tokens.
        batch_size: Rows at once; None takes as many as fit, at most `MAX_BATCH_SIZE`.
        device_bytes: Memory of the card, as torch.cuda.mem_get_info reports it; None for a CPU.
        prompt_tokens: The longest prompt alone, in tokens; None stands for `max_tokens`.

    Raises:
        DoesNotFit: Not even one row, or not as many as asked for, have room.
        ModelError: There is nothing to quantize, or a name in skip_modules matches no layer.
    """
    prompt = max_tokens if prompt_tokens is None else min(prompt_tokens, max_tokens)
    weights = weigh(checkpoint, model)
    load = _Load(checkpoint, model, weights, max_tokens, prompt, device_bytes)
    for rows in _batch_sizes(batch_size, device_bytes):
        plan = load.plan(rows)
        if plan.fits:
            return plan
    raise _does_not_fit(load, batch_size or 1)


def _batch_sizes(asked: int | None, device_bytes: int | None) -> Sequence[int]:
    """Return the batch sizes to try, the best first."""
    if asked is not None:
        return [asked]
    return [DEFAULT_BATCH_SIZE] if device_bytes is None else range(MAX_BATCH_SIZE, 0, -1)


@dataclass(frozen=True, slots=True)
class _Load:
    """What is to run on which device: everything that a plan depends on but the batch size."""

    checkpoint: Checkpoint
    model: Model
    weights: Weights
    max_tokens: int
    prompt_tokens: int
    device_bytes: int | None

    def plan(self, rows: int) -> MemoryPlan:
        item_bytes = ITEM_BYTES[weight_dtype(self.checkpoint, self.model)]
        shape = kv_shape(self.checkpoint.text_config, item_bytes)
        prefilled = shape.prefill_row_bytes(self.prompt_tokens)
        kv_bytes = rows * max(prefilled, shape.row_bytes(self.max_tokens))
        workspace_bytes = self._workspace_bytes(rows, shape, item_bytes)
        return MemoryPlan(
            weight_bytes=self.weights.total_bytes,
            kv_bytes_per_token=shape.bytes_per_token,
            kv_bytes=kv_bytes,
            workspace_bytes=workspace_bytes,
            overhead_bytes=CPU_PROCESS_BYTES if self.device_bytes is None else CUDA_CONTEXT_BYTES,
            reserve_bytes=math.ceil(RESERVE * (kv_bytes + workspace_bytes)),
            batch_size=rows,
            device_bytes=self.device_bytes,
        )

    def _workspace_bytes(self, rows: int, shape: KvShape, item_bytes: int) -> int:
        config = self.checkpoint.text_config
        quantization = stored_quantization(self.checkpoint.config)
        quantization = quantization or self.model.resolved().quantization or Unquantized()
        tokens = rows * self.prompt_tokens
        return (
            footprint.dequantized_bytes(self.weights, quantization, tokens)
            + footprint.activation_bytes(config, tokens, item_bytes)
            + footprint.mask_bytes(rows, self.prompt_tokens, item_bytes)
            + footprint.score_bytes(config, rows, self.prompt_tokens, item_bytes)
            + footprint.logit_bytes(config, rows)
            + footprint.cache_growth_bytes(shape, rows, self.max_tokens)
        )

    def of_length(self, tokens: int) -> _Load:
        """The same with shorter rows: at first shorter prompts."""
        return replace(self, max_tokens=tokens, prompt_tokens=min(self.prompt_tokens, tokens))

    def in_bits(self, bits: Literal[4, 8, 16]) -> _Load:
        """The same with other weights."""
        change = {"bits": bits, "quantization": None, "dtype": "auto"}
        model = self.model.model_copy(update=change)
        return replace(self, model=model, weights=weigh(self.checkpoint, model))


def _does_not_fit(load: _Load, rows: int) -> DoesNotFit:
    plan = load.plan(rows)
    assert plan.device_bytes is not None
    problem = (
        f"{load.checkpoint.id} at {_bits(load)} does not fit: it needs {gib(plan.total)} and the"
        f" device has {gib(plan.device_bytes)}\n"
        f"  weights {gib(plan.weight_bytes)}"
        f" + KV cache {gib(plan.kv_bytes)} ({rows} x {load.max_tokens:,} tokens, "
        f"{plan.kv_bytes_per_token / 1024:g} KiB each)"
        f" + workspace {gib(plan.workspace_bytes)} + CUDA context {gib(plan.overhead_bytes)}"
        f" + reserve {gib(plan.reserve_bytes)}"
    )
    experts = load.weights.bytes.get(Part.EXPERT, 0)
    if experts:
        problem += f"\n  {gib(experts)} of the weights are experts, which stay in 16 bits"
    return DoesNotFit(problem, _cheapest_help(load, rows))


def _cheapest_help(load: _Load, rows: int) -> str:
    """Find what makes it fit: first what costs speed only, then what costs input, then quality."""
    for fewer in range(rows - 1, 0, -1):
        if load.plan(fewer).fits:
            return f"engine.batch_size {fewer} fits"
    tokens = _longest_fitting(load)
    if tokens:
        return f"rows of {tokens:,} tokens fit one at a time: lower engine.max_input_tokens"
    for bits, lighter in _lighter(load):
        if lighter.plan(1).fits:
            return f"model.bits {bits} fits: its weights take {gib(lighter.weights.total_bytes)}"
    return "it takes a larger card or a smaller model"


def _longest_fitting(load: _Load) -> int:
    """Return the most tokens with which one row fits, in steps of `LENGTH_STEP`; 0 if none does."""
    fitting, too_long = 0, math.ceil(load.max_tokens / LENGTH_STEP)
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if load.of_length(middle * LENGTH_STEP).plan(1).fits:
            fitting = middle
        else:
            too_long = middle
    return fitting * LENGTH_STEP


def _lighter(load: _Load) -> Iterator[tuple[int, _Load]]:
    """Yield the same model in fewer bits, the most bits first."""
    bits: tuple[Literal[4, 8, 16], ...] = (16, 8, 4)
    for each in bits if load.checkpoint.quantized is None else ():
        other = load.in_bits(each)
        if other.weights.total_bytes < load.weights.total_bytes:
            yield each, other


def _bits(load: _Load) -> str:
    if load.checkpoint.quantized is not None:
        return f"its own quantization ({load.checkpoint.quantized})"
    match load.model.resolved().quantization:
        case FourBit(kind=kind, double_quant=double_quant):
            return f"4 bits ({kind}{' with double quantization' if double_quant else ''})"
        case Int8():
            return "8 bits (int8)"
        case _:
            return f"{8 * ITEM_BYTES[weight_dtype(load.checkpoint, load.model)]} bits"


def gib(count: int) -> str:
    """Write a number of bytes for people, in GiB or MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 8 else f"{count / 2**20:.1f} MiB"
