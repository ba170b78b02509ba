"""Divergence from a few words of each token, against all words in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbatch.compare.divergence import Beliefs, differences, kl_nats
from quantbatch.compare.scoring import Words, beliefs_of, choose_words, logprobs_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


def exact_logprobs(scores: Any) -> Any:
    scores = np.asarray(scores, float)
    return scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)


def exact_kl(ours: Any, theirs: Any) -> Any:
    log_p, log_q = exact_logprobs(ours), exact_logprobs(theirs)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def asked(ours: Any, theirs: Any, top_words: int, targets: Any = None) -> tuple[Beliefs, Beliefs]:
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    targets = torch.zeros(len(ours), dtype=torch.long) if targets is None else targets
    words = choose_words(logprobs_of(ours), top_words, torch.Generator().manual_seed(0))
    reference = beliefs_of(logprobs_of(ours), targets, words)
    words = Words.of([reference]).part(slice(None), ours.device)
    return reference, beliefs_of(logprobs_of(theirs), targets, words)


def scores(tokens: int, words: int, seed: int, spread: float = 3.0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, spread, (tokens, words)).astype(np.float32)


# ---- against float64


def test_with_all_words_it_is_exact() -> None:
    ours, change = scores(40, 50, 1), scores(40, 50, 2, 0.1)
    found = kl_nats(*asked(ours, ours + change, 50))
    exact = exact_kl(ours, ours + change)
    assert found.bound_P == pytest.approx(exact, rel=1e-4)
    assert found.estimate_P == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_divergence_is_not_drowned_by_rounding(size: float) -> None:
    """1e-4 on scores is 5e-9 nats, while log-probabilities in float32 are off by 1e-6."""
    ours = scores(400, 50, 3)
    theirs = (ours + scores(400, 50, 4, size)).astype(np.float32)
    found = kl_nats(*asked(ours, theirs, 50)).bound_P.mean()
    assert found == pytest.approx(exact_kl(ours, theirs).mean(), rel=0.02)


def test_few_words_tell_most_of_it() -> None:
    ours, change = scores(60, 2000, 5), scores(60, 2000, 6, 0.1)
    exact = exact_kl(ours, ours + change)
    found = kl_nats(*asked(ours, ours + change, 64))
    assert (found.bound_P <= exact * (1 + 1e-5)).all()
    assert found.bound_P.mean() > 0.4 * exact.mean()


@pytest.mark.parametrize("size", [1.5, 0.1, 1e-3])
def test_the_estimate_is_right_where_the_bound_sees_little(size: float) -> None:
    """Nearly flat distributions over 500 words: 20 of them hold a tenth of the mass."""
    ours, change = scores(3000, 500, 9, 0.5), scores(3000, 500, 10, size)
    exact = exact_kl(ours, (ours + change).astype(np.float32)).mean()
    found = kl_nats(*asked(ours, ours + change, 20))
    assert found.bound_P.mean() < 0.3 * exact
    assert found.estimate_P.mean() == pytest.approx(exact, rel=0.03)


def test_words_too_unlikely_for_float32_can_be_drawn() -> None:
    ours = np.full((3, 40), -300, np.float32)
    ours[:, 0] = 0
    ours[:, 7] = -290
    reference, candidate = asked(ours, ours, 1)
    assert np.isin(reference.drawn_PM, 7).mean() > 0.9
    assert kl_nats(reference, candidate).estimate_P.tolist() == [0, 0, 0]


def test_what_is_told_of_a_token() -> None:
    ours = np.log([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]).astype(np.float32)
    theirs = np.log([[0.2, 0.4, 0.4], [0.1, 0.2, 0.7]]).astype(np.float32)
    targets = torch.tensor([1, 2])
    reference, candidate = asked(ours, theirs, 1, targets)
    assert reference.words_PK.tolist() == [[0], [2]]
    assert np.exp(candidate.logprobs_PK) == pytest.approx(np.array([[0.2], [0.7]]))
    assert np.exp(candidate.others_P) == pytest.approx(np.array([0.8, 0.3]))
    found = differences(reference, candidate, np.array([0, 1]), np.array([False, True]))
    assert found.kl_bound_P == pytest.approx(
        [0.5 * np.log(0.5 / 0.2) + 0.5 * np.log(0.5 / 0.8), 0], abs=1e-7
    )
    assert found.probability_P == pytest.approx([0.1, 0], abs=1e-7)
    assert found.nll_P == pytest.approx([np.log(0.3 / 0.4), 0], abs=1e-7)
    assert found.same_top_P.tolist() == [False, True]
    assert found.of(prompts=True).row_P.tolist() == [1]


def test_scores_that_are_no_numbers_are_counted_and_left_out() -> None:
    ours = scores(4, 10, 7)
    theirs = ours.copy()
    theirs[1, 3] = np.nan
    theirs[2, 0] = np.inf
    theirs[3, :] = -np.inf
    reference, candidate = asked(ours, theirs, 4)
    found = differences(reference, candidate, np.arange(4), np.zeros(4, bool))
    assert (found.row_P.tolist(), found.not_finite) == ([0], 3)
    assert found.kl_P.tolist() == [0]


def test_16_bit_scores_are_widened_first() -> None:
    ours = torch.tensor(scores(5, 30, 8)).to(torch.bfloat16)
    reference, candidate = asked(ours.float().numpy(), ours.float().numpy(), 8)
    told = logprobs_of(ours).topk(8).values.numpy()
    assert np.array_equal(np.sort(told), np.sort(reference.logprobs_PK))
    assert kl_nats(reference, candidate).bound_P.max() == 0


# ---- properties


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Any, Any, int]:
    words = draw(st.integers(1, 12))
    numbers = st.floats(-12, 12, width=32)
    rows = st.lists(numbers, min_size=words, max_size=words)
    return draw(rows), draw(rows), draw(st.integers(1, 13))


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_it_is_a_lower_bound_that_grows_with_the_words(pair: tuple[Any, Any, int]) -> None:
    ours, theirs, top_words = pair
    exact = float(exact_kl([ours], [theirs])[0])
    found = float(kl_nats(*asked([ours], [theirs], top_words)).bound_P[0])
    slack = 1e-6 + 1e-5 * exact
    assert 0 <= found <= exact + slack
    assert float(kl_nats(*asked([ours], [theirs], 99)).bound_P[0]) == pytest.approx(
        exact, abs=slack
    )


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_nothing_diverges_from_itself(pair: tuple[Any, Any, int]) -> None:
    ours, _, top_words = pair
    found = kl_nats(*asked([ours], [ours], top_words))
    assert (found.estimate_P[0], found.bound_P[0]) == (0, 0)
