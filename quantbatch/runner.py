"""One engine, many callers: the thread in a replica that keeps the engine busy.

Chunks arrive while others are being answered. The runner feeds the rows of all of them to one
engine, so that a batch never drains at the end of a chunk, and hands each chunk its answers when
its last row is done.

This is also the one place that turns exceptions into rows. When a step fails, the requests that it
worked on are tried again in halves, apart from all others, until the row that fails alone is found:
it becomes an error row after at most 2 log2(batch) further steps, and its neighbours are
answered. Out of memory is handled by the same halves: smaller groups fit. What raises nothing, but
kills the process or never returns, is left to `gate`, `lastwords` and `suspects`.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from quantbatch.engine.dedup import Deduplicated
from quantbatch.records import Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.engine import Engine
    from quantbatch.records import Answer, Request, RequestId

logger = logging.getLogger(__name__)

EXIT_BROKEN_DEVICE = 70
"""Exit code of a replica whose device no longer works (EX_SOFTWARE of sysexits.h)."""


class Watch(Protocol):
    """Is told that work goes on, see `lastwords.Watchdog`."""

    def alive(self) -> None:
        """A step begins, or a part of it is done."""
        ...

    def rest(self) -> None:
        """There is nothing to do."""
        ...


class Unwatched:
    """Lets steps take as long as they like."""

    def alive(self) -> None:
        """See `Watch`."""

    def rest(self) -> None:
        """See `Watch`."""


@runtime_checkable
class LongSteps(Protocol):
    """An engine whose steps take long, and which says within them that it is alive."""

    alive: Callable[[], None]


class _Batch:
    """The requests of one caller, and the answers that are there."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.answers: dict[RequestId, Answer] = {}
        self.future: Future[dict[RequestId, Answer]] = Future()

    def receive(self, answer: Answer) -> None:
        self.answers[answer.id] = answer
        if len(self.answers) == len(self.requests):
            self.future.set_result(self.answers)


def _leave(code: int, reason: str) -> None:
    del reason
    os._exit(code)


class Runner:
    """Runs an engine in its own thread.

    Args:
        engine: Used from that thread only.
        leave: Called with an exit code and the reason when the device is broken; ends the process,
            so that Ray starts a new one.
        watch: Told of each step.
    """

    def __init__(
        self,
        engine: Engine,
        leave: Callable[[int, str], None] = _leave,
        watch: Watch | None = None,
    ) -> None:
        self._engine = engine
        self._leave = leave
        self._watch = watch or Unwatched()
        working = engine.engine if isinstance(engine, Deduplicated) else engine
        if isinstance(working, LongSteps):
            working.alive = self._watch.alive
        self._inbox: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._waiting: dict[RequestId, _Batch] = {}
        self._suspects: list[Sequence[Request]] = []
        self._isolated = False
        self.busy_s = 0.0
        """Time spent in the engine's steps so far, in seconds."""
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> Future[dict[RequestId, Answer]]:
        """Have requests answered; any thread may call this.

        Returns:
            A future of the answers by request id: one for each request.
        """
        batch = _Batch(requests)
        if requests:
            self._inbox.put(batch)
        else:
            batch.future.set_result({})
        return batch.future

    def close(self) -> None:
        """End the thread, which holds the engine; every answer must have come."""
        assert not self._waiting
        self._inbox.put(None)
        self._thread.join()

    def _loop(self) -> None:
        try:
            self._feed()
            while not self._closed:
                self._step()
                self._feed()
        except Exception as error:
            # Nobody would ever answer what waits here: a new process must.
            logger.critical("the engine's thread failed", exc_info=True)
            for batch in {id(batch): batch for batch in self._waiting.values()}.values():
                batch.future.set_exception(error)
            self._leave(EXIT_BROKEN_DEVICE, f"{type(error).__name__}: {error}")

    def _feed(self) -> None:
        """Give the engine what is to be done next: suspects by themselves, all others together."""
        if self._engine.has_work():
            # New rows would keep suspects waiting for as long as there are any.
            if not self._isolated and not self._suspects:
                self._receive()
        elif self._suspects:
            self._isolated = True
            self._engine.add(self._suspects.pop())
        else:
            self._isolated = False
            self._receive(wait=True)

    def _receive(self, *, wait: bool = False) -> None:
        while wait or not self._inbox.empty():
            if wait:
                self._watch.rest()
            batch = self._inbox.get()
            if batch is None:
                self._closed = True
                return
            self._waiting.update((request.id, batch) for request in batch.requests)
            self._engine.add(batch.requests)
            wait = False

    def _step(self) -> None:
        started = time.perf_counter()
        self._watch.alive()
        try:
            finished = self._engine.step()
        except Exception as error:  # noqa: BLE001 - whatever a model raises concerns some row of the step
            self._leave_if_broken(error)
            self._suspect(self._engine.evict(), error)
        else:
            for answer in finished:
                self._answer(answer)
        self.busy_s += time.perf_counter() - started

    def _suspect(self, failed: Sequence[Request], error: Exception) -> None:
        assert failed, f"the engine failed and gave nothing back: {error!r}"
        if len(failed) == 1:
            message = f"{type(error).__name__}: {error}"
            logger.warning("a row failed alone: %s", message)
            self._answer(Failure(failed[0].id, "model", message[:2000]))
            return
        middle = len(failed) // 2
        self._suspects += [failed[middle:], failed[:middle]]

    def _answer(self, answer: Answer) -> None:
        self._waiting.pop(answer.id).receive(answer)

    def _leave_if_broken(self, error: Exception) -> None:
        # After an illegal access every further call on the card fails: no row is to blame for
        # those.
        if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
            logger.critical("the device is broken, leaving: %s", error)
            self._leave(EXIT_BROKEN_DEVICE, str(error).split("\n", 1)[0])
