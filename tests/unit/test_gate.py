"""Who held what when it died, and when a round ends by itself."""

from __future__ import annotations

from typing_extensions import override

from quantbatch.gate import Gate
from quantbatch.leases import Permits
from quantbatch.suspects import HUNG, Death

HANGS = Death(HUNG, ": too long")


def started(gate: Gate, name: str = "a", last: Death | None = None) -> None:
    assert gate.starts(name, last or Death()) == ""
    gate.ready(name)


def test_what_a_process_held_when_it_died_is_lost() -> None:
    gate = Gate(3)
    started(gate)
    assert all(gate.begin("a", chunk) for chunk in (1, 2, 3))
    gate.end("a", 2, answered=True)
    started(gate, last=HANGS)
    assert gate.begin("a", 4)
    gate.end("a", 4, answered=True)
    lost = gate.lost()
    assert lost.chunks == {1: HANGS, 3: HANGS}
    assert (lost.deaths, lost.lived) == (0, True), "a chunk ended after it"


def test_what_is_held_at_the_end_is_lost() -> None:
    gate = Gate(3)
    started(gate)
    gate.begin("a", 7)
    assert gate.lost() == ({7: Death()}, 1, False)


def test_a_process_that_was_idle_loses_nothing() -> None:
    gate = Gate(1)
    started(gate)
    started(gate)
    assert gate.lost() == ({}, 0, False)
    assert gate.begin("a", 1)


def test_a_round_in_which_everything_dies_ends() -> None:
    gate = Gate(2)
    for chunk, may in ((1, True), (2, True), (3, False)):
        started(gate)
        assert gate.begin("a", chunk) is may
    assert gate.lost().deaths == 2


def test_reading_is_no_sign_of_life_of_replicas() -> None:
    gate = Gate(2)
    for chunk in (1, 2):
        started(gate)
        gate.begin("reader", chunk)
        gate.end("reader", chunk, answered=False)
        gate.begin("a", chunk)
    started(gate)
    assert not gate.begin("a", 3)


def test_a_replica_that_dies_while_it_loads_is_not_started_for_ever() -> None:
    gate = Gate(3)
    assert [gate.starts("a", Death()) for _ in range(3)] == ["", "", ""]
    assert "died 3 times while it loaded" in gate.starts("a", Death(words=": out of memory"))
    gate.ready("b")
    assert gate.starts("c", Death()) == "", "another one is ready"


def test_a_closed_gate_tells_what_is_under_way() -> None:
    gate = Gate(3)
    started(gate)
    for chunk in (1, 2, 3, 4):
        gate.begin("a", chunk)
    gate.end("a", 1, answered=True)
    gate.end("a", 2, answered=True)
    gate.arrived(1)
    gate.begin("reader", 5)
    gate.end("reader", 5, answered=False)
    assert gate.close() == {2, 3, 4}
    assert not gate.begin("a", 6)


def test_chunks_of_rivals_do_not_begin() -> None:
    class Odd(Permits):
        def __init__(self) -> None:
            """Even chunks are a rival's."""

        @override
        def begin(self, chunk: int, *, reading: bool) -> bool:
            return reading or bool(chunk % 2)

    gate = Gate(3, permits=Odd())
    started(gate)
    assert [gate.begin("a", chunk) for chunk in (1, 2, 3)] == [True, False, True]
    assert gate.begin("reader", 4, reading=True)
    gate.end("reader", 4, answered=False)
    assert set(gate.lost().chunks) == {1, 3}
