"""How long a call to a store is tried again, by a clock of its own."""

from __future__ import annotations

import pickle

import pytest

from quantbatch.spec import Storage
from quantbatch.storage import S3Store
from quantbatch.storage.patience import LONGEST_WAIT_S, OUTAGE_S, Patience


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def waits_of(trouble_s: float, limit_s: float, *, each_try_s: float = 0.0) -> list[float]:
    """Return the waits of a call that fails for some time, at most until it gives up."""
    clock = Clock()
    found = []
    for wait in Patience(clock=clock).waits(lambda: limit_s):
        found.append(wait)
        clock.now_s += wait + each_try_s
        if clock.now_s > 100 + trouble_s:
            break
    return found


def test_a_minute_is_sat_out_with_few_tries() -> None:
    for _ in range(20):
        waits = waits_of(60, OUTAGE_S)
        assert sum(waits) > 60
        assert len(waits) < 60


def test_there_is_an_end() -> None:
    for _ in range(20):
        waits = waits_of(10_000, OUTAGE_S)
        assert OUTAGE_S - LONGEST_WAIT_S < sum(waits) <= OUTAGE_S
        assert len(waits) < 90
        hanging = waits_of(10_000, OUTAGE_S, each_try_s=30)
        assert len(hanging) <= 5


def test_waits_grow_to_a_limit_and_differ() -> None:
    many = [waits_of(60, OUTAGE_S) for _ in range(50)]
    assert max(wait for waits in many for wait in waits) <= LONGEST_WAIT_S
    for tries, longest in enumerate((0.2, 0.4, 0.8, 1.6)):
        firsts = [waits[tries] for waits in many]
        assert max(firsts) <= longest
        assert len(set(firsts)) == len(many), "all workers would come back at once"


def test_the_limit_may_change_on_the_way() -> None:
    """An address that has answered for the first time gets the whole patience."""
    clock, limit_s = Clock(), [5.0]
    waits = Patience(clock=clock).waits(lambda: limit_s[0])
    next(waits)
    clock.now_s += 30
    limit_s[0] = 150.0
    assert next(waits) >= 0
    limit_s[0] = 20.0
    with pytest.raises(StopIteration):
        next(waits)


def test_large_transfers_have_more_time() -> None:
    patience = Patience(answer_s=10, slowest_bytes_per_s=1000)
    assert patience.time_for(0) == 10
    assert patience.time_for(60_000) == 70


def test_other_processes_of_a_job_know_that_the_store_is_there() -> None:
    store = S3Store("s3://bucket/out", Storage())
    assert not store.known
    sent = pickle.loads(pickle.dumps(store))
    assert sent.known
    assert sent == store
