"""Where keys and values lie: the seam between the accounting of blocks and the memory of a device.

`slots.py` is for CPUs, `paged.py` for cards. Both obey the same block tables, so admission is the
same arithmetic on both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def send(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Copy numbers to a device without waiting for it, as `torch.tensor(..., device=...)` would."""
    there = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return there.to(device, non_blocking=True)


class Span(NamedTuple):
    """A piece of one row in the packed sequence of a step."""

    slot: int
    """The row's place in the batch."""
    start: int
    """Tokens of the row that are in the cache already."""
    end: int
    """Tokens of the row after this step."""
    offset: int
    """Where the piece begins in the packed sequence."""
    blocks: Sequence[int]
    """The row's blocks, in order."""
    parents: tuple[int, ...] = ()
    """If these are tokens of candidates, the place among them of the one before each, -1 for the
    row's last: each sees the row, those before it and itself, and none is kept. Such spans come
    last."""

    @property
    def tokens(self) -> int:
        """How many tokens the piece has."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How one layer attends."""

    scale: float
    window: int | None = None
    """Tokens that a token sees, itself included; None is all before it."""
    softcap: float | None = None
    """Scores are squashed to this range by a tanh (Gemma 2)."""


class KvStore(Protocol):
    """Keys and values of all rows, layer by layer. Layers appear at their first use."""

    def begin(self, spans: Sequence[Span]) -> None:
        """Prepare for a forward over a packed sequence of these spans."""
        ...

    def attend(
        self, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, options: AttentionOptions
    ) -> Tensor:
        """Store the new keys and values of a layer and attend, each row to its own tokens only.

        Shapes: H query heads, K key-value heads, T tokens of the packed sequence, D sizes.

        Returns:
            The output, (1, T, H, D).
        """
        ...

    def keep(self, slot: int, index: int, block: int) -> None:
        """Make sure that block `index` of a row can be used by others as `block`."""
        ...

    def use(self, slot: int, blocks: Sequence[int]) -> None:
        """Let a row begin with kept blocks."""
        ...

    def forget(self, block: int) -> None:
        """Note that a block is kept no longer."""
        ...


@lru_cache(maxsize=64)
def sees_each_other(parents: tuple[int, ...]) -> Tensor:
    """Return which of candidates' tokens each of them sees, (N, N): its path and itself; it is
    remembered and must not be changed.
    """
    sees_NN = torch.eye(len(parents), dtype=torch.bool)
    for place, parent in enumerate(parents):
        if parent >= 0:
            sees_NN[place] |= sees_NN[parent]
    return sees_NN
