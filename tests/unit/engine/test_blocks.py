"""The books of the KV cache: every block has one place, whatever rows do in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from typing_extensions import override

from quantbatch.engine.blocks import BlockPool, blocks_for, prefix_digests


def digest(prompt: int, index: int) -> bytes:
    return b"%d/%d" % (prompt, index)


class Books(RuleBasedStateMachine):
    """Rows of five prompts take, keep, share and give back blocks."""

    @initialize(size=st.integers(1, 24))
    def start(self, size: int) -> None:
        self.pool = BlockPool(size)
        self.tables: list[tuple[int, list[int]]] = []
        self.holds: dict[bytes, int] = {}
        """Which block was kept under a digest last."""

    @rule(prompt=st.integers(0, 4), data=st.data())
    def begin(self, prompt: int, data: st.DataObject) -> None:
        """Begin a row: share what is kept, allocate the rest."""
        digests = [digest(prompt, index) for index in range(4)]
        kept = self.pool.count_kept(digests)
        assert kept <= 4
        shared = digests[: data.draw(st.integers(0, kept))]
        room = self.pool.available - self.pool.idle_among(shared)
        table = self.pool.share(shared)
        assert table == [self.holds[d] for d in shared]
        assert self.pool.available == room
        count = data.draw(st.integers(0, room))
        own = self.pool.allocate(count)
        assert len(own) == count
        taken = {block for _, blocks in self.tables for block in blocks}
        assert not taken & set(own), "a block was given away twice"
        self.tables.append((prompt, table + own))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        _, table = data.draw(st.sampled_from(self.tables))
        table += self.pool.allocate(data.draw(st.integers(0, self.pool.available)))

    @precondition(lambda self: any(table for _, table in self.tables))
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        prompt, table = data.draw(st.sampled_from([each for each in self.tables if each[1]]))
        index = data.draw(st.integers(0, min(4, len(table)) - 1))
        name = digest(prompt, index)
        there = self.pool.count_kept([name])
        if self.pool.keep(table[index], name):
            assert not there, "two blocks hold the same"
            self.holds[name] = table[index]
        assert self.pool.count_kept([name]) or table[index] in self.holds.values()

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(place)[1])

    @invariant()
    def books_agree(self) -> None:
        self.pool.check([table for _, table in self.tables])
        used = {block for _, table in self.tables for block in table}
        assert self.pool.in_use == len(used)
        assert self.pool.available == self.pool.size - len(used)

    @override
    def teardown(self) -> None:
        for _, table in getattr(self, "tables", []):
            self.pool.release(table)
        if hasattr(self, "pool"):
            self.pool.check([])
            assert self.pool.available == self.pool.size
            assert sorted(self.pool.allocate(self.pool.size)) == list(range(self.pool.size))


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_kept_blocks_are_given_up_the_longest_unused_first_and_the_last_of_a_prompt_first() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    for prompt, table in enumerate([first, second]):
        for index, block in enumerate(table):
            assert pool.keep(block, digest(prompt, index))
    pool.release(first)
    pool.release(second)
    assert pool.available == 4
    again = pool.share([digest(0, 0), digest(0, 1)])
    assert again == first
    pool.release(again)  # used later than the second now
    assert pool.allocate(1) == [second[1]]
    assert pool.allocate(1) == [second[0]]
    assert pool.allocate(1) == [first[1]]
    assert pool.count_kept([digest(0, 0), digest(0, 1)]) == 1


def test_more_than_there_is_is_our_mistake() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 available"):
        pool.allocate(3)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(AssertionError, match="has no user"):
        pool.release(table)
    with pytest.raises(AssertionError, match="only a row's block"):
        pool.keep(table[0], b"x")


@given(st.integers(0, 300), st.integers(1, 40))
def test_blocks_are_as_many_as_needed(tokens: int, block_tokens: int) -> None:
    blocks = blocks_for(tokens, block_tokens)
    assert blocks * block_tokens >= tokens > (blocks - 1) * block_tokens or blocks == tokens == 0


@given(
    st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40),
    st.integers(1, 8),
)  # fmt: skip
def test_digests_are_equal_as_far_as_prompts_are(
    one: list[int], other: list[int], block_tokens: int
) -> None:
    digests = [prefix_digests(ids, block_tokens) for ids in (one, other)]
    for ids, found in zip((one, other), digests, strict=True):
        assert len(found) == max(0, len(ids) - 1) // block_tokens, "the last token is computed"
    for index, (left, right) in enumerate(zip(*digests, strict=False)):
        end = (index + 1) * block_tokens
        assert (left == right) == (one[:end] == other[:end])
