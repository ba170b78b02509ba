"""The simulator finds the bugs that it is there for: each is put into the product on purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.faults import schedules
from tests.faults.mutants import MUTANTS, mutated
from tests.faults.world import simulated

MOST = 400
"""Schedules in which a mutant has to be caught; those of the suite are the same ones and more."""


@pytest.fixture(scope="module", autouse=True)
def _in_memory() -> Iterator[None]:
    with simulated():
        schedules.done_before()
        yield


@pytest.fixture(scope="module")
def caught() -> Counter[str]:
    """After how many schedules each mutant was caught."""
    return Counter()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, caught: Counter[str]) -> None:
    with mutated(MUTANTS[name]):
        for seed in range(MOST):
            if schedules.play(seed).wrong is not None:
                caught[name] = seed + 1
                return
    pytest.fail(f"{name}: nothing wrong was seen in {MOST} schedules")


def test_counts(caught: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nmutants={len(MUTANTS)} caught={len(caught)} schedules={caught.total()}")
