"""The thread that feeds an engine: batching across callers, and finding the row that fails."""

from __future__ import annotations

import math
import random
import threading
from collections import deque
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from quantbatch.engine.dedup import Deduplicated
from quantbatch.records import Answer, Completion, Failure, FinishReason, Request, RequestId
from quantbatch.runner import Runner
from quantbatch.spec import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

SAMPLING = Sampling()


def requests(chunk: int, count: int) -> list[Request]:
    return [Request(RequestId(chunk, row), (1, 2, 3), SAMPLING, seed=0) for row in range(count)]


def stay(code: int, reason: str) -> None:
    """Stand for os._exit where no device breaks."""
    pytest.fail(f"the runner left with {code}")


class FragileEngine:
    """Answers groups of up to `batch_size`; a group with a poisonous row in it fails."""

    def __init__(self, batch_size: int = 8, poison: Iterable[RequestId] = ()) -> None:
        self.batch_size = batch_size
        self.poison = set(poison)
        self.queue: deque[Request] = deque()
        self.group: list[Request] = []
        self.groups: list[list[RequestId]] = []
        self.gate = threading.Event()
        self.gate.set()

    def add(self, requests: Iterable[Request]) -> None:
        self.queue.extend(requests)

    def has_work(self) -> bool:
        return bool(self.queue)

    def step(self) -> Sequence[Completion]:
        self.gate.wait(10)
        size = min(self.batch_size, len(self.queue))
        self.group = [self.queue.popleft() for _ in range(size)]
        self.groups.append([request.id for request in self.group])
        if self.poison & {request.id for request in self.group}:
            raise ValueError("poisonous")
        return [Completion(r.id, "x", (1,), FinishReason.STOP) for r in self.group]

    def evict(self) -> Sequence[Request]:
        return self.group


def answer(engine: FragileEngine, *batches: list[Request]) -> list[dict[RequestId, Answer]]:
    runner = Runner(engine, leave=stay)
    futures = [runner.submit(batch) for batch in batches]
    return [future.result(timeout=20) for future in futures]


def test_every_request_is_answered_in_its_own_batch() -> None:
    first, second = answer(FragileEngine(), requests(1, 20), requests(2, 3))
    assert sorted(first) == [RequestId(1, row) for row in range(20)]
    assert sorted(second) == [RequestId(2, row) for row in range(3)]


def test_an_empty_chunk_is_answered_at_once() -> None:
    assert answer(FragileEngine(), []) == [{}]


def test_chunks_share_a_batch() -> None:
    engine = FragileEngine(batch_size=8)
    engine.gate.clear()
    runner = Runner(engine, leave=stay)
    futures = [runner.submit(requests(chunk, 3)) for chunk in range(5)]
    engine.gate.set()
    for future in futures:
        future.result(timeout=20)
    # The first step took what was there when it began; the others are full.
    assert max(len({id.chunk for id in group}) for group in engine.groups) >= 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_poisonous_row_is_found_and_its_neighbours_are_answered(data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, 16))
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    batches = [requests(chunk, size) for chunk, size in enumerate(sizes)]
    everyone = [request.id for batch in batches for request in batch]
    poison = set(data.draw(st.lists(st.sampled_from(everyone), max_size=4)) if everyone else [])
    engine = FragileEngine(batch_size, poison)

    answers = {id: found for batch in answer(engine, *batches) for id, found in batch.items()}

    assert set(answers) == set(everyone)
    assert {id for id, found in answers.items() if isinstance(found, Failure)} == poison
    for id in poison:
        found = answers[id]
        assert isinstance(found, Failure)
        assert (found.kind, found.message) == ("model", "ValueError: poisonous")
        tries = sum(id in group for group in engine.groups)
        assert tries <= math.ceil(math.log2(batch_size)) + 1


def test_out_of_memory_ends_in_smaller_groups() -> None:
    class SmallCard(FragileEngine):
        @override
        def step(self) -> Sequence[Completion]:
            done = super().step()
            if len(self.group) > 3:
                raise MemoryError("out of memory")
            return done

    (answers,) = answer(SmallCard(batch_size=16), requests(0, 50))
    assert len(answers) == 50
    assert all(isinstance(found, Completion) for found in answers.values())


def test_a_broken_device_ends_the_process() -> None:
    codes: list[int] = []

    def leave(code: int, reason: str) -> None:
        assert "illegal memory access" in reason
        codes.append(code)
        done.set()
        threading.Event().wait()  # as after os._exit, the thread goes no further

    class BrokenCard(FragileEngine):
        @override
        def step(self) -> Sequence[Completion]:
            super().step()
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    done = threading.Event()
    future = Runner(BrokenCard(), leave=leave).submit(requests(0, 4))
    assert done.wait(10)
    assert codes == [70]
    assert not future.done()


def test_many_threads_submit_at_once() -> None:
    engine = FragileEngine(batch_size=32, poison=[RequestId(3, 5)])
    runner = Runner(engine, leave=stay)
    results: dict[int, dict[RequestId, Answer]] = {}

    def submit(chunk: int) -> None:
        count = random.Random(chunk).randrange(1, 60) + 6
        results[chunk] = runner.submit(requests(chunk, count)).result(timeout=20)

    threads = [threading.Thread(target=submit, args=(chunk,)) for chunk in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(12))
    failed = [id for found in results.values() for id, a in found.items() if isinstance(a, Failure)]
    assert failed == [RequestId(3, 5)]


class Noted:
    """Notes what a watchdog is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def alive(self) -> None:
        self.said.append("alive")

    def rest(self) -> None:
        self.said.append("rest")


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_watchdog_hears_of_each_step_and_of_parts_of_long_ones(wrapped: bool) -> None:
    class LongWinded(FragileEngine):
        alive: Callable[[], None]

        def __init__(self) -> None:
            super().__init__()
            self.alive = Noted().rest

        @override
        def step(self) -> Sequence[Completion]:
            self.alive()
            self.alive()
            return super().step()

    watch = Noted()
    engine = Deduplicated(LongWinded()) if wrapped else LongWinded()
    runner = Runner(engine, leave=stay, watch=watch)
    runner.submit(requests(0, 1)).result(timeout=20)
    runner.close()
    assert watch.said == ["rest", "alive", "alive", "alive", "rest"]
