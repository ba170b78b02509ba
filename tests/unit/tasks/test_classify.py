"""Log-likelihoods to labels: by hand, and what is true of any."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbatch.records import Answer, Failure, Ranked, RequestId, Status
from quantbatch.spec import Classify, JobSpec
from quantbatch.tasks import classify, columns, result
from quantbatch.wants import Ask

ID = RequestId(0, 0)


def ranked(*sums: float, tokens: int = 1) -> Ranked:
    return Ranked(ID, tuple((total / tokens,) * tokens for total in sums))


def log(*shares: float) -> Ranked:
    return ranked(*map(math.log, shares))


def weigh(answers: list[Any], about: Any = None, **task: Any) -> classify.Verdict:
    task = {"labels": ["a", "bb"]} | task
    return classify.weigh(Classify.model_validate(task), Ask(about=about), answers)


def test_probabilities_are_among_the_labels() -> None:
    found = weigh([log(0.3, 0.1)])
    assert found.probabilities == pytest.approx({"a": 0.75, "bb": 0.25})
    assert found.label == "a"
    assert found.margin == pytest.approx(0.5)
    assert found.entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_wordings_of_a_label_add_up() -> None:
    found = weigh([log(0.2, 0.2, 0.3)], labels={"x": ["a", "b"], "y": "c"})
    assert found.probabilities == pytest.approx({"x": 4 / 7, "y": 3 / 7})


def test_lengths_divide() -> None:
    answer = Ranked(ID, ((-2.0,), (-1.0, -1.0, -1.0)))
    assert weigh([answer]).label == "a"
    assert weigh([answer], normalization="tokens").label == "bb"
    odds = weigh([answer], normalization="bytes").probabilities
    assert math.log(odds["a"] / odds["bb"]) == pytest.approx(-2 / 1 + 3 / 2)


def test_the_prior_is_taken_off() -> None:
    found = weigh([log(0.6, 0.2), log(0.9, 0.1)], prior_correction=True)
    assert found.probabilities == pytest.approx({"a": 1 / 4, "bb": 3 / 4})


def test_each_of_several_labels_is_for_itself() -> None:
    found = weigh([log(0.3, 0.1, 0.01, 0.03)], multi_label={})
    assert found.probabilities == pytest.approx({"a": 0.75, "bb": 0.25})
    assert found.label == ["a"]
    assert found.margin == pytest.approx(0.5)
    assert weigh([log(0.3, 0.1, 0.01, 0.03)], multi_label={"threshold": 0.2}).label == ["a", "bb"]


@pytest.mark.parametrize(
    ("yes", "threshold", "margin"),
    [(0.75, 0.5, 0.5), (0.25, 0.5, 0.5), (0.7, 0.6, 0.25), (0.5, 0.8, 0.375), (0.8, 0.8, 0.0)],
)
def test_how_sure_a_yes_is_is_measured_from_the_threshold(
    yes: float, threshold: float, margin: float
) -> None:
    sure = (0.999, 0.001)
    options = {"threshold": threshold}
    found = weigh([log(*sure, yes, 1 - yes)], multi_label=options)
    assert found.margin == pytest.approx(margin, abs=1e-9)
    assert found.label == (["a", "bb"] if yes >= threshold else ["a"])


@given(st.lists(st.floats(-1e4, -1e-9), min_size=3, max_size=3))
def test_they_are_probabilities_whatever_comes(sums: list[float]) -> None:
    found = weigh([ranked(*sums)], labels=["a", "b", "c"])
    assert sum(found.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert 0 <= found.margin <= 1
    assert -1e-12 <= found.entropy <= math.log(3) + 1e-9
    assert found.label == max(found.probabilities, key=lambda label: found.probabilities[label])


def spec_of(**task: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "n", "input": {"uri": "i"}, "model": {"id": "m"}, "output": {"uri": "o"},
            "prompt": {"template": "{{ t }}"}, "task": {"kind": "classify"} | task,
        }
    )  # fmt: skip


def test_an_unsure_row_keeps_its_probabilities_and_has_no_label() -> None:
    spec = spec_of(labels=["a", "b"], min_margin=0.2)
    answers: list[list[Answer]] = [
        [log(0.5, 0.45)], [log(0.6, 0.3)], [], [Failure(ID, "model", "no")],
    ]  # fmt: skip
    asks = [Ask()] * 4
    found = [result(spec, *row) for row in zip(asks, answers, strict=True)]
    assert [each.status for each in found] == [
        Status.INVALID, Status.OK, Status.ERROR, Status.ERROR,
    ]  # fmt: skip
    assert found[0].failure == Failure(ID, "unsure", "the margin is 0.0526, less than 0.2")
    label, probabilities, margin, entropy = columns(spec, asks, answers)
    assert label.to_pylist() == [None, "a", None, None]
    assert probabilities.type == pa.struct([("a", pa.float64()), ("b", pa.float64())])
    assert probabilities.to_pylist()[0] == pytest.approx({"a": 0.5 / 0.95, "b": 0.45 / 0.95})
    assert probabilities.null_count == margin.null_count == entropy.null_count == 2


def test_a_row_s_own_labels_come_as_a_list() -> None:
    spec = spec_of(labels_column="own")
    asks = [Ask(about=["x", "y"]), Ask(about=["z", "w"])]
    _, probabilities, margin, _ = columns(spec, asks, [[log(0.1, 0.3)], [log(0.2, 0.2)]])
    assert probabilities.to_pylist() == [
        [{"label": "x", "probability": pytest.approx(0.25)},
         {"label": "y", "probability": pytest.approx(0.75)}],
        [{"label": "z", "probability": 0.5}, {"label": "w", "probability": 0.5}],
    ]  # fmt: skip
    assert margin.to_pylist() == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"labels": []}, "it takes at least 2"),
        ({"labels": ["a"]}, "it takes at least 2"),
        ({"labels": ["a", "a "]}, "'a' is there twice"),
        ({"labels": ["e\u0301", "\xe9"]}, "is there twice"),
        ({"labels": ["a", " "]}, "a label is empty"),
        ({"labels": {"a": ["x"], "b": ["x "]}}, "the wording 'x' is there twice"),
        ({}, "either labels or labels_column"),
        ({"labels": ["a", "b"], "labels_column": "c"}, "either labels or labels_column"),
        ({"labels": ["a"], "multi_label": {"question": "is it"}}, "lacks {label}"),
    ],
)
def test_labels_that_make_no_sense_are_refused(task: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        spec_of(**task)


def test_what_does_not_go_with_a_task_is_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"engine": {"kind": "llama_cpp"}}, "llama_cpp only generates"),
        ({"sampling": {"n": 2, "temperature": 1.0}}, "samples nothing"),
        (
            {"prompt": {"column": "t"}, "task": {"kind": "classify", "labels": ["a", "b"],
             "prior_correction": True}},
            "prompt.column has no template",
        ),
        (
            {
                "prompt": {"template": "x", "format": "text"},
                "engine": {"too_long": "truncate_right"},
            },
            "would cut the end of the prompt",
        ),
    ]  # fmt: skip
    for changes, said in cases:
        document = spec_of(labels=["a", "b"]).model_dump()
        with pytest.raises(ValueError, match=said):
            JobSpec.model_validate(document | changes)
