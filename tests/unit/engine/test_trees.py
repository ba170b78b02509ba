"""Candidates as a tree: every token is asked for once, after what is before it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quantbatch.engine.trees import ROOT, Tree, grow

CANDIDATES = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), min_size=1, max_size=12
)


def asked(tree: Tree) -> dict[int, tuple[int, ...]]:
    """Return, for each edge, the tokens before it and its own, by walking through the groups."""
    found: dict[int, tuple[int, ...]] = {edge.id: (edge.token,) for edge in tree.first}
    for group in tree.groups:
        paths: list[tuple[int, ...]] = []
        for token, parent, edges in zip(group.tokens, group.parents, group.wanted, strict=True):
            paths.append(((paths[parent]) if parent != ROOT else ()) + (token,))
            for edge in edges:
                assert edge.id not in found, "asked twice"
                found[edge.id] = (*paths[-1], edge.token)
    return found


@given(CANDIDATES, st.integers(4, 9))
def test_every_token_of_every_candidate_is_asked_for_once(
    candidates: list[tuple[int, ...]], most: int
) -> None:
    tree = grow(tuple(map(tuple, candidates)), most)
    found = asked(tree)
    assert len(found) == tree.edges
    for candidate, path in zip(candidates, tree.paths, strict=True):
        assert [found[edge] for edge in path] == [
            candidate[:end] for end in range(1, len(candidate) + 1)
        ]


@given(CANDIDATES, st.integers(4, 9))
def test_a_group_is_no_larger_than_it_may_be_and_has_ancestors_first(
    candidates: list[tuple[int, ...]], most: int
) -> None:
    for group in grow(tuple(map(tuple, candidates)), most).groups:
        assert 0 < len(group.tokens) <= most
        assert all(parent < place for place, parent in enumerate(group.parents))
        assert group.depths == [
            0 if parent == ROOT else group.depths[parent] + 1 for parent in group.parents
        ]


def test_labels_of_one_token_need_nothing_beyond_the_prompt() -> None:
    tree = grow(((5,), (9,), (5,)), 8)
    assert tree.groups == ()
    assert [edge.token for edge in tree.first] == [5, 9]
    assert tree.paths == ((0,), (1,), (0,))


def test_what_labels_have_in_common_is_one_node() -> None:
    tree = grow(((1, 2, 3), (1, 2, 4), (1, 5)), 8)
    (group,) = tree.groups
    assert group.tokens == (1, 2)
    assert [[edge.token for edge in edges] for edges in group.wanted] == [[2, 5], [3, 4]]
