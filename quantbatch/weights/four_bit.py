"""Matrices in 4 bits as bitsandbytes keeps them, and how a product by one can be divided."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from bitsandbytes import functional

from quantbatch.weights.expansion import Expansion, expansion

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = (64, 128)
"""Codes to a scale that the kernel was tried with; transformers knows 64 only."""
LEAST_TILE, MOST_TILE = 16, 128
"""Rows of activations to a program: the least that a tensor core takes, and what registers hold."""
SPLITS = (1, 2, 4, 8, 16)
PROGRAMS = 4
"""Most to each multiprocessor where K is divided: they run at once, and more would only write more
sums. With less than a half, most of the card does nothing."""


class Packed(NamedTuple):
    """A matrix as bitsandbytes keeps it; nothing is copied."""

    codes: Tensor
    """uint8, N * K / 2 of them."""
    shape: tuple[int, int]
    """N and K."""
    block: int
    """Codes to a scale."""
    absmax: Tensor
    """Scales in float32, or, nested, codes of scales in uint8."""
    nested: tuple[Tensor, Tensor, Tensor] | None
    """Scales of 256 scales each, the table of their codes, and what is added; all float32."""
    expansion: Expansion
    """How codes become numbers of the activations' type."""


class Tiles(NamedTuple):
    """How a product is divided."""

    rows: int
    """Of activations to a program: a power of two, 16 to 128."""
    columns: int
    """Rows of the matrix to a program: 64 or 128."""
    splits: int
    """Programs among which K is divided."""


def packed_of(weight: Tensor, state: Any, dtype: torch.dtype) -> Packed | None:  # noqa: ANN401
    """Return a matrix of bitsandbytes as the kernel takes it; None for one that it does not take.

    Args:
        weight: Its packed codes, stored in any type.
        state: Its `QuantState`.
        dtype: Of the activations.
    """
    if dtype not in (torch.bfloat16, torch.float16) or state.quant_type not in ("nf4", "fp4"):
        return None
    if len(state.shape) != 2 or state.blocksize not in BLOCKS or state.shape[1] % state.blocksize:
        return None
    nested, scales = None, torch.float32
    if state.nested:
        inner = state.state2
        nested, scales = (inner.absmax, inner.code, state.offset), torch.uint8
        if inner.blocksize != 256 or {each.dtype for each in nested} != {torch.float32}:
            return None
        sizes = [-(-state.absmax.numel() // 256), 256, 1]
        if [each.numel() for each in nested] != sizes:
            return None
    n, k = state.shape
    if not weight.is_contiguous() or weight.numel() * weight.element_size() != n * k // 2:
        return None
    if state.absmax.dtype != scales or state.absmax.numel() != n * k // state.blocksize:
        return None
    # As bitsandbytes: by the kind, not by the table that came with the matrix.
    table = functional.get_4bit_type(state.quant_type, device="cpu").tolist()
    codes = weight.detach().view(-1).view(torch.uint8)
    expanded = expansion(tuple(table), dtype)
    return Packed(codes, (n, k), state.blocksize, state.absmax, nested, expanded)


def divisions(n: int, k: int, block: int, rows: int, *, processors: int) -> list[Tiles]:
    """Return the divisions of a product that are worth a try.

    Sums of programs that share K take no more memory than the matrix in 16 bits does.

    Args:
        n: Rows of the matrix.
        k: Its columns.
        block: Codes to a scale.
        rows: Of activations.
        processors: Of the card.
    """
    tile = min(MOST_TILE, max(LEAST_TILE, 1 << (rows - 1).bit_length()))
    found: list[tuple[int, Tiles]] = []
    for columns in (64, 128):
        whole = -(-n // columns) * -(-rows // tile)
        for splits in SPLITS:
            small = 4 * splits * rows <= 2 * k and splits <= k // block
            if splits == 1 or (small and whole * splits <= PROGRAMS * processors):
                found.append((whole * splits, Tiles(tile, columns, splits)))
    enough = min(processors // 2, max(programs for programs, _ in found))
    return [tiles for programs, tiles in found if programs >= enough]
