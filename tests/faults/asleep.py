"""A driver that sleeps, before any of its calls of a store, through all that others do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from quantbatch.records import Status
from tests.faults.choices import Asleep, Calm
from tests.faults.memory import Fault
from tests.faults.recovery import end_state_is_right, finish, unexpected
from tests.faults.world import World

Command = Callable[[World], object]


def _new() -> World:
    return World()


def _done() -> World:
    world = World()
    world.play(Calm(), ("first", world.run))
    return world


SITUATIONS: dict[str, tuple[Callable[[], World], Command, Command]] = {
    "a run, through a run and a retry": (
        _new,
        World.run,
        lambda world: (world.run(), world.retry()),
    ),
    "a retry, through it and another": (
        _done,
        World.retry,
        lambda world: (world.retry(), world.retry(Status.TRUNCATED)),
    ),
}
"""Where it begins, what the sleeper does, and what another does meanwhile."""


def sleeps(situation: str, fault: Fault) -> Iterator[AssertionError | None]:
    """Let a driver sleep before its first, its second, ... call; yield what is wrong at each end.

    Where it is not killed as it wakes up, nobody comes after it: it has put right what it put.
    """
    begin, late, others = SITUATIONS[situation]
    start, number = begin(), 0
    while True:
        number += 1
        world, choices = start.snapshot(), Asleep("late", number, fault)
        # Bound now: this world's.
        work = [lambda w=world, do=do: do(w) for do in (late, others)]
        try:
            processes = world.play(choices, ("late", work[0]), ("other", work[1]))
            for process in processes:
                assert unexpected(process) is None, process.ended
            if fault is not Fault.NONE:
                finish(world)
            end_state_is_right(world, rerun=fault is not Fault.NONE, proof=number % 10 == 0)
        except AssertionError as error:
            calls = "\n".join(world.trace[-30:])
            yield AssertionError(f"asleep before call {number}, {fault.value}: {error}\n{calls}")
        else:
            yield None
        if choices.made < number:
            return
