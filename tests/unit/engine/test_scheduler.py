"""The scheduler under a simulated engine: whatever comes, every row ends once and nothing is lost.

The simulation knows what each row will say, writes a hash of everything up to a token where that
token's keys would lie, and looks before each piece whether all that the piece attends to is there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantbatch.engine.blocks import BlockPool, blocks_for
from quantbatch.engine.pieces import Limits, Piece, Row
from quantbatch.engine.scheduler import Scheduler
from quantbatch.records import Request, RequestId
from quantbatch.spec import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTEXT = 96
MOST_TROUBLE = 12


@dataclass(frozen=True)
class Setup:
    """One simulated job."""

    seed: int
    requests: int
    blocks: int
    block_tokens: int
    slots: int
    step_tokens: int
    refill_share: float
    share: bool
    lag: bool
    """Tokens are read one step late, as on a card."""
    prefixes: int
    """Beginnings that prompts share."""
    adds: int
    """Calls of `add` that the requests are spread over."""
    trouble: float
    """Probability of an undone step, of evicted rows, and of a row put back, each."""
    changing: bool
    """Whether limits shrink and grow."""


SETUPS = st.builds(
    Setup,
    seed=st.integers(0, 2**32),
    requests=st.integers(1, 24),
    blocks=st.integers(2, 40),
    block_tokens=st.sampled_from([1, 2, 3, 4, 8, 16]),
    slots=st.integers(1, 8),
    step_tokens=st.integers(1, 64),
    refill_share=st.floats(0, 1),
    share=st.booleans(),
    lag=st.booleans(),
    prefixes=st.integers(1, 3),
    adds=st.integers(1, 4),
    trouble=st.sampled_from([0.0, 0.0, 0.05, 0.3]),
    changing=st.booleans(),
)


@dataclass
class Simulation:
    """An engine without a model."""

    setup: Setup
    random: random.Random = field(init=False)
    scheduler: Scheduler = field(init=False)
    finished: list[RequestId] = field(default_factory=list)
    flying: list[Row] = field(default_factory=list)
    written: dict[tuple[int, int], int] = field(default_factory=dict)
    """Hash of all up to a token, at (block, place in it)."""
    computed: dict[Row, int] = field(default_factory=dict)
    """How far each running row is."""
    undone: int = 0
    evicted: int = 0
    steps: int = 0
    reused: int = 0

    def __post_init__(self) -> None:
        setup = self.setup
        self.random = random.Random(setup.seed)
        self.scheduler = Scheduler(
            BlockPool(setup.blocks), slots=setup.slots, refill_share=setup.refill_share,
            share_prefixes=setup.share, block_tokens=setup.block_tokens,
        )  # fmt: skip
        self.answers: dict[RequestId, list[int]] = {}
        beginnings = [self._tokens(40) for _ in range(setup.prefixes)]
        self.to_add = [self._request(number, beginnings) for number in range(setup.requests)]
        self.all = list(self.to_add)

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(1000) for _ in range(count)]

    def _request(self, number: int, beginnings: Sequence[list[int]]) -> Request:
        room = min(self.setup.blocks * self.setup.block_tokens, CONTEXT)
        assert room >= 2
        # One place for the answer; what does not fit the pool alone never comes here.
        begin = self.random.choice(beginnings)[: self.random.choice([0, 5, 16, 33, 40])]
        prompt = (begin + self._tokens(self.random.randrange(1, 20)))[-max(1, room - 1) :]
        most = max(1, min(self.random.choice([1, 2, 8, 30]), room - len(prompt)))
        request = Request(
            RequestId(0, number), tuple(prompt), Sampling(max_new_tokens=most), seed=0
        )
        self.answers[request.id] = self._tokens(self.random.randint(1, most))
        return request

    def text(self, row: Row) -> list[int]:
        """What a row says in the end, and beyond."""
        return [*row.request.prompt_ids, *self.answers[row.request.id], -1, -1]

    # ---- the loop

    def run(self) -> None:
        before = -1
        most = self._most_steps()
        while self.to_add or self.scheduler.has_rows or self.flying:
            self._add()
            self.steps += 1
            assert self.steps <= most * (1 + self.undone + self.evicted), "no end in sight"
            state = self._state()
            assert state != before or self.to_add or self.undone, "a step that changed nothing"
            self.step()

    def _state(self) -> int:
        return hash((self.undone, self.evicted, len(self.finished), tuple(self.computed.items())))

    def _most_steps(self) -> int:
        # While the oldest row gets on by a token in each step; reading late takes one more.
        return (
            10
            + self.setup.adds
            + 2 * sum(len(r.prompt_ids) + r.sampling.max_new_tokens for r in self.all)
        )

    def _add(self) -> None:
        idle = not self.scheduler.has_rows and not self.flying
        if self.to_add and (idle or self.random.random() < 0.2):
            share = -(-len(self.all) // self.setup.adds)
            now, self.to_add = self.to_add[:share], self.to_add[share:]
            assert all(
                self.scheduler.fits_alone(len(r.prompt_ids) + r.sampling.max_new_tokens)
                for r in now
            )
            self.scheduler.add(now, CONTEXT)

    def limits(self) -> Limits:
        setup = self.setup
        if not setup.changing or self.random.random() < 0.5:
            return Limits(setup.slots, setup.step_tokens)
        rows = self.random.randint(1, setup.slots)
        return Limits(rows, self.random.randint(1, setup.step_tokens))

    def step(self) -> None:
        scheduler, limits = self.scheduler, self.limits()
        oldest = scheduler.running[0] if scheduler.running else None
        due = oldest is not None and oldest.length < oldest.limit
        pieces = scheduler.next_step(limits)
        self.check(pieces, limits)
        if due:
            assert oldest in {piece.row for piece in pieces}, "the oldest row did not get on"
        elif oldest is None and scheduler.has_rows and not self.flying:
            assert pieces, "nothing runs, and nothing was admitted"
        landing, self.flying = self.flying, []
        if pieces and self.trouble():
            if self.random.random() < 0.5:
                self.land(landing)
                landing = []
            self.undo(pieces)
        elif pieces and self.trouble():
            self.land(landing)
            landing = []
            self.evict(pieces)
        else:
            self.write(pieces)
            launched = [piece.row for piece in pieces if piece.samples]
            landing, self.flying = (landing, launched) if self.setup.lag else (launched, [])
        self.land(landing)
        if scheduler.running and self.trouble():
            row = self.random.choice(scheduler.running)
            scheduler.put_back(row)
            self.undone += 1
        self.check_books()

    def trouble(self) -> bool:
        enough = self.undone + self.evicted >= MOST_TROUBLE
        return not enough and self.random.random() < self.setup.trouble

    def check(self, pieces: Sequence[Piece], limits: Limits) -> None:
        scheduler, page = self.scheduler, self.setup.block_tokens
        assert sum(piece.tokens for piece in pieces) <= limits.step_tokens
        assert len(scheduler.running) <= limits.rows
        assert len({piece.row for piece in pieces}) == len(pieces)
        assert len({row.slot for row in scheduler.running}) == len(scheduler.running)
        assert all(0 <= row.slot < self.setup.slots for row in scheduler.running)
        for row in scheduler.admitted:
            self.computed[row] = 0
        for row in [row for row in self.computed if row.slot < 0]:
            del self.computed[row]
        for row, start, end, samples, _ in pieces:
            assert row in scheduler.running
            assert not row.done
            assert 0 <= start < end <= len(row.blocks) * page
            if row in scheduler.admitted:
                assert start % page == 0, "only whole blocks are shared"
                self.reused += start
            else:
                assert start == self.computed[row], "pieces follow each other"
            assert samples == (end == row.length - samples), "the newest token's piece samples"
            assert row.length <= row.limit
            assert row.tokens == self.text(row)[: len(row.tokens)]
            assert 0 <= row.length - len(row.tokens) <= 1 + self.setup.lag
            self.computed[row] = end
            assert row.computed == end
            for place in range(start):
                self._see(row, place)
        self.check_books()

    def _see(self, row: Row, place: int) -> None:
        page = self.setup.block_tokens
        where = row.blocks[place // page], place % page
        assert self.written.get(where) == self._hash(row, place), "it would see another's tokens"

    def _hash(self, row: Row, place: int) -> int:
        return hash(tuple(self.text(row)[: place + 1]))

    def check_books(self) -> None:
        self.scheduler.pool.check([row.blocks for row in self.scheduler.running])

    # ---- what may become of a step

    def write(self, pieces: Sequence[Piece]) -> None:
        page = self.setup.block_tokens
        for row, start, end, *_ in pieces:
            for place in range(start, end):
                self.written[row.blocks[place // page], place % page] = self._hash(row, place)
        for row, index in self.scheduler.keepable(pieces):
            assert (index + 1) * page <= self.computed[row]
            assert (index + 1) * page < len(row.request.prompt_ids)

    def undo(self, pieces: Sequence[Piece]) -> None:
        self.undone += 1
        self.scheduler.undo(pieces)
        assert all(piece.row.slot < 0 for piece in pieces)
        for piece in pieces:
            self.computed.pop(piece.row, None)

    def evict(self, pieces: Sequence[Piece]) -> None:
        """A step that failed: its rows begin anew, as `Runner` has it."""
        self.evicted += 1
        failed = [piece.row for piece in pieces if not piece.row.done]
        for row in failed:
            self.scheduler.remove(row)
            del self.computed[row]
        self.scheduler.add([row.request for row in failed], CONTEXT)

    def land(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.done:
                continue
            row.tokens.append(self.text(row)[len(row.tokens)])
            said = len(row.tokens) - len(row.request.prompt_ids)
            if said == len(self.answers[row.request.id]):
                self.scheduler.finish(row)
                self.computed.pop(row, None)
                self.finished.append(row.request.id)
            else:
                assert len(row.tokens) < row.limit


def simulated(setup: Setup) -> Simulation:
    simulation = Simulation(setup)
    simulation.run()
    assert sorted(simulation.finished) == sorted(r.id for r in simulation.all), "once each"
    scheduler = simulation.scheduler
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.pool.available == setup.blocks
    scheduler.pool.check([])
    assert not scheduler._wanted, "digests of rows that are gone"
    assert not scheduler._coming, "nobody will ever compute these"
    return simulation


PLAIN = Setup(
    seed=1, requests=24, blocks=30, block_tokens=4, slots=6, step_tokens=40, refill_share=0.0,
    share=True, lag=False, prefixes=1, adds=1, trouble=0.0, changing=False,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(SETUPS)
@example(PLAIN)
def test_every_row_ends_once_and_sees_its_own_tokens(setup: Setup) -> None:
    simulated(setup)


def changed(**fields: object) -> Setup:
    return Setup(**(PLAIN.__dict__ | fields))


@pytest.mark.parametrize("lag", [False, True])
def test_the_simulation_meets_what_it_is_for(lag: bool) -> None:
    """Else the test above might pass for want of trouble."""
    tight = [
        simulated(changed(seed=seed, blocks=12, lag=lag, requests=60, share=False, adds=4))
        for seed in range(8)
    ]
    assert sum(each.scheduler.preemptions for each in tight) > 0
    assert sum(each.scheduler.recomputed_tokens for each in tight) > 0
    shared = simulated(changed(blocks=200, lag=lag))
    assert shared.scheduler.preemptions == 0
    assert shared.reused == shared.scheduler.reused_tokens > 0
    troubled = simulated(changed(trouble=0.3, lag=lag))
    assert troubled.undone > 0
    assert troubled.evicted > 0


# ---- order and room


def requests(*prompts: Sequence[int], new: int = 4, chunk: int = 0) -> list[Request]:
    sampling = Sampling(max_new_tokens=new)
    return [
        Request(RequestId(chunk, row), tuple(prompt), sampling, 0)
        for row, prompt in enumerate(prompts)
    ]


def scheduler_of(blocks: int = 100, slots: int = 8, **options: Any) -> Scheduler:
    return Scheduler(BlockPool(blocks), slots=slots, block_tokens=4, **options)


def land(scheduler: Scheduler, pieces: Sequence[Piece], *ending: Row) -> None:
    """One more token for each row; some of them end with it."""
    list(scheduler.keepable(pieces))
    for piece in pieces:
        if piece.samples:
            piece.row.tokens.append(7)
            if piece.row in ending or len(piece.row.tokens) == piece.row.limit:
                scheduler.finish(piece.row)


def shapes(pieces: Sequence[Piece]) -> list[tuple[int, int, int]]:
    return [(piece.row.request.id.row, piece.start, piece.end) for piece in pieces]


PLENTY = Limits(8, 1000)


def test_rows_are_admitted_as_they_came_and_the_longest_first() -> None:
    scheduler = scheduler_of()
    scheduler.add(requests([1] * 2, [2] * 5, [3] * 3), None)
    scheduler.add(requests([4] * 9, chunk=1), None)
    pieces = scheduler.next_step(PLENTY)
    assert [(p.row.request.id.chunk, p.end) for p in pieces] == [(0, 5), (0, 3), (0, 2), (1, 9)]


def test_a_row_that_finds_no_room_is_not_passed_over() -> None:
    scheduler = scheduler_of(blocks=4, share_prefixes=False)
    scheduler.add(requests([1] * 5), None)
    scheduler.add(requests([2] * 6), None)
    scheduler.add(requests([3]), None)
    assert shapes(scheduler.next_step(PLENTY)) == [(0, 0, 5)]
    assert scheduler.waiting == 2


def test_prompts_are_cut_into_pieces_and_leave_a_token_to_each_row_behind_them() -> None:
    scheduler = scheduler_of()
    scheduler.add(requests(range(30)), None)
    assert shapes(scheduler.next_step(Limits(8, 10))) == [(0, 0, 10)]
    scheduler.add(requests([99, 98], [97], chunk=1), None)
    assert shapes(scheduler.next_step(Limits(8, 12))) == [(0, 10, 22)]
    pieces = scheduler.next_step(Limits(8, 12))
    assert shapes(pieces) == [(1, 0, 1), (0, 22, 30), (0, 0, 2)], "single tokens first"
    assert [p.samples for p in pieces] == [True, True, True]


def test_the_youngest_is_put_back_and_keeps_its_tokens() -> None:
    scheduler = scheduler_of(blocks=4, share_prefixes=False)
    scheduler._answers = 100  # answers are expected to be short
    scheduler.add(requests([1] * 4, new=12), None)
    scheduler.add(requests([2] * 4, new=12, chunk=1), None)
    while not scheduler.preemptions:
        pieces = scheduler.next_step(PLENTY)
        land(scheduler, pieces)
    (old,) = scheduler.running
    assert old.request.id.chunk == 0
    young = scheduler._waiting[0]
    assert young.request.id.chunk == 1
    assert young.tokens == [2] * 4 + [7] * (len(young.tokens) - 4)
    assert len(young.tokens) > 4
    assert (young.slot, young.blocks, young.computed) == (-1, [], 0)
    so_far = len(young.tokens)
    while scheduler.running == [old]:
        land(scheduler, scheduler.next_step(PLENTY))
    pieces = scheduler.next_step(PLENTY)
    assert shapes(pieces) == [(0, 0, so_far)]
    assert scheduler.recomputed_tokens > 0


def test_rows_with_one_beginning_compute_it_once() -> None:
    scheduler = scheduler_of()
    prefix = list(range(100, 109))
    scheduler.add(requests([*prefix, 1, 1], [*prefix, 2], [*prefix, 3], [5] * 3), None)
    first = scheduler.next_step(PLENTY)
    assert shapes(first) == [(0, 0, 8), (3, 0, 3)], "the others wait for its blocks"
    land(scheduler, first)
    assert sorted(shapes(scheduler.next_step(PLENTY))) == [
        (0, 8, 11), (1, 8, 10), (2, 8, 10), (3, 3, 4),
    ]  # fmt: skip
    assert scheduler.reused_tokens == 16
    tables = [row.blocks for row in scheduler.running]
    scheduler.pool.check(tables)
    assert tables[0][:2] == tables[2][:2] == tables[3][:2]


def test_a_piece_has_no_token_that_fewer_rows_share() -> None:
    """Else one that is not finite would spoil the others' blocks."""
    scheduler = scheduler_of()
    prompts = [[0] * 8 + [1] * 8 + [row] * 5 for row in (1, 2)] + [
        [0] * 8 + [row] for row in (3, 4)
    ]
    scheduler.add(requests(*prompts), None)
    seen = []
    while scheduler.has_rows:
        pieces = scheduler.next_step(PLENTY)
        seen.append([(p.start, p.end) for p in pieces if p.tokens > 1])
        land(scheduler, pieces)
    # One row computes for all; then for the other long one, beside the short ones; then its own.
    assert seen[:3] == [[(0, 8)], [(8, 16)], [(16, 21), (16, 21)]]
    assert scheduler.reused_tokens == 16 + 2 * 8


