"""Blocks of KV cache: whose they are, and which hold the beginning of a prompt that others share.

The cache of a row is a list of blocks of `BLOCK_TOKENS` tokens each, taken one by one as the row
grows (PagedAttention, arXiv 2309.06180), so that admission counts tokens and not the longest row
that there could be. A block that is full of prompt can be *kept* under the digest of everything up
to its end: another row whose prompt begins with the same tokens then uses it too, and computes only
what is its own. A kept block outlives its rows until its place is needed; those that were used
longest ago go first, and of one prompt the last blocks before the first.

Pure accounting: where the numbers lie is the business of a `KvStore`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

BLOCK_TOKENS = 16
"""Tokens of a block: half a block is lost for each row on average, and prefixes are shared in
multiples of it. vLLM's default, too."""


def blocks_for(tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Return how many blocks so many tokens take."""
    return -(-tokens // block_tokens)


def prefix_digests(token_ids: Sequence[int], block_tokens: int = BLOCK_TOKENS) -> list[bytes]:
    """Return a digest for each full block of a prompt: of all tokens up to the block's end.

    The last token of a prompt is never in one of these blocks: what follows it must be computed, so
    its row has to run at least that token itself.
    """
    digests: list[bytes] = []
    digest = b""
    for end in range(block_tokens, len(token_ids), block_tokens):
        block = array("i", token_ids[end - block_tokens : end]).tobytes()
        digest = hashlib.blake2b(digest + block, digest_size=16).digest()
        digests.append(digest)
    return digests


class BlockPool:
    """A fixed number of blocks, each free, used by rows, or kept for rows to come.

    Args:
        size: Number of blocks.
        most_idle: Most blocks that are kept without a user; None is as many as there are.
    """

    def __init__(self, size: int, most_idle: int | None = None) -> None:
        self.size = size
        self.forgotten: list[int] = []
        """Blocks that are kept no longer, for whoever has copies of them to clear."""
        self._most_idle = size if most_idle is None else most_idle
        self._free = list(range(size - 1, -1, -1))
        self._users = [0] * size
        self._kept: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Kept blocks without a user, the one to give up first at the beginning."""

    @property
    def available(self) -> int:
        """Blocks that can be allocated."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> int:
        """Blocks that rows use."""
        return self.size - self.available

    def allocate(self, count: int) -> list[int]:
        """Take blocks; there must be as many `available`."""
        assert count <= self.available, f"{count} blocks asked for, {self.available} available"
        return [self._allocate() for _ in range(count)]

    def _allocate(self) -> int:
        block = self._free.pop() if self._free else self._forget_oldest()
        self._users[block] = 1
        return block

    def _forget_oldest(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._kept[self._digest_of.pop(block)]
        self.forgotten.append(block)
        return block

    def keep(self, block: int, digest: bytes) -> bool:
        """Let other rows find a block by the digest of the prompt up to its end.

        Returns:
            Whether it is kept: not if another block holds the same already.
        """
        assert self._users[block], "only a row's block can be kept"
        if digest in self._kept or block in self._digest_of:
            return False
        self._kept[digest] = block
        self._digest_of[block] = digest
        return True

    def count_kept(self, digests: Sequence[bytes]) -> int:
        """Return how many blocks at the beginning of a prompt are there."""
        return next((i for i, d in enumerate(digests) if d not in self._kept), len(digests))

    def idle_among(self, digests: Iterable[bytes]) -> int:
        """Return how many of these kept blocks have no user, and so count as available."""
        return sum(self._kept[digest] in self._idle for digest in digests)

    def share(self, digests: Iterable[bytes]) -> list[int]:
        """Use kept blocks."""
        blocks = [self._kept[digest] for digest in digests]
        for block in blocks:
            self._idle.pop(block, None)
            self._users[block] += 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back the blocks of a row, in its order."""
        for block in reversed(blocks):
            assert self._users[block], f"block {block} has no user"
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._digest_of:
                self._idle[block] = None
            else:
                self._free.append(block)
        while len(self._idle) > self._most_idle:
            self._free.append(self._forget_oldest())

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Assert that the books agree with the blocks that rows have; for tests."""
        counted = [0] * self.size
        for table in tables:
            assert len(set(table)) == len(table), "a row has a block twice"
            for block in table:
                counted[block] += 1
        assert counted == self._users, "users of blocks are miscounted"
        shared = {block for block, users in enumerate(counted) if users > 1}
        assert shared <= set(self._digest_of), "rows share a block that is not kept"
        unused = {block for block, users in enumerate(counted) if not users}
        assert unused == set(self._free) | set(self._idle), "a block is lost"
        assert not set(self._free) & set(self._idle), "a block is free and idle"
        assert self._kept == {digest: block for block, digest in self._digest_of.items()}
        assert set(self._idle) <= set(self._digest_of)
