"""What is reported of a width: figures with intervals, from what it said and what it thought."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantbatch.compare.statistics import Bootstrap, mcnemar
from quantbatch.records import Completion, Failure, FinishReason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from quantbatch.compare.divergence import Differences
    from quantbatch.compare.statistics import Interval
    from quantbatch.records import Answer

MOST_FLIPS = 10
"""Pairs of labels that are listed, the most frequent first."""


@dataclass(frozen=True)
class Loading:
    """What a width took."""

    dtype: str
    """Type of the weights that are not quantized."""
    compute_dtype: str
    planned_weight_bytes: int
    weight_bytes: int
    """As the loaded tensors have it, scales included."""
    bits: float
    """Of a parameter of the whole model, embeddings and scales included."""
    float32_bytes: int
    """What the same parameters take as float32."""
    planned_bytes: int
    """With KV cache and workspace."""
    peak_bytes: int
    """Most memory that loading, answering and scoring took. On a CPU it is the growth of the
    process, of which later widths need less: they reuse what earlier ones left."""
    load_s: float


@dataclass(frozen=True)
class Said:
    """How a width answered the rows."""

    answers: tuple[Answer, ...]
    """In the order of the rows."""
    generate_s: float

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        done = (each for each in self.answers if isinstance(each, Completion))
        return sum(len(each.token_ids) for each in done)


@dataclass(frozen=True)
class Measured:
    """One width on all rows."""

    name: str
    loading: Loading
    said: Said
    differences: Differences | None
    """From the reference; None for the reference itself."""


def label_of(answer: Answer) -> str | None:
    """Return what an answer is counted as; None if there is no answer."""
    return answer.text.strip() if isinstance(answer, Completion) else None


def describe_loading(loading: Loading, said: Said) -> dict[str, Any]:
    """Return memory and speed of a width."""
    memory = {
        name: getattr(loading, name)
        for name in (
            "weight_bytes",
            "planned_weight_bytes",
            "float32_bytes",
            "bits",
            "planned_bytes",
            "peak_bytes",
        )
    }
    return {
        "dtype": loading.dtype,
        "compute_dtype": loading.compute_dtype,
        "memory": memory | {"saved": 1 - loading.weight_bytes / loading.float32_bytes},
        "speed": {
            "tokens_per_s": said.tokens / said.generate_s if said.generate_s else 0.0,
            "tokens": said.tokens,
            "generate_s": said.generate_s,
            "load_s": loading.load_s,
        },
    }


def describe_counts(said: Said, gold: Sequence[str | None]) -> dict[str, int]:
    """Count answers by what became of them; `invalid` are labels that the gold column never has."""
    done = [each for each in said.answers if isinstance(each, Completion)]
    known = {label for label in gold if label is not None}
    labels = [each.text.strip() for each in done]
    return {
        "rows": len(said.answers),
        "error": sum(isinstance(each, Failure) for each in said.answers),
        "truncated": sum(each.finish_reason is FinishReason.LENGTH for each in done),
        "empty": labels.count(""),
        "invalid": sum(label not in known for label in labels) if known else 0,
    }


def describe_divergence(found: Differences, bootstrap: Bootstrap) -> dict[str, Any] | None:
    """Return how far a width's beliefs are from the reference's; None where no token counts."""
    if not len(found.row_P):
        return None

    def by_row(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(found.row_P, values, bootstrap.rows).astype(float)

    tokens = by_row(np.ones(len(found.row_P)))
    kl = bootstrap.ratio(by_row(found.kl_P), tokens)
    p99 = bootstrap.quantile(found.kl_P, found.row_P, 0.99)
    return {
        "tokens": len(found.row_P),
        "not_finite": found.not_finite,
        "kl_mean": kl._asdict(),
        "kl_p99": p99._asdict(),
        "kl_max": float(found.kl_P.max()),
        "kl_mean_bound": float(found.kl_bound_P.mean()),
        "perplexity_ratio": bootstrap.ratio(by_row(found.nll_P), tokens, np.exp)._asdict(),
        "same_top": bootstrap.ratio(by_row(found.same_top_P), tokens)._asdict(),
        "rms_dp": bootstrap.ratio(by_row(found.probability_P**2), tokens, np.sqrt)._asdict(),
        "mean_dp": bootstrap.ratio(by_row(found.probability_P), tokens)._asdict(),
    }


def describe_answers(reference: Said, candidate: Said, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return how a width's answers differ from the reference's, token by token."""
    places = [
        _first_difference(ours, theirs)
        for ours, theirs in zip(reference.answers, candidate.answers, strict=True)
    ]
    differ = sorted(place for place in places if place is not None)
    same = np.array([place is None for place in places])
    return {
        "identical": bootstrap.share(same)._asdict(),
        "differ": len(differ),
        "first_difference_median": float(np.median(differ)) if differ else None,
        "first_differences": differ,
        "longest": max((_length(answer) for answer in reference.answers), default=0),
    }


def _first_difference(ours: Answer, theirs: Answer) -> int | None:
    """Return the place of the first token that differs, from 0; None if there is none."""
    if not isinstance(ours, Completion) or not isinstance(theirs, Completion):
        return None if type(ours) is type(theirs) else 0
    pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
    differs = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
    if differs is None and len(ours.token_ids) != len(theirs.token_ids):
        return min(len(ours.token_ids), len(theirs.token_ids))
    return differs


def _length(answer: Answer) -> int:
    return len(answer.token_ids) if isinstance(answer, Completion) else 0


def describe_labels(reference: Said, candidate: Said, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return how often the labels of both are the same, and which became which."""
    ours = [label_of(answer) for answer in reference.answers]
    theirs = [label_of(answer) for answer in candidate.answers]
    flips = Counter((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
    return {
        "distinct": len(set(ours)),
        "same": bootstrap.share(np.array(ours) == np.array(theirs))._asdict(),
        "flipped": flips.total(),
        "flips": [
            {"reference": a, "candidate": b, "count": count, "back": flips[b, a]}
            for (a, b), count in flips.most_common(MOST_FLIPS)
        ],
    }


def describe_accuracy(
    said: Said, gold: Sequence[str | None], bootstrap: Bootstrap, reference: Said | None = None
) -> dict[str, Any] | None:
    """Return how often a width is right, and against the reference; None without gold labels."""
    known = np.array([label is not None for label in gold], bool)
    if not known.any():
        return None

    def right(answers: Said) -> NDArray[np.bool_]:
        labels = [label_of(answer) for answer in answers.answers]
        same = [a is not None and a == b for a, b in zip(labels, gold, strict=True)]
        return np.array(same, bool)

    rows = known.astype(float)
    theirs = right(said)
    described: dict[str, Any] = {
        "rows": int(known.sum()),
        "value": _of_known(theirs, known, bootstrap)._asdict(),
    }
    if reference is not None:
        ours = right(reference)
        change = theirs.astype(float) - ours.astype(float)
        test = mcnemar(int((ours & ~theirs).sum()), int((theirs & ~ours).sum()))
        described |= {
            "difference": bootstrap.ratio(change, rows)._asdict(),
            "right_to_wrong": test.worse,
            "wrong_to_right": test.better,
            "mcnemar_exact_p": test.exact_p,
            "mcnemar_mid_p": test.mid_p,
        }
    return described


def _of_known(hits: NDArray[np.bool_], known: NDArray[np.bool_], bootstrap: Bootstrap) -> Interval:
    if known.all():
        return bootstrap.share(hits)
    return bootstrap.ratio(hits.astype(float), known.astype(float))
