"""What a row wants from an engine, and what it asks for beyond the job's own settings.

    Write    an answer, token by token
    Rank     the log-likelihood of each of some continuations after the prompt
    Score    the log-likelihood of the prompt's own tokens, from some place on
    Embed    the prompt's hidden state, pooled

`Ask` is one row's own part of that on its way from the reader, which knows the row, to the replica,
which knows the engine: as JSON in a column of the chunk, null where a row asks for nothing of its
own. The same few texts come again and again, so reading them is remembered.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer has to look like."""

    kind: Literal["json_schema", "regex", "choices", "grammar"]
    text: str
    """The schema, the expression, the choices as a JSON list, or the grammar (Lark)."""


@dataclass(frozen=True, slots=True)
class Write:
    """An answer, by the request's sampling."""

    kind: Literal["write"] = "write"
    grammar: Grammar | None = None
    """None leaves the answer free."""


@dataclass(frozen=True, slots=True)
class Rank:
    """The log-likelihood of continuations; the prompt is computed once for all of them."""

    candidates: tuple[tuple[int, ...], ...]
    """Token ids, at least one in each."""
    kind: Literal["rank"] = "rank"


@dataclass(frozen=True, slots=True)
class Score:
    """The log-likelihood of tokens of the prompt itself, each after all before it."""

    first: int
    """The first token that counts, from 1: nothing comes before the very first token."""
    kind: Literal["score"] = "score"


@dataclass(frozen=True, slots=True)
class Embed:
    """The hidden state of the last layer, after the last norm."""

    pooling: Literal["last", "mean"] = "last"
    kind: Literal["embed"] = "embed"


Want = Write | Rank | Score | Embed
"""What one request is for."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What a row asks of another prompt, to judge the answer to its own."""

    prompt_ids: tuple[int, ...]
    want: Want


@dataclass(frozen=True, slots=True)
class Ask:
    """What a row asks for beyond the job's own settings."""

    want: Want = field(default_factory=Write)
    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of `spec.Sampling` that this row has its own values for."""
    about: Any = None
    """What the row's task needs to know of it when the answer is there, in JSON types."""
    more_prompts: tuple[tuple[int, ...], ...] = ()
    """Token ids of further prompts of the row, of each of which it wants the same; their answers
    follow those of the first."""
    beside: Beside | None = None
    """Its answer comes after the row's own."""

    def to_json(self) -> str:
        """Return the ask as JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))


MOST_CHARS = 10_000
"""Longer texts are not remembered: such a one belongs to a single row."""
USUAL = Ask()
"""What a row asks for that says nothing."""


def read_ask(text: str | None) -> Ask:
    """Read what `Ask.to_json` wrote; the result is shared and must not be changed."""
    if text is None:
        return USUAL
    return _remembered(text) if len(text) <= MOST_CHARS else _read(text)


def _read(text: str) -> Ask:
    found = json.loads(text)
    more = tuple(tuple(ids) for ids in found["more_prompts"])
    beside = found["beside"]
    return Ask(
        _read_want(found["want"]),
        found["sampling"],
        found["about"],
        more,
        beside and Beside(tuple(beside["prompt_ids"]), _read_want(beside["want"])),
    )


_remembered = lru_cache(maxsize=4096)(_read)


def _read_want(found: dict[str, Any]) -> Want:
    match found["kind"]:
        case "write":
            grammar = found["grammar"]
            return Write(grammar=grammar and Grammar(**grammar))
        case "rank":
            return Rank(tuple(tuple(ids) for ids in found["candidates"]))
        case "score":
            return Score(found["first"])
        case "embed":
            return Embed(found["pooling"])
        case kind:
            raise AssertionError(kind)
