"""Engines as a replica makes them: how many rows and how much cache, the memory plan says."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from jobs.gpubench import shapes
from jobs.gpubench.record import Record
from jobs.gpubench.shapes import Built
from quantbatch.engine.continuous import ContinuousEngine
from quantbatch.engine.loading import limits_of
from quantbatch.model.memory import STEP_TOKENS, MemoryPlan, Work, plan_memory
from quantbatch.records import Completion, Request, RequestId
from quantbatch.spec import Sampling
from quantbatch.weights import peak

FIRST_WORD, WORDS = 300, 1700
"""Token ids that are words or parts of words in the tokenizer, so that prompts are of text."""


def on_card(device: str) -> bool:
    """Tell whether a device is a card."""
    return torch.device(device).type == "cuda"


def wait_for(device: str) -> None:
    """Wait until a card has done what it was given."""
    if on_card(device):
        torch.cuda.synchronize(device)


def free(device: str) -> None:
    """Give back what is no longer used, so that the next measurement begins at the model."""
    gc.collect()
    if on_card(device):
        torch.cuda.empty_cache()


def with_each(
    record: Record, shape: str, kinds: Sequence[str], use: Callable[[str, Built], None]
) -> None:
    """Build a shape in each kind of weights, one at a time and while there is time, and use it."""
    for kind in kinds:
        if not record.has_time():
            record.skip(kind=kind)
            continue
        with record.timed(f"make {shape} {kind}"):
            built = shapes.build(shape, kind, record.device)
        free(record.device)
        use(kind, built)
        del built
        free(record.device)


def planned(
    built: Built,
    device: str,
    *,
    prompt_tokens: int,
    new_tokens: int,
    rows: int | None = None,
    device_bytes: int | None = None,
) -> MemoryPlan:
    """Plan a replica with the continuous engine and greedy answers, as `quantbatch run` does.

    Args:
        built: The model.
        device: Where it is.
        prompt_tokens: The longest prompt.
        new_tokens: The longest answer.
        rows: Rows at once; None for as many as pay and fit.
        device_bytes: Memory that it may fill; None for all of the card.
    """
    work = work_of(device, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rows=rows)
    if device_bytes is None:
        device_bytes = peak.device_bytes(device, 1)
    return plan_memory(built.checkpoint, built.spec, work, device_bytes)


def work_of(device: str, *, prompt_tokens: int, new_tokens: int, rows: int | None = None) -> Work:
    """Return the work that `planned` plans."""
    return Work(
        max_tokens=prompt_tokens + new_tokens,
        prompt_tokens=prompt_tokens,
        batch_size=rows,
        step_tokens=STEP_TOKENS["cuda" if on_card(device) else "cpu"],
        greedy=True,
    )


@contextlib.contextmanager
def engine_of(
    built: Built, plan: MemoryPlan, *, record_steps: bool = True, share_prefixes: bool = False
) -> Iterator[ContinuousEngine]:
    """Make the engine of a plan; afterwards the model is as before, and the cache is free.

    Beginnings are shared on request only: rows that are answered twice would be answered from the
    first time.
    """
    limits = replace(limits_of(plan, share_prefixes=share_prefixes), record_steps=record_steps)
    engine = ContinuousEngine(built.model, built.tokenizer, limits)
    try:
        yield engine
    finally:
        engine.close()
        # Whoever holds the engine still must not hold what it took of the card.
        engine.__dict__.clear()
        free(str(built.model.device))


def requests(rows: int, *, prompt_tokens: int, new_tokens: int, seed: int = 0) -> list[Request]:
    """Return rows of one length; answers have all their tokens, since the model can't end them."""
    random = np.random.default_rng(seed)
    prompts = FIRST_WORD + random.integers(0, WORDS, (rows, prompt_tokens))
    sampling = Sampling(max_new_tokens=new_tokens)
    return [
        Request(RequestId(0, row), tuple(prompt), sampling, seed=0)
        for row, prompt in enumerate(prompts.tolist())
    ]


def answers(engine: ContinuousEngine, asked: Sequence[Request]) -> dict[RequestId, tuple[int, ...]]:
    """Answer rows; every one must come back, and whole."""
    engine.add(asked)
    found: dict[RequestId, tuple[int, ...]] = {}
    while engine.has_work():
        found |= taken(engine.step())
    check_whole(asked, found)
    return found


def taken(done: Sequence[Any]) -> dict[RequestId, tuple[int, ...]]:
    """Return the tokens of answers, none of which may be a failure."""
    for answer in done:
        assert isinstance(answer, Completion), answer
    return {answer.id: tuple(answer.token_ids) for answer in done}


def check_whole(asked: Sequence[Request], found: dict[RequestId, tuple[int, ...]]) -> None:
    """Check that no row is missing and none is short."""
    for request in asked:
        assert len(found[request.id]) == request.sampling.max_new_tokens, request.id
    assert len(found) == len(asked)
