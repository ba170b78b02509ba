"""How many rows to decode together on a CPU: measured, since no formula knows the machine.

Each row more makes a step longer and the tokens per second more, until the arithmetic is busy all
the time or the caches are full; where that is depends on cores, types and bit width (a 27 M
parameter model on two cores gained until 64 rows in float32, until 32 in bfloat16). So a few steps
of each size are timed, the small ones first, and the search ends where more rows no longer pay.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from quantbatch.records import Request, RequestId
from quantbatch.spec import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quantbatch.engine import Engine

SIZES = (8, 16, 32, 64, 128)
WORTH_IT = 1.05
"""Gain in tokens per second below which more rows are not worth their memory."""
BUDGET_S = 10.0
"""Time after which no larger size is tried."""
SURELY_GOOD = 32
"""What is taken at least where time ran out while each doubling still paid."""
PROMPT_TOKENS = 8
"""Prompts of the timed rows: short, because only the steps after them are timed."""
STEPS = 3
ROW_TOKENS = 32
"""Room that a timed row needs: its prompt, a token for each step, and a part of a block."""


def best_size(
    step_s: Callable[[int], float],
    sizes: Sequence[int] = SIZES,
    *,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Return the size beyond which more rows don't pay.

    Args:
        step_s: Measures the time of a step with so many rows, in seconds.
        sizes: In rising order.
        budget_s: Time for all of it.
        clock: In seconds.
    """
    began = clock()
    best, rate = sizes[0], sizes[0] / step_s(sizes[0])
    for size in sizes[1:]:
        if clock() - began > budget_s:
            return max(best, min(SURELY_GOOD, sizes[-1]))
        found = size / step_s(size)
        if found < WORTH_IT * rate:
            break
        best, rate = size, found
    return best


def time_step(engine: Engine, rows: int, vocabulary: int) -> float:
    """Return the least time of a step in which so many rows decode, in seconds.

    Args:
        engine: Takes at least that many rows, and all of their prompts in one step; empty before
            and after.
        rows: How many.
        vocabulary: Tokens to make prompts of.
    """
    sampling = Sampling(max_new_tokens=STEPS + 2, min_new_tokens=STEPS + 2)
    engine.add(
        Request(
            RequestId(-1, row),
            tuple((row * 7919 + k * 104729) % vocabulary for k in range(PROMPT_TOKENS)),
            sampling,
            0,
        )
        for row in range(rows)
    )
    times = []
    while engine.has_work():
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    assert len(times) == STEPS + 2, "all rows begin and end together"
    return min(times[1:])
