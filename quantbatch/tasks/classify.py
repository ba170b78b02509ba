"""One of some labels, or several: log-likelihoods to probabilities.

    a wording's weight    the sum of its tokens' log-probabilities, by its length if asked,
                          less the same after the template without a row, if asked
    a label's weight      the log of the sum of its wordings' exp(weight)
    probabilities         the softmax of the labels' weights; with `multi_label`, for each label the
                          softmax of its yes and its no

What comes before a label and what ends it are part of its tokens, and of no account to `bytes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from quantbatch.records import Failure, Ranked, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from quantbatch.records import Answer
    from quantbatch.spec import Classify
    from quantbatch.wants import Ask

UNSURE = "unsure"
"""`error_type` of rows below `min_margin`."""


class Verdict(NamedTuple):
    """What a row's labels have."""

    probabilities: dict[str, float]
    """Of each label, in the order in which they were asked for."""
    margin: float
    entropy: float
    label: str | list[str] | None
    """The likeliest, or all that apply; None if the margin is too small."""


def fields(task: Classify) -> list[pa.Field]:
    """Return the columns that the task adds to a row."""
    label = pa.list_(pa.string()) if task.multi_label else pa.string()
    if task.labels is None:
        each = pa.struct([("label", pa.string()), ("probability", pa.float64())])
        probabilities: pa.DataType = pa.list_(each)
    else:
        probabilities = pa.struct([(name, pa.float64()) for name in task.spoken])
    types = {
        "label": label,
        "probabilities": probabilities,
        "margin": pa.float64(),
        "entropy": pa.float64(),
    }
    return [pa.field(name, kind) for name, kind in types.items()]


def status(task: Classify, ask: Ask, answers: Sequence[Answer]) -> tuple[Status, Failure | None]:
    """Tell what became of a row that has all its answers."""
    verdict = weigh(task, ask, answers)
    if verdict.label is not None:
        return Status.OK, None
    why = f"the margin is {verdict.margin:.4f}, less than {task.min_margin:g}"
    return Status.INVALID, Failure(answers[0].id, UNSURE, why)


def columns(
    task: Classify, asks: Sequence[Ask], answers: Sequence[Sequence[Answer]]
) -> list[pa.Array]:
    """Turn the answers of a chunk into the task's columns, in the order of `fields`.

    Args:
        task: The job's.
        asks: What each row asked for.
        answers: The answers of each row; none for a row without one.
    """
    verdicts = [weigh(task, *row) if row[1] else None for row in zip(asks, answers, strict=True)]
    return [
        pa.array([each and _cell(task, each, field.name) for each in verdicts], field.type)
        for field in fields(task)
    ]


def _cell(task: Classify, verdict: Verdict, name: str) -> Any:  # noqa: ANN401 - of any column
    if name == "probabilities" and task.labels is None:
        found = verdict.probabilities.items()
        return [{"label": label, "probability": value} for label, value in found]
    return getattr(verdict, name)


def weigh(task: Classify, ask: Ask, answers: Sequence[Answer]) -> Verdict:
    """Weigh the labels of a row.

    Args:
        task: The job's.
        ask: What the row asked for; `about` holds its own labels, if the job has none.
        answers: The ranking after its prompt, and that after the template without a row if the
            job corrects by it.
    """
    spoken = task.spoken if task.labels is not None else {label: [label] for label in ask.about}
    words = [word for each in spoken.values() for word in each]
    if task.multi_label:
        words = [word for label in spoken for word in task.multi_label.asked(label)]
    weights = _weights(task, words, answers[0])
    if task.prior_correction:
        weights = weights - _weights(task, words, answers[1])
    if task.multi_label:
        return _several(task, list(spoken), weights.reshape(-1, 2))
    ends = np.cumsum([len(each) for each in spoken.values()])
    parts = np.split(weights, ends[:-1])
    return _one(task, list(spoken), np.array([np.logaddexp.reduce(part) for part in parts]))


def _weights(task: Classify, words: Sequence[str], answer: Answer) -> NDArray[np.float64]:
    """Return the weight of each wording in one ranking."""
    assert isinstance(answer, Ranked)
    logprobs = answer.logprobs
    assert len(logprobs) == len(words), "a ranking has other candidates"
    sums = np.array([np.sum(each, dtype=np.float64) for each in logprobs])
    match task.normalization:
        case "none":
            return sums
        case "tokens":
            return sums / [len(each) for each in logprobs]
        case "bytes":
            return sums / [len(word.encode()) for word in words]


def _one(task: Classify, labels: Sequence[str], weights: NDArray[np.float64]) -> Verdict:
    shares = np.exp(weights - np.logaddexp.reduce(weights))
    shares /= shares.sum()
    first = int(np.argmax(shares))
    margin = float(shares[first] - np.delete(shares, first).max())
    label = labels[first] if _is_sure(task, margin) else None
    return Verdict(_named(labels, shares), margin, _entropy(shares), label)


def _several(task: Classify, labels: Sequence[str], weights: NDArray[np.float64]) -> Verdict:
    """Compare each label's yes with its no, its two columns.

    The margin is that of the least sure label: how far its yes is from the threshold, as a share of
    the way to a certain yes or a certain no.
    """
    assert task.multi_label is not None
    threshold = task.multi_label.threshold
    shares = np.exp(weights - np.logaddexp.reduce(weights, axis=1, keepdims=True))
    yes = shares[:, 0]
    ways = np.where(yes >= threshold, 1 - threshold, threshold)
    margin = float((np.abs(yes - threshold) / ways).min())
    applying = [label for label, share in zip(labels, yes, strict=True) if share >= threshold]
    label = applying if _is_sure(task, margin) else None
    return Verdict(_named(labels, yes), margin, _entropy(shares), label)


def _named(labels: Sequence[str], shares: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(labels, shares.tolist(), strict=True))


def _is_sure(task: Classify, margin: float) -> bool:
    return task.min_margin is None or margin >= task.min_margin


def _entropy(shares: NDArray[np.float64]) -> float:
    there = shares[shares > 0]
    return float(-(there * np.log(there)).sum()) + 0.0
