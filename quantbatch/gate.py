"""The gate that a chunk passes before a process takes it: who holds what, and may more begin?

Ray tells that an actor died, not of which chunk, and it goes on handing out chunks until the last.
So one small actor beside the driver is asked before a chunk is read and before it is answered. It
knows what a process held when it died, ends a round in which nothing but dying happens, keeps a
replica that dies while it loads from being started for ever, and closes when a run is to stop.

A process tells its name when it starts. A name that starts twice has died in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from quantbatch.suspects import Death

if TYPE_CHECKING:
    from quantbatch.leases import Permits


class Door(Protocol):
    """The gate, as one process of the pipeline sees it."""

    @property
    def name(self) -> str:
        """The process's; empty if nobody asks."""
        ...

    def starts(self, last: Death) -> str:
        """Tell that the process starts, and how the one of its name ended that was before it.

        Returns:
            Why it must not go on; empty if it may.
        """
        ...

    def ready(self) -> None:
        """Tell that the process is ready for chunks."""
        ...

    def begin(self, chunk: int, *, reading: bool = False) -> bool:
        """Ask whether a chunk may begin, and say that it does.

        Args:
            chunk: Its number.
            reading: Whether it is only read, and answered later.
        """
        ...

    def end(self, chunk: int, *, answered: bool) -> None:
        """Tell that the process is done with a chunk.

        Args:
            chunk: Its number.
            answered: Whether it is on its way to the output now.
        """
        ...


class NoDoor:
    """Lets everything pass: for work without rounds.

    Args:
        name: The process's.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name

    def starts(self, last: Death) -> str:
        """See `Door`."""
        del last
        return ""

    def ready(self) -> None:
        """See `Door`."""

    def begin(self, chunk: int, *, reading: bool = False) -> bool:
        """See `Door`."""
        del chunk, reading
        return True

    def end(self, chunk: int, *, answered: bool) -> None:
        """See `Door`."""


class Lost(NamedTuple):
    """What a round lost."""

    chunks: dict[int, Death]
    """Chunks that were with a process when it died."""
    deaths: int
    """Deaths in a row at its end."""
    lived: bool = False
    """Whether a chunk was answered in it."""


@dataclass
class Gate:
    """The state of a round. One caller at a time."""

    most_deaths: int
    """Deaths in a row, without a chunk that ended in between, after which it closes."""
    deaths: int = 0
    """In a row."""
    lived: bool = False
    """Whether a chunk was answered."""
    permits: Permits | None = None
    """Which chunks rivals leave to us; None where all are ours."""
    open: bool = True
    loads: int = 0
    """Processes in a row that died before they were ready."""
    _held: dict[str, set[int]] = field(default_factory=dict)
    """Chunks by the process that holds them."""
    _answered: set[int] = field(default_factory=set)
    """Chunks on their way to the output."""
    _loading: set[str] = field(default_factory=set)
    _lost: dict[int, Death] = field(default_factory=dict)

    def starts(self, name: str, last: Death) -> str:
        """See `Door`."""
        if name in self._loading:
            self.loads += 1
            if self.loads >= self.most_deaths:
                return f"a replica died {self.loads} times while it loaded the model{last.words}"
        if name in self._held:
            self._died(name, last)
        self._held[name] = set()
        self._loading.add(name)
        return ""

    def ready(self, name: str) -> None:
        """See `Door`."""
        self.loads = 0
        self._loading.discard(name)

    def begin(self, name: str, chunk: int, *, reading: bool = False) -> bool:
        """See `Door`."""
        if not self.open or (self.permits and not self.permits.begin(chunk, reading=reading)):
            return False
        self._held.setdefault(name, set()).add(chunk)
        return True

    def end(self, name: str, chunk: int, *, answered: bool) -> None:
        """See `Door`."""
        self._held[name].discard(chunk)
        if answered:
            self.deaths, self.lived = 0, True
            self._answered.add(chunk)

    def arrived(self, chunk: int) -> None:
        """Note that the driver has a chunk's receipt."""
        self._answered.discard(chunk)

    def close(self) -> set[int]:
        """Let no more chunks begin; return those that are under way."""
        self.open = False
        return self._answered.union(*self._held.values())

    def lost(self) -> Lost:
        """Return what a round that is over has lost: what is still held, nobody holds."""
        for name in list(self._held):
            if self._held[name]:
                self._died(name, Death())
        return Lost(self._lost, self.deaths, self.lived)

    def _died(self, name: str, death: Death) -> None:
        held = self._held.pop(name)
        self._lost |= dict.fromkeys(held, death)
        self.deaths += bool(held)
        if self.deaths >= self.most_deaths:
            self.open = False
