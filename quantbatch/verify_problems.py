"""What `verify` finds wrong, by kind, with examples: that is what a person is told."""

from __future__ import annotations

from dataclasses import dataclass

EXAMPLES = 5


@dataclass(frozen=True)
class Problem:
    """One kind of thing that is wrong."""

    kind: str
    count: int
    examples: tuple[str, ...]


class Problems:
    """What is wrong, by kind, with the first few examples."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def note(self, kind: str, example: str, count: int = 1) -> None:
        """Note what was found."""
        self._counts[kind] = self._counts.get(kind, 0) + count
        examples = self._examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(example)

    @property
    def total(self) -> int:
        """How much is wrong, of all kinds."""
        return sum(self._counts.values())

    def found(self) -> tuple[Problem, ...]:
        """Return all of it, in the order in which the kinds came up."""
        return tuple(
            Problem(kind, count, tuple(self._examples[kind]))
            for kind, count in self._counts.items()
        )
