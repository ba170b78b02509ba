"""Keys and values on a card: in the pages that the block tables say.

The pool is allocated once, layer by layer at a layer's first use, with one page more than there are
blocks: what pads a batch of a recorded step writes there. The block tables of all slots stay on the
card and only what is new of them is sent, so that a recorded step finds them where they always are.

Where a model's layers are spread over several cards, each layer's pages are on its own card; the
tables are kept on the first, and the others get a copy when a step first reaches them.

Candidates' tokens are attended from over a copy of their rows' pages, many rows at once: label by
label a step of a hundred rows would start thousands of small kernels.

Shapes: N blocks, P tokens of a block, K key-value heads, H query heads, D sizes, S slots, W blocks
of the longest row, T tokens of the packed sequence, R rows with a single token, I items of queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from typing_extensions import override

from quantbatch.engine.attention import attend_one_row, attend_trees
from quantbatch.engine.blocks import BLOCK_TOKENS
from quantbatch.engine.kvstore import AttentionOptions, KvStore, Span, sees_each_other, send
from quantbatch.engine.pieces import TREE_TOKENS_AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from quantbatch.engine.paged_attention import Queries


class _Trees(NamedTuple):
    """Rows, side by side in the packed sequence, whose candidates make the same tree."""

    spans: Sequence[Span]
    sees_NN: Tensor
    """Which of each other the candidates' tokens of a row see."""
    slots_R: Tensor
    ends_R: Tensor
    """Tokens of each row."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What a card needs to know of a step to attend."""

    table_SW: Tensor
    places_T: Tensor
    queries: list[Queries] = field(default_factory=list)


