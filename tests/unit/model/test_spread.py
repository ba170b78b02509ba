"""The cut of a model over several cards."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from quantbatch.model.footprint import LayeredWeights
from quantbatch.model.spread import spread

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SIZES = st.integers(1, 60)
MODELS = st.builds(LayeredWeights, SIZES, st.lists(SIZES, min_size=1, max_size=7).map(tuple), SIZES)


def cuts(layers: int, cards: int) -> Iterator[tuple[int, ...]]:
    """Every way of giving each card at least one of the layers."""
    for ends in itertools.combinations(range(1, layers), cards - 1):
        bounds = (0, *ends, layers)
        yield tuple(b - a for a, b in itertools.pairwise(bounds))


def card_weights(weights: LayeredWeights, cut: Sequence[int]) -> list[int]:
    ends = list(itertools.accumulate(cut, initial=0))
    found = [sum(weights.layers[a:b]) for a, b in itertools.pairwise(ends)]
    found[0] += weights.besides
    found[-1] += weights.head
    return found


def most_tokens(
    weights: LayeredWeights, cut: Sequence[int], room: int, per_layer: int
) -> int | None:
    left = [room - taken for taken in card_weights(weights, cut)]
    if min(left) < 0:
        return None
    return min(each // (count * per_layer) for each, count in zip(left, cut, strict=True))


@given(MODELS, st.integers(1, 4), st.integers(1, 300), st.integers(1, 3))
def test_no_other_cut_has_room_for_more(
    weights: LayeredWeights, cards: int, room: int, per_layer: int
) -> None:
    found = spread(
        weights,
        kv_bytes_per_token=per_layer * len(weights.layers),
        room_bytes=room,
        cards=cards,
        most_tokens=40,
    )
    best = [most_tokens(weights, cut, room, per_layer) for cut in cuts(len(weights.layers), cards)]
    possible = [min(each, 40) for each in best if each is not None]
    assert (found.kv_tokens if found else None) == max(possible, default=None)


@given(MODELS, st.integers(1, 4), st.integers(50, 300))
def test_each_card_holds_what_it_is_said_to_hold(
    weights: LayeredWeights, cards: int, room: int
) -> None:
    found = spread(
        weights,
        kv_bytes_per_token=2 * len(weights.layers),
        room_bytes=room,
        cards=cards,
        most_tokens=40,
    )
    if found is None:
        return
    assert sum(found.layers) == len(weights.layers)
    assert min(found.layers) >= 1
    kv = [2 * found.kv_tokens * count for count in found.layers]
    taken = [a + b for a, b in zip(card_weights(weights, found.layers), kv, strict=True)]
    assert list(found.card_bytes) == taken
    assert max(taken) <= room


def test_equal_layers_are_divided_evenly() -> None:
    weights = LayeredWeights(10, (10,) * 8, 10)
    found = spread(weights, kv_bytes_per_token=8, room_bytes=10_000, cards=2, most_tokens=5)
    assert found is not None
    assert found.layers == (4, 4)
    assert found.kv_tokens == 5
