"""The teacher-forced pass against plain forwards: architectures, padding, batches, pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from quantbatch.compare import scoring
from quantbatch.compare.divergence import Beliefs, kl_nats
from quantbatch.compare.scoring import Scorer, Text
from tests.integration.llama import loaded, make_model, random_prompts

if TYPE_CHECKING:
    from pathlib import Path

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 32, "pad_token_id": 0, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25, "pad_token_id": 0},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {},
    "mixtral": {"num_local_experts": 4},
    "mamba": {"state_size": 8, "pad_token_id": 0},
}
"""Caps, scales, experts, layers of another name, and no attention at all."""


def texts(*, with_prompt: bool = False) -> list[Text]:
    made = []
    for ids in random_prompts(9):
        ids = [token % 300 for token in ids] + [5, 6, 7]
        cut = max(1, len(ids) // 2)
        made.append(Text(tuple(ids[:cut]), tuple(ids[cut:]), with_prompt))
    return made


def plain(model: Any, text: Text) -> torch.Tensor:
    """Log-probabilities after each token but the last that counts, over the text alone."""
    with torch.inference_mode():
        scores = model(input_ids=torch.tensor([text.token_ids]), use_cache=False).logits[0]
    found: torch.Tensor = scores.float().log_softmax(-1)[text.first - 1 : -1]
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_it_is_what_the_plain_forward_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, padding: Any
) -> None:
    sizes = {"initializer_range": 0.2, "eos_token_id": 2}
    model = loaded(make_model(tmp_path, kind, dtype=torch.float32, **sizes | MODELS[kind]))
    # Pieces of 7 tokens: smaller than an answer, larger than another.
    monkeypatch.setattr(scoring, "PIECE_BYTES", 7 * scoring.SCORE_BYTES * 300)
    asked = texts()
    found = Scorer(model, 100, padding, top_words=20).ask(asked)
    for text, beliefs in zip(asked, found, strict=True):
        expected = plain(model, text)
        target = expected.gather(1, torch.tensor(text.answer_ids)[:, None])[:, 0]
        assert beliefs.target_P == pytest.approx(target.numpy(), abs=2e-4)
        words = torch.from_numpy(beliefs.words_PK).long()
        top = expected.gather(1, words)
        assert beliefs.logprobs_PK == pytest.approx(top.numpy(), abs=2e-4)
        likeliest = expected.topk(20).values.sort(descending=True).values
        assert np.sort(beliefs.logprobs_PK)[:, ::-1] == pytest.approx(likeliest.numpy(), abs=2e-4)
        assert beliefs.others_P == pytest.approx((1 - top.exp().sum(-1)).log().numpy(), abs=1e-2)
        assert beliefs.likeliest_P.tolist() == expected.argmax(-1).tolist()
    assert "forward" not in vars(model.base_model)


def test_prompts_count_if_asked(tmp_path: Path) -> None:
    model = loaded(make_model(tmp_path, "llama", dtype=torch.float32))
    asked = texts(with_prompt=True)
    found = Scorer(model, 60).ask(asked)
    for text, beliefs in zip(asked, found, strict=True):
        assert text.counted == len(text.token_ids) - 1 == len(beliefs.target_P)
        expected = plain(model, text).gather(1, torch.tensor(text.token_ids[1:])[:, None])[:, 0]
        assert beliefs.target_P == pytest.approx(expected.numpy(), abs=2e-4)


def test_other_batches_and_padding_say_the_same(tmp_path: Path) -> None:
    model = loaded(make_model(tmp_path, "llama", dtype=torch.float32))
    asked = texts()
    reference = Scorer(model, 500).ask(asked)
    again = Scorer(model, 40, "left").ask(asked, reference)
    kl = kl_nats(Beliefs.joined(reference), Beliefs.joined(again))
    assert 0 <= kl.estimate_P.max() < 1e-10


def test_scores_are_there_for_a_piece_of_the_tokens_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(make_model(tmp_path, "llama", dtype=torch.float32))
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _a, out: sizes.append(out.shape[-2]))
    monkeypatch.setattr(scoring, "PIECE_BYTES", 5 * scoring.SCORE_BYTES * 300)
    asked = texts()
    Scorer(model, 200).ask(asked)
    assert max(sizes) <= 5
    assert sum(sizes) >= sum(text.counted for text in asked)


def test_a_changed_weight_is_seen(tmp_path: Path) -> None:
    model = loaded(make_model(tmp_path, "llama", dtype=torch.float32, initializer_range=0.2))
    asked = texts()
    reference = Scorer(model, 200).ask(asked)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    damaged = Scorer(model, 200).ask(asked, reference)
    assert kl_nats(Beliefs.joined(reference), Beliefs.joined(damaged)).bound_P.mean() > 1e-4
