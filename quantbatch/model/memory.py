"""Will it fit: what a replica takes of a card, and how many rows it can run at once.

    total = weights + KV cache + workspace + overhead + reserve

The first three are computed from shapes by `footprint`; overhead is what a process
takes besides tensors (on a card, the CUDA context), and the
reserve is for fragmentation. All of it is arithmetic, so a job that can't run is refused before
anybody waits for a card, with what would help.

Two kinds of engine are planned. The static one pads: the rows of a group all take the room of the
longest, in the cache and in a forward. The continuous one computes a bounded number of tokens in a
step and takes cache as rows grow; whatever the card has left is its pool, and its rows share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from quantbatch.engine.blocks import BLOCK_TOKENS, blocks_for
from quantbatch.model import workspace
from quantbatch.model.footprint import ITEM_BYTES, weigh, weigh_layers, weight_dtype
from quantbatch.model.formats import stored_quantization
from quantbatch.model.kv import kv_shape, unpackable
from quantbatch.model.misfit import does_not_fit
from quantbatch.model.spread import spread
from quantbatch.spec import BatchRequests, Classify, ContinuousEngine, Embed, Score, Unquantized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.footprint import LayeredWeights, Weights
    from quantbatch.model.kv import KvShape
    from quantbatch.spec import JobSpec, Model, Quantization

CUDA_CONTEXT_BYTES = 800 * 2**20
"""What a process takes of a card beside torch's tensors: 0.74 to 0.80 GiB on an H100 with the
kernels of cuBLAS, bitsandbytes and Triton (torch 2.11, measured). A smaller card has less: 0.49 GiB
in an out-of-memory report from a 4090."""
CUBLAS_BYTES = 4 * 32 * 2**20
"""Workspaces of cuBLAS. torch keeps one for each stream of each thread that multiplies, 32 MiB on a
Hopper card, less on others: for the thread that loads, and the stream on which it tries the 4-bit
kernel; for the thread that computes, and the stream on which it records steps."""
RECORDED_SIZES = (
    *(1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256),
)
"""Batch sizes for which decode steps are recorded; at most a quarter of a batch is padding, beyond
4 rows."""
RECORDED_LAYER_BYTES = 200 * 2**10
"""What one layer of one recorded step takes of the card, beside tensors: 168 KiB for 32 layers, 179
for 64 (H100, measured)."""
CPU_PROCESS_BYTES = 256 * 2**20
"""What a process on a CPU grows by besides tensors: code of libraries that are first used, pages of
the mapped checkpoint, what malloc keeps. 208 MiB with the quickstart's model; 250 to 760 while
200 MiB of weights are quantized (measured). On a CPU a plan is a guide, not a promise."""
RESERVE = 0.05
"""Share of KV cache and workspace that is lost to rounding and fragmentation; weights are allocated
once. Placeholder, not measured."""

MAX_PADDED_ROWS = 64
"""More rows do not pay: a 32B model at 4 bits stops gaining at 64 (977 tokens/s, at 96 only 782; a
roofline for a 4090), and the rows of a padded group wait for the longest of them."""
DEFAULT_BATCH_SIZE = 32
"""Where no limit is known, as on a CPU: `generate` on groups of 32 rows of similar length was the
fastest of what we measured there."""

PACKED_ROWS = (256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
"""Batch sizes of the continuous engine to choose from. bitsandbytes expands a 4-bit matrix for more
than 8 to 64 rows, and then 256 rows cost hardly more than 32 (14336 x 4096 on an H100, measured: 72
us for 32, 126 for 64, 134 for 256)."""
TOKENS_FOR_A_ROW = 512
"""Tokens of cache that a further row should find. Prompts and answers of a batch job have some
hundred; with fewer than that, rows are put back and computed again. Placeholder, not measured."""
STEP_TOKENS = {"cuda": 2048, "cpu": 512}
"""Tokens of a step by device. The overhead of expanding 4-bit weights falls from 1.6 times at 256
tokens to 1.1 at 2,048 (roofline of a 4090)."""
PACKED_RESERVE = 0.01
"""Share of the card that the continuous engine leaves for fragmentation, beside `RESERVE` of its
workspace; its pool is allocated once."""


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
    kv_tokens: int
    """Tokens that the cache has room for."""
    step_tokens: int | None
    """Tokens computed in one step by the continuous engine; None for the static one."""
    device_bytes: int | None
    """Memory of the device; None if it is not known, or there is no limit to keep."""
    card_layers: tuple[int, ...] = ()
    """Over several cards, how many layers each takes: all that is planned is then of the cards
    together. Empty for one."""
    whole: bool = True
    """Whether the layers can be divided like this: False if some card is always too full."""

    @property
    def total(self) -> int:
        """Everything together."""
        moving = self.kv_bytes + self.workspace_bytes + self.reserve_bytes
        return self.weight_bytes + moving + self.overhead_bytes

    @property
    def fits(self) -> bool:
        """Whether the device has room for everything."""
        return self.whole and (self.device_bytes is None or self.total <= self.device_bytes)


@dataclass(frozen=True, slots=True)
class Work:
    """What a replica is to do, as far as its memory depends on it."""

    max_tokens: int
    """Prompt and answer of the longest row, in tokens."""
    prompt_tokens: int
    """The longest prompt alone, in tokens."""
    batch_size: int | None = None
    """Rows at once; None takes as many as pay and fit."""
    step_tokens: int | None = None
    """Tokens in a step of the continuous engine; None plans for the static one."""
    greedy: bool = False
    """Whether every row takes the likeliest token and nothing else: choosing is then cheap."""
    counts_tokens: bool = False
    """Whether it is counted how often each row has said each token, for penalties."""
    reads: bool = False
    """Whether rows want log-likelihoods or vectors, and no answer."""
    cards: int = 1
    """Cards that the model's layers are spread over."""

    @classmethod
    def of(
        cls, spec: JobSpec, checkpoint: Checkpoint, *, max_input_tokens: int, device: str
    ) -> Work:
        """Return the work of a job's replica.

        Args:
            spec: The job, with an engine that has a model.
            checkpoint: The model's files.
            max_input_tokens: Longest prompt.
            device: `cpu`, or the name of a card.
        """
        engine, sampling = spec.engine, spec.sampling
        step_tokens = None
        max_tokens = max_input_tokens + spec.answer_tokens
        packed = isinstance(engine, ContinuousEngine)
        if packed and not unpackable(checkpoint.text_config, max_tokens):
            assert isinstance(engine, ContinuousEngine)
            auto = STEP_TOKENS["cpu" if device == "cpu" else "cuda"]
            step_tokens = auto if engine.step_tokens == "auto" else engine.step_tokens
        return cls(
            max_tokens=max_tokens,
            prompt_tokens=max_input_tokens,
            batch_size=None if engine.batch_size == "auto" else engine.batch_size,
            step_tokens=step_tokens,
            # Rows of a batch file may ask for anything.
            greedy=sampling.is_plain and not isinstance(spec.task, BatchRequests),
            counts_tokens=sampling.counts_tokens or isinstance(spec.task, BatchRequests),
            reads=isinstance(spec.task, BatchRequests | Classify | Score | Embed),
            cards=max(1, int(spec.cluster.gpus_per_replica)),
        )


