"""Every call of a store goes wrong once: fails, or ends its process, before or after its effect.

As SQLite's tests do: for n = 1, 2, 3, ... the n-th call, until none is left. Each time the same
command runs again afterwards, and the end is looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from quantbatch.records import Status
from tests.faults import asleep
from tests.faults.choices import OneFault
from tests.faults.memory import Fault
from tests.faults.recovery import calmly, end_state_is_right, finish, unexpected
from tests.faults.world import LATER, World, input_file

if TYPE_CHECKING:
    from tests.conftest import Count

FAULTS = [fault for fault in Fault if fault is not Fault.NONE]


def fresh() -> World:
    """Return an input without an output."""
    return World()


def half_done() -> World:
    """Return a job whose driver was killed when it had published one of two shards."""
    return _killed_before(fresh(), World.run, "put _quantbatch/shards/000001.json")


def unpublished() -> World:
    """Return a job whose chunks are all committed, and whose driver was killed before it put the
    first file.
    """
    world = _killed_before(fresh(), World.run, "put part-000000.parquet")
    assert not world.visible
    return world


def done() -> World:
    """Return a job that is finished."""
    world = fresh()
    calmly(world, world.run)
    return world


def half_retried() -> World:
    """Return a finished job whose first retry was killed half way."""
    return _killed_before(done(), World.retry, "put part-000000.parquet")


def grown() -> World:
    """Return a finished job to whose input a file came."""
    world = done()
    for name, rows in LATER.items():
        world.input.set(name, input_file(name, rows))
    return world


def _killed_before(world: World, command: Callable[[World], object], call: str) -> World:
    """Kill a command at the first call of that name."""
    rehearsal = world.snapshot()
    calmly(rehearsal, lambda: command(rehearsal))
    number = next(n for n, made in enumerate(rehearsal.trace, 1) if call in made)
    later = world.snapshot()
    later.play(OneFault(number, Fault.KILL_BEFORE), ("killed", lambda: command(later)))
    return later


SITUATIONS: dict[str, tuple[Callable[[], World], Callable[[World], object]]] = {
    "a fresh job": (fresh, World.run),
    "a job that is half done": (half_done, World.run),
    "shards to publish": (unpublished, World.run),
    "a finished job": (done, World.run),
    "a retry": (done, World.retry),
    "a retry that is half done": (half_retried, World.retry),
    "a second retry": (done, lambda world: (world.retry(), world.retry(Status.TRUNCATED))),
    "new files": (grown, lambda world: world.run(extend=True)),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_any_call_of_a_store_may_go_wrong(situation: str, tally: Counter[str]) -> None:
    begin, command = SITUATIONS[situation]
    start = begin()
    for fault in FAULTS:
        number, fired = 0, True
        while fired:
            number += 1
            fired = _goes_wrong(start.snapshot(), command, number, fault)
            tally["calls enumerated"] += fired
            tally["crashes"] += fired and "kill" in fault.value
        assert fault is not Fault.FAIL_BEFORE or number > 3


def _goes_wrong(
    world: World, command: Callable[[World], object], number: int, fault: Fault
) -> bool:
    """Let a call go wrong, finish the job, and look at the end; tell whether there was one."""
    choices = OneFault(number, fault)
    where = f"call {number}: {fault.value}"
    try:
        (process,) = world.play(choices, ("first", lambda: command(world)))
        assert unexpected(process) is None, process.ended
        finish(world)
        end_state_is_right(world, rerun=False, proof=number % 10 == 0)
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}\n" + "\n".join(world.trace[-30:])) from error
    return choices.fired


@pytest.mark.parametrize("fault", [Fault.NONE, Fault.KILL_AFTER])
@pytest.mark.parametrize("situation", asleep.SITUATIONS)
def test_a_driver_may_sleep_before_any_call(
    situation: str, fault: Fault, tally: Counter[str]
) -> None:
    for wrong in asleep.sleeps(situation, fault):
        if wrong:
            raise wrong
        tally["sleeps"] += 1


def test_nothing_is_left_behind_where_nothing_goes_wrong() -> None:
    world = done()
    calmly(world, world.retry)
    assert world.checker.orphans() == []
    assert [key for key in world.output.found if "probe" in key] == []


def test_counts(tally: Counter[str], count: Count) -> None:
    told = ", ".join(f"{name}={number}" for name, number in tally.items())
    count(f"{told}, situations={len(SITUATIONS)}, wrong=0")
