"""Rows whose lengths are those of a labeling job, the same in every process.

A prompt is made of words that are one token each (" word"), so that its text gives back its tokens
and a contender that takes texts gets the same rows as one that takes tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]

SEED = 20_260_101
MIN_PROMPT, MAX_PROMPT = 20, 400
MAX_BUDGET = 128
PREFIX_TOKENS = 300
LONGEST_ROW = MAX_PROMPT + MAX_BUDGET
"""Most tokens of a prompt and its answer, in any of the workloads."""


@dataclass(frozen=True)
class Row:
    """One prompt, and exactly how many tokens its answer has."""

    prompt_ids: Tokens
    text: str
    budget: int


@dataclass(frozen=True)
class Words:
    """Words that are one token each.

    Args:
        tokenizer: Puts a space at a word's beginning into its token.
    """

    tokenizer: PreTrainedTokenizerBase

    def rows(self, prompts: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[Row]:
        """Return a row for each prompt; its text has exactly its tokens."""
        texts = self.tokenizer.batch_decode([list(prompt) for prompt in prompts])
        again = self.tokenizer(texts).input_ids
        assert again == [list(prompt) for prompt in prompts], "texts don't give back their tokens"
        return [
            Row(tuple(prompt), text, budget)
            for prompt, text, budget in zip(prompts, texts, budgets, strict=True)
        ]

    def prompts(self, random: Generator, lengths: Sequence[int]) -> list[list[int]]:
        """Return prompts of random words."""
        ids = self._ids()
        return [random.choice(ids, length).tolist() for length in lengths]

    def _ids(self) -> list[int]:
        found = [
            number
            for token, number in self.tokenizer.get_vocab().items()
            if token.startswith("\u0120") and token[1:].isascii() and token[1:].isalpha()
        ]
        assert found, "the tokenizer has no tokens that are words with a space before them"
        return sorted(found)


def make(name: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> list[Row]:
    """Return the rows of a workload: `mixed`, `prefix` or `duplicates`."""
    words = Words(tokenizer)
    match name:
        case "mixed":
            return mixed(words, rows)
        case "prefix":
            return prefix(words, rows)
        case "duplicates":
            return duplicates(words, rows)
        case _:
            raise ValueError(f"no workload is called {name}")


def mixed(words: Words, rows: int) -> list[Row]:
    """Prompts of 20 to 400 tokens, answers of 1 to 128, both log-normal; means about 120 and 36."""
    random = np.random.default_rng(SEED)
    lengths = _log_normal(random, rows, median=98, sigma=0.65, low=MIN_PROMPT, high=MAX_PROMPT)
    budgets = _log_normal(random, rows, median=26, sigma=0.85, low=1, high=MAX_BUDGET)
    return words.rows(words.prompts(random, lengths), budgets)


def prefix(words: Words, rows: int) -> list[Row]:
    """A prefix of 300 tokens that all share, then 10 to 30 of a row's own; answers of 8 to 24."""
    random = np.random.default_rng(SEED + 1)
    [shared] = words.prompts(random, [PREFIX_TOKENS])
    own = words.prompts(random, random.integers(10, 31, rows).tolist())
    budgets = random.integers(8, 25, rows).tolist()
    return words.rows([shared + ids for ids in own], budgets)


def duplicates(words: Words, rows: int, share: float = 0.2) -> list[Row]:
    """The mixed rows, of which a share is replaced by repetitions of others."""
    random = np.random.default_rng(SEED + 2)
    result = mixed(words, rows)
    order = random.permutation(rows).tolist()
    copies = order[: round(share * rows)]
    originals = order[len(copies) :]
    for place in copies:
        result[place] = result[int(random.choice(originals))]
    return result


def with_budget(rows: Sequence[Row], budget: int) -> list[Row]:
    """Return the same prompts with answers of one length."""
    return [dataclasses.replace(row, budget=budget) for row in rows]


def facts(rows: Sequence[Row]) -> dict[str, float]:
    """Return what a reader needs to know of a workload."""
    prompts, budgets = [len(row.prompt_ids) for row in rows], [row.budget for row in rows]
    return {
        "rows": len(rows),
        "prompt_tokens": sum(prompts),
        "mean_prompt": round(float(np.mean(prompts)), 1),
        "output_tokens": sum(budgets),
        "mean_output": round(float(np.mean(budgets)), 1),
        "different_prompts": len({row.prompt_ids for row in rows}),
    }


def _log_normal(
    random: Generator, count: int, *, median: float, sigma: float, low: int, high: int
) -> list[int]:
    drawn = random.lognormal(np.log(median), sigma, count)
    lengths: list[int] = np.clip(np.round(drawn), low, high).astype(int).tolist()
    return lengths
