"""The search for rows that kill: every position, in as many attempts as are promised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from quantbatch.errors import StorageError
from quantbatch.records import Again, Chunk, Slice, Trial
from quantbatch.storage import LocalStore
from quantbatch.suspects import (
    DIED,
    HUNG,
    Death,
    Search,
    Suspects,
    attempts_for_a_row,
    key,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

MOST = 3


def chunk_of(*slices: int, id: int = 4) -> Chunk:
    return Chunk(id, 0, tuple(Slice(f"{n}.parquet", 0, rows) for n, rows in enumerate(slices)))


def blamed(trial: Trial) -> set[int]:
    return {row for blame in trial.blamed for row in range(blame.low, blame.high)}


def searched(search: Search, dies: Callable[[set[int]], bool], *, unread: bool = False) -> Search:
    """Search until a trial with all rows survives."""
    while True:
        trial = search.trial()
        rows = set(range(trial.low, trial.high)) - blamed(trial)
        if not dies(rows):
            if trial.commits:
                return search
            search = search.survived()
        else:
            search = search.died(Death(words=": boom", unread=unread), most=MOST)
        search = Search.from_bytes(search.to_bytes())
        assert search.attempts < 500


def test_one_row_is_found_in_every_place() -> None:
    for rows in (1, 2, 3, 5, 8, 20, 255, 256):
        for poison in range(rows):
            found = searched(Search.of(chunk_of(rows)), {poison}.issubset)
            assert [(blame.low, blame.high) for blame in found.blamed] == [(poison, poison + 1)]
            assert found.attempts + 1 <= attempts_for_a_row(rows)


@given(st.integers(1, 300), st.data())
def test_several_rows_are_found_and_then_it_gives_up(rows: int, data: st.DataObject) -> None:
    poison = data.draw(st.sets(st.integers(0, rows - 1), max_size=6))
    found = searched(Search.of(chunk_of(rows)), lambda tried: bool(tried & poison))
    assert poison <= blamed(found.trial())
    if len(poison) <= MOST:
        assert blamed(found.trial()) == poison
    assert found.found == min(len(poison), MOST)
    # One row after another, and the attempt that shows that there is one more.
    assert found.attempts <= (found.found + 1) * attempts_for_a_row(rows)


@given(st.integers(1, 300), st.integers(0, 2000))
def test_an_accident_blames_nobody_else(rows: int, seed: int) -> None:
    """A death from outside at any one moment of the search in a sound chunk."""
    calls = 0

    def dies(tried: set[int]) -> bool:
        nonlocal calls
        calls += 1
        return calls == seed % (attempts_for_a_row(rows) + 1) and len(tried) > 1

    assert searched(Search.of(chunk_of(rows)), dies).blamed == ()


@given(st.integers(2, 300), st.data())
def test_rows_that_kill_only_together_are_not_tried_for_ever(
    rows: int, data: st.DataObject
) -> None:
    """Such as by the memory that they take: each alone, and each half, is well."""
    enough = data.draw(st.integers(rows // 2 + 1, rows))
    found = searched(Search.of(chunk_of(rows)), lambda tried: len(tried) >= enough)
    assert found.attempts <= MOST * attempts_for_a_row(rows)
    assert "no row of it alone does" in found.blamed[-1].message


@given(st.integers(1, 300), st.randoms(use_true_random=False))
def test_whatever_dies_a_search_ends(rows: int, random: Random) -> None:
    search = Search.of(chunk_of(rows))
    for _ in range((2 * MOST + 2) * attempts_for_a_row(rows)):
        trial = search.trial()
        left = set(range(trial.low, trial.high)) - blamed(trial)
        if left and random.random() < 0.5:
            search = search.died(Death(), most=MOST)
        elif trial.commits:
            return
        else:
            search = search.survived()
    raise AssertionError(f"{search}")


def test_the_slice_that_can_not_be_read_is_blamed_as_a_whole() -> None:
    poison = set(range(4, 10))
    chunk = chunk_of(4, 6, 3)
    found = searched(Search.of(chunk), lambda tried: bool(tried & poison), unread=True)
    assert [(blame.low, blame.high, blame.unread) for blame in found.blamed] == [(4, 10, True)]


def test_what_is_given_up_says_so() -> None:
    search = searched(Search.of(chunk_of(40)), lambda tried: bool(tried & {1, 5, 9, 30}))
    *single, rest = search.blamed
    assert [blame.low for blame in single] == [1, 5, 9]
    assert (rest.low, rest.high) == (0, 40)
    assert rest.message.startswith("not tried any more: 3 rows of its chunk killed a process each")
    assert single[0].message == "the process that was answering it alone died: boom"


def test_a_hang_is_told_as_one() -> None:
    search = Search.of(chunk_of(1)).died(Death(HUNG, ": it took longer than 0:00:02"), most=MOST)
    assert search.blamed[0].kind == HUNG
    assert "did not end in time: it took longer than 0:00:02" in search.blamed[0].message


def test_a_driver_that_continues_knows_what_was_found(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    first, second, third = chunk_of(8, id=1), chunk_of(8, id=2), chunk_of(8, id=3)
    suspects = Suspects(store)
    suspects.note(first)
    search = Search.of(second).died(Death(DIED), most=MOST)
    suspects.note(second, search)
    again = Suspects(store)
    assert [chunk in again for chunk in (first, second, third)] == [True, True, False]
    assert again.search(first) is None
    assert again.search(second) == search
    # A damaged record costs attempts, no more.
    store.put(key(first), b"{torn")
    assert first not in Suspects(store)


def test_a_retry_is_searched_apart() -> None:
    retried = Chunk(4, 0, chunk_of(100).slices, Again(2, 0, (7, 50)))
    assert Search.of(retried).rows == 2
    assert key(retried) != key(chunk_of(100))


def test_a_record_that_can_not_be_kept_stops_nothing(tmp_path: Path) -> None:
    class Full(LocalStore):
        @override
        def put(self, key: str, data: bytes) -> None:
            raise StorageError("no space left on device")

    suspects = Suspects(Full(str(tmp_path)))
    suspects.note(chunk_of(8))
    assert chunk_of(8) in suspects