def plan_memory(
    checkpoint: Checkpoint, model: Model, work: Work, device_bytes: int | None
) -> MemoryPlan:
    """Plan a replica whose rows may all have the greatest length.

    Args:
        checkpoint: The model's files.
        model: How to load it.
        work: What it is to do.
        device_bytes: Memory of the card, as torch.cuda.mem_get_info reports it, or of each of
            several; None for a CPU.

    Raises:
        DoesNotFit: Not even one row, or not as many as asked for, have room.
        ModelError: There is nothing to quantize, or a name in skip_modules matches no layer.
    """
    load = Load(checkpoint, model, weigh(checkpoint, model), work, device_bytes)
    plan = load.best()
    if plan is None:
        raise does_not_fit(load, work.batch_size or 1)
    return plan


def recorded_sizes(rows: int) -> list[int]:
    """Return the batch sizes for which the decode steps of an engine are recorded on a card.

    Args:
        rows: Most rows that it decodes together.
    """
    return [size for size in RECORDED_SIZES if size < rows] + [rows]


def _batch_sizes(work: Work, device_bytes: int | None) -> Sequence[int]:
    """Return the batch sizes to try, the best first."""
    if work.batch_size is not None:
        return [work.batch_size]
    if device_bytes is None:
        return [DEFAULT_BATCH_SIZE]
    return PACKED_ROWS if work.step_tokens else range(MAX_PADDED_ROWS, 0, -1)


