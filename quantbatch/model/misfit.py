"""What is said of a model that does not fit: the sum, and the nearest thing that does."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from quantbatch.errors import DoesNotFit
from quantbatch.model.cards import CARDS
from quantbatch.model.footprint import ITEM_BYTES, Part, weight_dtype
from quantbatch.model.sizes import gib
from quantbatch.spec import FourBit, Int8

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quantbatch.model.memory import Load

LENGTH_STEP = 64
"""Tokens; shorter rows than this are no help, and lengths are tried in multiples of it."""


def does_not_fit(load: Load, rows: int) -> DoesNotFit:
    """Say what so many rows need, what there is, and what would fit."""
    layers, cards = load.shape.layers, load.work.cards
    if layers < cards:
        return DoesNotFit(
            f"{load.checkpoint.id} has {layers} layers, which can't be spread over {cards} cards",
            f"cluster.gpus_per_replica is at most {layers}",
        )
    plan = load.plan(rows)
    assert plan.device_bytes is not None
    problem = (
        f"{load.checkpoint.id} at {_bits(load)} does not fit: it needs {gib(plan.total)} and"
        f" {_devices(load.work.cards)} {gib(plan.device_bytes)}\n"
        f"  weights {gib(plan.weight_bytes)}"
        f" + KV cache {gib(plan.kv_bytes)} ({_cached(load, rows)} tokens, "
        f"{plan.kv_bytes_per_token / 1024:g} KiB each)"
        f" + workspace {gib(plan.workspace_bytes)} + CUDA context {gib(plan.overhead_bytes)}"
        f" + reserve {gib(plan.reserve_bytes)}"
    )
    experts = load.weights.bytes.get(Part.EXPERT, 0)
    if experts:
        problem += f"\n  {gib(experts)} of the weights are experts, which stay in 16 bits"
    return DoesNotFit(problem, _cheapest_help(load, rows))


def _devices(cards: int) -> str:
    return "the device has" if cards == 1 else f"its {cards} cards have together"


def _cached(load: Load, rows: int) -> str:
    longest = f"{load.work.max_tokens:,}"
    return f"{rows} x {longest}" if load.work.step_tokens is None else f"one row of {longest}"


def _cheapest_help(load: Load, rows: int) -> str:
    """Find what makes it fit: first what costs speed only, then what costs input, then quality."""
    fewer = _most(rows, lambda rows: load.plan(rows).fits)
    if fewer:
        return f"engine.batch_size {fewer} fits"
    steps = math.ceil(load.work.max_tokens / LENGTH_STEP)
    tokens = LENGTH_STEP * _most(
        steps, lambda steps: load.of_length(steps * LENGTH_STEP).plan(1).fits
    )
    if tokens:
        return f"rows of {tokens:,} tokens fit one at a time: {_what_to_lower(load, tokens)}"
    for bits, lighter in _lighter(load):
        if lighter.plan(1).fits:
            return f"model.bits {bits} fits: its weights take {gib(lighter.weights.total_bytes)}"
    for cards in (2, 4, 8):
        wider = replace(load, work=replace(load.work, cards=cards))
        if cards > load.work.cards and load.device_bytes and wider.plan(1).fits:
            spread_out = (
                f"cluster.gpus_per_replica {cards} fits: its layers are spread over the cards"
            )
            return f"{spread_out}{_larger_card(load, '; so does ')}"
    return f"it takes a larger card{_larger_card(load, ', such as ')}, or a smaller model"


def _what_to_lower(load: Load, tokens: int) -> str:
    """Name the fields by which rows get no longer than so many tokens."""
    answer = load.work.max_tokens - load.work.prompt_tokens
    if answer < tokens:
        return "lower engine.max_input_tokens"
    return f"lower sampling.max_new_tokens, which is {answer:,}, and engine.max_input_tokens"


def _larger_card(load: Load, before: str) -> str:
    """Name the smallest card that holds a model in the bits that were asked for; nothing if none
    does.
    """
    for card in sorted(CARDS, key=lambda card: card.memory_gib):
        alone = replace(load.work, cards=1)
        if replace(load, work=alone, device_bytes=card.memory_bytes).plan(1).fits:
            return f"{before}one {card.name} with {card.memory_gib:g} GiB"
    return ""


def _most(too_many: int, fits: Callable[[int], bool]) -> int:
    """Return the greatest number that fits, where all below it do; 0 if none does."""
    fitting = 0
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if fits(middle):
            fitting = middle
        else:
            too_many = middle
    return fitting


def _lighter(load: Load) -> Iterator[tuple[int, Load]]:
    """Yield the same model in fewer bits, the most bits first."""
    bits: tuple[Literal[4, 8, 16], ...] = (16, 8, 4)
    for each in bits if load.checkpoint.quantized is None else ():
        other = load.in_bits(each)
        if other.weights.total_bytes < load.weights.total_bytes:
            yield each, other


def _bits(load: Load) -> str:
    if load.checkpoint.quantized is not None:
        return f"its own quantization ({load.checkpoint.quantized})"
    match load.model.resolved().quantization:
        case FourBit(kind=kind, double_quant=double_quant):
            return f"4 bits ({kind}{' with double quantization' if double_quant else ''})"
        case Int8():
            return "8 bits (int8)"
        case _:
            return f"{8 * ITEM_BYTES[weight_dtype(load.checkpoint, load.model)]} bits"
