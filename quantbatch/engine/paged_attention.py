"""Attention over pages of KV cache on a card, in Triton: prompts and single tokens alike.

A program attends for some queries of one row and for all query heads that share one key-value head:
queries times heads are the rows of its matrix products, so keys and values are read once for all
of them. It walks through the row's pages by the block table and keeps a running softmax
(FlashAttention, arXiv 2205.14135). When there are too few programs to fill the card, the tokens are
split among several and their results joined (Flash-Decoding, 2023).

Why a kernel of our own, and not `torch.nn.attention.varlen` with a block table: that is in torch
2.13 and not in 2.11, takes 16-bit types only and knows no softcap. This one takes pages of 16
tokens on every torch, in every type. Triton comes with torch for CUDA; where it can't be imported,
`paged.py` gathers each row's pages and calls torch's attention.

The signature of the kernel has the strides of all tensors. Programs: item, key-value head, split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from quantbatch.engine.kvstore import AttentionOptions

SINGLE_ROWS, PROMPT_ROWS = 16, 64
"""Rows of a program's products: the least that a tensor core takes, and what keeps registers."""
TOKENS_AT_ONCE = 64
STAGED_BYTES = 64 << 10
"""Keys and values on their way at once: shared memory is 99 KB on an RTX 4090, A10 or L4."""
PROGRAMS_TO_FILL_A_CARD = 264
"""Two for each of an H100's 132 multiprocessors."""
MOST_SPLITS = 8


