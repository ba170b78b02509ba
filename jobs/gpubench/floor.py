"""Decode steps against the memory's bandwidth, and prefill against the matrix rate.

A step of single tokens can't be faster than the card reads all weights and the keys and values of
its rows once. How fast it reads is measured first, by copying a large tensor (bytes read and bytes
written count). The embedding is left out, of which a step reads a row for each of its rows.
4-bit weights that are expanded before they are multiplied move more bytes; the floor does not know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from jobs.gpubench import engines, shapes
from jobs.gpubench.engines import on_card, wait_for
from jobs.gpubench.record import GIB, Record
from quantbatch.engine.blocks import BLOCK_TOKENS
from quantbatch.engine.continuous import ContinuousEngine

PROMPT_TOKENS = 256
LEAST_STEPS = 8
"""Steps of single tokens before those that are timed: the first of a size is recorded."""
PREFILL_PROMPT_TOKENS = 2048


class Rates(NamedTuple):
    """What the device can do at most."""

    copy_bytes_per_s: float
    matrix_flops_per_s: float


def measure(
    record: Record, shape: str, kinds: list[str], batch_sizes: list[int], *, steps: int
) -> None:
    """Measure the device, and then steps of each kind of weights."""
    device = record.device
    rates = measure_rates(device)
    record.add(
        copy_gb_per_s=round(rates.copy_bytes_per_s / 1e9, 1),
        matrix_tflops=round(rates.matrix_flops_per_s / 1e12, 2),
    )

    def use(kind: str, built: shapes.Built) -> None:
        _decode(record, built, {"shape": shape, "kind": kind}, batch_sizes, steps, rates)
        record.add(shape=shape, kind=kind, **_prefill(built, device, rates))

    engines.with_each(record, shape, kinds, use)


def _decode(
    record: Record,
    built: shapes.Built,
    common: dict[str, str],
    batch_sizes: list[int],
    steps: int,
    rates: Rates,
) -> None:
    for rows in batch_sizes:
        for recorded in (True, False) if on_card(record.device) else (False,):
            if not record.has_time():
                record.skip(**common, rows=rows)
                continue
            timed = _timed_steps(built, record.device, rows, steps, recorded=recorded)
            record.add(**common, rows=rows, **_against_floor(built, timed, rates))
            if recorded and not timed.recorded:
                break  # such steps can't be recorded: it would be the same once more


def decode_step(
    built: shapes.Built, device: str, rows: int, steps: int, rates: Rates
) -> dict[str, Any]:
    """Time steps of single tokens, recorded where they can be, and compare them with the floor."""
    timed = _timed_steps(built, device, rows, steps, recorded=on_card(device))
    return _against_floor(built, timed, rates)


class _Timed(NamedTuple):
    step_s: float
    kv_tokens: float
    """Tokens in the cache of all rows, in the middle of what was timed."""
    recorded: bool
    """Whether the steps were replayed from a graph."""


def _timed_steps(
    built: shapes.Built, device: str, rows: int, steps: int, *, recorded: bool
) -> _Timed:
    """Time steps of single tokens, all of whose rows run."""
    with decoding(built, device, rows, steps, record_steps=recorded) as engine:
        before = engine.totals.decode_tokens
        wait_for(device)
        began = time.perf_counter()
        for _ in range(steps):
            engine.step()
        wait_for(device)
        step_s = (time.perf_counter() - began) / steps
        after = engine.totals.decode_tokens
        graphs = bool(engine._recorded is not None and engine._recorded._recorded)
    assert after - before >= rows * (steps - 1), "rows ended before they were timed"
    return _Timed(step_s, rows * PROMPT_TOKENS + (before + after) / 2, graphs)


@contextmanager
def decoding(
    built: shapes.Built, device: str, rows: int, steps: int, *, record_steps: bool = True
) -> Iterator[ContinuousEngine]:
    """Give an engine in which all rows have had their prompts and a few tokens.

    Args:
        built: The model.
        device: Where it is.
        rows: Rows at once.
        steps: Steps that the rows will have left at least.
        record_steps: Whether steps are replayed from CUDA graphs.
    """
    prompts = -(-rows * PROMPT_TOKENS // 512) + rows
    # Whole blocks of cache, so that the plan has room for all rows.
    new_tokens = BLOCK_TOKENS * -(-(prompts + LEAST_STEPS + steps + 8) // BLOCK_TOKENS)
    plan = engines.planned(
        built, device, prompt_tokens=PROMPT_TOKENS, new_tokens=new_tokens, rows=rows
    )
    with engines.engine_of(built, plan, record_steps=record_steps) as engine:
        engine.add(engines.requests(rows, prompt_tokens=PROMPT_TOKENS, new_tokens=new_tokens))
        while engine.totals.prefill_tokens < rows * PROMPT_TOKENS:
            engine.step()
        for _ in range(LEAST_STEPS):
            engine.step()
        yield engine


def _against_floor(built: shapes.Built, timed: _Timed, rates: Rates) -> dict[str, Any]:
    embedding = built.model.get_input_embeddings().weight
    weight_bytes = built.weight_bytes - embedding.numel() * embedding.element_size()
    kv_bytes = timed.kv_tokens * kv_bytes_per_token(built)
    floor_s = (weight_bytes + kv_bytes) / rates.copy_bytes_per_s
    return {
        "recorded": timed.recorded,
        "step_ms": round(1000 * timed.step_s, 3),
        "floor_ms": round(1000 * floor_s, 3),
        "share_of_floor": round(floor_s / timed.step_s, 3),
        "weights_gib": round(weight_bytes / GIB, 3),
        "kv_gib": round(kv_bytes / GIB, 3),
    }


def kv_bytes_per_token(built: shapes.Built) -> int:
    """Return what a token takes in the cache of keys and values."""
    config = built.model.config
    head = config.hidden_size // config.num_attention_heads
    item_bytes: int = built.model.dtype.itemsize
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head * item_bytes)


def _prefill(built: shapes.Built, device: str, rates: Rates) -> dict[str, Any]:
    """Time prompts; what is counted is the products with weights and those of attention."""
    prompts, length = (32, PREFILL_PROMPT_TOKENS) if on_card(device) else (4, 256)
    plan = engines.planned(built, device, prompt_tokens=length, new_tokens=1, rows=8)
    with engines.engine_of(built, plan) as engine:
        engines.answers(engine, engines.requests(4, prompt_tokens=length, new_tokens=1, seed=1))
        asked = engines.requests(prompts, prompt_tokens=length, new_tokens=1)
        wait_for(device)
        began = time.perf_counter()
        engines.answers(engine, asked)
        took_s = time.perf_counter() - began
    tokens_per_s = prompts * length / took_s
    flops_per_s = tokens_per_s * _flops_per_token(built, length)
    return {
        "prefill_tokens_per_s": round(tokens_per_s),
        "prompt_tokens": length,
        "prefill_tflops": round(flops_per_s / 1e12, 2),
        "share_of_matrix_rate": round(flops_per_s / rates.matrix_flops_per_s, 3),
    }


def _flops_per_token(built: shapes.Built, length: int) -> float:
    config = built.model.config
    layers = [t for t in built.checkpoint.tensors if ".layers." in t.name and len(t.shape) == 2]
    attention: int = 2 * config.num_hidden_layers * config.hidden_size * length  # half of all pairs
    return 2.0 * sum(each.numel for each in layers) + attention


def measure_rates(device: str) -> Rates:
    """Measure what a device can do."""
    count, side = (2**31, 8192) if on_card(device) else (2**22, 256)
    rates = Rates(2 * count / _copy_s(device, count), 2 * side**3 / _product_s(device, side))
    engines.free(device)
    return rates


def _copy_s(device: str, count: int) -> float:
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _seconds(device, lambda: target.copy_(source))


def _product_s(device: str, side: int) -> float:
    left, right = torch.randn(2, side, side, device=device).to(torch.bfloat16)
    return _seconds(device, lambda: left @ right)


def _seconds(device: str, work: Callable[[], object], times: int = 20) -> float:
    """Return the mean time of some work, after three times that don't count."""
    for _ in range(3):
        work()
    wait_for(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait_for(device)
    return (time.perf_counter() - began) / times
