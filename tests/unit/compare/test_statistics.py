"""Intervals and tests against values by hand, and against the same thing done the slow way."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbatch.compare.statistics import Bootstrap, Interval, mcnemar, rule_of_three

COUNTS = st.integers(0, 6)


# ---- McNemar


def test_mcnemar_by_hand() -> None:
    # 2 of 12 changes: (1 + 12 + 66) / 4096 on a side, and the last of the three half.
    found = mcnemar(10, 2)
    assert found.exact_p == pytest.approx(2 * 79 / 4096)
    assert found.mid_p == pytest.approx(2 * (13 + 33) / 4096)
    assert mcnemar(0, 0)[2:] == (1, 1)
    assert mcnemar(0, 5).exact_p == pytest.approx(2 / 32)
    assert mcnemar(0, 5).mid_p == pytest.approx(1 / 32)


@settings(deadline=None)
@given(COUNTS, COUNTS)
def test_mcnemar_is_what_all_outcomes_of_the_coins_say(worse: int, better: int) -> None:
    changed = worse + better
    found = mcnemar(worse, better)
    heads = [sum(coins) for coins in itertools.product((0, 1), repeat=changed)]
    uneven = abs(worse - better)
    exact = sum(abs(2 * count - changed) >= uneven for count in heads) / 2**changed
    just = sum(abs(2 * count - changed) == uneven for count in heads) / 2**changed
    assert found.exact_p == pytest.approx(exact)
    if changed:
        assert found.mid_p == pytest.approx(exact - just / 2)
    assert found == mcnemar(better, worse)._replace(worse=worse, better=better)


def test_mcnemar_of_more_changes_than_floats_hold_powers() -> None:
    found = mcnemar(2000, 2200)
    # The normal approximation, with half a row of correction.
    z = (200 - 1) / math.sqrt(4200)
    assert found.exact_p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert found.mid_p < found.exact_p


# ---- the rule of three


def test_the_rule_of_three() -> None:
    assert rule_of_three(300) == pytest.approx(0.0099, abs=1e-4)
    assert pytest.approx(1 - (1 - rule_of_three(7)) ** 7) == 0.95
    assert rule_of_three(0) == 1


def test_what_happened_in_no_row_may_still_happen() -> None:
    none = Bootstrap(100).share(np.zeros(100, bool))
    assert none == (0, 0, rule_of_three(100))
    every = Bootstrap(100).share(np.ones(100, bool))
    assert every == (1, 1 - rule_of_three(100), 1)


# ---- the bootstrap


def drawn_rows(rows: int, resamples: int, seed: int) -> list[list[int]]:
    """The rows of each resample, one at a time."""
    random = np.random.default_rng(seed)
    return [random.integers(rows, size=rows).tolist() for _ in range(resamples)]


def middle(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def test_a_ratio_is_resampled_by_rows() -> None:
    sums, tokens = [3.0, 0.5, 9.0, 2.0], [2, 1, 3, 4]
    found = Bootstrap(4, resamples=50, seed=3).ratio(np.array(sums), np.array(tokens, float))
    slow = [
        sum(sums[row] for row in rows) / sum(tokens[row] for row in rows)
        for rows in drawn_rows(4, 50, 3)
    ]
    assert found.value == pytest.approx(14.5 / 10)
    assert found[1:] == pytest.approx(middle(slow))


def test_a_quantile_is_resampled_by_rows() -> None:
    values = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0])
    row_of = np.array([0, 0, 1, 1, 1, 2, 3])
    found = Bootstrap(4, resamples=60, seed=1).quantile(values, row_of, 0.7)

    def quantile(numbers: list[float]) -> float:
        return sorted(numbers)[math.ceil(0.7 * len(numbers) - 1e-9) - 1]

    slow = [
        quantile([value for row in rows for value in values[row_of == row]])
        for rows in drawn_rows(4, 60, 1)
    ]
    assert found.value == quantile(values.tolist()) == 5
    assert found[1:] == pytest.approx(middle(slow))


def test_blocks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    values, row_of = random.normal(size=200), np.repeat(np.arange(20), 10)
    whole = Bootstrap(20).quantile(values, row_of, 0.5)
    monkeypatch.setattr("quantbatch.compare.statistics.BLOCK_NUMBERS", 777)
    assert Bootstrap(20).quantile(values, row_of, 0.5) == whole


def test_rows_without_tokens_and_draws_of_nothing_else() -> None:
    one = np.array([1.0, 0.0, 0.0])
    assert Bootstrap(3).ratio(2 * one, one) == Interval(2, 2, 2)
    nothing = Bootstrap(3).quantile(np.array([]), np.array([], int), 0.5)
    assert all(math.isnan(number) for number in nothing)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Rows of tokens that resemble each other, which resampling of tokens would not see."""
    random = np.random.default_rng(11)
    held = 0
    for trial in range(200):
        of_row = random.gamma(2.0, 0.5, size=60)  # mean 1
        tokens = random.integers(1, 30, size=60).astype(float)
        sums = of_row * tokens
        found = Bootstrap(60, resamples=400, seed=trial).ratio(sums, tokens)
        held += found.low <= 1 <= found.high
    assert 175 <= held <= 199
