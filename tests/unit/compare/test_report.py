"""What may be claimed of a width, and how it is shown: in words, on a terminal, as a page."""

from __future__ import annotations

import copy
import io
import json
import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from rich.console import Console

from quantbatch.compare import figures
from quantbatch.compare.divergence import Differences
from quantbatch.compare.figures import Loading, Said
from quantbatch.compare.page import page
from quantbatch.compare.report import _finite, check_folder, remarks, save, table, verdict
from quantbatch.compare.statistics import Bootstrap
from quantbatch.errors import Refused, StorageError
from quantbatch.records import Completion, Failure, FinishReason, RequestId
from quantbatch.spec import Output

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = "</title><script>alert('x')</script>\x1b[2J\x00 & \"quoted\""
LOADING = Loading("bfloat16", "bfloat16", 1000, 1000, 4.5, 4000, 5000, 6000, 1.0)


def said(*texts: str | None, cut: str = "") -> Said:
    """Answers of a token for each letter; None is a failure, `cut` one that is truncated."""
    answers = [
        Failure(RequestId(0, row), "model", "broken")
        if text is None
        else Completion(
            RequestId(0, row),
            text,
            tuple(map(ord, text)),
            FinishReason.LENGTH if text == cut else FinishReason.STOP,
        )
        for row, text in enumerate(texts)
    ]
    return Said(tuple(answers), 2.0)


def apart(kl: float, rows: int = 4, tokens: int = 10) -> Differences:
    """Tokens that all diverge equally."""
    row = np.repeat(np.arange(rows), tokens)
    return Differences(
        row,
        np.zeros(len(row), bool),
        np.full(len(row), kl),
        np.full(len(row), kl),
        np.full(len(row), 0.1),
        np.full(len(row), -0.02),
        np.arange(len(row)) % 10 > 0,
        0,
    )


def width(
    name: str, ours: Said, theirs: Said, gold: list[str | None], kl: float = 0.01
) -> dict[str, Any]:
    bootstrap = Bootstrap(len(ours.answers))
    found = apart(kl, len(ours.answers))
    return {
        "name": name,
        **figures.describe_loading(LOADING, theirs),
        "counts": figures.describe_counts(theirs, gold),
        "accuracy": figures.describe_accuracy(theirs, gold, bootstrap, ours),
        "divergence": figures.describe_divergence(found.of(prompts=False), bootstrap),
        "divergence_on_prompts": figures.describe_divergence(found.of(prompts=True), bootstrap),
        "answers": figures.describe_answers(ours, theirs, bootstrap),
        "labels": figures.describe_labels(ours, theirs, bootstrap),
    }


def document_of(name: str = "job", label: str = "spam") -> dict[str, Any]:
    ours, theirs = said(label, "ham", "ham", "egg"), said(label, "ham", "hat", "ham")
    gold: list[str | None] = [label, "ham", "hat", "egg"]
    noise = width("fp32", ours, ours, gold, 1e-9)
    others = [width("nf4", ours, theirs, gold), width("bf16", ours, ours, gold, 1e-12)]
    for each in others:
        each["verdict"] = verdict(each, noise, 4)
    reference = {
        "name": "fp32",
        **figures.describe_loading(LOADING, ours),
        "counts": figures.describe_counts(ours, gold),
        "accuracy": figures.describe_accuracy(ours, gold, Bootstrap(4)),
    }
    found: dict[str, Any] = _finite(
        {
            "outcome": "compared",
            "exit_code": 0,
            "name": name,
            "model": name,
            "device": "cpu",
            "reference": "fp32",
            "reference_is": "fp32, which holds the checkpoint's own numbers",
            "rows": {"compared": 4, "asked": 5, "in_input": 9, "left_out": {name: 1}},
            "gold": "label",
            "greedy_instead_of_sampled": True,
            "free_instead_of_form": False,
            "method": {"kl": "how", "intervals": "which"},
            "noise_floor": noise,
            "widths": [reference, *others],
            "skipped": {"fp16": name},
        }
    )
    return found


def printed(document: dict[str, Any]) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=400)
    console.print(table(document))
    return stream.getvalue()


# ---- figures by hand