@pytest.mark.parametrize("fate", ["undo", "remove", "put_back"])
def test_nobody_waits_for_blocks_that_will_not_come(fate: str) -> None:
    """The row that was to compute them did not: its step ran out of memory, or failed."""
    scheduler = scheduler_of()
    prefix = list(range(100, 109))
    scheduler.add(requests([*prefix, 1], [*prefix, 2], [*prefix, 3]), None)
    (piece,) = scheduler.next_step(PLENTY)
    if fate == "undo":
        scheduler.undo([piece])
    elif fate == "remove":
        scheduler.remove(piece.row)
    else:
        scheduler.put_back(piece.row)
    assert scheduler.next_step(PLENTY), "all wait for each other"


def test_rows_are_admitted_when_enough_places_are_free() -> None:
    scheduler = scheduler_of(slots=4, refill_share=0.5)
    scheduler.add(requests(*([[i] for i in range(10)])), None)
    pieces = scheduler.next_step(Limits(4, 100))
    assert len(pieces) == 4
    land(scheduler, pieces, pieces[1].row)
    pieces = scheduler.next_step(Limits(4, 100))
    assert len(pieces) == 3, "one place is free, two are waited for"
    land(scheduler, pieces, pieces[0].row)
    assert len(scheduler.next_step(Limits(4, 100))) == 4


