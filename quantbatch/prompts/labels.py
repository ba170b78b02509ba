"""A prompt and what may follow it, as token ids.

The tokens of (prompt + label) need not begin with the tokens of (prompt): `:` and ` yes` may become
`: `, `yes`, a word may go on across the seam, and a token of the prompt's end may not be what the
model saw when it was trained. So the whole text is tokenized with each label; what all of them,
and the prompt alone, have in common at the beginning is the prompt, and the rest are the
candidates. lm-evaluation-harness does the same for one continuation at a time, with the tokens of
the prompt alone cut off by number.

Only the end of a prompt is tokenized again for that. In a chat it begins with the last token that
the template writes, such as `<|im_start|>`, which is never part of another. In other texts it is
the last few hundred characters, if most of their tokens are those that the whole text has: where
tokens begin in one place, they go on alike. If not, it is the whole.

*Where a label ends.* Labels are compared as events: that the answer begins with their tokens. Those
exclude each other unless one begins with the tokens of another (`good`, `good enough`): then the
shorter is never less likely. Their end tells them apart, the token that ends a turn, or a text;
given to one label it has to be given to all. In a base model's text an end is rare after any
label, but about equally so. lm-evaluation-harness adds none.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal, NamedTuple

from quantbatch.errors import RowError
from quantbatch.prompts.tokens import MarkedText

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from quantbatch.prompts.rendering import Renderer

TokenIds = tuple[int, ...]
WINDOW_CHARS = 256
"""Characters of a text's end that are tokenized with each label."""
MOST_REMEMBERED = 1024
"""Seams of prompt and labels that are remembered; in a chat all rows have the same."""


class Split(NamedTuple):
    """A prompt and what may follow it."""

    prompt_ids: TokenIds
    candidates: tuple[TokenIds, ...]


class _Seam(NamedTuple):
    """The end of a prompt, tokenized with what may follow it."""

    alone: tuple[int, ...]
    """The end by itself."""
    reaching: int
    """How many of its last tokens are not the same whatever follows."""
    candidates: tuple[TokenIds, ...]


class Splitter:
    """Tokenizes prompts with what may follow them.

    Args:
        renderer: Makes the prompts.
        tokenizer: The model's.
    """

    def __init__(self, renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder, self._control = renderer.encoder, renderer.control
        self._end = _end_of_answer(renderer, tokenizer)
        self._seams: dict[tuple[str, tuple[str, ...]], _Seam] = {}

    def split(self, text: MarkedText, prompt_ids: Sequence[int], endings: Sequence[str]) -> Split:
        """Tokenize a prompt with what may follow it.

        Args:
            text: The prompt.
            prompt_ids: Its tokens, perhaps cut, but not at the end.
            endings: What may follow it: data, which writes no control tokens.

        Raises:
            RowError: Nothing is left of the prompt.
        """
        head, tail = self._encoder.special
        ids = tuple(prompt_ids[: len(prompt_ids) - len(tail)])
        seam = self._seam_near(text, ids, tuple(endings))
        prompt = ids[: len(ids) - seam.reaching]
        if len(prompt) < max(1, len(head)):
            raise RowError("empty_prompt", "all of the prompt's tokens reach into what follows it")
        return Split(prompt, seam.candidates)

    def _seam_near(self, text: MarkedText, ids: TokenIds, endings: tuple[str, ...]) -> _Seam:
        start = self._control.last_written(text.text)
        if start >= 0:
            return self._remembered(MarkedText(text.text[start:], text.marked), endings)
        part = self._control.ending(text.text, WINDOW_CHARS)
        seam = self._seam(MarkedText(part, text.marked), endings)
        same = _common_length([ids[::-1], seam.alone[::-1]])
        if 2 * same >= len(seam.alone) and same > seam.reaching:
            return seam
        return self._seam(MarkedText(self._encoder.ending(text), text.marked), endings)

    def _remembered(self, end: MarkedText, endings: tuple[str, ...]) -> _Seam:
        key = (end.text, endings)
        if key not in self._seams:
            if len(self._seams) >= MOST_REMEMBERED:
                self._seams.clear()
            self._seams[key] = self._seam(end, endings)
        return self._seams[key]

    def _seam(self, end: MarkedText, endings: Sequence[str]) -> _Seam:
        alone, *whole = self._encode(
            [end.text, *(end.text + self._safe(each) for each in endings)], marked=end.marked
        )
        common = _common_length([alone, *whole])
        candidates = tuple(tuple(ids[common:]) for ids in whole)
        return _Seam(tuple(alone), len(alone) - common, candidates)

    def _safe(self, ending: str) -> str:
        return self._control.mark(ending) if self._control.within(ending) else ending

    def _encode(self, texts: Sequence[str], *, marked: bool) -> list[list[int]]:
        if marked or any(mark in text for text in texts for mark in self._control.marks):
            return [self._control.encode(text) for text in texts]
        return self._encoder.plain(texts)

    def tokens_of(self, text: str) -> int:
        """Return how many tokens a text has by itself."""
        return len(self._encode([self._safe(text)], marked=False)[0])

    def check(self, endings: Sequence[str]) -> None:
        """Refuse what can follow no prompt at all.

        Raises:
            RowError: Two endings have the same tokens, or one has none.
        """
        found = self._encode([self._safe(each) for each in endings], marked=False)
        seen: dict[TokenIds, str] = {}
        for ending, ids in zip(endings, map(tuple, found), strict=True):
            if not ids:
                raise RowError("bad_labels", f"{ending!r} has no tokens")
            if ids in seen:
                raise RowError("bad_labels", f"{seen[ids]!r} and {ending!r} have the same tokens")
            seen[ids] = ending

    def ended(
        self, candidates: Sequence[TokenIds], end: Literal["auto", "always", "never"]
    ) -> tuple[TokenIds, ...]:
        """Return candidates with the end of the answer, where they need one to be told apart.

        Raises:
            RowError: They can't be told apart.
        """
        if len(set(candidates)) < len(candidates):
            raise RowError("bad_labels", "two labels have the same tokens")
        if not all(candidates):
            raise RowError("bad_labels", "a label has no tokens")
        if end == "never" or (end == "auto" and not _begin_alike(candidates)):
            return tuple(candidates)
        if self._end is None:
            raise RowError(
                "bad_labels",
                "one label begins with another, and the tokenizer has no token to end it",
            )
        return tuple((*each, self._end) for each in candidates)


def _end_of_answer(renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends an answer: what the chat template puts there, if that is a special
    token, else the tokenizer's own.
    """
    after = renderer.after_answer()
    ids = tokenizer.encode(after.strip(), add_special_tokens=False) if after.strip() else []
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    if ids and ids[0] in special:
        return int(ids[0])
    own: int | None = tokenizer.eos_token_id
    return own


def _common_length(lists: Sequence[Sequence[int]]) -> int:
    first, *others = lists
    shortest = min(map(len, lists))
    return next((i for i in range(shortest) if any(ids[i] != first[i] for ids in others)), shortest)


def _begin_alike(candidates: Sequence[TokenIds]) -> bool:
    """Tell whether a candidate begins with all of another's tokens."""
    ordered = sorted(candidates)
    return any(after[: len(before)] == before for before, after in itertools.pairwise(ordered))
