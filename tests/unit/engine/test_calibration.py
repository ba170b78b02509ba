"""How many rows: the search over sizes, with pretended timings."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbatch.engine.calibration import (
    BUDGET_S,
    PROMPT_TOKENS,
    SIZES,
    STEPS,
    SURELY_GOOD,
    WORTH_IT,
    best_size,
    time_step,
)
from quantbatch.records import Answer, Completion, FinishReason, Request

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def asked(times: dict[int, float], clock_s: float = 0.0) -> tuple[int, list[int]]:
    """Return the best of some sizes, and which were tried; each try takes `clock_s`."""
    tried: list[int] = []

    def step_s(rows: int) -> float:
        tried.append(rows)
        return times[rows]

    size = best_size(step_s, sorted(times), clock=lambda: clock_s * len(tried))
    return size, tried


def test_more_rows_as_long_as_they_pay() -> None:
    # Rows a second: 80, 150, 200, 202 (not worth it), 900 (never tried).
    times = {8: 0.1, 16: 16 / 150, 32: 32 / 200, 64: 64 / 202, 128: 128 / 900}
    assert asked(times) == (32, [8, 16, 32, 64])


def test_a_machine_that_gains_always_gets_the_most() -> None:
    assert asked(dict.fromkeys(SIZES, 0.1)) == (SIZES[-1], list(SIZES))


def test_a_machine_that_gains_never_gets_the_least() -> None:
    assert asked({size: size * 0.1 for size in SIZES}) == (SIZES[0], list(SIZES[:2]))


def test_the_search_ends_with_its_time() -> None:
    assert asked(dict.fromkeys(SIZES, 0.1), clock_s=BUDGET_S + 1) == (SURELY_GOOD, [8])
    assert asked(dict.fromkeys(SIZES, 0.1), clock_s=BUDGET_S / 3.5) == (64, [8, 16, 32, 64])


@given(st.dictionaries(st.integers(1, 300), st.floats(1e-4, 10), min_size=1, max_size=6))
def test_each_size_on_the_way_was_worth_it(times: dict[int, float]) -> None:
    best, tried = asked(times)
    sizes = sorted(times)
    assert tried == sizes[: len(tried)]
    rates = [size / times[size] for size in sizes[: sizes.index(best) + 1]]
    assert all(b >= WORTH_IT * a for a, b in itertools.pairwise(rates))


@pytest.mark.parametrize("rows", [1, 8])
def test_a_trial_fills_an_engine_and_empties_it(rows: int) -> None:
    class Fake:
        def __init__(self) -> None:
            self.running: list[Request] = []
            self.left = 0
            self.steps: list[int] = []

        def add(self, requests: Iterable[Request]) -> None:
            self.running = list(requests)
            (self.left,) = {r.sampling.max_new_tokens for r in self.running}
            for request in self.running:
                assert len(request.prompt_ids) == PROMPT_TOKENS
                assert all(0 <= token < 50 for token in request.prompt_ids)
                assert request.sampling.min_new_tokens == self.left

        def has_work(self) -> bool:
            return self.left > 0

        def step(self) -> Sequence[Answer]:
            self.steps.append(len(self.running))
            self.left -= 1
            done = [] if self.left else self.running
            return [Completion(r.id, "", (), FinishReason.LENGTH) for r in done]

        def evict(self) -> Sequence[Request]:
            return []

    fake = Fake()
    assert 0 <= time_step(fake, rows, 50) < 5
    assert not fake.has_work()
    assert len(fake.steps) > STEPS
    assert set(fake.steps) == {rows}
