"""A model in every width: what it takes, what it saves, and how many rows it leaves room for.

Savings are those of the whole model. "4 bits save 87 %" is true of the codes alone: with their
scales, and with embeddings and head in 16 bits, a model of 32 billion parameters saves 85 % of
float32, and one of 8 billion 82 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantbatch.errors import ModelError
from quantbatch.model.footprint import Part, weigh, weight_dtype
from quantbatch.model.memory import Load
from quantbatch.spec import FourBit, Int8, Unquantized

if TYPE_CHECKING:
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.memory import MemoryPlan, Work
    from quantbatch.spec import Model

Verdict = Literal["fits", "tight", "no"]

USEFUL_ROWS = 8
"""Rows at once below which a card is not used: a step reads all weights for whatever rows there
are, so up to here tokens/s grow nearly with the rows (8 rows give 7.0 times the tokens/s of one:
334.6 and 47.5, Llama 3.1 8B in 16 bits on an RTX 4090, bitsandbytes' benchmarking/README.md,
v0.45)."""
AUTO_BITS: tuple[Literal[16, 8, 4], ...] = (16, 8, 4)
"""What `model.bits: auto` chooses from, the best answers first."""
DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Width:
    """What a model takes in one width, on one card."""

    kind: str
    """Such as `bf16`, `int8`, `nf4` or `nf4+dq` (with double quantization)."""
    chosen: bool
    """Whether it is what the job asks for."""
    params: int
    quantized_params: int
    weight_bytes: int
    workspace_bytes: int
    overhead_bytes: int
    """With the reserve."""
    growing_bytes_per_token: int
    """KV cache of the layers that see everything."""
    sliding_bytes_per_token: int
    """KV cache of the layers that see a window."""
    window_tokens: int
    fixed_bytes_per_row: int
    """State of linear attention."""
    kv_tokens: int | None
    """Tokens of KV cache that the card has left; None if there is no card."""
    rows: int | None
    """Rows that run at once at the job's lengths; None if there is no card."""
    verdict: Verdict | None
    """`tight`: fits, but with fewer rows than pay or were asked for."""
    needed_bytes: int
    """Everything together, with as many rows as fit, or else with the fewest."""

    @property
    def bits_per_param(self) -> float:
        """Bits for each parameter of the whole model."""
        return 8 * self.weight_bytes / self.params

    @property
    def quantized_share(self) -> float:
        """Share of the parameters that is quantized."""
        return self.quantized_params / self.params

    @property
    def saved_of_32_bits(self) -> float:
        """Share of the bytes in float32 that is saved."""
        return 1 - self.bits_per_param / 32

    @property
    def saved_of_16_bits(self) -> float:
        """Share of the bytes in 16 bits that is saved; negative for float32."""
        return 1 - self.bits_per_param / 16


def every_width(
    checkpoint: Checkpoint,
    model: Model,
    work: Work,
    device_bytes: int | None,
    *,
    row_tokens: int,
) -> list[Width]:
    """Plan a model in every width, the widest first; one that is quantized already only as it is.

    Args:
        checkpoint: The model's files.
        model: How the job would load it; with `bits: auto` none is the chosen one.
        work: What a replica is to do.
        device_bytes: Memory of the card; None if there is none, or it is not known.
        row_tokens: Prompt and answer of a usual long row, in tokens.
    """
    found = []
    asked = _asked(checkpoint, model)
    for candidate in _candidates(checkpoint, model, asked):
        try:
            weights = weigh(checkpoint, candidate)
        except ModelError:
            continue  # nothing in it that could be quantized
        load = Load(checkpoint, candidate, weights, work, device_bytes)
        found.append(_width(load, row_tokens, chosen=candidate == asked))
    return found


def useful_bits(
    checkpoint: Checkpoint, model: Model, work: Work, device_bytes: int, *, row_tokens: int
) -> Literal[16, 8, 4] | None:
    """Return the most bits in which a model fits with a useful batch; failing that, those with the
    most rows; None if it fits in none.

    A useful batch is as many rows as were asked for, or else `USEFUL_ROWS`, all as long as
    `row_tokens`.
    """
    most_rows: tuple[int, Literal[16, 8, 4]] = (0, 4)
    for bits in AUTO_BITS:
        candidate = model.model_copy(update={"bits": bits})
        try:
            weights = weigh(checkpoint, candidate)
        except ModelError:
            continue  # nothing in it that could be quantized
        load = Load(checkpoint, candidate, weights, work, device_bytes)
        width = _width(load, row_tokens, chosen=False)
        if width.verdict == "fits":
            return bits
        most_rows = max(most_rows, (width.rows or 0, bits))
    return most_rows[1] if most_rows[0] else None


