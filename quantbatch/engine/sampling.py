"""Choosing the next token of many rows at once, each by its own settings.

What happens to a row's scores, in this order, is what `spec.Sampling` says and what the static
engine does with transformers' processors: grammar, bias, repetition penalty, presence and frequency
penalties, forbidden words, minimum length; and for rows with a temperature: temperature, top_k,
top_p, min_p, and the draw with the row's own noise. Rows without a setting go through its step with
a value that changes nothing; a step that no row needs is left out. Greedy rows, the most of them in
practice, cost one maximum.

Settings are kept in tensors for as long as the batch stays the same. Nothing here reads a result
back from the device.

Shapes: B rows of a step, S places in the batch, V words of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from quantbatch.engine.kvstore import send
from quantbatch.engine.noise import gumbel_noise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from quantbatch.engine.ends import Endings
    from quantbatch.engine.grammar import Masks
    from quantbatch.engine.pieces import Row
    from quantbatch.spec import Sampling


class Chosen(NamedTuple):
    """The next tokens of the rows of a step, on the device."""

    tokens_B: Tensor
    sound_B: Tensor
    """False where the scores are no numbers, or no token has a chance."""
    logprobs: Logprobs | None


class Logprobs(NamedTuple):
    """Log-probabilities for the rows that ask for them."""

    rows: list[int]
    """Their places among the rows of the step."""
    chosen_R: Tensor
    top_ids_RK: Tensor
    top_RK: Tensor


class _Best(NamedTuple):
    """The likeliest token of each row, the first of several, and its score."""

    tokens_B: Tensor
    scores_B: Tensor


def _likeliest_of(scores_BV: Tensor) -> _Best:
    if scores_BV.device.type != "cpu" or scores_BV.dtype != torch.float32:
        best = scores_BV.max(-1)
        return _Best(best.indices, best.values)
    # Where the maximum is, torch finds out word by word on a CPU: of 32 rows of 150,000 in 4.1 ms,
    # numpy in 0.7 (torch 2.13, measured).
    tokens_B = torch.from_numpy(scores_BV.numpy().argmax(1))
    return _Best(tokens_B, scores_BV.gather(1, tokens_B[:, None])[:, 0])


class _Settings(NamedTuple):
    """The settings of the rows of a batch, as tensors; None where no row has any."""

    bias: tuple[Tensor, Tensor, Tensor] | None
    """Row, token and value of each bias."""
    repetition_B1: Tensor | None
    presence_B1: Tensor | None
    frequency_B1: Tensor | None
    slots_B: Tensor
    drawn: list[int]
    """Places of the rows with a temperature."""
    drawn_R: Tensor
    temperature_R1: Tensor
    top_k_R1: Tensor | None
    top_p_R1: Tensor | None
    min_p_R1: Tensor | None
    seeds_R: Tensor
    logprob_rows: list[int]
    logprob_rows_R: Tensor
    most_logprobs: int


class Sampler:
    """Chooses tokens.

    Args:
        slots: Places in the batch.
        endings: The end tokens, which may not come before a row's minimum.
        device: Where scores are.
    """

    def __init__(self, *, slots: int, endings: Endings, device: torch.device) -> None:
        self._slots = slots
        self._endings = endings
        self._device = device
        self._settings: tuple[list[tuple[Row, int]], _Settings] | None = None
        self._in_prompt_SV: Tensor | None = None
        self._counts_SV: Tensor | None = None

    def _send(self, numbers: Sequence[float], dtype: torch.dtype = torch.long) -> Tensor:
        return send(numbers, self._device, dtype)

    def start(self, row: Row, vocabulary: int) -> None:
        """Note what a row that enters the batch has said so far."""
        if not row.request.sampling.counts_tokens:
            return
        if self._in_prompt_SV is None or self._counts_SV is None:
            shape = self._slots, vocabulary
            self._in_prompt_SV = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._counts_SV = torch.zeros(shape, dtype=torch.int32, device=self._device)
        self._in_prompt_SV[row.slot] = False
        self._in_prompt_SV[row.slot].index_fill_(0, self._send(row.request.prompt_ids), value=True)
        self._counts_SV[row.slot] = 0
        said = row.tokens[row.prompt_tokens :]
        if said:
            ones = torch.ones(len(said), dtype=torch.int32, device=self._device)
            self._counts_SV[row.slot].index_add_(0, self._send(said), ones)

    def choose(
        self,
        logits_BV: Tensor,
        rows: Sequence[Row],
        generated: Sequence[int],
        masks: Masks | None = None,
    ) -> Chosen:
        """Choose the next token of each row.

        Args:
            logits_BV: The model's scores.
            rows: The rows.
            generated: Tokens that each has generated before this one.
            masks: What the grammars of rows allow, if any has one.
        """
        sound_B = logits_BV.amax(-1) < torch.inf  # false for nan, too
        scores_BV = masks.apply(logits_BV) if masks else logits_BV
        if all(row.request.sampling.is_plain for row in rows):
            best = _likeliest_of(scores_BV)
            return Chosen(best.tokens_B, sound_B & (best.scores_B > -torch.inf), None)
        settings = self._settings_of(rows)
        scores_BV = self._adjusted(scores_BV.float(), rows, generated, settings)
        best = _likeliest_of(scores_BV)
        tokens_B, sound_B = best.tokens_B, sound_B & (best.scores_B > -torch.inf)
        if settings.drawn:
            warped_RV = _warped(scores_BV[settings.drawn_R], settings)
            steps = self._send([generated[i] for i in settings.drawn])
            noise_RV = gumbel_noise(settings.seeds_R, steps, scores_BV.shape[1])
            tokens_B[settings.drawn_R] = (warped_RV + noise_RV).argmax(-1)
        self._count(rows, settings.slots_B, tokens_B)
        return Chosen(tokens_B, sound_B, _logprobs(logits_BV, tokens_B, settings))

    def _count(self, rows: Sequence[Row], slots_B: Tensor, tokens_B: Tensor) -> None:
        if self._counts_SV is not None:
            counts = [row.request.sampling.counts_tokens for row in rows]
            counted = self._send(counts, torch.int32)
            self._counts_SV.index_put_((slots_B, tokens_B), counted, accumulate=True)

    def _settings_of(self, rows: Sequence[Row]) -> _Settings:
        places = [(row, row.slot) for row in rows]
        if self._settings is None or self._settings[0] != places:
            self._settings = places, self._make_settings(rows)
        return self._settings[1]

    def _make_settings(self, rows: Sequence[Row]) -> _Settings:
        samplings = [row.request.sampling for row in rows]
        drawn = [i for i, sampling in enumerate(samplings) if sampling.temperature > 0]
        of_drawn = [samplings[i] for i in drawn]
        asked = [i for i, sampling in enumerate(samplings) if sampling.logprobs is not None]
        return _Settings(
            bias=self._bias(samplings),
            repetition_B1=self._column(samplings, lambda s: s.repetition_penalty, nothing=1),
            presence_B1=self._column(samplings, lambda s: s.presence_penalty, nothing=0),
            frequency_B1=self._column(samplings, lambda s: s.frequency_penalty, nothing=0),
            slots_B=self._send([row.slot for row in rows]),
            drawn=drawn,
            drawn_R=self._send(drawn),
            temperature_R1=self._send([s.temperature for s in of_drawn], torch.float32)[:, None],
            top_k_R1=self._column(of_drawn, lambda s: float(s.top_k), nothing=0),
            top_p_R1=self._column(of_drawn, lambda s: s.top_p, nothing=1),
            min_p_R1=self._column(of_drawn, lambda s: s.min_p, nothing=0),
            seeds_R=self._send([rows[i].request.seed for i in drawn]),
            logprob_rows=asked,
            logprob_rows_R=self._send(asked),
            most_logprobs=max((samplings[i].logprobs or 0 for i in asked), default=0),
        )

    def _column(
        self, samplings: Sequence[Sampling], value: Callable[[Sampling], float], *, nothing: float
    ) -> Tensor | None:
        values = [float(value(sampling)) for sampling in samplings]
        if all(each == nothing for each in values):
            return None
        return self._send(values, torch.float32)[:, None]

    def _bias(self, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor, Tensor] | None:
        found = [
            (row, token, value)
            for row, sampling in enumerate(samplings)
            for token, value in sampling.logit_bias.items()
        ]
        if not found:
            return None
        rows, tokens, values = zip(*found, strict=True)
        return self._send(rows), self._send(tokens), self._send(values, torch.float32)

    def _adjusted(
        self,
        scores_BV: Tensor,
        rows: Sequence[Row],
        generated: Sequence[int],
        settings: _Settings,
    ) -> Tensor:
        if settings.bias is not None:
            places, tokens, values = settings.bias
            scores_BV = scores_BV.index_put((places, tokens), values, accumulate=True)
        if self._counts_SV is not None and self._in_prompt_SV is not None:
            counts_BV = self._counts_SV[settings.slots_B]
            if settings.repetition_B1 is not None:
                seen_BV = self._in_prompt_SV[settings.slots_B] | (counts_BV > 0)
                scores_BV = _repeated_less(scores_BV, seen_BV, settings.repetition_B1)
            if settings.presence_B1 is not None:
                scores_BV = scores_BV - settings.presence_B1 * (counts_BV > 0)
            if settings.frequency_B1 is not None:
                scores_BV = scores_BV - settings.frequency_B1 * counts_BV
        struck, forbidden = self._forbidden(rows, generated, scores_BV.shape[1])
        if struck:
            nothing = scores_BV.new_full((), -torch.inf)
            scores_BV = scores_BV.index_put((self._send(struck), self._send(forbidden)), nothing)
        return scores_BV

    def _forbidden(
        self, rows: Sequence[Row], generated: Sequence[int], vocabulary: int
    ) -> tuple[list[int], list[int]]:
        """Return the places and tokens that may not be chosen now."""
        places: list[int] = []
        tokens: list[int] = []
        for place, (row, count) in enumerate(zip(rows, generated, strict=True)):
            sampling = row.request.sampling
            forbidden: set[int] = set()
            if count < sampling.min_new_tokens:
                forbidden |= self._endings.end_ids(sampling)
            if sampling.bad_words:
                answer = row.tokens[row.prompt_tokens :]
                words = self._endings.bad_word_ids(sampling)
                forbidden |= {word[-1] for word in words if _is_next(word, answer)}
            known = sorted(token for token in forbidden if token < vocabulary)
            places += [place] * len(known)
            tokens += known
        return places, tokens


def _is_next(word: Sequence[int], answer: Sequence[int]) -> bool:
    """Tell whether an answer ends with all of a word but its last token."""
    begun = len(word) - 1
    return begun == 0 or tuple(answer[-begun:]) == tuple(word[:begun])


def _repeated_less(scores_BV: Tensor, seen_BV: Tensor, penalty_B1: Tensor) -> Tensor:
    lower_BV = torch.where(scores_BV > 0, scores_BV / penalty_B1, scores_BV * penalty_B1)
    return torch.where(seen_BV, lower_BV, scores_BV)


def _warped(scores_RV: Tensor, settings: _Settings) -> Tensor:
    """Narrow scores down to the tokens that may be drawn."""
    scores_RV = scores_RV / settings.temperature_R1
    if settings.top_k_R1 is not None or settings.top_p_R1 is not None:
        scores_RV = _likeliest(scores_RV, settings.top_k_R1, settings.top_p_R1)
    if settings.min_p_R1 is not None:
        floor_R1 = scores_RV.amax(-1, keepdim=True) + settings.min_p_R1.log()
        scores_RV = scores_RV.masked_fill(scores_RV < floor_R1, -torch.inf)
    return scores_RV


def _likeliest(scores_RV: Tensor, top_k_R1: Tensor | None, top_p_R1: Tensor | None) -> Tensor:
    """Strike out all but the k likeliest tokens, and of these all but the likeliest that together
    have the probability p. Tokens as likely as the last one that stays, stay too.
    """
    sorted_RV = scores_RV.sort(-1, descending=True).values
    if top_k_R1 is not None:
        k_R1 = top_k_R1.long().clamp(max=scores_RV.shape[1])
        last_R1 = sorted_RV.gather(1, (k_R1 - 1).clamp(min=0))
        last_R1 = last_R1.masked_fill(k_R1 == 0, -torch.inf)
        scores_RV = scores_RV.masked_fill(scores_RV < last_R1, -torch.inf)
        sorted_RV = sorted_RV.masked_fill(sorted_RV < last_R1, -torch.inf)
    if top_p_R1 is not None:
        likely_RV = sorted_RV.softmax(-1)
        before_RV = likely_RV.cumsum(-1) - likely_RV
        stays_RV = before_RV < top_p_R1
        last_R1 = sorted_RV.masked_fill(~stays_RV, torch.inf).amin(-1, keepdim=True)
        scores_RV = scores_RV.masked_fill(scores_RV < last_R1, -torch.inf)
    return scores_RV


def _logprobs(logits_BV: Tensor, tokens_B: Tensor, settings: _Settings) -> Logprobs | None:
    if not settings.logprob_rows:
        return None
    rows_R = settings.logprob_rows_R
    logprobs_RV = logits_BV[rows_R].float().log_softmax(-1)
    chosen_R = logprobs_RV.gather(1, tokens_B[rows_R][:, None])[:, 0]
    top = logprobs_RV.topk(settings.most_logprobs, dim=-1)
    return Logprobs(settings.logprob_rows, chosen_R, top.indices, top.values)
