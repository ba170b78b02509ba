"""Memory that really runs out, again and again: no row is lost, and answers stay what they were.

A large tensor takes what the card has left but for a little, during one step; then it is released,
and the engine goes on. A step that has prompts in it fails then. (A step of single tokens runs in
memory that its graph holds.) In float32 the answers must be equal: smaller steps add in another
order, which matters in the last bit only.

An engine whose steps failed goes on with smaller ones, so after four or five failures they fit into
what is left. Then a fresh engine answers the rows once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from jobs.gpubench import engines, shapes
from jobs.gpubench.engines import on_card
from jobs.gpubench.record import Record
from quantbatch.engine.backoff import SMALLEST_STEP_TOKENS
from quantbatch.engine.continuous import ContinuousEngine
from quantbatch.model.memory import MemoryPlan
from quantbatch.records import Request, RequestId

ROWS_AT_ONCE = 32
PROMPT_TOKENS, NEW_TOKENS = 384, 4
"""Short answers: most steps have prompts in them."""
LEFT_BYTES = 48 << 20
"""Less than one product of the MLP in a step of 2,048 tokens of the 8B shape, 117 MB in float32."""
WARM_UP_ROWS = 4
CALM_STEPS = 4
"""Steps without the large tensor between two with it."""


def provoke(record: Record, shape: str, kind: str, *, times: int, rows: int) -> None:
    """Answer rows twice, once while memory runs out so many times, and compare the answers."""
    device = record.device
    with record.timed(f"make {shape} {kind}"):
        built = shapes.build(shape, kind, device)
    engines.free(device)
    plan = engines.planned(
        built, device, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, rows=ROWS_AT_ONCE
    )
    asked = engines.requests(rows, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
    _warm_up(built, plan, asked[:WARM_UP_ROWS])
    with engines.engine_of(built, plan) as engine:
        wanted = engines.answers(engine, asked)
    rounds = [_Round(0, 0, 0)]
    while sum(each.out_of_memory for each in rounds) < times and record.has_time():
        with engines.engine_of(built, plan) as engine:
            found = _answer_with_little(engine, asked, device)
            equal = sum(wanted[key] == tokens for key, tokens in found.items())
            rounds.append(_Round(engine.totals.out_of_memory, len(asked) - len(found), equal))
        record.add(round=len(rounds) - 1, **rounds[-1]._asdict())
        if not rounds[-1].out_of_memory:
            break  # a CPU, or a shape whose steps fit into what is left
    record.add(
        shape=shape,
        kind=kind,
        rounds=len(rounds) - 1,
        wanted_out_of_memory=times,
        out_of_memory=sum(each.out_of_memory for each in rounds),
        answered=(len(rounds) - 1) * rows,
        lost_rows=sum(each.lost_rows for each in rounds),
        equal_rows=sum(each.equal_rows for each in rounds),
    )


class _Round(NamedTuple):
    """All rows answered by a fresh engine."""

    out_of_memory: int
    lost_rows: int
    equal_rows: int


def _warm_up(built: shapes.Built, plan: MemoryPlan, asked: Sequence[Request]) -> None:
    """Run steps of all sizes once: what the driver loads for them, it would not find room for."""
    step_tokens = plan.step_tokens or 0
    while step_tokens >= SMALLEST_STEP_TOKENS:
        with engines.engine_of(built, replace(plan, step_tokens=step_tokens)) as engine:
            engines.answers(engine, asked)
        step_tokens //= 2


def _answer_with_little(
    engine: ContinuousEngine, asked: Sequence[Request], device: str
) -> dict[RequestId, tuple[int, ...]]:
    """Answer rows, every few steps with next to no memory left."""
    found: dict[RequestId, tuple[int, ...]] = {}
    engine.add(asked)
    while engine.has_work():
        if on_card(device):
            found |= _short_of_memory(engine, device)
        for _ in range(CALM_STEPS):
            found |= engines.taken(engine.step()) if engine.has_work() else {}
    return found


def _short_of_memory(engine: ContinuousEngine, device: str) -> dict[RequestId, tuple[int, ...]]:
    """Run one step while a tensor holds what the card has left."""
    engines.free(device)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    hog = torch.empty(max(0, free_bytes - LEFT_BYTES), dtype=torch.uint8, device=device)
    try:
        return engines.taken(engine.step())
    finally:
        del hog
        engines.free(device)
