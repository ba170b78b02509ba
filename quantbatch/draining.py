"""What a run does when it is told to stop: nothing new begins, and what is under way may finish.

SIGTERM comes from a spot instance's notice, from Kubernetes or from `ray job stop`; SIGINT from
Ctrl-C. The first closes the gate (see `gate`) and sets a timer; the run ends when the chunks that
were under way are committed, or when the timer ends, whichever is first. A second signal ends it at
once. Nothing depends on it: a run that is killed loses no more than those chunks.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, NoReturn

from quantbatch.errors import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT)


class Drain:
    """Listens for signals while a run goes on, and ends it in time.

    Args:
        seconds: Time that chunks under way have; with none, a signal ends the run at once.
        told: Called, in another thread, with the name of the signal when the first comes.
    """

    def __init__(self, seconds: float = 0, told: Callable[[str], None] | None = None) -> None:
        self._seconds = seconds
        self._told = told
        self._signal = ""
        self._over = False
        """Whether the run ends now; an exception from a signal handler can get lost: Python drops
        it when the signal comes while it runs a destructor or a callback from C."""
        self._close: Callable[[], set[int]] | None = None
        self._under_way: set[int] | None = None
        self._done: set[int] = set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Let signals stop the run, if this is the thread that gets them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = dict.fromkeys(ENDING, self._on_signal) | {signal.SIGALRM: self._on_alarm}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def during(self, close: Callable[[], set[int]]) -> Iterator[None]:
        """Say how to let no more chunks begin, for the time in which some may be under way.

        Args:
            close: Called in another thread; returns the chunks that are under way.

        Raises:
            Stopped: The run was told to stop before.
        """
        if self._signal:
            raise self._stopped()
        self._close, self._done = close, set()
        try:
            yield
        finally:
            self._close = None

    def done(self, chunk: int) -> None:
        """Note that a chunk is done, or was held back.

        Raises:
            Stopped: The run ends now.
        """
        self._done.add(chunk)
        if self._over or (self._under_way is not None and self._under_way <= self._done):
            raise self._stopped()

    def _stopped(self) -> Stopped:
        return Stopped(f"stopped by {self._signal}", "the same command continues the job")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self._signal = not self._signal, signal.Signals(number).name
        if not first or self._close is None or not self._seconds:
            self._on_alarm(number, frame)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        # A handler runs between any two lines of the main thread, so it asks nobody itself.
        threading.Thread(target=self._close_gate, args=(self._close,), daemon=True).start()

    def _on_alarm(self, number: int, frame: FrameType | None) -> NoReturn:
        del number, frame
        self._over = True
        raise self._stopped()

    def _close_gate(self, close: Callable[[], set[int]]) -> None:
        if self._told:
            self._told(self._signal)
        self._under_way = close()
        if self._under_way <= self._done:
            # Nothing will come that `done` could be called for.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
