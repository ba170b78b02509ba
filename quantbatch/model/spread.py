"""A replica over several cards: which layers go where.

A model that no single card holds is cut into runs of layers, one for each card; a forward goes
through them one after the other, so several cards give room and no speed. Each card takes the
weights of its layers and their part of the KV cache, and what every process with a card takes
besides. The first card has the embeddings too, and the last one the output head, unless that is the
embedding (tied).

The cache is one number of tokens for all layers, so it is bounded by the fullest card. The cut that
leaves room for the most tokens is found first, then, among those that do, the one whose fullest
card is emptiest.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quantbatch.model.footprint import LayeredWeights


class Spread(NamedTuple):
    """A model cut into runs of layers."""

    layers: tuple[int, ...]
    """How many layers each card takes, in order."""
    kv_tokens: int
    """Tokens of cache that every card has room for."""
    card_bytes: tuple[int, ...]
    """Weights and cache of each card."""


def spread(
    weights: LayeredWeights,
    *,
    kv_bytes_per_token: int,
    room_bytes: int,
    cards: int,
    most_tokens: int,
) -> Spread | None:
    """Cut a model over cards of the same size.

    Args:
        weights: What each layer takes.
        kv_bytes_per_token: What a token takes in the cache, over all layers.
        room_bytes: What each card has for weights and cache.
        cards: How many cards there are; each takes at least one layer.
        most_tokens: Tokens of cache beyond which there is no use for more.

    Returns:
        The cut, with room for `most_tokens` or for as many as there is; None if not even the
        weights fit.
    """
    if len(weights.layers) < cards:
        return None
    of_layer = math.ceil(kv_bytes_per_token / len(weights.layers))
    tokens = _largest(
        most_tokens, lambda tokens: _cut(weights, tokens * of_layer, room_bytes, cards) is not None
    )
    if tokens is None:
        return None
    saved = _largest(
        room_bytes,
        lambda saved: _cut(weights, tokens * of_layer, room_bytes - saved, cards) is not None,
    )
    assert saved is not None
    layers = _cut(weights, tokens * of_layer, room_bytes - saved, cards)
    assert layers is not None
    return Spread(layers, tokens, _card_bytes(weights, tokens * of_layer, layers))


def _largest(most: int, works: Callable[[int], bool]) -> int | None:
    """Return the largest number up to `most` that works; None if 0 does not."""
    if not works(0):
        return None
    if works(most):
        return most
    good, bad = 0, most
    while bad - good > 1:
        middle = (good + bad) // 2
        if works(middle):
            good = middle
        else:
            bad = middle
    return good


def _cut(
    weights: LayeredWeights, kv_bytes_of_layer: int, room_bytes: int, cards: int
) -> tuple[int, ...] | None:
    """Fill one card after the other, leaving each later one at least one layer; None if layers are
    left over.
    """
    counts: list[int] = []
    rest = list(weights.layers)
    for card in range(cards):
        left = room_bytes - (weights.besides if card == 0 else 0)
        is_last = card == cards - 1
        left -= weights.head if is_last else 0
        count = 0
        later = cards - 1 - card
        while len(rest) - count > later and left >= rest[count] + kv_bytes_of_layer:
            left -= rest[count] + kv_bytes_of_layer
            count += 1
        if left < 0 or not count:
            return None
        counts.append(count)
        rest = rest[count:]
    return None if rest else tuple(counts)


def _card_bytes(
    weights: LayeredWeights, kv_bytes_of_layer: int, layers: Sequence[int]
) -> tuple[int, ...]:
    found, first = [], 0
    for count in layers:
        own = sum(weights.layers[first : first + count])
        found.append(own + count * kv_bytes_of_layer)
        first += count
    found[0] += weights.besides
    found[-1] += weights.head
    return tuple(found)
