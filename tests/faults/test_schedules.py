"""2,000 seeded schedules of drivers that crash, sleep, race each other and lose answers.

A seed that goes wrong is printed, with the faults that it takes and the command that plays it
again.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.faults import schedules

if TYPE_CHECKING:
    from tests.conftest import Count

IN_A_BATCH = 200
BATCHES = int(os.environ.get("QUANTBATCH_TEST_SCHEDULES", "2000")) // IN_A_BATCH
_ONE = os.environ.get("QUANTBATCH_TEST_SEED")
_FIRST = int(os.environ.get("QUANTBATCH_FIRST_SEED", "0"))


def _play(seeds: range, tally: Counter[str]) -> None:
    for seed in seeds:
        played = schedules.play(seed)
        assert played.wrong is None, schedules.told(played)
        tally["schedules"] += 1
        tally["calls"] += played.calls
        tally["faults"] += len(played.faults)
        tally["crashes"] += played.crashes
        tally["with gc"] += played.tidied


@pytest.mark.skipif(_ONE is not None, reason="one seed is asked for")
@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_schedule_leaves_a_wrong_output(batch: int, tally: Counter[str]) -> None:
    first = _FIRST + batch * IN_A_BATCH
    _play(range(first, first + IN_A_BATCH), tally)


@pytest.mark.skipif(_ONE is None, reason="QUANTBATCH_TEST_SEED names no seed")
def test_one_seed() -> None:
    _play(range(int(_ONE or 0), int(_ONE or 0) + 1), Counter())


def test_counts(tally: Counter[str], count: Count) -> None:
    told = ", ".join(f"{name}={number}" for name, number in tally.items())
    count(f"{told}, wrong=0 seeds={_FIRST}..{_FIRST + tally['schedules'] - 1}")


def test_a_schedule_is_the_same_each_time() -> None:
    for seed in range(40, 44):
        first, second = schedules.play(seed), schedules.play(seed)
        assert first.trace == second.trace
        assert first.faults == second.faults
