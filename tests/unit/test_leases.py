"""Who may work on a shard: a store whose clock the tests turn, and drivers that are processes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from quantbatch import leases
from quantbatch.errors import StorageError
from quantbatch.leases import DRIVERS, LEASES, TTL_S, Driver, Leases, Permits
from quantbatch.storage import FileInfo
from tests.integration.support import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


SAYS_ITS_NAME = """
from quantbatch.leases import Driver
print(Driver.this().to_bytes().decode(), flush=True)
input()
"""


@dataclass
class ClockedStore:
    """As much of a store as leases need, in memory, with a clock of its own."""

    now_s: float = 5000.0
    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    calls: int = 0
    broken: bool = False

    def _called(self) -> None:
        self.calls += 1
        if self.broken:
            raise StorageError("the store is away")

    def put(self, key: str, data: bytes) -> None:
        self._called()
        self.objects[key] = (data, self.now_s)

    def claim(self, key: str, data: bytes) -> bytes:
        self._called()
        return self.objects.setdefault(key, (data, self.now_s))[0]

    def read(self, key: str) -> bytes:
        self._called()
        if key not in self.objects:
            raise FileNotFoundError(key)
        return self.objects[key][0]

    def info(self, key: str) -> FileInfo:
        self._called()
        data, modified_s = self.objects[key]
        return FileInfo(key, len(data), "", modified_s)

    def list(self, prefix: str) -> Iterator[FileInfo]:
        self._called()
        for key in sorted(self.objects):
            if key.startswith(f"{prefix}/"):
                yield self.info(key)

    def delete(self, key: str) -> None:
        self._called()
        self.objects.pop(key, None)


def driver(store: ClockedStore, name: str, machine: str = "elsewhere") -> Leases:
    """Return the leases of a driver on another machine that has just given a sign of life."""
    found = Leases(store, Driver(name, machine, 1, "1"))  # type: ignore[arg-type]
    found._beat()
    return found


def survey(leases: Leases, shards: Iterable[int]) -> tuple[set[int], set[int]]:
    held, abandoned = leases.survey(shards)
    return set(held), set(abandoned)


@pytest.fixture
def store() -> ClockedStore:
    return ClockedStore()


def test_a_shard_is_its_first_drivers_as_long_as_that_one_lives(store: ClockedStore) -> None:
    a, b = driver(store, "a"), driver(store, "b")
    assert a.take(0)
    assert b.take(1)
    assert not b.take(0)
    assert not a.take(1)
    assert survey(a, [0, 1, 2]) == ({1}, set())
    assert survey(b, [0, 1, 2]) == ({0}, set())
    assert survey(b, [2]) == (set(), set())

    for _ in range(10):  # long shards: signs of life keep coming
        store.now_s += TTL_S - 1
        a._beat()
        b._beat()
    assert survey(a, [0]) == (set(), set())
    assert survey(b, [0]) == ({0}, set())
    assert a.take(0)
    assert not b.take(0)


def test_what_a_driver_held_that_went_silent_is_taken_over(store: ClockedStore) -> None:
    a, b = driver(store, "a"), driver(store, "b")
    assert a.take(0)
    store.now_s += TTL_S + 1
    b._beat()
    assert survey(b, [0]) == (set(), {0})
    assert b.take(0)
    # It was only slow: it learns that its shard has gone, and leaves it alone.
    a._beat()
    assert survey(a, [0]) == ({0}, set())
    assert not a.take(0)


def test_what_a_rival_did_since_the_survey_is_looked_at_first(store: ClockedStore) -> None:
    a, b = driver(store, "a"), driver(store, "b")
    assert survey(b, [0, 1]) == (set(), set())
    assert a.take(0)
    store.delete(f"{DRIVERS}/a.json")  # it did its work and ended
    assert not b.take(0), "its chunks are not known to be done"
    assert b.take(1)
    assert survey(b, [0]) == (set(), {0})
    assert b.take(0)


def test_the_age_of_a_lease_is_told_by_the_store_alone(
    store: ClockedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own clock may be two hours off, or jump: it is not even asked."""
    a, b = driver(store, "a"), driver(store, "b")

    def asked() -> float:
        raise AssertionError("a clock of this machine was asked")

    for name in ("time", "monotonic"):
        monkeypatch.setattr(f"time.{name}", asked)
    assert a.take(0)
    store.now_s += TTL_S - 1
    b._beat()
    assert not b.take(0)


def test_an_answer_stays_until_the_next_survey(store: ClockedStore) -> None:
    a, b = driver(store, "a"), driver(store, "b")
    assert a.take(0)
    assert not b.take(0)
    calls = store.calls
    assert not b.take(0)
    assert a.take(0)
    assert store.calls == calls
    store.delete(f"{DRIVERS}/a.json")
    assert not b.take(0)
    survey(b, [0])
    assert b.take(0)


