"""Masks of tokens put on scores, and the likeliest token of what is left."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
import torch

from quantbatch.engine.grammar import Masks
from quantbatch.engine.sampling import _likeliest_of
from quantbatch.engine.trees import grow

WORDS = 67
"""Of the vocabulary; masks have 96 bits."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [[0, 1, 2], [2], [0, 2]])
def test_masked_scores_are_those_allowed(dtype: torch.dtype, places: list[int]) -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, WORDS).to(dtype)
    allowed = torch.rand(len(places), 96) < 0.3
    packed = np.packbits(allowed.numpy(), axis=1, bitorder="little").view(np.int32)
    filled: Future[None] = Future()
    filled.set_result(None)
    masks = Masks(places, torch.from_numpy(packed), filled, WORDS, torch.device("cpu"))
    wanted = scores.clone()
    wanted[places] = wanted[places].masked_fill(~allowed[:, :WORDS], -torch.inf)
    before = scores.clone()
    found = masks.apply(scores)
    assert found.dtype == dtype
    assert torch.equal(found, wanted)
    assert torch.equal(scores, before), "log-probabilities are the model's own"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_is_the_first_of_the_largest(dtype: torch.dtype) -> None:
    scores = torch.zeros(5, WORDS, dtype=dtype)
    scores[0, [9, 4, 30]] = 2.0
    scores[1] = -torch.inf
    scores[2, 5] = torch.nan
    scores[3, 66] = torch.inf
    best = _likeliest_of(scores)
    assert best.tokens_B.tolist() == [4, 0, 5, 66, 0]
    assert best.scores_B[0] == 2.0
    assert best.scores_B[2].isnan()
    assert (best.scores_B < torch.inf).tolist() == [True, True, False, False, True]
    assert _likeliest_of(scores[:0]).tokens_B.tolist() == []


def test_the_same_candidates_are_one_tree() -> None:
    assert grow(((1, 2), (3,)), 8) is grow(((1, 2), (3,)), 8)