def test_answers_and_where_they_begin_to_differ() -> None:
    ours = said("abcdef", "abc", "xyz", None, None, "same")
    theirs = said("abXdef", "abcd", "Xyz", None, "a", "same")
    found = figures.describe_answers(ours, theirs, Bootstrap(6))
    assert found["first_differences"] == [0, 0, 2, 3]
    assert found["first_difference_median"] == 1
    assert found["identical"]["value"] == pytest.approx(2 / 6)
    assert found["longest"] == 6
    same = figures.describe_answers(ours, ours, Bootstrap(6))
    assert (same["differ"], same["first_difference_median"]) == (0, None)


def test_labels_flip_both_ways() -> None:
    ours = said("a", " a\n", "b", "b", "c", None)
    theirs = said("b", "b", "a", "b", "c", "c")
    found = figures.describe_labels(ours, theirs, Bootstrap(6))
    assert found["flipped"] == 4
    assert found["flips"][0] == {"reference": "a", "candidate": "b", "count": 2, "back": 1}
    assert {"reference": None, "candidate": "c", "count": 1, "back": 0} in found["flips"]
    assert found["same"]["value"] == pytest.approx(2 / 6)


def test_accuracy_is_of_rows_with_a_gold_label() -> None:
    ours, theirs = said("a", "b", "c", "d", None), said("a", "x", "c ", None, "e")
    found = figures.describe_accuracy(theirs, ["a", "b", "y", None, "e"], Bootstrap(5), ours)
    assert found is not None
    assert (found["rows"], found["value"]["value"]) == (4, 0.5)
    assert (found["right_to_wrong"], found["wrong_to_right"]) == (1, 1)
    assert found["difference"]["value"] == 0
    assert figures.describe_accuracy(theirs, [None] * 5, Bootstrap(5), ours) is None


def test_answers_are_counted_by_what_became_of_them() -> None:
    counts = figures.describe_counts(said("a", " ", "zzz", None, cut="zzz"), ["a", "b", None, "a"])
    assert counts == {"rows": 4, "error": 1, "truncated": 1, "empty": 1, "invalid": 2}
    assert figures.describe_counts(said("a"), [None])["invalid"] == 0