def test_a_lone_driver_asks_the_store_little(store: ClockedStore) -> None:
    a = driver(store, "a")
    before = store.calls
    assert survey(a, range(10_000)) == (set(), set())
    assert store.calls - before == 1
    before = store.calls
    assert a.take(0)
    assert store.calls - before == 1


def test_two_that_take_over_at_once_end_with_one_holder(store: ClockedStore) -> None:
    dead, b, c = driver(store, "dead"), driver(store, "b"), driver(store, "c")
    assert dead.take(0)
    store.delete(f"{DRIVERS}/dead.json")
    assert survey(b, [0]) == survey(c, [0]) == (set(), {0})
    put = store.put

    def overtaken(key: str, data: bytes) -> None:
        put(key, data)
        put(key, c.driver.to_bytes())  # c had read the dead one's lease before b's was there

    store.put = overtaken  # type: ignore[method-assign]
    assert not b.take(0)
    assert c.take(0)


@pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b'{"id": 3}', b"\xff"])
def test_a_damaged_lease_holds_nothing(store: ClockedStore, damaged: bytes) -> None:
    a = driver(store, "a")
    driver(store, "b")
    store.put(f"{LEASES}/000000.json", damaged)
    assert survey(a, [0]) == (set(), {0})
    assert a.take(0)


def test_signs_of_life_that_were_removed_are_given_again(store: ClockedStore) -> None:
    a, b = driver(store, "a"), driver(store, "b")
    assert b.take(0)
    store.delete(f"{DRIVERS}/a.json")
    assert survey(a, [0]) == ({0}, set())
    assert f"{DRIVERS}/a.json" in store.objects


def test_a_driver_gives_signs_of_life_and_takes_them_away(
    store: ClockedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.01)
    a = Leases(store, Driver.this())  # type: ignore[arg-type]
    key = f"{DRIVERS}/{a.driver.id}.json"
    with a.beating():
        first = store.info(key).modified_s
        store.broken = True
        calls = store.calls
        wait_for(lambda: store.calls > calls + 2, timeout_s=30, what="a sign that gets lost")
        store.broken = False
        store.now_s += 5
        wait_for(lambda: store.info(key).modified_s > first, timeout_s=30, what="a further sign")
        assert Driver.from_bytes(store.read(key)) == a.driver
    assert key not in store.objects


def test_the_end_is_not_held_up_by_a_store_that_is_away(store: ClockedStore) -> None:
    a = Leases(store, Driver.this())  # type: ignore[arg-type]
    with a.beating():
        store.broken = True


def test_a_driver_that_was_killed_on_this_machine_holds_nothing(store: ClockedStore) -> None:
    """Whoever starts the same command again need not wait until its lease is old."""
    with subprocess.Popen(
        [sys.executable, "-c", SAYS_ITS_NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        rival = Leases(store, Driver.from_bytes(process.stdout.readline()))  # type: ignore[arg-type]
        rival._beat()
        ours = Leases(store, Driver.this())  # type: ignore[arg-type]
        ours._beat()
        assert rival.take(0)
        assert survey(ours, [0]) == ({0}, set())
        assert not ours.take(0)
        process.kill()
        wait_for(rival.driver.is_gone, timeout_s=30, what="a process that is not reaped yet")
        assert process.returncode is None
    assert rival.driver.is_gone()
    assert survey(ours, [0]) == (set(), {0})
    assert ours.take(0)


def test_a_number_of_a_process_that_is_used_again_is_another_process() -> None:
    ours = Driver.this()
    assert not ours.is_gone()
    assert ours._replace(started="1").is_gone()
    assert not ours._replace(started="1", machine="another").is_gone()


def test_chunks_begin_if_their_shard_is_ours(store: ClockedStore) -> None:
    a, b = driver(store, "a"), driver(store, "b")
    assert a.take(1)
    permits = Permits(b, (0, 5, 7))
    assert permits.begin(4, reading=True)
    assert permits.begin(5, reading=True), "nobody asked yet"
    assert f"{LEASES}/000000.json" not in store.objects, "reading leases nothing"
    assert [permits.begin(chunk, reading=False) for chunk in (0, 4, 5, 6, 7)] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert not permits.begin(6, reading=True)


def test_a_store_that_is_away_refuses_nothing(store: ClockedStore) -> None:
    a, b = driver(store, "a"), driver(store, "b")
    assert b.take(0)
    store.broken = True
    assert a.take(0)
    store.broken = False
    assert not a.take(0)
