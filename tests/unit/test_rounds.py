"""What rounds do with chunks whose processes die, without Ray: each row ends once, or the run does.

A stand-in for a round hands its chunks to one replica after another, which hold several; a row of
`deadly` kills the one that tries it, and what it held is lost.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from quantbatch import rounds
from quantbatch.draining import Drain
from quantbatch.errors import Stopped
from quantbatch.gate import Gate
from quantbatch.records import Chunk, Receipt, Slice
from quantbatch.rounds import Rounds
from quantbatch.spec import Cluster, Limits
from quantbatch.stages import _chunk, item_table
from quantbatch.storage import LocalStore
from quantbatch.suspects import FOLDER, Death

if TYPE_CHECKING:
    from collections.abc import Collection, Generator
    from pathlib import Path

    from quantbatch.records import Trial

ATTEMPTS = 3


class World:
    """A job of chunks with the same number of rows, and what is left of it."""

    def __init__(
        self, folder: Path, *, chunks: int, rows: int, deadly: Collection[int], replicas: int = 1
    ) -> None:
        self.rows = rows
        self.deadly = set(deadly)
        """Numbers of rows, counted over all chunks."""
        self.left = {id: Chunk(id, 0, (Slice("a", id * rows, rows),)) for id in range(chunks)}
        self.blamed: set[int] = set()
        self.deaths = 0
        store = LocalStore(str(folder))
        for info in list(store.list(FOLDER)):
            store.delete(info.key)
        cluster = Cluster(replicas=replicas, gpus_per_replica=0)
        self.job: Any = SimpleNamespace(
            spec=SimpleNamespace(cluster=cluster, limits=Limits(attempts=ATTEMPTS)),
            ledger=SimpleNamespace(store=store),
        )

    def kills(self, chunk: int, trial: Trial | None = None) -> bool:
        """Tell whether to answer a chunk kills, and count it."""
        first = chunk * self.rows
        tried = set(range(self.rows))
        if trial:
            tried = set(range(trial.low, trial.high)) - blamed_by(trial)
        dead = bool(self.deadly & {first + row for row in tried})
        self.deaths += dead
        return dead

    def run(self) -> None:
        """Run the job until it is done."""
        world = self

        class Here(Rounds):
            @override
            def _through(
                self, items: list[dict[str, str]], in_flight: int, gate: Any
            ) -> Generator[Receipt]:
                chunks = [_chunk(item_table(item)).id for item in items]
                for n in range(0, len(chunks), in_flight):
                    gate.starts("a", Death())
                    gate.ready("a")
                    held = chunks[n : n + in_flight]
                    may = [chunk for chunk in held if gate.begin("a", chunk)]
                    if any([world.kills(chunk) for chunk in may]):
                        continue
                    for chunk in held:
                        if chunk in may:
                            gate.end("a", chunk, answered=True)
                        yield Receipt(chunk, 0, committed=chunk in may)

        drain = Drain()
        here = Here(self.job, lambda: iter(list(self.left.values())), device="cpu", drain=drain)
        with (
            patch.object(rounds, "RemoteGate", lambda most, permits: Gate(most, permits=permits)),
            patch.object(rounds, "Trials", lambda *_: Attempts(self)),
        ):
            for receipt in here.receipts():
                del self.left[receipt.chunk]


class Attempts:
    """Stands for `trials.Trials`."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> Attempts:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def attempt(self, chunk: Chunk) -> Receipt | Death:
        trial = chunk.trial
        assert trial
        if self._world.kills(chunk.id, trial):
            return Death(words=": boom")
        if trial.commits:
            self._world.blamed |= {chunk.id * self._world.rows + row for row in blamed_by(trial)}
        return Receipt(chunk.id, 0, committed=trial.commits)


def blamed_by(trial: Trial) -> set[int]:
    return {row for blame in trial.blamed for row in range(blame.low, blame.high)}


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), st.data())
def test_rows_that_kill_are_found_and_no_others(
    tmp_path_factory: pytest.TempPathFactory,
    chunks: int,
    rows: int,
    replicas: int,
    data: st.DataObject,
) -> None:
    number = st.integers(0, chunks * rows - 1)
    deadly = data.draw(st.sets(number, max_size=min(3, chunks * rows // 8)))
    folder = tmp_path_factory.getbasetemp() / "found"
    world = World(folder, chunks=chunks, rows=rows, deadly=deadly, replicas=replicas)
    world.run()
    assert not world.left
    assert world.blamed == deadly


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("rows", [1, 2, 4, 256])
def test_nobody_is_blamed_where_everything_dies(tmp_path: Path, rows: int, replicas: int) -> None:
    """A broken driver: even small chunks, whose rows would all be found one by one."""
    chunks = 100
    world = World(
        tmp_path, chunks=chunks, rows=rows, deadly=range(chunks * rows), replicas=replicas
    )
    with pytest.raises(Stopped, match=r"died \d+ times in a row, whatever their rows"):
        world.run()
    assert (len(world.left), world.blamed) == (chunks, set())
    # The machine is mended.
    world.deadly = {5}
    world.run()
    assert not world.left
    assert world.blamed == {5}


def test_many_rows_that_kill_are_no_broken_machine(tmp_path: Path) -> None:
    """Their chunks, each tried alone, all die in a row; and so do halves of the first."""
    world = World(tmp_path, chunks=40, rows=256, deadly=range(0, 256 * 20, 256), replicas=4)
    world.run()
    assert not world.left
    assert world.blamed == set(range(0, 256 * 20, 256))


def test_a_job_of_nothing_but_a_row_that_kills_ends(tmp_path: Path) -> None:
    """As a retry of what killed before."""
    world = World(tmp_path, chunks=1, rows=1, deadly=[0])
    world.run()
    assert world.blamed == {0}
    assert world.deaths == 3, "in company, alone, and once more"


def test_a_death_of_which_nothing_is_left_stops_no_round(tmp_path: Path) -> None:
    """A process dies with a chunk whose receipt has come already."""
    world = World(tmp_path, chunks=4, rows=2, deadly=[])
    job: Any = world.job
    tries = 0

    class Here(Rounds):
        @override
        def _through(
            self, items: list[dict[str, str]], in_flight: int, gate: Any
        ) -> Generator[Receipt]:
            nonlocal tries
            tries += 1
            assert tries < 9
            chunk = _chunk(item_table(items[0])).id
            gate.begin("a", chunk)
            yield Receipt(chunk, 0)

    with patch.object(rounds, "RemoteGate", lambda most, permits: Gate(most, permits=permits)):
        drain = Drain()
        for receipt in Here(job, world.left.values, device="cpu", drain=drain).receipts():
            world.left.pop(receipt.chunk)
    assert tries == 4


def test_rows_that_kill_side_by_side_are_found_in_the_only_chunk(tmp_path: Path) -> None:
    """Every half that the search tries first has one: nothing lives until it looks elsewhere."""
    world = World(tmp_path, chunks=1, rows=16, deadly=[0, 1, 2])
    world.run()
    assert world.blamed == {0, 1, 2}