def test_divergence_by_hand() -> None:
    found = figures.describe_divergence(apart(0.25), Bootstrap(4))
    assert found is not None
    assert found["kl_mean"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert found["perplexity_ratio"]["value"] == pytest.approx(np.exp(0.1))
    assert found["same_top"]["value"] == 0.9
    assert found["rms_dp"]["value"] == pytest.approx(0.02)
    assert found["mean_dp"]["value"] == pytest.approx(-0.02)
    assert figures.describe_divergence(apart(0.25).of(prompts=True), Bootstrap(4)) is None


# ---- what may be claimed


def test_within_the_noise_no_difference_is_claimed() -> None:
    (divergence, labels, accuracy) = document_of()["widths"][2]["verdict"]
    assert divergence == "no difference larger than the noise, 1e-09 nats a token, with 4 rows"
    assert labels == "no difference in more than 52.71% of labels seen with 4 rows"
    assert accuracy.startswith("no difference in accuracy larger than 52.7 points seen with 4 rows")


def test_a_difference_is_told_with_its_interval() -> None:
    (divergence, labels, accuracy) = document_of()["widths"][1]["verdict"]
    assert divergence == "differs by 0.01 nats a token (0.01 to 0.01) with 4 rows"
    assert labels == "2 labels changed, between 0.00% and 100.00% of rows, seen with 4 rows"
    assert "no difference in accuracy larger than" in accuracy


def test_an_accuracy_that_differs_is_called_so() -> None:
    gold: list[str | None] = ["a"] * 20
    found = width("nf4", said(*["a"] * 20), said(*["a"] * 10, *["b"] * 10), gold)
    noise = width("fp32", said(*["a"] * 20), said(*["a"] * 20), gold, 0)
    _, labels, told = verdict(found, noise, 20)
    assert labels.startswith("10 labels changed, between ")
    assert told.startswith("accuracy differs by -50.0 points (")
    assert told.endswith("with 20 rows (McNemar mid-p 0.00098)")


def test_scores_that_are_no_numbers_are_told() -> None:
    found = document_of()
    broken = copy.deepcopy(found["widths"][1])
    broken["divergence"]["not_finite"] = 1
    said_of_it = verdict(broken, found["noise_floor"], 4)
    assert said_of_it[0] == "scores of 1 token are no numbers"
    assert verdict(broken | {"divergence": None}, found["noise_floor"], 4)[0] == (
        "no token of an answer could be compared"
    )


def test_nothing_is_ever_called_lossless(tmp_path: Path) -> None:
    found = document_of()
    save(found, tmp_path)
    texts = [json.dumps(found), printed(found), (tmp_path / "index.html").read_text()]
    texts += [f"{name} {what}" for name, what in remarks(found)]
    for text in texts:
        assert not re.search(r"loss\s*less|no loss|without loss|identical quality", text, re.I)


# ---- how it is shown


def test_a_terminal_shows_what_there_is() -> None:
    text = printed(document_of())
    header, *lines = text.splitlines()
    assert re.split(r" {2,}", header.strip()) == ["fp32", "fp32 again", "nf4", "bf16"]
    names = [re.split(r" {2,}", line.strip())[0] for line in lines]
    assert {"weights", "KL mean", "p99", "differs at", "accuracy", "mid-p"} <= set(names)
    assert not {"KL on prompts", "memory planned"} & set(names)
    assert "memory planned" in printed(document_of() | {"device": "cuda"})
    assert lines[names.index("accuracy")].split() == [
        "accuracy",
        "75.0%",
        "75.0%",
        "75.0%",
        "75.0%",
    ]
    without_gold = document_of()
    for each in (without_gold["noise_floor"], *without_gold["widths"]):
        each["accuracy"] = None
    text = printed(without_gold)
    assert "accuracy" not in text
    assert "same answer" in text
    for each in (without_gold["noise_floor"], *without_gold["widths"][1:]):
        each["labels"]["distinct"] = 2
    assert "same label" in printed(without_gold)


def test_the_page_is_well_formed_and_loads_nothing() -> None:
    text = page(document_of())
    root = ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert len(root.findall(".//svg")) == 3
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<img|src=|href=", text)
    assert "prefers-color-scheme: dark" in text
    shown = "".join(root.itertext())
    assert "no difference larger than the noise" in shown
    places = [float(n) for n in re.findall(r' (?:x|y|cx|cy|x1|y1|x2|y2)="([^"]*)"', text)]
    assert all(0 <= place <= 700 for place in places)


def test_a_hostile_name_is_text() -> None:
    text = page(document_of(HOSTILE, label=HOSTILE))
    root = ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert "<script" not in text
    assert "\x1b" not in text
    title = root.find("head/title")
    assert title is not None
    assert "<script>alert('x')</script>\\x1b[2J" in (title.text or "")
    assert "\x1b" not in printed(document_of(HOSTILE))


def test_a_page_of_the_reference_alone() -> None:
    found = document_of()
    found["widths"] = found["widths"][:1]
    ET.fromstring(page(found).removeprefix("<!DOCTYPE html>\n"))
    assert printed(found)


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    found = document_of()
    assert _finite({"a": [float("nan"), 1.0, {"b": float("inf")}]}) == {
        "a": [None, 1.0, {"b": None}]
    }
    save(found, tmp_path / "deep" / "er")
    assert json.loads((tmp_path / "deep" / "er" / "compare.json").read_text()) == found


def test_where_no_report_can_be_written_is_known_before_models_run(tmp_path: Path) -> None:
    output = Output(uri=str(tmp_path / "out"))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"--out .*file/report: Not a directory"):
        check_folder(tmp_path / "file" / "report", output)
    with pytest.raises(StorageError, match=r"--out .*file: File exists"):
        check_folder(tmp_path / "file", output)
    check_folder(tmp_path / "report", output)
    assert list((tmp_path / "report").iterdir()) == []


@pytest.mark.parametrize("name", ["out", "out/compare/reviews"])
def test_no_report_is_written_into_the_output_of_the_job(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused, match="is in the job's output"):
        check_folder(tmp_path / name, Output(uri=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
