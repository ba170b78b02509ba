r"""How far apart two models are in what they think of the same next tokens.

The measure is the Kullback-Leibler divergence from the reference p to the candidate q, in nats a
token:

    KL(p || q) = sum over all words w of p(w) log(p(w) / q(w))

The whole distributions of 300 short answers over 150,000 words would be gigabytes, and rounding
them to 16 bits biases the result (measured by others: ik_llama.cpp, PR 325). So of each token are
kept the log-probabilities of the reference's 64 likeliest words and the mass of all others, and the
candidate is asked about the same words. Two figures follow:

- A *bound*. Count all other words as one. That can only make two distributions look more alike (the
  log-sum inequality), so the divergence is at least this.
- An *estimate*. Beside the likeliest words, 64 of the others are drawn by the reference's own
  probabilities and asked about too; their mean stands for what the others add. It is right on
  average, and it is what is reported; the bound is in the JSON report.

Both are exact where the vocabulary has no more than 64 words. Measured on the quickstart's model
(2,048 words, 300 rows, float32 as the reference), as shares of the divergence over all words:

                                       fp16     bf16     int8      nf4      fp4
    answers, 1,077 tokens:   bound     99.6 %   99.5 %   99.5 %   99.3 %   98.9 %
                             estimate  99.99    99.98    99.98    99.96   100.00
    prompts, 20,889 tokens:  bound     74.9     74.7     66.5     62.2     62.1
                             estimate  99.98   100.00   100.00   100.11   100.08

That model is sure of its answers, and of the next word of a prompt it is not: there the 64
likeliest words hold 60 % of the mass. Of single tokens the estimate is coarser: p99 came out
within 2 %, the largest within 8 %.

Terms are summed as p (d - 1 + exp(-d)) with d = log p - log q, which adds up to the same since both
sides sum to 1. Each term is then at least 0 and of second order in d, so that the rounding of
float32 scores does not drown a divergence of 1e-7, which is what float16 weights cause.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

TOP_WORDS = 64
"""Words of which log-probabilities are kept; 8 bytes each and token."""
DRAWN_WORDS = 64
"""Other words that are drawn; 8 bytes each and token."""


@dataclass(frozen=True)
class Beliefs:
    """What a model thinks of P next tokens. All probabilities are natural logarithms."""

    words_PK: NDArray[np.int32]
    """The reference's likeliest words."""
    logprobs_PK: NDArray[np.float32]
    """Of those words."""
    others_P: NDArray[np.float32]
    """Of all other words together; -inf if there are none."""
    drawn_PM: NDArray[np.int32]
    """Some of the others, drawn by the reference's probabilities; one can come twice."""
    drawn_logprobs_PM: NDArray[np.float32]
    """Of those."""
    target_P: NDArray[np.float32]
    """Of the token that came."""
    likeliest_P: NDArray[np.int32]
    """This model's own likeliest word."""

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return the beliefs of several runs of tokens as one."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def split(self, places: list[int]) -> list[Self]:
        """Return the runs of tokens that end at places, and the rest."""
        columns = (np.split(getattr(self, field.name), places) for field in fields(self))
        return [type(self)(*parts) for parts in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Differences:
    """How far a candidate is from the reference on P tokens."""

    row_P: NDArray[np.int64]
    """Which of the compared rows a token belongs to."""
    in_prompt_P: NDArray[np.bool_]
    """Whether it is the user's text, not the answer."""
    kl_P: NDArray[np.float64]
    """Nats, estimated."""
    kl_bound_P: NDArray[np.float64]
    """Nats, at least."""
    nll_P: NDArray[np.float64]
    """Change of the token's negative log-likelihood, in nats."""
    probability_P: NDArray[np.float64]
    """Change of the token's probability."""
    same_top_P: NDArray[np.bool_]
    """Whether both find the same word likeliest."""
    not_finite: int
    """Tokens left out because a model's scores were no numbers."""

    def of(self, *, prompts: bool) -> Self:
        """Return the part on prompts, or that on answers."""
        return self._where(self.in_prompt_P == prompts)

    def sound(self) -> Self:
        """Return the part whose figures are numbers."""
        chosen = np.isfinite(self.kl_P) & np.isfinite(self.nll_P)
        return replace(self._where(chosen), not_finite=int((~chosen).sum()))

    def _where(self, chosen: NDArray[np.bool_]) -> Self:
        columns = (
            "row_P",
            "in_prompt_P",
            "kl_P",
            "kl_bound_P",
            "nll_P",
            "probability_P",
            "same_top_P",
        )
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})


def differences(
    reference: Beliefs,
    candidate: Beliefs,
    row_P: NDArray[np.int64],
    in_prompt_P: NDArray[np.bool_],
) -> Differences:
    """Compare what two models think of the same tokens."""
    theirs, ours = candidate.target_P.astype(float), reference.target_P.astype(float)
    with np.errstate(invalid="ignore"):
        return Differences(
            row_P,
            in_prompt_P,
            *kl_nats(reference, candidate),
            ours - theirs,
            np.exp(theirs) - np.exp(ours),
            reference.likeliest_P == candidate.likeliest_P,
            not_finite=0,
        ).sound()


class Divergence(NamedTuple):
    """At each of P tokens, in nats."""

    estimate_P: NDArray[np.float64]
    bound_P: NDArray[np.float64]
    """No more than the divergence over all words."""


def kl_nats(reference: Beliefs, candidate: Beliefs) -> Divergence:
    """Return how far a candidate is from the reference."""
    top_PK = _terms(reference.logprobs_PK, candidate.logprobs_PK)
    bound_P = top_PK.sum(-1) + _terms(reference.others_P, candidate.others_P)
    if not reference.drawn_PM.shape[1]:
        return Divergence(bound_P, bound_P)
    with np.errstate(invalid="ignore", over="ignore"):
        ours, theirs = reference.drawn_logprobs_PM, candidate.drawn_logprobs_PM
        distance_PM = ours.astype(float) - theirs.astype(float)
        per_mass_P = (distance_PM + np.expm1(-distance_PM)).mean(-1)
        mass_P = np.exp(reference.others_P.astype(float))
        # Where there are no others, what was drawn means nothing.
        others_P = np.where(mass_P > 0, mass_P * per_mass_P, 0.0)
    return Divergence(top_PK.sum(-1) + others_P, bound_P)


def _terms(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return p log(p / q) - p + q, from log p and log q."""
    log_p, log_q = ours.astype(float), theirs.astype(float)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        distance = log_p - log_q
        terms: NDArray[np.float64] = np.exp(log_p) * (distance + np.expm1(-distance))
        without_p = np.isneginf(log_p)
        # Only q is left of those; 0 times infinity is no number.
        terms[without_p] = np.exp(log_q[without_p])
    return terms
