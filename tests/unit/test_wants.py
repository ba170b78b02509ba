"""A row's own wishes on their way through a chunk's columns."""

from __future__ import annotations

import pytest

from quantbatch.wants import USUAL, Ask, Embed, Grammar, Rank, Score, Want, Write, read_ask


@pytest.mark.parametrize(
    "want",
    [
        Write(),
        Write(grammar=Grammar("regex", r"\d+")),
        Rank(((1, 2), (3,))),
        Score(7),
        Embed("mean"),
    ],
)
def test_an_ask_comes_back_as_it_went(want: Want) -> None:
    ask = Ask(want, {"max_new_tokens": 3, "stop": ["\n"]}, {"labels": ["a", "b"]})
    assert read_ask(ask.to_json()) == ask


def test_a_row_that_says_nothing_asks_for_the_usual() -> None:
    assert read_ask(None) is USUAL


def test_further_prompts_go_along() -> None:
    ask = Ask(Embed("mean"), {"n": 2}, {"a": [1]}, more_prompts=((1, 2), (3,)))
    assert read_ask(ask.to_json()) == ask
    long = Ask(more_prompts=(tuple(range(5000)),))
    assert read_ask(long.to_json()) == long
