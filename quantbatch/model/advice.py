"""What to know before a model is run in few bits: one sentence each, only where it applies.

Numbers are from research/quant.md's sources: bitsandbytes' own benchmark (benchmarking/README.md,
v0.45, tokens/s of `generate` with Llama 3.1 8B on an RTX 4090) and issues, the papers named, and
our measurements on a small model, of which only the order counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantbatch.model.footprint import EMBEDDING, HEADS, Part, part_of, weigh, weight_dtype
from quantbatch.model.sizes import gib
from quantbatch.spec import FourBit, Int8, Unquantized

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quantbatch.model.cards import Card
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.footprint import Weights
    from quantbatch.model.memory import Work
    from quantbatch.model.widths import Width
    from quantbatch.spec import Model, Quantization

KERNEL_COLUMNS = 64
"""Rows of a matrix that the fast kernels of bitsandbytes 0.50 multiply are multiples of this."""
LONG_TOKENS = 32_768
"""Prompts from which on 4 bits are known to lose most: the paper's have 64K tokens and more; half
of that, to be careful."""
LARGE_VOCABULARY = 0.1
"""Share of the parameters from which embeddings and head are worth a word; 4.8 % of a 32B model,
13 % of Llama 3.1 8B."""
FP8_METHODS = frozenset({"fp8", "fbgemm_fp8", "finegrained_fp8"})


@dataclass(frozen=True, slots=True)
class _Case:
    checkpoint: Checkpoint
    model: Model
    card: Card | None
    work: Work
    widths: Sequence[Width]

    @property
    def quantization(self) -> Quantization:
        """As asked for; a checkpoint that is quantized already is advised on as it is."""
        found = self.model.resolved().quantization
        return found or Unquantized()

    @property
    def chosen(self) -> Width | None:
        return next((width for width in self.widths if width.chosen), None)

    @property
    def whole_fits(self) -> bool:
        """Whether 16 bits fit the card with as many rows as pay."""
        kinds = ("bf16", "fp16")
        return any(w.verdict == "fits" for w in self.widths if w.kind in kinds)


def advise(
    checkpoint: Checkpoint,
    model: Model,
    card: Card | None,
    work: Work,
    widths: Sequence[Width],
) -> list[str]:
    """Return what applies to a model as a job would load it.

    Args:
        checkpoint: The model's files.
        model: How the job loads it, with its bits chosen.
        card: The card; None if there is none, or it is not known.
        work: What a replica is to do.
        widths: The model in every width.
    """
    case = _Case(checkpoint, model, card, work, widths)
    of_types = [*_own_code(case), *_float16(case), *_fp8(case)]
    if checkpoint.quantized is not None:
        return of_types
    found = [*_experts(case), *_vocabulary(case), *of_types]
    match case.quantization:
        case Int8():
            found += _int8(case)
        case FourBit():
            found += _four_bits(case)
        case Unquantized():
            pass
    return found


def _own_code(case: _Case) -> Iterator[str]:
    checkpoint = case.checkpoint
    if checkpoint.trusted and not checkpoint.is_native:
        yield (
            f"transformers has no model type {checkpoint.config.get('model_type')}: what the"
            " repository's own code makes of its tensors is told from their names alone, so these"
            " sizes are approximate"
        )


def _experts(case: _Case) -> Iterator[str]:
    weights = weigh(case.checkpoint, case.model)
    experts = weights.params.get(Part.EXPERT, 0)
    if experts and not isinstance(case.quantization, Unquantized):
        yield (
            f"{experts / weights.total_params:.0%} of the parameters are experts, which"
            " bitsandbytes leaves in 16 bits (its issue 1849), so the model takes"
            f" {gib(weights.total_bytes)} at {_bits(weights):.2f} bits a parameter: look for a"
            " GPTQ, AWQ or MXFP4 checkpoint of it"
        )


def _vocabulary(case: _Case) -> Iterator[str]:
    if isinstance(case.quantization, Unquantized):
        return
    weights = weigh(case.checkpoint, case.model)
    kept = [t for t in case.checkpoint.tensors if part_of(t, case.checkpoint) is Part.KEPT]
    vocabulary = sum(t.numel for t in kept if _is_vocabulary(t.name))
    share = vocabulary / max(1, weights.total_params)
    if share >= LARGE_VOCABULARY:
        tied = sum(_is_vocabulary(t.name) for t in kept) == 1
        what = "the embedding, which is the output head too," if tied else "embedding and head"
        yield (
            f"{what} {'has' if tied else 'have'} {share:.0%} of the parameters and"
            f" {'stays' if tied else 'stay'} in 16 bits, so this model takes"
            f" {_bits(weights):.2f} bits a parameter: a larger one gains more from few bits"
        )


def _bits(weights: Weights) -> float:
    return 8 * weights.total_bytes / weights.total_params


def _is_vocabulary(name: str) -> bool:
    last = name.rpartition(".")[0].rpartition(".")[2]
    return last in HEADS or EMBEDDING.search(last) is not None


def _float16(case: _Case) -> Iterator[str]:
    dtype = weight_dtype(case.checkpoint, case.model)
    without = case.card is not None and not case.card.has_bfloat16
    is_half = dtype == "float16" or (dtype == "bfloat16" and without)
    is_gemma = str(case.checkpoint.text_config.get("model_type")).startswith("gemma")
    if is_gemma and (is_half or isinstance(case.quantization, Int8)):
        remedy = "float32, or a card from Ampere on" if without else "bfloat16, and 16 or 4 bits"
        yield (
            "activations of Gemma exceed 65,504, the largest float16, in which"
            f" {'int8' if not is_half else 'this job'} multiplies, and empty answers are known"
            f" (bitsandbytes issue 1572): use {remedy}"
        )
    elif dtype == "bfloat16" and without and case.card:
        yield (
            f"{case.card.name} has no bfloat16, so the weights are loaded as float16, whose"
            " largest number is 65,504: look for empty answers, and use model.dtype float32 if"
            " there are any"
        )


def _fp8(case: _Case) -> Iterator[str]:
    card = case.card
    if case.checkpoint.quantized in FP8_METHODS and card and card.capability and not card.has_fp8:
        yield (
            f"{card.name} does not multiply 8-bit floating-point numbers (from compute capability"
            " 8.9 on), so the weights are expanded to 16 bits and take twice as much: use the"
            " original model with model.bits 8"
        )


def _int8(case: _Case) -> Iterator[str]:
    assert isinstance(case.quantization, Int8)
    if case.quantization.threshold > 0:
        yield (
            "with an int8 threshold above 0 an answer depends slightly on the other rows of its"
            " batch (logits by up to 0.125, 2 of 128 likeliest tokens; measured): use 4 bits if"
            " equal prompts must give equal answers"
        )
        instead = "16 bits fit here" if case.whole_fits else "4 bits leave more room for rows, too"
        yield (
            "int8 is the slowest kind: 625 tokens/s where 16 bits make 1,054 and nf4 695"
            f" (bitsandbytes' benchmark v0.45, 8B, RTX 4090, 32 rows): {instead}"
        )


def _four_bits(case: _Case) -> Iterator[str]:
    assert isinstance(case.quantization, FourBit)
    if case.quantization.kind == "fp4":
        yield (
            "fp4 takes as much as nf4 and is worse (KL divergence 1.6 times as large; measured):"
            " use nf4"
        )
    yield from _speed(case.quantization, case)
    yield from _odd_shapes(case)
    if case.work.prompt_tokens >= LONG_TOKENS:
        yield (
            "at 4 bits tasks with prompts of 64K tokens and more lost up to 59 % (arXiv"
            " 2505.20276): compare on your own rows first, or use 8 bits"
        )
    yield from _estimate(case)


def _speed(quantization: FourBit, case: _Case) -> Iterator[str]:
    if case.whole_fits:
        percent = 64 if quantization.double_quant else 66
        yield (
            f"4 bits save memory, not time: {percent} % of the tokens/s of 16 bits at 32 rows"
            " (bitsandbytes' benchmark v0.45, 8B, RTX 4090; its 0.50 is faster), and 16 bits fit"
            " here: use model.bits 16 if speed counts"
        )


def _odd_shapes(case: _Case) -> Iterator[str]:
    linear = [
        t.shape for t in case.checkpoint.tensors if part_of(t, case.checkpoint) is Part.LINEAR
    ]
    odd = [shape for shape in linear if shape[-1] % KERNEL_COLUMNS]
    if odd:
        rows, columns = max(odd, key=math.prod)
        yield (
            f"{len(odd)} of {len(linear)} matrices, such as {rows:,} x {columns:,}, are no multiple"
            f" of {KERNEL_COLUMNS} wide, which the fast 4-bit kernels need: use model.bits 8 or 16"
            " if it is too slow"
        )


def _estimate(case: _Case) -> Iterator[str]:
    """Say that transformers would call fitting what does not fit."""
    chosen, card = case.chosen, case.card
    if chosen is None or card is None or chosen.verdict != "no":
        return
    weights = weigh(case.checkpoint, case.model)
    theirs = sum(weights.bytes.values()) - weights.bytes[Part.LINEAR]
    theirs += weights.params[Part.LINEAR] // 2
    if theirs <= card.memory_bytes:
        yield (
            f"transformers' own estimate is {gib(theirs)}, which would fit, because it counts"
            f" neither the scales (the weights take {gib(weights.total_bytes)}) nor cache and"
            " workspace: go by the plan"
        )
