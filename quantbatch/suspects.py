"""Which row ends the process that answers it? Found by trying its chunk alone, in halves.

A row may kill whatever holds it: a fault in a kernel, memory that the system takes back, a call
that never returns (the watchdog of `lastwords` ends that). No exception tells which row it was. All
chunks that a replica held when it died are suspects (`gate` knows them). Each is tried again alone.
One that kills its process then is searched:

    its first half alone                     dies: the row is there; lives: it is in the other half
    ... log2(rows) of those
    the row alone, if it only remains        lives: it was an accident from outside
    the chunk without it                     its answers are committed, beside one error row

So a row is blamed only if its chunk died in company or alone *and* it died by itself, and a row
costs at most log2(rows) + 2 attempts after the one in which its chunk died alone. If the last
attempt dies as well, there is another row like it, and the search begins again without the first.
A search may also find nobody: rows that kill only together, such as by the memory that they take.
After `limits.attempts` searches all that is left of the chunk becomes error rows.

Where it is reading the rows that kills, the slice of the file that holds the row is blamed.

    OUT/_quantbatch/suspects/<retry>-<chunk>.json      put after each attempt

The record only spares a driver that continues the job what is known already: it decides nothing
about whose answers count. The driver puts it when it sees a death.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from quantbatch.errors import StorageError
from quantbatch.records import Blame, Trial
from quantbatch.storage import PRIVATE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantbatch.records import Chunk
    from quantbatch.storage import Store

FOLDER = f"{PRIVATE}/suspects"
DIED, HUNG = "process_died", "step_timeout"
"""Kinds of error rows."""


@dataclass(frozen=True)
class Death:
    """How a process ended."""

    kind: str = DIED
    words: str = ""
    """What it could still say."""
    unread: bool = False
    """Whether it was reading."""


@dataclass(frozen=True)
class Search:
    """How far the search in one chunk is. A value: each attempt makes another one."""

    rows: int
    """Rows of the chunk that are to be answered."""
    low: int = 0
    high: int = 0
    """The next row to blame is from `low` to before `high`; if they are equal, all is ready for the
    last attempt."""
    blamed: tuple[Blame, ...] = ()
    found: int = 0
    """Rows that were found one by one."""
    searches: int = 0
    """How often the last attempt died: after a row was found, or nobody."""
    attempts: int = 0
    ends: tuple[int, ...] = ()
    """Where each slice of the chunk ends."""

    @classmethod
    def of(cls, chunk: Chunk) -> Search:
        """Begin to search a chunk that killed its process when it was alone."""
        if chunk.again:
            return cls(len(chunk.again.rows), high=len(chunk.again.rows))
        ends = tuple(accumulate(piece.rows for piece in chunk.slices))
        return cls(chunk.rows, high=chunk.rows, ends=ends)

    @property
    def _middle(self) -> int:
        return (self.low + self.high + 1) // 2

    def trial(self) -> Trial:
        """Return what to try next."""
        if self.low == self.high:
            return Trial(0, self.rows, self.blamed, self.rows)
        return Trial(self.low, self._middle, self.blamed, self.rows)

    def parts(self, most: int) -> Iterator[Trial]:
        """Yield trials with a part of the rows each; together they ask all that is not blamed."""
        ends = [self.rows * n // most for n in range(most + 1)]
        for low, high in pairwise(ends):
            trial = Trial(low, high, self.blamed, self.rows)
            if trial.asks and not trial.commits:
                yield trial

    def survived(self) -> Search:
        """Note that a trial which does not commit ended well."""
        after = replace(self, attempts=self.attempts + 1, low=self._middle)
        # A row that only remained, and is well by itself: what died before died of something else.
        return replace(after, low=0, high=0) if after.low == after.high else after

    def died(self, death: Death, *, most: int) -> Search:
        """Note that a process died in a trial.

        Args:
            death: How.
            most: Searches in one chunk.
        """
        after = replace(self, attempts=self.attempts + 1)
        if self.low == self.high:
            after = replace(after, searches=self.searches + 1)
            if after.searches < most:
                return replace(after, high=self.rows)
            rest = Blame(0, self.rows, death.kind, _given_up(self.found, death), death.unread)
            return replace(after, blamed=(*self.blamed, rest))
        if self._middle - self.low > 1:
            return replace(after, high=self._middle)
        blamed = (*self.blamed, self._blame(death))
        return replace(after, low=0, high=0, found=self.found + 1, blamed=blamed)

    def _blame(self, death: Death) -> Blame:
        low, high = self.low, self.low + 1
        if death.unread:
            low = max((end for end in self.ends if end <= self.low), default=0)
            high = next((end for end in self.ends if end > self.low), self.rows)
        return Blame(low, high, death.kind, _alone(death), death.unread)

    def to_bytes(self) -> bytes:
        """Return the record as JSON."""
        return json.dumps(self.__dict__, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Search:
        """Read what `to_bytes` wrote."""
        found: dict[str, Any] = json.loads(data)
        blamed = tuple(Blame(*each) for each in found["blamed"])
        return cls(**found | {"blamed": blamed, "ends": tuple(found["ends"])})


def attempts_for_a_row(rows: int) -> int:
    """Return how many attempts finding one row of a chunk takes at most."""
    return math.ceil(math.log2(max(rows, 1))) + 2


def _alone(death: Death) -> str:
    doing = "reading its file" if death.unread else "answering it alone"
    if death.kind == HUNG:
        return f"{doing} did not end in time{death.words}"
    return f"the process that was {doing} died{death.words}"


def _given_up(found: int, death: Death) -> str:
    if not found:
        ended = "did not end in time" if death.kind == HUNG else "killed its process"
        how = f"its chunk {ended} again and again{death.words}"
        return f"not tried any more: {how}; no row of it alone does"
    return f"not tried any more: {found} rows of its chunk killed a process each, {_alone(death)}"


def key(chunk: Chunk) -> str:
    """Return the key of a chunk's record."""
    return f"{FOLDER}/{chunk.again.retry if chunk.again else 0:04d}-{chunk.id:08d}.json"


class Suspects:
    """The chunks of a job that are tried alone, and how far each is.

    Args:
        store: The output's.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._searches: dict[str, Search | None] = {}
        for info in store.list(FOLDER):
            with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
                # A record that can't be read costs attempts, no more.
                self._searches[info.key] = _search_of(store.read(info.key))

    def __contains__(self, chunk: Chunk) -> bool:
        """Tell whether a chunk is tried alone."""
        return key(chunk) in self._searches

    def search(self, chunk: Chunk) -> Search | None:
        """Return how far the search in a chunk is; None if it was not alone yet."""
        return self._searches.get(key(chunk))

    def note(self, chunk: Chunk, search: Search | None = None) -> None:
        """Note, also for a driver that continues, that a chunk is a suspect and how far it is."""
        self._searches[key(chunk)] = search
        # Without the record, a driver that continues begins this search again.
        with contextlib.suppress(StorageError):
            self._store.put(key(chunk), b"null" if search is None else search.to_bytes())


def _search_of(data: bytes) -> Search | None:
    return None if data == b"null" else Search.from_bytes(data)
