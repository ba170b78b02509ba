"""Who runs in the next step: admission by KV tokens, prompts in pieces, rows put back and kept.

Pure: no tensors, so that everything about it can be tested in milliseconds. A step is a list of
pieces, each some consecutive tokens of one row; a running row that has only its newest token to
compute is a piece of one. Prompts and running rows share a step, so the weights (and their
dequantization) are paid once for both, up to a budget of tokens that bounds the memory of a step.

Order. Rows are admitted in the order of `add`; of those that came together the ones with the most
new tokens to come first, then those with the longest prompts: the rows that take longest should
not begin last, or the batch would be all but empty for a long end. A row is never passed over for
want of room, so none starves; it is passed over for a moment when its prompt's beginning is just
being computed by another row, whose blocks it will then share.

Room. A row is admitted when the pool has room for its prompt and for the growth that it and all
running rows are expected to have. An expectation can be wrong, so when a running row finds no
block, the youngest is put back: it waits at the front of the queue, keeps its answer so far, and
its cache is computed again later. The oldest row always gets on, so the work always ends.

`length` of a row may be ahead of the tokens that are known: on a card the next step is launched
before the last one's tokens have been read.

Some rows only read (`wants.Rank`, `Score`, `Embed`): they never get longer, and leave when all of
their prompt, and of their tree of candidates, is computed. Scores of many places at once take much
memory, so a step has a budget of them too.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from typing import TYPE_CHECKING

from quantbatch.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for, prefix_digests
from quantbatch.engine.pieces import Budget, Piece, ReadLimits, Row, first_read
from quantbatch.engine.trees import grow
from quantbatch.wants import Rank, Score, Write

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from quantbatch.engine.pieces import Limits
    from quantbatch.records import Request

PASSED_OVER_AT_MOST = 256
"""Rows of the queue looked at in one step behind one that waits for a neighbour's blocks."""
ANSWERS_TO_TRUST = 16
"""Finished rows after which their mean length says more than max_new_tokens."""


