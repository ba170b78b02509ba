"""Keys and values on a CPU: each row's in one place, in order.

Attention reads all of a row's cache for each new token, and on a CPU that is bound by memory: a
cache in pages would have to be gathered first, which reads and writes it once more. So a row has a
slot, where its keys lie one after the other, and attention over it is one call without padding. The
blocks of the accounting are only counted here, but for those that are kept for others: they are
copied out of the row that computed them and into those that use them. Copying a token's keys and
values takes a hundredth of computing them.

Slots are as long as the longest row so far; what was never written takes no memory, since Linux
gives pages at their first use.

Shapes: S slots, K key-value heads, L tokens of a slot, D sizes of a head, T tokens of the step,
P tokens of a block.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from quantbatch.engine.attention import attend_one_row, attend_trees
from quantbatch.engine.blocks import BLOCK_TOKENS
from quantbatch.engine.kvstore import AttentionOptions, KvStore, Span, sees_each_other

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

GROWTH_TOKENS = 256
"""Slots are as long as a multiple of this."""
GROWTH = 1.5
"""Slots grow at least by half, so that a long prompt in pieces has them copied a few times only."""


class _Layer:
    """Keys and values of one layer."""

    def __init__(self, k_1KTD: Tensor, v_1KTD: Tensor, slots: int, page: int) -> None:
        self._page = page
        self.tensors = [
            torch.empty(slots, x.shape[1], 0, x.shape[3], dtype=x.dtype) for x in (k_1KTD, v_1KTD)
        ]
        self._kept: dict[int, list[Tensor]] = {}
        """Keys and values (K, P, D) of kept blocks."""

    def grow(self, tokens: int, ends: Mapping[int, int]) -> None:
        """Make slots longer; `ends` says how much of each is filled."""
        self.tensors = [self._grown(old_SKLD, tokens, ends) for old_SKLD in self.tensors]

    def _grown(self, old_SKLD: Tensor, tokens: int, ends: Mapping[int, int]) -> Tensor:
        slots, heads, there, size = old_SKLD.shape
        new_SKLD = torch.empty(slots, heads, tokens, size, dtype=old_SKLD.dtype)
        for slot, end in ends.items():
            new_SKLD[slot, :, : min(end, there)] = old_SKLD[slot, :, : min(end, there)]
        return new_SKLD

    def keep(self, slot: int, index: int, block: int) -> None:
        place = slice(index * self._page, (index + 1) * self._page)
        self._kept[block] = [slots_SKLD[slot, :, place].clone() for slots_SKLD in self.tensors]

    def forget(self, block: int) -> None:
        self._kept.pop(block, None)

    def use(self, slot: int, blocks: Sequence[int]) -> None:
        found = zip(*(self._kept[block] for block in blocks), strict=True)
        for slots_SKLD, pages_KPD in zip(self.tensors, found, strict=True):
            slots_SKLD[slot, :, : len(blocks) * self._page] = torch.cat(pages_KPD, dim=1)


class SlotStore(KvStore):
    """See `KvStore`.

    Args:
        slots: Places in the batch.
        block_tokens: Tokens of a block.
    """

    def __init__(self, *, slots: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self._slots, self._page = slots, block_tokens
        self._layers: dict[int, _Layer] = {}
        self._spans: Sequence[Span] = []
        self._trees: list[tuple[Span, Tensor]] = []
        """Spans of candidates, with which of each other their tokens see."""
        self._singles = torch.empty(0, dtype=torch.long)
        self._single_slots = self._single_places = self._singles
        self._tokens = 0
        self._ends: dict[int, int] = {}
        """How much of each slot is filled."""

    @override
    def begin(self, spans: Sequence[Span]) -> None:
        self._trees = [(span, sees_each_other(span.parents)) for span in spans if span.parents]
        self._spans = spans = spans[: len(spans) - len(self._trees)]
        singles = [span for span in spans if span.tokens == 1]
        self._singles = torch.tensor([span.offset for span in singles], dtype=torch.long)
        self._single_slots = torch.tensor([span.slot for span in singles], dtype=torch.long)
        self._single_places = torch.tensor([span.start for span in singles], dtype=torch.long)
        self._reserve(max((span.end for span in spans), default=0))
        self._ends |= {span.slot: span.end for span in spans}

    def _reserve(self, tokens: int) -> None:
        if tokens > self._tokens:
            wanted = max(tokens, GROWTH * self._tokens)
            self._tokens = math.ceil(wanted / GROWTH_TOKENS) * GROWTH_TOKENS
            for layer in self._layers.values():
                layer.grow(self._tokens, self._ends)

    @override
    def attend(
        self, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, options: AttentionOptions
    ) -> Tensor:
        if layer not in self._layers:
            self._layers[layer] = _Layer(k_1KTD, v_1KTD, self._slots, self._page)
            self._layers[layer].grow(self._tokens, {})
        keys_SKLD, values_SKLD = self._layers[layer].tensors
        self._write(keys_SKLD, k_1KTD)
        self._write(values_SKLD, v_1KTD)
        outputs = []
        for slot, start, end, offset, *_ in self._spans:
            q_1HQD = q_1HTD[:, :, offset : offset + end - start]
            k_1KLD, v_1KLD = (
                keys_SKLD[slot : slot + 1, :, :end],
                values_SKLD[slot : slot + 1, :, :end],
            )
            outputs.append(attend_one_row(q_1HQD, k_1KLD, v_1KLD, options).transpose(1, 2))
        for span, sees_NN in self._trees:
            place = slice(span.offset, span.offset + span.tokens)
            k_1KLD, v_1KLD = (
                slots_SKLD[span.slot : span.slot + 1, :, : span.start]
                for slots_SKLD in (keys_SKLD, values_SKLD)
            )
            new = k_1KTD[:, :, place], v_1KTD[:, :, place]
            out_1HND = attend_trees(q_1HTD[:, :, place], (k_1KLD, v_1KLD), new, sees_NN, options)
            outputs.append(out_1HND.transpose(1, 2))
        return torch.cat(outputs, dim=1)

    def _write(self, slots_SKLD: Tensor, new_1KTD: Tensor) -> None:
        """Store what is new: rows with one token in one go, the pieces of prompts one by one."""
        new_TKD = new_1KTD[0].transpose(0, 1)
        if len(self._singles):
            slots_SKLD[self._single_slots, :, self._single_places] = new_TKD[self._singles]
        for slot, start, end, offset, *_ in self._spans:
            if end - start > 1:
                slots_SKLD[slot, :, start:end] = new_1KTD[0, :, offset : offset + end - start]

    @override
    def keep(self, slot: int, index: int, block: int) -> None:
        for layer in self._layers.values():
            layer.keep(slot, index, block)

    @override
    def use(self, slot: int, blocks: Sequence[int]) -> None:
        self._reserve(len(blocks) * self._page)
        self._ends[slot] = len(blocks) * self._page
        for layer in self._layers.values():
            layer.use(slot, blocks)

    @override
    def forget(self, block: int) -> None:
        for layer in self._layers.values():
            layer.forget(block)
