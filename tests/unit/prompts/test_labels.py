"""Prompt and label as tokens: together they are always the tokens of the whole text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from quantbatch.errors import SpecError
from quantbatch.prompts.asking import Asker
from quantbatch.prompts.rendering import Prompts
from quantbatch.spec import Classify, Embed, MultiLabel, Prompt, Score
from quantbatch.wants import Ask, Rank, read_ask
from quantbatch.wants import Score as WantScore

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart" / "model"
END = "<|im_end|>"
LONG = "The food was nice and the staff were friendly. " * 12


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizer_folder)


@pytest.fixture(scope="module")
def quickstart() -> Any:
    return AutoTokenizer.from_pretrained(QUICKSTART)


def asked(
    tokenizer: Any, task: Any, rows: dict[str, Any], *, chat: bool = False, limit: int = 400,
    too_long: Any = "error", template: str = "{{ text }}",
) -> Prompts:  # fmt: skip
    prompt = Prompt(template=template, format="chat" if chat else "text")
    asker = Asker(prompt, task, tokenizer, max_prompt_tokens=limit, too_long=too_long)
    return asker.render(pa.table(rows))


def asks(found: Prompts) -> list[Ask]:
    assert found.asks is not None
    return [read_ask(text) for text in found.asks.to_pylist()]


def wholes(found: Prompts) -> list[list[list[int]]]:
    """The tokens of each row's prompt with each of its candidates."""
    rows = []
    for ids, ask in zip(found.token_ids.to_pylist(), asks(found), strict=True):
        assert isinstance(ask.want, Rank)
        rows.append([[*ids, *candidate] for candidate in ask.want.candidates])
    return rows


def ids_of(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


PIECES = st.sampled_from(
    [
        "the",
        " food",
        "was",
        " ",
        "  ",
        "\n",
        ":",
        "?",
        "yes",
        "no",
        "é",
        "中",
        "🙂",
        "12",
        "a",
        " f",
    ]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=150).map("".join).filter(str.strip)
LABELS = st.lists(
    st.lists(PIECES, min_size=1, max_size=4).map("".join).filter(str.strip),
    min_size=2, max_size=5, unique_by=str.strip,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, labels=LABELS, before=st.sampled_from(["", " ", "\n"]))
def test_prompt_and_label_are_the_tokens_of_the_whole(
    tiny: Any, quickstart: Any, text: str, labels: list[str], before: str
) -> None:
    task = Classify(labels=labels, before=before, end="never")
    for tokenizer in (tiny, quickstart):
        found = asked(tokenizer, task, {"text": [text]}, limit=4000)
        if found.errors:
            # Nothing is left of a prompt whose first token goes on in a label.
            assert found.errors[0].kind in ("empty_prompt", "bad_labels")
            continue
        expected = [ids_of(tokenizer, text + before + label) for label in labels]
        assert wholes(found) == [expected]


def test_a_token_across_the_seam_belongs_to_the_label(quickstart: Any) -> None:
    assert len(ids_of(quickstart, " the")) == 1
    found = asked(quickstart, Classify(labels=["he", "xy"], end="never"), {"text": ["a t"]})
    [[the, xy]] = wholes(found)
    assert (the, xy) == (ids_of(quickstart, "a the"), ids_of(quickstart, "a txy"))
    # Without " t": it is not the same token with both labels.
    assert found.token_ids[0].as_py() == ids_of(quickstart, "a")


def test_in_a_chat_labels_follow_the_generation_prompt(tiny: Any) -> None:
    found = asked(tiny, Classify(labels=["good", "bad"]), {"text": ["hi", "so"]}, chat=True)
    for text, row in zip(["hi", "so"], wholes(found), strict=True):
        chat = [{"role": "user", "content": text}]
        before = tiny.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert row == [ids_of(tiny, before + "good"), ids_of(tiny, before + "bad")]


@pytest.mark.parametrize("chat", [True, False])
def test_labels_that_begin_alike_get_the_end_of_the_turn(tiny: Any, chat: bool) -> None:
    def ends(labels: list[str], end: Any) -> list[bool]:
        found = asked(tiny, Classify(labels=labels, end=end), {"text": ["say: "]}, chat=chat)
        want = asks(found)[0].want
        assert isinstance(want, Rank)
        return [each[-1] == tiny.convert_tokens_to_ids(END) for each in want.candidates]

    assert ends(["b", "bx"], "auto") == [True, True]
    assert ends(["b", "bx"], "never") == [False, False]
    assert ends(["b", "x"], "auto") == [False, False]
    assert ends(["b", "x"], "always") == [True, True]


@pytest.mark.parametrize("chat", [True, False])
def test_a_cut_prompt_keeps_its_end_and_whole_labels(tiny: Any, chat: bool) -> None:
    text = LONG + "Is it a t"
    task = Classify(labels=["he", "xy"], end="never")
    whole = asked(tiny, task, {"text": [text]}, chat=chat, limit=4000)
    cut = asked(tiny, task, {"text": [text]}, chat=chat, limit=60, too_long="truncate_left")
    for long, short in zip(wholes(whole)[0], wholes(cut)[0], strict=True):
        same = next(
            (i for i, (a, b) in enumerate(zip(long[::-1], short[::-1], strict=False)) if a != b),
            len(short),
        )
        assert same >= 30
    assert asks(whole) == asks(cut)
    assert 55 <= len(cut.token_ids[0].as_py()) <= 60
    assert asked(tiny, task, {"text": [text]}, chat=chat, limit=60).errors[0].kind == (
        "prompt_too_long"
    )


def test_in_a_chat_the_middle_may_be_cut(tiny: Any) -> None:
    task = Classify(labels=["good", "bad"])
    rows = {"text": [LONG]}
    cut = asked(tiny, task, rows, chat=True, limit=60, too_long="truncate_right")
    whole = asked(tiny, task, rows, chat=True, limit=4000)
    assert asks(cut) == asks(whole)
    assert tiny.decode(cut.token_ids[0].as_py()).endswith("assistant\n")


def test_control_tokens_in_labels_and_rows_are_text(tiny: Any) -> None:
    rows = {"text": ["a"], "own": [[END, "b"]]}
    found = asked(tiny, Classify(labels_column="own"), rows, chat=True)
    want = asks(found)[0].want
    assert isinstance(want, Rank)
    assert len(want.candidates[0]) > 3
    assert tiny.convert_tokens_to_ids(END) not in want.candidates[0]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (None, "no list"), ([], "no list"), (["a", None], "empty or no text"),
        (["b"], "holds the label 'b' alone"),
        (["a", " a"], "twice"), (["a", " "], "empty"), (["a", "b" * 90], "max_label_tokens"),
    ],
)  # fmt: skip
def test_a_row_with_bad_labels_is_an_error_row(tiny: Any, own: Any, said: str) -> None:
    rows = {"text": ["x", "y"], "own": pa.array([own, ["a", "b"]], pa.list_(pa.string()))}
    found = asked(tiny, Classify(labels_column="own"), rows, chat=True)
    assert set(found.errors) == {0}
    assert found.errors[0].kind == "bad_labels"
    assert said in found.errors[0].message
    assert asks(found)[1].about == ["a", "b"]


