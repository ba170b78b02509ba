"""Few rows times a matrix in 4 bits, in Triton: the codes are expanded in registers.

For more than a few rows bitsandbytes (0.50) mostly expands a matrix to 16 bits, in memory, and then
multiplies: for every weight it reads half a byte, writes two and reads two. Here a weight is read
once, as its half byte. Decoding an 8B model (7.0e9 weights in 4-bit matrices) that is 3.5 GB of
codes and 0.11 GB of nested scales instead of 31 GB: 1.2 ms a step at the 3.0 TB/s that an H100 was
measured to copy at, which no kernel can beat.

How it goes. bitsandbytes packs two codes to a byte, the first in the high half, row after row, and
keeps a scale for each block of 64 (or 128, ...) codes; only rows of whole blocks are taken here, as
by its own kernel. A program has some rows N of the matrix and up to 128 rows M of the activations,
and walks along K block by block. It expands high and low halves to two tiles, which meet the even
and the odd activations: so nothing is interleaved. Within a block the scale is the same, so
products are of bare codes, and their sum in float32 is multiplied by the scale: one fused multiply-
add for each of 64 * M products. Where there are few programs, K is split among several, and a
second kernel adds their sums in fixed order: no atomics, the same bits each time.

Codes become 16-bit numbers by permuting bytes (`expansion.py`). With all that surrounds it that is
5 to 6.6 instructions for a weight (Nsight Compute, H200), and however a product is divided, they
are what is waited for: 14,336 x 4,096 by 16 rows takes 28 us there, a quarter of what memory allows
and no longer than bf16 takes by cuBLAS; bitsandbytes takes 69, and 108 for 4,096 x 14,336. A step
of 32 rows through an 8B model takes 8.6 ms instead of 15.4 (`jobs/bench.py gpu fused`).

Rounding. bitsandbytes rounds each product of a code and a scale to the activations' type, which
costs 0.16 % of a weight in bfloat16. Here only the 16 codes are rounded, in the unit that is best
for them: 0.06 % (`expansion.py`). So products are a little nearer to the exact ones, and others:
answers may differ at near-ties, as they do by the size of a batch.

`fused.py` decides on the card at hand, by comparing and by timing, for which rows it is used.

Shapes: M rows of activations, N rows of the matrix, K columns, two to a byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from quantbatch.weights.four_bit import Packed, Tiles

STAGES = 4
"""Tiles on their way from memory at once."""
STAGED_BYTES = 64 << 10
"""Of activations at most: shared memory is 99 KB on an RTX 4090, A10 or L4."""
SUM_AT_ONCE = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _scales(  # type: ignore[no-untyped-def]
    absmax_ptr, nested_ptr, table_ptr, offset, at_N, NESTED: tl.constexpr,
):  # fmt: skip
    if NESTED:
        code_N = tl.load(absmax_ptr + at_N).to(tl.int32)
        return tl.load(table_ptr + code_N) * tl.load(nested_ptr + (at_N >> 8)) + offset
    else:  # noqa: RET505 - to Triton, what follows a return belongs to both
        return tl.load(absmax_ptr + at_N)


# Not compiled anew for numbers of rows, nor for most shapes.
@triton.jit(do_not_specialize=["M", "blocks", "share", "unit"])  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x_ptr, bytes_ptr, absmax_ptr, nested_ptr, table_ptr, offset_ptr, bias_ptr, out_ptr,
    M, N, blocks, share, unit,
    HALF_BLOCK: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, NESTED: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, EXPAND: tl.constexpr,
):  # fmt: skip
    # Those of the same rows of the matrix side by side: the second finds codes in the cache.
    split = tl.program_id(2)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    # Rows beyond the last are the last once more, and are not stored: loads need no masks.
    n_row = tl.minimum(n, N - 1)
    m_row = tl.minimum(m, M - 1)
    k = tl.arange(0, HALF_BLOCK)
    row_pairs = blocks * HALF_BLOCK
    bytes_at = bytes_ptr + n_row.to(tl.int64)[:, None] * row_pairs + k[None, :]
    kind = x_ptr.dtype.element_ty
    pairs_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    pairs_at = pairs_ptr + m_row[None, :] * row_pairs + k[:, None]
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)

    first = split * share
    last = tl.minimum(first + share, blocks)
    scales_at = n_row * blocks
    next_scale = _scales(absmax_ptr, nested_ptr, table_ptr, offset, scales_at + first, NESTED)
    acc = tl.zeros([TILE_N, TILE_M], tl.float32)
    for block in range(first, last):
        codes = tl.load(bytes_at + block * HALF_BLOCK)
        pairs = tl.load(pairs_at + block * HALF_BLOCK)
        scale = next_scale
        # Asked for a block ahead: three loads, one after the other.
        ahead = scales_at + tl.minimum(block + 1, blocks - 1)
        next_scale = _scales(absmax_ptr, nested_ptr, table_ptr, offset, ahead, NESTED)
        high, low = tl.inline_asm_elementwise(
            EXPAND, "=r,=r,=r,=r,r", [codes], dtype=(kind, kind), is_pure=True, pack=4
        )
        even = pairs.to(tl.int16).to(kind, bitcast=True)
        odd = (pairs >> 16).to(tl.int16).to(kind, bitcast=True)
        part = tl.dot(high, even)
        part = tl.dot(low, odd, part)
        acc += part * scale[:, None]

    acc *= unit
    if BIAS:
        acc += tl.load(bias_ptr + n_row).to(tl.float32)[:, None]
    inside = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT:
        at += split.to(tl.int64) * M * N
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "splits"])  # type: ignore[untyped-decorator]
def _add_up(  # type: ignore[no-untyped-def]
    parts_ptr, bias_ptr, out_ptr, count, N, splits, BIAS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    inside = at < count
    total = tl.zeros([AT_ONCE], tl.float32)
    part_at = parts_ptr + at
    for _ in range(splits):
        total += tl.load(part_at, mask=inside, other=0.0)
        part_at += count
    if BIAS:
        total += tl.load(bias_ptr + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def multiply(x_MK: Tensor, weights: Packed, bias_N: Tensor | None, tiles: Tiles) -> Tensor:
    """Return the product of activations and a matrix in 4 bits, (M, N).

    Makes no copy to or from the host, and allocates by shapes alone: it can be recorded.

    Args:
        x_MK: bfloat16 or float16, contiguous.
        weights: The matrix; K is whole blocks.
        bias_N: Added in float32, before the sum is rounded.
        tiles: How to divide it.
    """
    (m, k), (n, _) = x_MK.shape, weights.shape
    assert x_MK.is_contiguous(), "pairs of activations are read as one number"
    out_MN = torch.empty(m, n, dtype=x_MK.dtype, device=x_MK.device)
    blocks = k // weights.block
    share = triton.cdiv(blocks, tiles.splits)
    splits = triton.cdiv(blocks, share)  # none is empty
    sums = out_MN
    if splits > 1:
        sums = torch.empty(splits, m, n, dtype=torch.float32, device=x_MK.device)
    nested, table, offset = weights.nested or (weights.absmax,) * 3
    bias = weights.absmax if bias_N is None else bias_N
    _multiply[(triton.cdiv(m, tiles.rows), triton.cdiv(n, tiles.columns), splits)](
        x_MK, weights.codes, weights.absmax, nested, table, offset, bias, sums,
        m, n, blocks, share, weights.expansion.unit,
        HALF_BLOCK=weights.block // 2, TILE_M=tiles.rows, TILE_N=tiles.columns,
        NESTED=weights.nested is not None, BIAS=bias_N is not None and splits == 1,
        SPLIT=splits > 1, EXPAND=weights.expansion.text,
        num_warps=_warps(tiles), num_stages=_stages(tiles.rows, weights.block),
    )  # fmt: skip
    if splits > 1:
        _add_up[(triton.cdiv(m * n, SUM_AT_ONCE),)](
            sums, bias, out_MN, m * n, n, splits, BIAS=bias_N is not None, AT_ONCE=SUM_AT_ONCE
        )
    return out_MN


def _warps(tiles: Tiles) -> int:
    """Return as many that each thread has 64 sums or fewer: they are twice in its registers.

    Two, not four, where that is enough. With four Triton takes the tensor cores' instructions for
    whole groups of warps, which want activations in shared memory: on an H200 that was slower, 33
    against 28 us for 16 rows by 14,336 x 4,096.
    """
    return max(2, tiles.rows * tiles.columns // (64 * 32))


def _stages(rows: int, block: int) -> int:
    return max(2, min(STAGES, STAGED_BYTES // (2 * rows * block)))
