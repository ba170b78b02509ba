"""Candidates as a tree of tokens: what they have in common is computed once. Pure.

Labels such as "very good" and "very bad" share their first tokens. The log-likelihood of a token
comes from the scores after the one before it, so the last token of a candidate needs no
computation of its own: only nodes that have children are computed, and labels of a single token
need nothing beyond the prompt. The nodes of a group are computed in one step, side by side after
the prompt; each sees the prompt, its ancestors and itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = -1
"""Stands for the prompt's last token, whose scores are those of first tokens."""


class Edge(NamedTuple):
    """A token that can follow a node, whose log-probability is wanted."""

    id: int
    """Number of the edge in its tree."""
    token: int


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that are computed together."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    """Place of each node's parent in the group, before its own; `ROOT` for a first token."""
    wanted: tuple[tuple[Edge, ...], ...]
    """What is wanted of each node's scores; nothing of one that is here for others' sake only."""

    @property
    def depths(self) -> list[int]:
        """How many nodes are above each, from 0."""
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent == ROOT else found[parent] + 1)
        return found


@dataclass(frozen=True, slots=True)
class Tree:
    """The candidates of one row."""

    first: tuple[Edge, ...]
    """Wanted of the scores after the prompt."""
    groups: tuple[Group, ...]
    paths: tuple[tuple[int, ...], ...]
    """The edges of each candidate, in order."""
    edges: int


@dataclass(slots=True)
class _Node:
    parent: int
    token: int
    edges: list[Edge] = field(default_factory=list)


@lru_cache(maxsize=64)
def grow(candidates: tuple[tuple[int, ...], ...], most_nodes: int) -> Tree:
    """Make the tree of some candidates. Remembered: most jobs have the same for all rows, and that
    of 45 labels takes a millisecond.

    Args:
        candidates: Their token ids; none is empty, and none has more than `most_nodes` + 1.
        most_nodes: Most nodes of a group.
    """
    edge_ids: dict[tuple[int, ...], int] = {}
    nodes: dict[tuple[int, ...], _Node] = {}
    numbers: dict[tuple[int, ...], int] = {(): ROOT}
    first: list[Edge] = []
    for ids in sorted({tuple(ids) for ids in candidates}):
        for end in range(1, len(ids) + 1):
            path, before = ids[:end], ids[: end - 1]
            if path not in edge_ids:
                edge_ids[path] = len(edge_ids)
                edge = Edge(edge_ids[path], ids[end - 1])
                (nodes[before].edges if before else first).append(edge)
            if end < len(ids) and path not in nodes:
                numbers[path] = len(nodes)
                nodes[path] = _Node(numbers[before], ids[end - 1])
    paths = tuple(
        tuple(edge_ids[tuple(ids[:end])] for end in range(1, len(ids) + 1)) for ids in candidates
    )
    groups = tuple(_groups(list(nodes.values()), most_nodes))
    return Tree(tuple(first), groups, paths, len(edge_ids))


def _groups(nodes: Sequence[_Node], most: int) -> list[Group]:
    """Divide nodes, which come in depth-first order, repeating the ancestors that a group lacks."""
    divided: list[list[int]] = []
    members: set[int] = set()
    for number in range(len(nodes)):
        if not divided or len(members) + len(_missing(nodes, number, members)) > most:
            divided.append([])
            members = set()
        missing = _missing(nodes, number, members)
        divided[-1] += missing
        members.update(missing)
    seen: set[int] = set()
    groups = []
    for numbers in divided:
        places = {number: place for place, number in enumerate(numbers)}
        groups.append(
            Group(
                tokens=tuple(nodes[n].token for n in numbers),
                parents=tuple(places.get(nodes[n].parent, ROOT) for n in numbers),
                wanted=tuple(() if n in seen else tuple(nodes[n].edges) for n in numbers),
            )
        )
        seen.update(numbers)
    return groups


def _missing(nodes: Sequence[_Node], number: int, members: set[int]) -> list[int]:
    """Return a node and its ancestors that are no members, the highest first."""
    found: list[int] = []
    while number != ROOT and number not in members:
        found.append(number)
        number = nodes[number].parent
    return found[::-1]