class PagedStore(KvStore):
    """See `KvStore`.

    Args:
        slots: Places in the batch; there is one more for padding.
        blocks: Blocks of the pool.
        row_blocks: Blocks of the longest row.
        device: The card, or the first of them.
        block_tokens: Tokens of a block.
    """

    def __init__(
        self,
        *,
        slots: int,
        blocks: int,
        row_blocks: int,
        device: torch.device,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.padding_slot, self.padding_place = slots, blocks * block_tokens
        self._device, self._page, self._blocks = device, block_tokens, blocks
        self._pages: dict[int, tuple[Tensor, Tensor]] = {}
        self._written: list[list[int]] = [[] for _ in range(slots)]
        self._table_SW = torch.full(
            (slots + 1, row_blocks), blocks, dtype=torch.int32, device=device
        )
        self._spans: Sequence[Span] = []
        self._trees: list[_Trees] = []
        self._step = _Step(self._table_SW, torch.empty(0, dtype=torch.long, device=device))
        self._copies: dict[torch.device, _Step] = {}
        self._singles = 0
        self.has_triton = _has_triton()

    # ---- before a forward

    @override
    def begin(self, spans: Sequence[Span]) -> None:
        trees = [span for span in spans if span.parents]
        self._trees = [self._side_by_side(alike) for alike in _alike(trees)]
        self._spans = spans = spans[: len(spans) - len(trees)]
        self.update_tables(spans)
        places = [place for span in spans for place in self._places(span)]
        self._step, self._copies = _Step(self._table_SW, self._send(places)), {}
        self._singles = sum(span.tokens == 1 for span in spans)
        assert all(span.tokens == 1 for span in spans[: self._singles]), "singles come first"

    def _side_by_side(self, spans: Sequence[Span]) -> _Trees:
        sees_NN = sees_each_other(spans[0].parents).to(self._device)
        slots, ends = ([getattr(span, name) for span in spans] for name in ("slot", "start"))
        return _Trees(spans, sees_NN, self._send(slots), self._send(ends))

    def begin_singles(self, slots_R: Tensor, positions_R: Tensor, places_R: Tensor) -> None:
        """Prepare for a step of single tokens whose inputs are on the card already."""
        from quantbatch.engine import paged_attention

        count = slots_R.shape[0]
        offsets_R = torch.arange(count, device=self._device)
        ones_R = torch.ones_like(offsets_R)
        self._spans, self._trees, self._singles = [], [], count
        queries = paged_attention.Queries(
            slots_R, offsets_R, positions_R, ones_R, paged_attention.SINGLE_ROWS
        )
        self._step, self._copies = _Step(self._table_SW, places_R, [queries]), {}

    def update_tables(self, spans: Sequence[Span]) -> None:
        """Send what is new of the block tables of these rows."""
        slots: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for span in spans:
            there = self._written[span.slot]
            if there == span.blocks:
                continue
            known = len(there) if there == span.blocks[: len(there)] else 0
            new = span.blocks[known:]
            slots += [span.slot] * len(new)
            columns += range(known, len(span.blocks))
            blocks += new
            self._written[span.slot] = list(span.blocks)
        if slots:
            at = self._send(slots), self._send(columns)
            self._table_SW.index_put_(at, self._send(blocks).to(torch.int32))

    def _send(self, numbers: Sequence[int]) -> Tensor:
        return send(numbers, self._device)

    def place(self, blocks: Sequence[int], token: int) -> int:
        """Return where a token of a row lies among all places of the pool."""
        return blocks[token // self._page] * self._page + token % self._page

    def _places(self, span: Span) -> list[int]:
        return [self.place(span.blocks, token) for token in range(span.start, span.end)]

    # ---- in a forward

    @override
    def attend(
        self, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, options: AttentionOptions
    ) -> Tensor:
        if layer not in self._pages:
            self._pages[layer] = self._new_pages(k_1KTD), self._new_pages(v_1KTD)
        pages, step = self._pages[layer], self._step_on(q_1HTD.device)
        kept = step.places_T.shape[0]
        for pages_NPKD, new_1KTD in zip(pages, (k_1KTD, v_1KTD), strict=True):
            new_TKD = new_1KTD[0, :, :kept].transpose(0, 1)
            pages_NPKD.flatten(0, 1).index_copy_(0, step.places_T, new_TKD)
        outputs = [
            self._of_trees(pages, step, (q_1HTD, k_1KTD, v_1KTD), trees, options)
            for trees in self._trees
        ]
        if kept:
            outputs.insert(0, self._of_rows(pages, step, q_1HTD[:, :, :kept], options))
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _of_rows(
        self,
        pages: tuple[Tensor, Tensor],
        step: _Step,
        q_1HTD: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        if not self.has_triton:
            return self._gathered(pages, step, q_1HTD, options)
        with torch.cuda.device(q_1HTD.device):  # Triton launches on the current card
            return self._in_triton(pages, step, q_1HTD[0].transpose(0, 1), options)[None]

    def _of_trees(
        self,
        pages: tuple[Tensor, Tensor],
        step: _Step,
        qkv: tuple[Tensor, Tensor, Tensor],
        trees: _Trees,
        options: AttentionOptions,
    ) -> Tensor:
        """Attend from candidates' tokens, over a copy of their rows' pages."""
        first, rows, device = trees.spans[0], len(trees.spans), qkv[0].device
        place = slice(first.offset, first.offset + rows * first.tokens)
        q_RHND, *new = (
            x_1HTD[0, :, place].reshape(x_1HTD.shape[1], rows, first.tokens, -1).transpose(0, 1)
            for x_1HTD in qkv
        )
        sees_NN, slots_R, ends_R = (x.to(device) for x in trees[1:])
        longest = max(span.start for span in trees.spans)
        blocks_RW = step.table_SW[slots_R, : -(-longest // self._page)].long()
        # What is beyond a row's end is somebody else's, who may have had numbers that are none.
        beyond_RL = torch.arange(longest, device=device) >= ends_R[:, None]
        keys, values = (
            pages_NPKD[blocks_RW]
            .flatten(1, 2)[:, :longest]
            .masked_fill_(beyond_RL[:, :, None, None], 0)
            .transpose(1, 2)
            for pages_NPKD in pages
        )
        out_RHND = attend_trees(q_RHND, (keys, values), (new[0], new[1]), sees_NN, options, ends_R)
        return out_RHND.transpose(1, 2).flatten(0, 1)[None]

    def _step_on(self, device: torch.device) -> _Step:
        """Return what a card needs to know of the step."""
        if device == self._table_SW.device:
            return self._step
        if device not in self._copies:
            self._copies[device] = _Step(
                self._step.table_SW.to(device),
                self._step.places_T.to(device),
                [queries.to(device) for queries in self._step.queries],
            )
        return self._copies[device]

    def _new_pages(self, new_1KTD: Tensor) -> Tensor:
        shape = self._blocks + 1, self._page, new_1KTD.shape[1], new_1KTD.shape[3]
        # Zeros, because padding reads what was never written, and no number is no number.
        return torch.zeros(shape, dtype=new_1KTD.dtype, device=new_1KTD.device)

    def _in_triton(
        self,
        pages: tuple[Tensor, Tensor],
        step: _Step,
        q_THD: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        from quantbatch.engine import paged_attention

        if not step.queries:
            groups = q_THD.shape[1] // pages[0].shape[2]
            step.queries.extend(self._make_queries(groups, q_THD.device))
        q_THD = q_THD if q_THD.stride(2) == 1 else q_THD.contiguous()
        shape = *q_THD.shape[:2], pages[1].shape[3]
        out_THD = torch.empty(shape, dtype=q_THD.dtype, device=q_THD.device)
        for queries in step.queries:
            paged_attention.attend(q_THD, pages, step.table_SW, queries, options, out_THD)
        return out_THD

    def _make_queries(self, groups: int, device: torch.device) -> list[Queries]:
        """Divide the queries of a step among programs: single tokens, and pieces of prompts."""
        from quantbatch.engine.paged_attention import PROMPT_ROWS, SINGLE_ROWS

        singles, prompts = self._spans[: self._singles], self._spans[self._singles :]
        return [
            self._queries_of(spans, max(1, rows // groups), rows).to(device)
            for spans, rows in ((singles, SINGLE_ROWS), (prompts, PROMPT_ROWS))
            if spans
        ]

    def _queries_of(self, spans: Sequence[Span], at_once: int, rows: int) -> Queries:
        from quantbatch.engine.paged_attention import Queries

        items = [
            (
                span.slot,
                span.offset + first,
                span.start + first,
                min(at_once, span.end - span.start - first),
            )
            for span in spans
            for first in range(0, span.end - span.start, at_once)
        ]
        sent = self._send([number for column in zip(*items, strict=True) for number in column])
        slots_I, offsets_I, positions_I, counts_I = sent.view(4, -1)
        return Queries(slots_I, offsets_I, positions_I, counts_I, rows)

    def _gathered(
        self,
        pages: tuple[Tensor, Tensor],
        step: _Step,
        q_1HTD: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        """Attend without Triton: row by row, over a copy of its pages."""
        outputs = []
        for span in self._spans:
            k_1KLD, v_1KLD = self._row(pages, step, span, span.end)
            q_1HQD = q_1HTD[:, :, span.offset : span.offset + span.tokens]
            outputs.append(attend_one_row(q_1HQD, k_1KLD, v_1KLD, options).transpose(1, 2))
        return torch.cat(outputs, dim=1)

    def _row(
        self, pages: tuple[Tensor, Tensor], step: _Step, span: Span, tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Return a copy of a row's first keys and values, (1, K, L, D)."""
        table = step.table_SW[span.slot, : -(-tokens // self._page)].long()
        keys, values = (
            pages_NPKD[table].flatten(0, 1)[None, :tokens].transpose(1, 2) for pages_NPKD in pages
        )
        return keys, values

    # ---- shared blocks are where they are

    @override
    def keep(self, slot: int, index: int, block: int) -> None:
        pass

    @override
    def use(self, slot: int, blocks: Sequence[int]) -> None:
        pass

    @override
    def forget(self, block: int) -> None:
        pass


def _alike(trees: Sequence[Span]) -> Iterator[Sequence[Span]]:
    """Divide spans of candidates into runs of the same tree whose copies are not too large."""
    run: list[Span] = []
    longest = 0
    for span in trees:
        longest = max(longest, span.end)
        too_many = (len(run) + 1) * longest > TREE_TOKENS_AT_ONCE
        if run and (too_many or span.parents != run[0].parents):
            yield run
            run, longest = [], span.end
        run.append(span)
    if run:
        yield run


def _has_triton() -> bool:
    try:
        from quantbatch.engine import paged_attention  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.is_available()
