"""Where the answer to a request is, among millions of them, in 24 bytes each.

Digests are spread evenly, so any chunk of rows would touch every part of an index that is divided
by them: it is loaded whole, and bounded. It consists of a few sorted runs; adding a small one joins
neighbours of similar size, so that there are never more than some twenty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_KEYS = 8_000_000
"""Answers that are found: 200 MB in each replica. Of those beyond it the replica knows nothing."""


class Place(NamedTuple):
    """Where an answer is."""

    file: int
    row: int


class _Run(NamedTuple):
    """Keys in the order of their first halves."""

    first: np.ndarray[Any, np.dtype[np.uint64]]
    second: np.ndarray[Any, np.dtype[np.uint64]]
    places: np.ndarray[Any, np.dtype[np.uint32]]
    """File and row of each."""


class Index:
    """Finds keys of 16 bytes."""

    def __init__(self, most: int = MOST_KEYS) -> None:
        self._most = most
        self._runs: list[_Run] = []

    def __len__(self) -> int:
        return sum(len(run.first) for run in self._runs)

    @property
    def full(self) -> bool:
        """Whether it takes no more keys."""
        return len(self) >= self._most

    def add(self, file: int, keys: bytes) -> None:
        """Add the keys of a file, one after another, in the order of its rows."""
        halves = np.frombuffer(keys, np.uint64).reshape(-1, 2)[: self._most - len(self)]
        rows = np.arange(len(halves), dtype=np.uint32)
        places = np.stack([np.full_like(rows, file), rows], axis=1)
        self._runs.append(_sorted(halves[:, 0], halves[:, 1], places))
        while len(self._runs) > 1 and len(self._runs[-2].first) < 2 * len(self._runs[-1].first):
            one, other = self._runs.pop(), self._runs.pop()
            self._runs.append(_joined(other, one))

    def find(self, keys: Sequence[bytes]) -> list[Place | None]:
        """Return where the answers of some keys are, as far as they are known."""
        found: list[Place | None] = [None] * len(keys)
        halves = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
        for run in self._runs:
            for at, place in _matches(run, halves):
                found[at] = place
        return found


def _sorted(first: Any, second: Any, places: Any) -> _Run:  # noqa: ANN401 - numpy arrays
    order = np.argsort(first, kind="stable")
    return _Run(first[order], second[order], places[order])


def _joined(one: _Run, other: _Run) -> _Run:
    return _sorted(
        np.concatenate([one.first, other.first]),
        np.concatenate([one.second, other.second]),
        np.concatenate([one.places, other.places]),
    )


def _matches(run: _Run, halves: Any) -> list[tuple[int, Place]]:  # noqa: ANN401 - a numpy array
    if not len(run.first):
        return []
    at = np.searchsorted(run.first, halves[:, 0])
    at = np.minimum(at, len(run.first) - 1)
    # Of two keys with the same first half, one in 10^5 such indexes, the second is not found.
    hit = (run.first[at] == halves[:, 0]) & (run.second[at] == halves[:, 1])
    return [
        (place, Place(*run.places[at[place]].tolist())) for place in np.flatnonzero(hit).tolist()
    ]