def test_fewer_rows_run_when_limits_shrink() -> None:
    scheduler = scheduler_of()
    scheduler.add(requests(*([[i] for i in range(8)])), None)
    land(scheduler, scheduler.next_step(PLENTY))
    pieces = scheduler.next_step(Limits(3, 1000))
    assert len(pieces) == len(scheduler.running) == 3
    assert scheduler.waiting == 5
    land(scheduler, pieces)
    assert len(scheduler.next_step(PLENTY)) == 8


def test_an_answer_is_expected_to_be_as_long_as_those_before() -> None:
    """By max_new_tokens one row would fill the pool."""
    scheduler = scheduler_of(blocks=16, share_prefixes=False)
    scheduler.add(requests(*[[i] for i in range(20)], new=60), None)
    ended = 0
    while ended < 16:
        pieces = scheduler.next_step(PLENTY)
        assert len(pieces) == 1
        land(scheduler, pieces, pieces[0].row)
        ended += 1
    assert len(scheduler.next_step(PLENTY)) == 4


def test_blocks_of_a_row_are_those_of_its_tokens() -> None:
    scheduler = scheduler_of()
    scheduler.add(requests(range(9), new=20), None)
    while scheduler.has_rows:
        pieces = scheduler.next_step(Limits(8, 3))
        for piece in pieces:
            assert len(piece.row.blocks) == blocks_for(piece.end, 4)
        land(scheduler, pieces)


def test_a_batch_that_room_bounds_is_refilled_in_groups_too() -> None:
    """With places to spare, rows that come one by one would each cost a step with a prompt."""
    scheduler = scheduler_of(slots=8, blocks=4, share_prefixes=False, refill_share=0.25)
    scheduler.add(requests(*([[i] for i in range(9)]), new=3), None)
    pieces = scheduler.next_step(Limits(8, 100))
    assert len(pieces) == 4
    land(scheduler, pieces, pieces[0].row)
    pieces = scheduler.next_step(Limits(8, 100))
    assert len(pieces) == 3, "there is room for one more, two are waited for"
    land(scheduler, pieces, pieces[0].row)
    assert len(scheduler.next_step(Limits(8, 100))) == 4


def test_a_large_first_batch_is_filled_over_several_steps() -> None:
    scheduler = scheduler_of(slots=8, share_prefixes=False, refill_share=1.0)
    scheduler.add(requests(*([[i, i, i] for i in range(8)]), new=9), None)
    running = []
    for _ in range(8):
        land(scheduler, scheduler.next_step(Limits(8, 9)))
        running.append(len(scheduler.running))
    assert running[-1] == 8
