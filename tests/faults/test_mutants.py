"""The simulator finds the bugs that it is there for: each is put into the product on purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.faults import asleep, schedules
from tests.faults.choices import OneFault
from tests.faults.memory import Fault
from tests.faults.mutants import MUTANTS, mutated
from tests.faults.recovery import finish
from tests.faults.world import World

if TYPE_CHECKING:
    from tests.conftest import Count

MOST = 400
"""Seeds up to which a mutant has to be caught; the suite plays these and more."""
BEGIN = {
    "the etag is ignored": 75,
    "a writer's error is swallowed": 40,
    "gc removes what no record names yet": 150,
}
"""Seeds to begin with where the first that catch a mutant are known to come late."""


@pytest.fixture(scope="module", autouse=True)
def _done_before(_in_memory: None) -> None:
    schedules.done_before()


@pytest.fixture(scope="module")
def caught() -> Counter[str]:
    """After how many schedules each mutant was caught."""
    return Counter()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, caught: Counter[str]) -> None:
    with mutated(MUTANTS[name]):
        for wrong in _verdicts(name):
            caught[name] += 1
            if wrong:
                return
    pytest.fail(f"{name}: nothing wrong was seen in {caught.pop(name)} schedules")


def _verdicts(name: str) -> Iterator[BaseException | None]:
    """Yield what is wrong at the end of one schedule after another."""
    if "late" in name:
        for situation in asleep.SITUATIONS:
            yield from asleep.sleeps(situation, Fault.NONE)
    if "swallowed" in name:
        yield from _each_call_fails()
    for seed in range(BEGIN.get(name, 0), MOST):
        yield schedules.play(seed).wrong


def _each_call_fails() -> Iterator[AssertionError | None]:
    choices, number = OneFault(1, Fault.FAIL_BEFORE), 1
    while choices.fired or number == 1:
        world, choices = World(), OneFault(number, Fault.FAIL_BEFORE)
        try:
            world.play(choices, ("first", world.run))
            finish(world)
            world.checker.finished()
        except AssertionError as error:
            yield error
        else:
            yield None
        number += 1


def test_counts(caught: Counter[str], count: Count) -> None:
    count(f"mutants={len(MUTANTS)} caught={len(caught)} schedules={caught.total()}")