def kind_of(checkpoint: Checkpoint, model: Model) -> str:
    """Name the width in which a model is loaded."""
    if checkpoint.quantized is not None:
        return f"{checkpoint.quantized}{' expanded' if checkpoint.expanded else ''}"
    match model.resolved().quantization:
        case FourBit(kind=kind, double_quant=double_quant):
            return f"{kind}+dq" if double_quant else kind
        case Int8():
            return "int8"
        case _:
            return DTYPE_NAMES[weight_dtype(checkpoint, model)]


def _asked(checkpoint: Checkpoint, model: Model) -> Model | None:
    """Return what a job asks for, written out; None if that is to be chosen."""
    if model.bits != "auto":
        return model.resolved()
    is_quantized = checkpoint.quantized is not None
    return model.model_copy(update={"bits": None}).resolved() if is_quantized else None


def _candidates(checkpoint: Checkpoint, model: Model, asked: Model | None) -> list[Model]:
    """Return a model in every width, and in its own if that is another one."""
    if checkpoint.quantized is not None:
        assert asked is not None
        return [asked]
    made = _unquantized(checkpoint, asked or model) + _quantized(asked or model)
    if asked is None:
        return made
    kind = kind_of(checkpoint, asked)
    made = [asked if kind_of(checkpoint, each) == kind else each for each in made]
    return made if asked in made else [*made, asked]


def _unquantized(checkpoint: Checkpoint, model: Model) -> list[Model]:
    """Return a model in 16 bits, and in 32 if its files or the job have it so."""
    model = model.model_copy(update={"bits": None, "quantization": Unquantized()})
    own = weight_dtype(checkpoint, model.model_copy(update={"dtype": "auto"}))
    half = next((d for d in (model.dtype, own) if d in ("bfloat16", "float16")), "bfloat16")
    dtypes = ["float32", half] if "float32" in (own, model.dtype) else [half]
    return [model.model_copy(update={"dtype": dtype}) for dtype in dtypes]


def _quantized(model: Model) -> list[Model]:
    skipped = getattr(model.quantization, "skip_modules", [])
    # What a job in 32 bits says of its type is not meant for the rest of a quantized model.
    is_whole = isinstance(model.quantization, Unquantized)
    dtype = "auto" if is_whole and model.dtype == "float32" else model.dtype
    kinds = [
        Int8(skip_modules=skipped),
        FourBit(double_quant=False, skip_modules=skipped),
        FourBit(skip_modules=skipped),
    ]
    return [
        model.model_copy(update={"bits": None, "quantization": kind, "dtype": dtype})
        for kind in kinds
    ]


def _width(load: Load, row_tokens: int, *, chosen: bool) -> Width:
    best = load.best()
    plan = best or load.plan(load.work.batch_size or 1)
    quantization = load.model.resolved().quantization
    has_codes = load.checkpoint.quantized is not None and not load.checkpoint.expanded
    is_whole = not has_codes and isinstance(quantization, Unquantized)
    rows = _rows_at_once(plan, min(row_tokens, load.work.max_tokens)) if best else 0
    on_card = load.device_bytes is not None
    return Width(
        kind=kind_of(load.checkpoint, load.model),
        chosen=chosen,
        params=load.weights.total_params,
        quantized_params=0 if is_whole else load.weights.params[Part.LINEAR],
        weight_bytes=plan.weight_bytes,
        workspace_bytes=plan.workspace_bytes,
        overhead_bytes=plan.overhead_bytes + plan.reserve_bytes,
        growing_bytes_per_token=load.shape.growing_bytes_per_token,
        sliding_bytes_per_token=load.shape.sliding_bytes_per_token,
        window_tokens=load.shape.window_tokens,
        fixed_bytes_per_row=load.shape.fixed_bytes,
        kv_tokens=_kv_tokens(plan) if on_card else None,
        rows=rows if on_card else None,
        verdict=_verdict(rows, load.work.batch_size or USEFUL_ROWS) if on_card else None,
        needed_bytes=plan.total,
    )


def _kv_tokens(plan: MemoryPlan) -> int:
    """Return how many tokens of cache have room beside everything else."""
    assert plan.device_bytes is not None
    if plan.card_layers:
        return plan.kv_tokens if plan.fits else 0  # bounded by the fullest card
    left = plan.device_bytes - (plan.total - plan.kv_bytes)
    return max(0, left // plan.kv_bytes_per_token)


def _rows_at_once(plan: MemoryPlan, row_tokens: int) -> int:
    """Return how many rows run at once: padded ones as planned, others as the pool has room for."""
    if plan.step_tokens is None:
        return plan.batch_size
    return min(plan.batch_size, plan.kv_tokens // max(1, row_tokens))


def _verdict(rows: int, wanted: int) -> Verdict:
    if rows == 0:
        return "no"
    return "fits" if rows >= wanted else "tight"