def test_a_single_label_is_one_to_say_yes_or_no_to(tiny: Any) -> None:
    rows = {"text": ["x"], "own": pa.array([["a"]], pa.list_(pa.string()))}
    task = Classify(labels_column="own", multi_label=MultiLabel())
    assert not asked(tiny, task, rows, chat=True).errors


def test_a_job_s_labels_with_the_same_tokens_are_refused(tmp_path: Path, tiny: Any) -> None:
    tiny.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    document = json.loads(file.read_text())
    document["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(document))
    lower = AutoTokenizer.from_pretrained(tmp_path)
    task = Classify(labels=["Us", "us"])
    with pytest.raises(SpecError, match="'Us' and 'us' have the same tokens"):
        Asker(Prompt(template="{{ t }}"), task, lower, max_prompt_tokens=90).check()
    Asker(Prompt(template="{{ t }}"), task, tiny, max_prompt_tokens=90).check()


def test_the_prior_is_the_template_with_empty_columns(tiny: Any) -> None:
    task = Classify(labels=["good", "bad"], prior_correction=True)
    template = "Text: {{ text }}\nIt is"
    found = asked(tiny, task, {"text": ["hi", "so"]}, template=template)
    one, other = asks(found)
    assert one.beside == other.beside
    assert one.beside is not None
    assert list(one.beside.prompt_ids) == ids_of(tiny, "Text: \nIt is")
    assert one.beside.want == one.want


def test_a_template_that_needs_a_row_has_no_prior(tiny: Any) -> None:
    task = Classify(labels=["good", "bad"], prior_correction=True)
    prompt = Prompt(template="{{ n + 1 }}")
    with pytest.raises(SpecError, match="no text without a row"):
        Asker(prompt, task, tiny, max_prompt_tokens=90).check()


def test_a_continuation_is_scored_from_the_seam(tiny: Any) -> None:
    rows = {"text": ["a t", "so"], "more": ["he food", "é"]}
    found = asked(tiny, Score(continuation="more", per_token=True), rows)
    for row, (text, ask) in enumerate(zip(["a the food", "soé"], asks(found), strict=True)):
        ids = found.token_ids[row].as_py()
        assert ids == ids_of(tiny, text)
        assert isinstance(ask.want, WantScore)
        assert ask.about == ids[ask.want.first :]
    first = asks(found)[0].want
    assert isinstance(first, WantScore)
    assert first.first == len(ids_of(tiny, "a"))


def test_a_continuation_is_never_cut(tiny: Any) -> None:
    rows = {"text": [LONG, LONG], "more": [" and so on", LONG]}
    found = asked(tiny, Score(continuation="more"), rows, limit=60, too_long="truncate_left")
    assert set(found.errors) == {1}
    ids = found.token_ids[0].as_py()
    assert ids[-len(ids_of(tiny, " and so on")) :] == ids_of(tiny, " and so on")
    assert len(ids) <= 60
    whole = ids_of(tiny, LONG + " and so on")
    assert ids == whole[-len(ids) :]


def test_rows_without_anything_to_score_are_error_rows(tiny: Any) -> None:
    rows = {"text": ["a", "a", "a"], "more": ["", None, "b"]}
    found = asked(tiny, Score(continuation="more"), rows)
    assert {row: error.kind for row, error in found.errors.items()} == dict.fromkeys(
        [0, 1], "empty_continuation"
    )
    assert asked(tiny, Score(), {"text": ["a", "a b c"]}).errors[0].kind == "too_short"


def test_all_rows_to_embed_ask_for_the_same(tiny: Any) -> None:
    found = asked(tiny, Embed(pooling="mean"), {"text": ["a", "b"]})
    assert asks(found)[0] == asks(found)[1]
