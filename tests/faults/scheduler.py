"""Simulated processes that take turns at every call of a store, in an order that a seed decides.

A process is a thread or several (its driver, and those that commit and publish for it), of which
one runs at a time: at a call of a store it hands over to whoever is next. So a schedule is a list
of choices, and the same choices are the same run. What the threads do between two calls nobody else
can see, so that no interleaving of effects is left out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from tests.faults.memory import Fault, Killed

ResultT = TypeVar("ResultT")
LONGEST = 20_000
"""Turns after which a schedule counts as one that never ends."""


class Choices(Protocol):
    """Decides a schedule."""

    def next(self, runnable: list[Task]) -> Task:
        """Say who goes on."""
        ...

    def fault(self, task: Task, name: str, key: str) -> Fault:
        """Say what goes wrong with the call that a task makes now."""
        ...


@dataclass(eq=False)
class Process:
    """One simulated process: what ends together."""

    name: str
    dead: bool = False
    ended: str = ""
    """How its main task ended: `returned`, `killed`, or an exception's class and text."""
    error: BaseException | None = None


@dataclass(eq=False)
class Task:
    """One thread of a process."""

    process: Process
    number: int
    work: Callable[[], None]
    waits_for: Callable[[], bool] | None = None
    """Tells whether it may go on; None if it may."""
    outlives: bool = False
    """It goes on when its process is killed, as Ray's actors do for a moment, to its own end."""
    done: bool = False
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @property
    def runnable(self) -> bool:
        return not self.done and (self.doomed or self.waits_for is None or self.waits_for())

    @property
    def doomed(self) -> bool:
        """Whether its process is killed, so that it ends at its next turn."""
        return self.process.dead and not self.outlives


class Deadlock(Exception):  # noqa: N818 - a verdict
    """Everybody waits, or nobody ever ends."""


class Scheduler:
    """Runs tasks one at a time."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.tasks: list[Task] = []
        self.current: Task | None = None
        self.calls = 0
        """Calls of stores so far."""
        self.trace: list[str] = []
        self.broken: BaseException | None = None
        """What the watcher found wrong: it ends the schedule."""
        self._numbers = 0
        self._over = threading.Semaphore(0)

    def start(self, process: Process, work: Callable[[], None], *, outlives: bool = False) -> Task:
        """Add a task, which goes on when it is chosen."""
        task = Task(process, self._numbers, work, outlives=outlives)
        self._numbers += 1
        self.tasks.append(task)
        threading.Thread(target=self._body, args=(task,), daemon=True).start()
        return task

    def spawn(self, name: str, work: Callable[[], object]) -> Process:
        """Add a process with one task; how that ends is noted."""
        process = Process(name)

        def main() -> None:
            try:
                work()
            except Killed:
                process.ended = "killed"
                raise
            except Exception as error:  # noqa: BLE001 - whatever ends a process is looked at later
                process.ended, process.error = f"{type(error).__name__}: {error}", error
                # What it has started ends with it, as threads do.
                process.dead = True
                return
            process.ended = "returned"

        self.start(process, main)
        return process

    def run(self) -> None:
        """Let all tasks run to their ends."""
        first = self._choose()
        if first is None:
            return
        self._hand_over(first)
        self._over.acquire()
        self.current = None
        if self.broken is not None:
            raise self.broken

    def turn(self, name: str, key: str) -> Fault:
        """Let others go on, then say what goes wrong with the call that is made now."""
        me = self._me()
        self.switch()
        self.calls += 1
        if self.calls > LONGEST:
            self.broken = self.broken or Deadlock(f"not over after {LONGEST} calls")
            self._kill_all()
            raise Killed
        fault = self.choices.fault(me, name, key)
        self.trace.append(f"{me.process.name}/{me.number} {name} {key} {fault.value}".rstrip())
        if fault in (Fault.KILL_BEFORE, Fault.KILL_AFTER):
            me.process.dead = True
        return fault

    def wait(self, until: Callable[[], bool]) -> None:
        """Let others go on until something is true."""
        me = self._me()
        me.waits_for = until
        self.switch()
        me.waits_for = None

    def switch(self) -> None:
        """Let whoever is chosen go on, and come back when it is this task's turn again."""
        me = self._me()
        chosen = self._choose()
        if chosen is None:
            self.broken = self.broken or Deadlock(f"all wait for each other: {self.trace[-5:]}")
            self._kill_all()
            raise Killed
        if chosen is not me:
            self._hand_over(chosen)
            me.turn.acquire()
        if me.doomed:
            raise Killed

    def fail(self, error: BaseException) -> None:
        """End the schedule: a watcher saw something wrong."""
        self.broken = self.broken or error
        self._kill_all()

    def _kill_all(self) -> None:
        for task in self.tasks:
            task.process.dead = True
            task.outlives = False

    def _me(self) -> Task:
        assert self.current is not None
        if self.current.doomed:
            raise Killed
        return self.current

    def _choose(self) -> Task | None:
        runnable = [task for task in self.tasks if task.runnable]
        if not runnable:
            return None
        return runnable[0] if len(runnable) == 1 else self.choices.next(runnable)

    def _hand_over(self, task: Task) -> None:
        self.current = task
        task.turn.release()

    def _body(self, task: Task) -> None:
        task.turn.acquire()
        try:
            if not task.doomed:
                task.work()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - it would be lost with its thread
            self.fail(error)
        task.done = True
        self.tasks.remove(task)
        chosen = self._choose()
        if chosen is None and self.tasks:
            self.broken = self.broken or Deadlock(f"all wait for each other: {self.trace[-5:]}")
            self._kill_all()
            chosen = self._choose()
        if chosen is None:
            self._over.release()
        else:
            self._hand_over(chosen)


@dataclass(eq=False)
class SimFuture(Generic[ResultT]):
    """As much of `concurrent.futures.Future` as the product uses."""

    finished: bool = False
    value: Any = None
    error: Exception | None = None
    cancelled: bool = False

    def done(self) -> bool:
        return self.finished

    def result(self) -> ResultT:
        if self.error is not None:
            raise self.error
        value: ResultT = self.value
        return value


class SimThreads:
    """As much of `ThreadPoolExecutor` as the product uses; its threads are tasks of the process."""

    def __init__(self, scheduler: Scheduler, most: int) -> None:
        self._scheduler, self._most = scheduler, most
        self._futures: list[SimFuture[Any]] = []
        self._running = 0

    def submit(self, work: Callable[..., ResultT], *args: Any, **named: Any) -> SimFuture[ResultT]:
        future: SimFuture[ResultT] = SimFuture()
        self._futures.append(future)
        me = self._scheduler.current
        assert me is not None

        def body() -> None:
            task.waits_for = None
            if not future.cancelled:
                self._running += 1
                try:
                    future.value = work(*args, **named)
                except Exception as error:  # noqa: BLE001 - whoever asks for the result gets it
                    future.error = error
                self._running -= 1
            future.finished = True

        task = self._scheduler.start(me.process, body)
        task.waits_for = lambda: self._running < self._most
        return future

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        if cancel_futures:
            for future in self._futures:
                future.cancelled = True
        if wait:
            self._scheduler.wait(lambda: all(future.finished for future in self._futures))


class InlineThreads:
    """A pool for reading: its calls are made one after another, so that a schedule is short."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> InlineThreads:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, work: Callable[..., ResultT], *items: Any) -> map[ResultT]:
        return map(work, *items)
