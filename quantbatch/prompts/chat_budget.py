"""What rendering one conversation with a stranger's chat template may take."""

from __future__ import annotations

import time
from typing import Any, NoReturn

from quantbatch.errors import RowError

MAX_STEPS = 1_000_000
"""Most calls, and steps of loops, for one conversation."""
MAX_RENDER_S = 10.0
"""Longest that one conversation may take. Generous: a busy machine must not hit honest rows."""
WORK_CHARS = 50_000_000
WORK_PER_CHAR = 64
"""Characters and items that all operations together may make: the first number, and the second for
each character of the conversation. A template copies a message some ten times."""


class Budget:
    """What rendering one conversation may still take.

    Args:
        chars: Characters of the conversation.
    """

    def __init__(self, chars: int = 0) -> None:
        self.steps = MAX_STEPS
        self.work = WORK_CHARS + WORK_PER_CHAR * chars
        self.deadline = time.monotonic() + MAX_RENDER_S

    def step(self) -> None:
        """Take a call, or a step of a loop."""
        self.steps -= 1
        if self.steps < 0:
            refuse(f"it takes more than {MAX_STEPS:,} steps for this conversation")
        self._check_clock()

    def reserve(self, size: int) -> None:
        """Refuse what would be larger than what is left."""
        if size > self.work:
            refuse("it makes far more text than this conversation has")

    def made(self, value: Any) -> Any:  # noqa: ANN401 - any value
        """Take off what was made, and return it."""
        if isinstance(value, str | list | tuple | dict):
            self.reserve(len(value))
            self.work -= len(value)
        self._check_clock()
        return value

    def _check_clock(self) -> None:
        if time.monotonic() > self.deadline:
            refuse(f"it takes longer than {MAX_RENDER_S:g} s")


def refuse(what: str) -> NoReturn:
    """Give a row up for what its model's chat template does."""
    raise RowError("chat_template", f"the model's chat template: {what}")


def chars_of(value: object, most: int) -> int:
    """Return about how long a value is when it is printed, or something above `most`.

    A list that holds another one twice, and so on, is small and prints without end.
    """
    found, left = 0, [(value, 0)]
    while left and found <= most:
        each, depth = left.pop()
        found += 8 + depth
        match each:
            case str():
                found += len(each)
            case dict():
                found += sum(len(str(key)) for key in each)
                left += [(item, depth + 1) for item in each.values()]
            case list() | tuple():
                left += [(item, depth + 1) for item in each]
            case _:
                pass
    return found