@dataclass(frozen=True)
class Load:
    """What is to run on which device: everything that a plan depends on but the batch size."""

    checkpoint: Checkpoint
    model: Model
    weights: Weights
    work: Work
    device_bytes: int | None

    def best(self) -> MemoryPlan | None:
        """Return the plan with the most rows that pay and fit; None if not even one does, or not as
        many as were asked for.
        """
        for rows in _batch_sizes(self.work, self.device_bytes):
            plan = self.plan(rows)
            if plan.fits and (rows in (1, self.work.batch_size) or self.has_room_for(rows, plan)):
                return plan
        return None

    def plan(self, rows: int) -> MemoryPlan:
        """Plan for so many rows, whether that fits or not."""
        plan = self._padded(rows) if self.work.step_tokens is None else self._packed(rows)
        if self.work.cards == 1 or self.device_bytes is None:
            return plan
        return self._over_cards(plan, rows)

    def _over_cards(self, plan: MemoryPlan, rows: int) -> MemoryPlan:
        """Spread a plan over several cards; each needs a workspace and a context of its own."""
        assert self.device_bytes is not None
        cards = self.work.cards
        besides = plan.workspace_bytes + plan.overhead_bytes + plan.reserve_bytes
        least, most, bytes_per_token = self._cache_wanted(plan, rows)
        cut = spread(
            self._layers,
            kv_bytes_per_token=bytes_per_token,
            room_bytes=self.device_bytes - besides,
            cards=cards,
            most_tokens=most,
        )
        tokens = max(least, cut.kv_tokens // BLOCK_TOKENS * BLOCK_TOKENS if cut else 0)
        return replace(
            plan,
            kv_tokens=plan.kv_tokens if plan.step_tokens is None else tokens,
            kv_bytes=tokens * bytes_per_token,
            workspace_bytes=cards * plan.workspace_bytes,
            overhead_bytes=cards * plan.overhead_bytes,
            reserve_bytes=cards * plan.reserve_bytes,
            device_bytes=cards * self.device_bytes,
            card_layers=cut.layers if cut else (),
            whole=cut is not None and cut.kv_tokens >= least,
        )

    @cached_property
    def _layers(self) -> LayeredWeights:
        return weigh_layers(self.checkpoint, self.model)

    def _cache_wanted(self, plan: MemoryPlan, rows: int) -> tuple[int, int, int]:
        """Return the least and the most tokens of cache, and the bytes of one.

        Padded rows have their room each, all or nothing: that counts as one token here.
        """
        if plan.step_tokens is None:
            return 1, 1, plan.kv_bytes
        least = BLOCK_TOKENS * blocks_for(self.work.max_tokens)
        return least, rows * least, plan.kv_bytes_per_token

    def has_room_for(self, rows: int, plan: MemoryPlan) -> bool:
        """Tell whether a plan's pool is worth so many rows; padded rows have their own room."""
        wanted = rows * min(self.work.max_tokens, TOKENS_FOR_A_ROW)
        return self.work.step_tokens is None or plan.kv_tokens >= wanted

    def _padded(self, rows: int) -> MemoryPlan:
        prefilled = self.shape.prefill_row_bytes(self.work.prompt_tokens)
        kv_bytes = rows * max(prefilled, self.shape.row_bytes(self.work.max_tokens))
        workspace_bytes = self._padded_workspace_bytes(rows)
        return MemoryPlan(
            weight_bytes=self.weights.total_bytes,
            kv_bytes_per_token=self.shape.bytes_per_token,
            kv_bytes=kv_bytes,
            workspace_bytes=workspace_bytes,
            overhead_bytes=self._overhead_bytes(recorded=0),
            reserve_bytes=math.ceil(RESERVE * (kv_bytes + workspace_bytes)),
            batch_size=rows,
            kv_tokens=rows * self.work.max_tokens,
            step_tokens=None,
            device_bytes=self.device_bytes,
        )

    def _packed(self, rows: int) -> MemoryPlan:
        """Plan a pool of what is left, but of no more than all rows at their longest could use."""
        per_token = self.shape.bytes_per_token
        workspace_bytes = self._packed_workspace_bytes(rows)
        reserve_bytes = math.ceil(
            RESERVE * workspace_bytes + PACKED_RESERVE * (self.device_bytes or 0)
        )
        overhead_bytes = self._overhead_bytes(recorded=len(recorded_sizes(rows)))
        used = self.weights.total_bytes + workspace_bytes + overhead_bytes + reserve_bytes
        kv_tokens = most = rows * BLOCK_TOKENS * blocks_for(self.work.max_tokens)
        if self.device_bytes is not None:
            left = (self.device_bytes - used) // per_token
            kv_tokens = min(most, max(left, self.work.max_tokens))
        # Whole blocks, and enough of them for the longest row.
        kv_tokens = BLOCK_TOKENS * max(kv_tokens // BLOCK_TOKENS, blocks_for(self.work.max_tokens))
        return MemoryPlan(
            weight_bytes=self.weights.total_bytes,
            kv_bytes_per_token=per_token,
            kv_bytes=kv_tokens * per_token,
            workspace_bytes=workspace_bytes,
            overhead_bytes=overhead_bytes,
            reserve_bytes=reserve_bytes,
            batch_size=rows,
            kv_tokens=kv_tokens,
            step_tokens=self.work.step_tokens,
            device_bytes=self.device_bytes,
        )

    @property
    def _item_bytes(self) -> int:
        return ITEM_BYTES[weight_dtype(self.checkpoint, self.model)]

    @property
    def shape(self) -> KvShape:
        """What the cache of a row takes."""
        return kv_shape(self.checkpoint.text_config, self._item_bytes)

    def _overhead_bytes(self, *, recorded: int) -> int:
        """What a process takes besides tensors, with so many recorded steps."""
        if self.device_bytes is None:
            return CPU_PROCESS_BYTES
        return CUDA_CONTEXT_BYTES + recorded * self.shape.layers * RECORDED_LAYER_BYTES

    @property
    def _quantization(self) -> Quantization:
        stored = stored_quantization(self.checkpoint.config)
        return stored or self.model.resolved().quantization or Unquantized()

    def _padded_workspace_bytes(self, rows: int) -> int:
        config, item_bytes = self.checkpoint.text_config, self._item_bytes
        tokens = rows * self.work.prompt_tokens
        return (
            self._cublas_bytes
            + workspace.dequantized_bytes(self.weights, self._quantization, tokens)
            + workspace.activation_bytes(config, tokens, item_bytes)
            + workspace.mask_bytes(rows, self.work.prompt_tokens, item_bytes)
            + workspace.score_bytes(config, rows, self.work.prompt_tokens, item_bytes)
            + workspace.logit_bytes(config, rows)
            + (workspace.alone_bytes(config) if self.work.reads else 0)
            + workspace.cache_growth_bytes(self.shape, rows, self.work.max_tokens)
            + workspace.expanded_latent_bytes(config, rows, self.work.max_tokens, item_bytes)
        )

    def _packed_workspace_bytes(self, rows: int) -> int:
        assert self.work.step_tokens is not None
        config, item_bytes = self.checkpoint.text_config, self._item_bytes
        tokens = max(rows, self.work.step_tokens)
        return (
            self._cublas_bytes
            + workspace.dequantized_bytes(self.weights, self._quantization, tokens)
            + workspace.activation_bytes(config, tokens, item_bytes)
            + workspace.packed_score_bytes(config, self.work.max_tokens, item_bytes)
            + workspace.logit_bytes(config, rows, greedy=self.work.greedy)
            + (workspace.count_bytes(config, rows) if self.work.counts_tokens else 0)
            + (self._reading_bytes() if self.work.reads else 0)
            + self._recorded_bytes(rows)
            # Prompts in pieces gather what a layer has of them, at most all rows' own.
            + workspace.cache_growth_bytes(
                self.shape, 1, self.work.step_tokens + 2 * self.work.max_tokens
            )
        )

    def _reading_bytes(self) -> int:
        config = self.checkpoint.text_config
        if self.device_bytes is None:
            return workspace.reading_bytes(config)
        return workspace.reading_bytes(config, "cuda") + workspace.tree_bytes(self.shape)

    @property
    def _cublas_bytes(self) -> int:
        return 0 if self.device_bytes is None else CUBLAS_BYTES

    def _recorded_bytes(self, rows: int) -> int:
        """What recorded steps keep for themselves on a card: scores, a forward's workspace, and a
        block of the pool that padding is written to.
        """
        if self.device_bytes is None:
            return 0
        config, item_bytes = self.checkpoint.text_config, self._item_bytes
        return (
            BLOCK_TOKENS * self.shape.bytes_per_token
            + workspace.scores_kept_bytes(config, rows, item_bytes)
            + workspace.dequantized_bytes(self.weights, self._quantization, rows)
            + workspace.activation_bytes(config, rows, item_bytes)
        )

    def of_length(self, tokens: int) -> Load:
        """The same with shorter rows: at first shorter prompts."""
        prompt = min(self.work.prompt_tokens, tokens)
        return replace(self, work=replace(self.work, max_tokens=tokens, prompt_tokens=prompt))

    def in_bits(self, bits: Literal[4, 8, 16]) -> Load:
        """The same with other weights."""
        change = {"bits": bits, "quantization": None, "dtype": "auto"}
        model = self.model.model_copy(update=change)
        return replace(self, model=model, weights=weigh(self.checkpoint, model))
