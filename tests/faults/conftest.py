"""What the simulations share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.faults.world import simulated


@pytest.fixture(scope="module", autouse=True)
def _in_memory() -> Iterator[None]:
    with simulated():
        yield


@pytest.fixture(scope="module")
def tally() -> Counter[str]:
    """What all tests of a file did."""
    return Counter()