class Scheduler:
    """Holds the waiting and the running rows and decides on each step.

    Args:
        pool: The blocks.
        slots: Places in the batch.
        refill_share: Share of the batch that leaves before others are admitted to a running batch.
            On a card a step with prompts in it costs more than one without, whatever they are.
        share_prefixes: Whether rows whose prompts begin alike share those blocks.
        block_tokens: Tokens of a block.
        read_limits: What rows that only read may take of a step.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        slots: int,
        refill_share: float = 0.0,
        share_prefixes: bool = True,
        block_tokens: int = BLOCK_TOKENS,
        read_limits: ReadLimits | None = None,
    ) -> None:
        self._read_limits = read_limits or ReadLimits()
        self.pool = pool
        self.running: list[Row] = []
        """Oldest first."""
        self.preemptions = 0
        self.reused_tokens = 0
        self.recomputed_tokens = 0
        self.admitted: list[Row] = []
        """Rows that the last step admitted."""
        self._waiting: list[Row] = []
        """The next one last."""
        self._free_slots = list(range(slots - 1, -1, -1))
        self._refill_share = refill_share
        self._refilling = True
        """Whether rows are admitted now: until places, room or rows run out."""
        self._left = 0
        """Rows that left since then."""
        self._share = share_prefixes
        self._block_tokens = block_tokens
        self._adds = 0
        self._wanted: Counter[bytes] = Counter()
        """How many waiting rows have a block in their prompt."""
        self._coming: set[bytes] = set()
        """Wanted blocks that a running row is about to compute."""
        self._answers, self._answer_tokens = 0, 0

    @property
    def has_rows(self) -> bool:
        """Whether any row waits or runs."""
        return bool(self._waiting or self.running)

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    # ---- rows come and go

    def add(self, requests: Iterable[Request], context_tokens: int | None) -> None:
        """Queue requests; each must be able to have at least one new token within the context and
        fit the pool alone.
        """
        self._adds += 1
        self._refilling = True
        for request in requests:
            length = len(request.prompt_ids)
            new = request.sampling.max_new_tokens if isinstance(request.want, Write) else 0
            limit = min(length + new, context_tokens or 1 << 62)
            order = self._adds, length - limit, -length
            row = Row(request, order, list(request.prompt_ids), limit, length)
            if isinstance(request.want, Rank):
                row.tree = grow(request.want.candidates, self._read_limits.most_nodes)
            if self._share:
                shared = first_read(request) // self._block_tokens
                row.digests = prefix_digests(request.prompt_ids, self._block_tokens)[:shared]
            self._queue(row)
        self._sort()

    def fits_alone(self, tokens: int) -> bool:
        """Tell whether a row of so many tokens fits the pool when it has all of it."""
        return blocks_for(tokens, self._block_tokens) <= self.pool.size

    def finish(self, row: Row) -> None:
        """Take out a row that is answered."""
        row.done = True
        if not row.reads:
            self._answers += 1
            self._answer_tokens += row.generated
        self.remove(row)

    def remove(self, row: Row) -> None:
        """Take out a row and forget what was computed for it."""
        if row.slot >= 0:
            self._leave(row)
        else:
            self._waiting.remove(row)
            self._unwant(row)

    def put_back(self, row: Row) -> None:
        """Let a running row wait again; its answer so far is kept."""
        self._leave(row)
        self._queue(row)
        self._sort()

    def _queue(self, row: Row) -> None:
        self._waiting.append(row)
        self._wanted.update(row.digests)

    def _unwant(self, row: Row) -> None:
        for digest in row.digests:
            self._wanted[digest] -= 1
            if not self._wanted[digest]:
                del self._wanted[digest]

    def _sort(self) -> None:
        self._waiting.sort(key=operator.attrgetter("order"), reverse=True)

    def _leave(self, row: Row) -> None:
        self.running.remove(row)
        self.pool.release(row.blocks)
        self._free_slots.append(row.slot)
        # All of them: what a failed step computed was never kept, and never comes.
        self._coming.difference_update(row.digests)
        self._left += 1
        row.slot, row.blocks, row.computed, row.next_group = -1, [], 0, 0

    def undo(self, pieces: Iterable[Piece]) -> None:
        """Put back the rows of a step that failed before it chose any token."""
        for piece in pieces:
            if not piece.row.done:
                piece.row.length -= piece.samples
                self._leave(piece.row)
                self._queue(piece.row)
        self._sort()

    # ---- a step

    def next_step(self, limits: Limits) -> list[Piece]:
        """Decide what to compute next, and give the rows the blocks for it.

        Returns:
            The pieces, at most `limits.step_tokens` tokens together; empty if there is nothing to
            compute until tokens are read.
        """
        self.admitted = []
        budget = Budget(limits.step_tokens, self._read_limits.step_scores)
        pieces = list(self._of_running(limits, budget))
        pieces += self._of_waiting(limits, budget)
        for piece in pieces:
            self._launched(piece)
        # Stores take rows with one token together.
        return sorted(pieces, key=lambda piece: piece.end - piece.start != 1)

    def _launched(self, piece: Piece) -> None:
        row = piece.row
        self.recomputed_tokens += max(0, min(row.once_computed, piece.end) - piece.start)
        if piece.samples:
            row.length += 1
        row.next_group += piece.group is not None
        row.computed = piece.end
        row.once_computed = max(row.once_computed, piece.end)

    def _of_running(self, limits: Limits, budget: Budget) -> Iterator[Piece]:
        """Yield pieces of running rows, oldest first: a row that is put back on the way is then
        younger than all that have their pieces.
        """
        while len(self.running) > limits.rows:
            self._preempt(self.running[-1])
        for place, row in enumerate(list(self.running)):
            if row.slot < 0 or not budget.tokens or self._has_nothing_to_do(row):
                continue
            # A prompt leaves each row behind it the one token that it needs to go on.
            behind = max(0, len(self.running) - place - 1)
            piece = self._piece(row, max(1, budget.tokens - behind), budget)
            if piece is not None and self._take_blocks(row, piece.end):
                budget.take(piece)
                yield piece

    @staticmethod
    def _has_nothing_to_do(row: Row) -> bool:
        return row.is_read if row.reads else row.length >= row.limit

    def _piece(self, row: Row, tokens: int, budget: Budget) -> Piece | None:
        """Return what of a row is computed next, at most so many tokens; None if nothing can be."""
        end = self._piece_end(row, tokens)
        if isinstance(row.request.want, Score):
            end = min(end, max(row.computed, first_read(row.request)) + budget.scores)
        piece = Piece(row, row.computed, end, end == row.length and not row.reads)
        if row.tree is None or end < row.length:
            return piece if end > row.computed else None
        if row.next_group < len(row.tree.groups):
            whole = piece._replace(group=row.tree.groups[row.next_group])
            # A step that has nothing else takes a group whatever its size: the work must end.
            if budget.is_whole or (whole.tokens <= tokens and whole.scores <= budget.scores):
                return whole
        return piece if piece.tokens and piece.scores <= budget.scores else None

    def _piece_end(self, row: Row, budget: int) -> int:
        """Return where a row's next piece ends: before tokens that fewer waiting rows have, too.

        Were they not finite, they would spoil what others share: attention gives them the weight 0
        in what comes before them, and 0 times NaN is NaN.
        """
        end = min(row.length, row.computed + budget)
        first, page = row.computed // self._block_tokens, self._block_tokens
        wanted = [self._wanted[digest] for digest in row.digests[first : end // page + 1]]
        for block, (by_now, by_next) in enumerate(itertools.pairwise([*wanted, 0]), start=first):
            if by_now > by_next:
                return min(end, (block + 1) * page)
        return end

    def _take_blocks(self, row: Row, tokens: int) -> bool:
        """Give a row blocks for its first `tokens` tokens, putting younger rows back if need be."""
        missing = blocks_for(tokens, self._block_tokens) - len(row.blocks)
        while missing > self.pool.available:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is row:
                return False
        row.blocks += self.pool.allocate(max(0, missing))
        return True

    def _preempt(self, row: Row) -> None:
        self.preemptions += 1
        self.put_back(row)

    def _of_waiting(self, limits: Limits, budget: Budget) -> Iterator[Piece]:
        """Admit rows while there are places, blocks and tokens left in the step's budget."""
        enough = int(self._refill_share * limits.rows)
        if self.running and not self._refilling and self._left < enough:
            return
        self._left = 0
        free = min(len(self._free_slots), limits.rows - len(self.running))
        passed_over: list[Row] = []
        while (
            free > 0
            and budget.tokens > 0
            and budget.scores > 0
            and self._waiting
            and len(passed_over) < PASSED_OVER_AT_MOST
        ):
            row = self._waiting.pop()
            if self._must_wait(row):
                passed_over.append(row)
                continue
            if not self._has_room(row):
                self._waiting.append(row)
                self._refilling = False
                break
            self._admit(row)
            free -= 1
            piece = self._piece(row, budget.tokens, budget)
            if piece is None:
                continue
            taken = self._take_blocks(row, piece.end)
            assert taken, "a row was admitted without room for its prompt"
            budget.take(piece)
            yield piece
        else:
            self._refilling = min(budget.tokens, budget.scores) <= 0 or bool(passed_over)
        self._waiting += reversed(passed_over)

    def _must_wait(self, row: Row) -> bool:
        if len(row.tokens) < row.length:
            return True  # put back before its newest token was read
        kept = self.pool.count_kept(row.digests)
        return kept < len(row.digests) and row.digests[kept] in self._coming

    def _has_room(self, row: Row) -> bool:
        """Tell whether the pool has room for a row and for what all running rows may still grow."""
        shared = row.digests[: self.pool.count_kept(row.digests)]
        own = blocks_for(self._expected_tokens(row), self._block_tokens) - len(shared)
        growth = sum(
            max(0, blocks_for(self._expected_tokens(other), self._block_tokens) - len(other.blocks))
            for other in self.running
        )
        room = self.pool.available - self.pool.idle_among(shared)
        if not self.running:
            return blocks_for(row.length, self._block_tokens) - len(shared) <= room
        return own + growth <= room

    def _expected_tokens(self, row: Row) -> int:
        """Return how long a row is expected to become, from the answers so far."""
        if self._answers < ANSWERS_TO_TRUST:
            return row.limit
        mean = self._answer_tokens // self._answers + 1
        return min(row.limit, max(row.length + self._block_tokens, row.prompt_tokens + mean))

    def _admit(self, row: Row) -> None:
        self._unwant(row)
        row.slot = self._free_slots.pop()
        shared = row.digests[: self.pool.count_kept(row.digests)]
        row.blocks = self.pool.share(shared)
        row.computed = len(shared) * self._block_tokens
        self.reused_tokens += max(0, row.computed - row.once_computed)
        self._coming.update(d for d in row.digests[len(shared) :] if self._wanted[d] > 0)
        self.running.append(row)
        self.admitted.append(row)

    def keepable(self, pieces: Sequence[Piece]) -> Iterator[tuple[Row, int]]:
        """Keep the blocks that these pieces filled and that waiting rows want.

        Yields:
            The row and the number of the block within it, for each block that is kept now.
        """
        for row, start, end, *_ in pieces:
            filled = range(start // self._block_tokens, end // self._block_tokens)
            for index in filled[: max(0, len(row.digests) - filled.start)]:
                digest = row.digests[index]
                self._coming.discard(digest)
                if self._wanted[digest] > 0 and self.pool.keep(row.blocks[index], digest):
                    yield row, index
