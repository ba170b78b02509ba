"""Rows that only read, one at a time by the model's plain forward: slow, and the measure of
`reading.py`.

Each candidate is computed with the whole prompt before it, nothing is shared, and scores are turned
into float64 before they become log-probabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from quantbatch.engine.pieces import PLACES_ALONE
from quantbatch.records import Embedded, Failure, Ranked, Scored
from quantbatch.wants import Embed, Rank, Score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from quantbatch.records import Answer, Request


def read(model: PreTrainedModel, request: Request) -> Answer:
    """Answer a request that wants no text."""
    with torch.inference_mode():
        return _read(model, request)


def _read(model: PreTrainedModel, request: Request) -> Answer:
    prompt = request.prompt_ids
    match request.want:
        case Rank(candidates=candidates):
            found = tuple(
                tuple(_logprobs(model, prompt + candidate, len(prompt))) for candidate in candidates
            )
            answer: Answer = Ranked(request.id, found)
            sound = all(map(_is_finite, found))
        case Score(first=first):
            logprobs = tuple(_logprobs(model, prompt, first))
            answer, sound = Scored(request.id, logprobs), _is_finite(logprobs)
        case Embed(pooling=pooling):
            hidden_TH = _hidden(model, prompt)
            pooled_H = hidden_TH[-1] if pooling == "last" else hidden_TH.double().mean(0)
            vector = tuple(pooled_H.float().tolist())
            answer, sound = Embedded(request.id, vector), _is_finite(vector)
        case _:
            raise AssertionError(request.want)
    return answer if sound else Failure(request.id, "model", "the model's scores are not finite")


def _logprobs(model: PreTrainedModel, ids: Sequence[int], first: int) -> list[float]:
    """Return the log-probability of each token from the first that counts."""
    runs: Any = model
    found: list[float] = []
    ids_1T = torch.tensor([list(ids)], device=model.device)
    for begin in range(first, len(ids), PLACES_ALONE):
        end = min(len(ids), begin + PLACES_ALONE)
        # Nothing after these places changes their scores.
        output = runs(input_ids=ids_1T[:, : end - 1], use_cache=False, logits_to_keep=end - begin)
        scores_PV = output.logits[0, begin - end :]
        taken_P1 = ids_1T[0, begin:end, None]
        found += scores_PV.double().log_softmax(-1).gather(1, taken_P1)[:, 0].tolist()
    return found


def _hidden(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    base: Any = model.base_model
    hidden_1TH: Tensor = base(
        input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False
    ).last_hidden_state
    return hidden_1TH[0]


def _is_finite(numbers: Sequence[float]) -> bool:
    return all(abs(number) < float("inf") for number in numbers)