class Queries(NamedTuple):
    """What the programs of one launch attend for: I items of some queries of one row each."""

    slots_I: Tensor
    offsets_I: Tensor
    """Where the item's first query is in the packed sequence."""
    positions_I: Tensor
    """That query's position in its row."""
    counts_I: Tensor
    """Queries of the item, at most `rows` // (query heads to a key-value head)."""
    rows: int
    """`SINGLE_ROWS` or `PROMPT_ROWS`."""

    def to(self, device: torch.device) -> Queries:
        """Return them on a card."""
        return Queries(
            self.slots_I.to(device),
            self.offsets_I.to(device),
            self.positions_I.to(device),
            self.counts_I.to(device),
            self.rows,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table_ptr,
    slots_ptr, offsets_ptr, positions_ptr, counts_ptr,
    scale, softcap, window, table_stride, q_token, q_head, out_token, out_head, out_split,
    k_block, k_token, k_head, v_block, v_token, v_head, lse_split,
    GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr,
    DV_PADDED: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SPLITS: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    item, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots_ptr + item)
    offset = tl.load(offsets_ptr + item)
    position = tl.load(positions_ptr + item)
    count = tl.load(counts_ptr + item)
    m = tl.arange(0, M)
    query, group = m // GROUPS, m % GROUPS
    is_query = query < count
    d, dv = tl.arange(0, D_PADDED), tl.arange(0, DV_PADDED)
    q_at = (offset + query) * q_token + (head * GROUPS + group) * q_head
    q = tl.load(
        q_ptr + q_at[:, None] + d[None, :], mask=is_query[:, None] & (d < D)[None, :], other=0.0
    )

    first = 0
    if WINDOW:
        first = tl.maximum(0, position - window + 1)
    last = position + count
    share = tl.cdiv(tl.cdiv(last - first, SPLITS), N) * N
    begin = first + split * share
    end = tl.minimum(last, begin + share)

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV_PADDED], tl.float32)
    for at in range(begin, end, N):
        t = at + tl.arange(0, N)
        inside = t < end
        block = tl.load(table_ptr + slot * table_stride + t // PAGE, mask=inside, other=0).to(
            tl.int64
        )
        k_at = block * k_block + (t % PAGE) * k_token + head * k_head
        k = tl.load(
            k_ptr + k_at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        sees = inside[None, :] & (t[None, :] <= (position + query)[:, None])
        if WINDOW:
            sees = sees & (t[None, :] > (position + query - window)[:, None])
        scores = tl.where(sees, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - safe_top[:, None])
        decay = tl.exp(top - safe_top)
        v_at = block * v_block + (t % PAGE) * v_token + head * v_head
        v = tl.load(
            v_ptr + v_at[:, None] + dv[None, :],
            mask=inside[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        top = new_top
    safe_total = tl.where(total == 0.0, 1.0, total)
    out = (acc / safe_total[:, None]).to(out_ptr.dtype.element_ty)
    row = (offset + query) * out_token + (head * GROUPS + group) * out_head
    out_at = split * out_split + row[:, None] + dv[None, :]
    tl.store(
        out_ptr + out_at,
        out.to(out_ptr.dtype.element_ty),
        mask=is_query[:, None] & (dv < DV)[None, :],
    )
    if SPLITS > 1:
        lse = tl.where(
            total == 0.0, float("-inf"), top + tl.log(tl.where(total == 0.0, 1.0, total))
        )
        lse_at = split * lse_split + row // DV
        tl.store(lse_ptr + lse_at, lse, mask=is_query)


def attend(
    q_THD: Tensor,
    pages: tuple[Tensor, Tensor],
    table_SW: Tensor,
    queries: Queries,
    options: AttentionOptions,
    out_THD: Tensor,
) -> None:
    """Attend for some queries of the packed sequence and write their outputs.

    Args:
        q_THD: Queries of the packed sequence, T tokens and H heads.
        pages: Keys and values, (N blocks, P tokens, K heads, D).
        table_SW: Blocks of each slot, int32.
        queries: Which, all of them with keys and values in the pages.
        options: How.
        out_THD: Where outputs go.
    """
    keys_NPKD, values_NPKD = pages
    heads, kv_heads = q_THD.shape[1], keys_NPKD.shape[2]
    items = queries.slots_I.shape[0]
    splits = _splits(items * kv_heads) if queries.rows == SINGLE_ROWS else 1
    size, value_size = q_THD.shape[2], values_NPKD.shape[3]
    parts = out_THD[None]
    lse = out_THD
    if splits > 1:
        parts = torch.empty(splits, *out_THD.shape, dtype=torch.float32, device=out_THD.device)
        lse = torch.empty(splits, *out_THD.shape[:2], dtype=torch.float32, device=out_THD.device)
    _attend[(items, kv_heads, splits)](
        q_THD, keys_NPKD, values_NPKD, parts, lse, table_SW,
        queries.slots_I, queries.offsets_I, queries.positions_I, queries.counts_I,
        options.scale, options.softcap or 0.0, options.window or 0, table_SW.stride(0),
        q_THD.stride(0), q_THD.stride(1), parts.stride(1), parts.stride(2), parts.stride(0),
        *keys_NPKD.stride()[:3], *values_NPKD.stride()[:3], lse.stride(0),
        GROUPS=heads // kv_heads, D=size, DV=value_size,
        D_PADDED=_padded(size), DV_PADDED=_padded(value_size), PAGE=keys_NPKD.shape[1],
        M=max(queries.rows, triton.next_power_of_2(heads // kv_heads)), N=TOKENS_AT_ONCE,
        SPLITS=splits, SOFTCAP=options.softcap is not None, WINDOW=options.window is not None,
        num_warps=4, num_stages=_stages(size + value_size, keys_NPKD.element_size()),
    )  # fmt: skip
    if splits > 1:
        _join(parts, lse, queries, out_THD)


def _padded(size: int) -> int:
    padded: int = max(16, triton.next_power_of_2(size))
    return padded


def _stages(numbers_per_token: int, item_bytes: int) -> int:
    return max(1, min(3, STAGED_BYTES // (TOKENS_AT_ONCE * numbers_per_token * item_bytes)))


def _splits(programs: int) -> int:
    return max(1, min(MOST_SPLITS, PROGRAMS_TO_FILL_A_CARD // programs))


def _join(parts_XTHD: Tensor, lse_XTH: Tensor, queries: Queries, out_THD: Tensor) -> None:
    """Join the results of splits; single tokens are the first of the packed sequence."""
    count = queries.slots_I.shape[0]
    weights = lse_XTH[:, :count].softmax(0)
    out_THD[:count] = (parts_XTHD[:, :count] * weights[..., None]).sum(0).to(out_THD.dtype)
