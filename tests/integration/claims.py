"""Rivals that claim the same objects while answers get lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from quantbatch.storage import S3Store
from quantbatch.storage.patience import Patience
from tests.faults.proxy import Operation

if TYPE_CHECKING:
    from tests.faults.proxy import FaultProxy
    from tests.integration.support import Bucket

LOST = 0.13
"""Probability of each of two kinds of lost answers."""


def contended(bucket: Bucket, proxy: FaultProxy, *, claims: int, rivals: int) -> str:
    """Prove that each claim of each rival says the same, and that it is what one of them wrote.

    Returns:
        What was counted.
    """
    proxy.fail("reset_after", operation=Operation.PUT, probability=LOST)
    proxy.fail("500_after", operation=Operation.PUT, probability=LOST)
    told: list[list[bytes]] = [[] for _ in range(claims)]

    def contend(name: int) -> None:
        swift = Patience(first_wait_s=0.01)
        store = S3Store(f"{bucket.uri}/out", bucket.storage, patience=swift)
        for number in range(claims):
            told[number].append(store.claim(f"{number}", f"{name}-{number}".encode()))

    with ThreadPoolExecutor(rivals) as pool:
        list(pool.map(contend, range(rivals)))
    faults = proxy.faults
    proxy.clear()
    store = bucket.store("out")
    wrong = 0
    for number, answers in enumerate(told):
        there = store.read(f"{number}")
        possible = {f"{name}-{number}".encode() for name in range(rivals)}
        wrong += len(answers) != rivals or set(answers) != {there} or there not in possible
    assert wrong == 0
    assert faults > claims // 4
    return f"claims={claims} rivals={rivals} faults={faults} wrong={wrong}"
