"""What a run does when it is told to stop: nothing new begins, and what is under way may finish.

SIGTERM comes from a spot instance's notice, from Kubernetes or from `ray job stop`; SIGINT from
Ctrl-C. The first closes the gate (see `gate`) and sets a timer; the run ends when the chunks that
were under way are committed, or when the timer ends, whichever is first. A second signal ends it at
once, and so does the first while no chunks are answered: before Ray is there (`stoppable`), between
rounds. Nothing depends on it: a run that is killed loses no more than those chunks.
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
CLOSING_S = 10.0
"""Longest wait in seconds for the gate's answer when a run ends before it came; it takes
milliseconds."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM end a command that can be continued with an error that says so, at any moment at
    which no `Drain` listens. Ctrl-C is an exception of Python's own.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        del frame
        raise stopped_by(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def ours_again() -> Iterator[None]:
    """Keep Ray's way of ending at SIGTERM, without a word and with code 15, to the time in which it
    starts, and end with our error there too.

    Raises:
        Stopped: The signal came.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        raise stopped_by(signal.SIGTERM.name) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Let signals come when the block is over: an exception in the middle of what Ray does there in
    C++ may end the process with SIGABRT (seen once in some 50 stops), and what is half imported of
    Ray prints a traceback as Python ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stopped_by(name: str) -> Stopped:
    """Return what ends a run that was told to stop by a signal."""
    return Stopped(f"stopped by {name}", "the same command continues the job")


class Drain:
    """Listens for signals while a run goes on, and ends it in time.

    Args:
        seconds: Time that chunks under way have; with none, a signal ends the run at once.
        told: Called, in another thread, with the name of the signal when the first comes.
    """

    def __init__(self, seconds: float = 0, told: Callable[[str], None] | None = None) -> None:
        self._seconds = seconds
        self._told = told or (lambda name: None)
        self._signal = ""
        self._over = False
        """Whether the run ends now; an exception from a signal handler can get lost: Python drops
        it when the signal comes while it runs a destructor or a callback from C."""
        self._close: Callable[[], set[int]] | None = None
        self._under_way: set[int] | None = None
        self._done: set[int] = set()
        self._closing: threading.Thread | None = None
        self._asking = threading.Lock()
        """Held while `_close` goes, and while the main thread is woken since nothing is under way:
        an alarm must not come when nobody listens any more, because it would kill the process."""

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
            try:
                if self._closing:
                    # Ray ends a process in which a thread asks it for something after its shutdown.
                    self._closing.join(CLOSING_S)
            finally:
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
            raise stopped_by(self._signal)
        self._close, self._done = close, set()
        try:
            yield
        finally:
            with self._asking:
                self._close = None

    def done(self, chunk: int) -> None:
        """Note that a chunk is done, or was held back.

        Raises:
            Stopped: The run ends now.
        """
        self._done.add(chunk)
        if self._over or (self._under_way is not None and self._under_way <= self._done):
            raise stopped_by(self._signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self._signal = not self._signal, signal.Signals(number).name
        if not first or self._close is None or not self._seconds:
            self._on_alarm(number, frame)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        # A handler runs between any two lines of the main thread, so it asks nobody itself.
        self._closing = threading.Thread(
            target=self._close_gate, args=(self._close,), name="closing", daemon=True
        )
        self._closing.start()

    def _on_alarm(self, number: int, frame: FrameType | None) -> NoReturn:
        del number, frame
        self._over = True
        raise stopped_by(self._signal)

    def _close_gate(self, close: Callable[[], set[int]]) -> None:
        with contextlib.suppress(OSError):
            # Whoever read what is told may have had the same Ctrl-C: `quantbatch run 2>&1 | tee`.
            self._told(self._signal)
        self._under_way = close()
        with self._asking:
            if self._close is close and self._under_way <= self._done:
                # Nothing will come that `done` could be called for.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
