"""Ways to decide a schedule: nothing goes wrong, one call goes wrong, or a seed decides."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from typing_extensions import override

from tests.faults.memory import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.scheduler import Task

WRITES = ("put", "create", "delete")
JUMP_S = 7200.0


class Calm:
    """Whoever began first goes on, and nothing goes wrong."""

    def next(self, runnable: list[Task]) -> Task:
        return runnable[0]

    def fault(self, task: Task, name: str, key: str) -> Fault:
        del task, name, key
        return Fault.NONE


class OneFault(Calm):
    """The n-th call of a store goes wrong: of all calls, or of those that have an effect for what
    goes wrong after one.
    """

    def __init__(self, number: int, fault: Fault) -> None:
        self._left, self._fault = number, fault
        self._any = fault in (Fault.FAIL_BEFORE, Fault.KILL_BEFORE)
        self.fired = False

    @override
    def fault(self, task: Task, name: str, key: str) -> Fault:
        del task, key
        self._left -= self._any or name in WRITES
        if self._left or self.fired:
            return Fault.NONE
        self.fired = True
        return self._fault


class Asleep(Calm):
    """A process falls asleep before its n-th call, and wakes up when all others have ended.

    Its workers' calls are its own. As it wakes up, something may go wrong with that call.
    """

    def __init__(self, name: str, number: int, fault: Fault = Fault.NONE) -> None:
        self._name, self._number, self._fault = name, number, fault
        self.made = 0
        """Calls that it made."""

    def _is_it(self, task: Task) -> bool:
        return task.process.name.partition(".")[0] == self._name

    @override
    def next(self, runnable: list[Task]) -> Task:
        asleep = self.made >= self._number - 1
        return next((task for task in runnable if self._is_it(task) != asleep), runnable[0])

    @override
    def fault(self, task: Task, name: str, key: str) -> Fault:
        del name, key
        if not self._is_it(task):
            return Fault.NONE
        self.made += 1
        return self._fault if self.made == self._number else Fault.NONE


class Seeded:
    """A seed decides who goes on and what goes wrong.

    Tasks have priorities, which change now and then: so one of them may stand still for long while
    all others come to their ends, as a process does whose put takes minutes.
    """

    def __init__(
        self, seed: int, *, jump: Callable[[float], None], without: frozenset[int] = frozenset()
    ) -> None:
        self._random = random.Random(seed)
        self._priorities: dict[int, float] = {}
        self._restless = self._random.choice([0.02, 0.1, 0.5])
        self._rate = self._random.choice([0.0, 0.005, 0.02, 0.06])
        self._jump = jump
        self._without = without
        """Numbers of faults that are left out, to see whether they matter."""
        self.faults: list[Fault] = []

    def next(self, runnable: list[Task]) -> Task:
        for task in runnable:
            if task.number not in self._priorities or self._random.random() < self._restless:
                self._priorities[task.number] = self._random.random()
        return max(runnable, key=lambda task: self._priorities[task.number])

    def fault(self, task: Task, name: str, key: str) -> Fault:
        del task, key
        if self._random.random() < 0.01:
            self._jump(self._random.choice([-JUMP_S, JUMP_S]))
        if self._random.random() >= self._rate:
            return Fault.NONE
        fault = self._random.choice([f for f in Fault if f is not Fault.NONE])
        if fault is Fault.TWICE and name not in WRITES:
            return Fault.NONE
        self.faults.append(fault)
        return Fault.NONE if len(self.faults) - 1 in self._without else fault
