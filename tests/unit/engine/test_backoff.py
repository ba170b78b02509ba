"""Smaller steps when memory runs out: always a step that fits, if there is one."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantbatch.engine.backoff import GOOD_STEPS, MOST_GOOD_STEPS, SMALLEST_STEP_TOKENS, Backoff
from quantbatch.engine.pieces import Limits

MOST = st.builds(Limits, st.integers(1, 300), st.integers(SMALLEST_STEP_TOKENS, 5000))


def within(limits: Limits, most: Limits) -> bool:
    return (
        1 <= limits.rows <= most.rows
        and SMALLEST_STEP_TOKENS <= limits.step_tokens <= most.step_tokens
    )


@settings(deadline=None)
@given(
    MOST, st.lists(st.tuples(st.booleans(), st.integers(0, 99), st.integers(0, 99)), max_size=60)
)
def test_limits_stay_between_the_smallest_and_the_most(
    most: Limits, steps: list[tuple[bool, int, int]]
) -> None:
    backoff = Backoff(most)
    for good, rows_share, tokens_share in steps:
        before = backoff.limits
        if good:
            for _ in range(GOOD_STEPS):
                backoff.succeeded()
            assert backoff.limits.rows >= before.rows
            assert backoff.limits.step_tokens >= before.step_tokens
        else:
            # A step within the limits: some rows, each with a token or more.
            rows = 1 + rows_share * (min(before) - 1) // 99
            tokens = rows + tokens_share * (before.step_tokens - rows) // 99
            assert backoff.failed(rows=rows, tokens=tokens) == (
                rows > 1 or tokens > SMALLEST_STEP_TOKENS
            )
        assert within(backoff.limits, most)


@settings(deadline=None)
@given(MOST, st.integers(0, 2**32))
@example(Limits(4, 16), 0)
def test_failing_on_and_on_ends_with_one_row(most: Limits, seed: int) -> None:
    """Whatever the steps look like that the limits let through."""
    chance, backoff, failures = random.Random(seed), Backoff(most), 0
    while True:
        limits = backoff.limits
        rows = chance.randint(1, min(limits))
        tokens = chance.choice([rows, limits.step_tokens, chance.randint(rows, limits.step_tokens)])
        failures += 1
        assert failures <= 60, f"{rows} rows with {tokens} tokens, over and over"
        if not backoff.failed(rows=rows, tokens=tokens):
            assert (rows, tokens <= SMALLEST_STEP_TOKENS) == (1, True)
            return


@settings(deadline=None)
@given(MOST, st.integers(1, 300), st.integers(1, 5000), st.booleans())
@example(Limits(8, 64), 1, 20, True)
@example(Limits(8, 64), 3, 64, True)
def test_a_step_that_fits_is_found(
    most: Limits, true_rows: int, true_tokens: int, short: bool
) -> None:
    """A device with room for so many rows and tokens, and work without end: steps as large as
    they may be, with prompts in every other one.
    """
    true_tokens = max(true_tokens, SMALLEST_STEP_TOKENS if not short else 1)
    backoff, good, failures = Backoff(most), 0, 0
    for number in range(2000):
        limits = backoff.limits
        rows = min(limits)
        tokens = min(limits.step_tokens, 2 * rows if short else 5000) if number % 2 else rows
        if rows <= true_rows and tokens <= true_tokens:
            backoff.succeeded()
            good += 1
        else:
            failures += 1
            if not backoff.failed(rows=rows, tokens=tokens):
                assert tokens > true_tokens, "one row would have fit"
                return
    assert failures <= 40
    assert good >= 1900


def test_limits_grow_back() -> None:
    backoff = Backoff(Limits(64, 2048))
    assert backoff.failed(rows=64, tokens=64)
    assert backoff.failed(rows=10, tokens=2048)
    assert backoff.limits == Limits(32, 1024)
    steps = 0
    while backoff.limits != Limits(64, 2048):
        backoff.succeeded()
        steps += 1
    assert steps <= 4 * GOOD_STEPS * 8


def test_a_limit_found_by_failing_is_not_tried_again_and_again() -> None:
    """Room for 40 of 64 rows: few steps of many are lost, and most rows run."""
    backoff = Backoff(Limits(64, 64))
    failures, rows, steps = 0, 0, 50_000
    for _ in range(steps):
        now = backoff.limits.rows
        if now <= 40:
            rows += now
            backoff.succeeded()
        else:
            failures += 1
            backoff.failed(rows=now, tokens=now)
    assert failures <= 12
    assert rows / steps > 24


def test_patience_has_an_end() -> None:
    backoff = Backoff(Limits(64, 64))
    for _ in range(40):
        backoff.failed(rows=64, tokens=64)
    assert backoff.limits.rows == 1
    for _ in range(MOST_GOOD_STEPS):
        backoff.succeeded()
    assert backoff.limits.rows == 2


def test_a_row_that_fails_alone_costs_the_others_nothing_afterwards() -> None:
    """It is the row that was too large, not the steps."""
    most = Limits(64, 2048)
    backoff = Backoff(most)
    rows, tokens = 64, 2048
    while backoff.failed(rows=rows, tokens=tokens):
        rows, tokens = min(backoff.limits), backoff.limits.step_tokens
    steps = 0
    while backoff.limits != most:
        backoff.succeeded()
        steps += 1
    assert steps <= 20 * GOOD_STEPS


@pytest.mark.parametrize("rows", [1, 2, 3, 15])
def test_rows_with_few_tokens_each_become_fewer(rows: int) -> None:
    """Pieces of prompts, but fewer tokens than the smallest step: only rows are left to halve."""
    backoff, seen = Backoff(Limits(rows, 64)), [rows]
    while backoff.failed(rows=seen[-1], tokens=seen[-1] + 1):
        seen.append(backoff.limits.rows)
        assert seen[-1] < seen[-2], "the same step over and over"
    assert seen[-1] == 1
