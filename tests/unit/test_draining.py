"""When a run that is told to stop ends. The signals are real, and come to this process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from quantbatch.draining import Drain, ours_again, signals_wait, stoppable
from quantbatch.errors import Stopped

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def drain(told: list[str]) -> Iterator[Drain]:
    drain = Drain(30, told.append)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    with drain.listening():
        yield drain
    assert {number: signal.getsignal(number) for number in before} == before


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def struck(number: signal.Signals = signal.SIGTERM) -> None:
    """Get a signal, and then nothing else."""
    send(number)
    time.sleep(20)


def wait(condition: threading.Event) -> None:
    assert condition.wait(20)
    time.sleep(0.05)  # the thread that closed the gate notes what it was told


def test_chunks_under_way_are_waited_for(drain: Drain, told: list[str]) -> None:
    closed = threading.Event()

    def close() -> set[int]:
        closed.set()
        return {1, 2}

    with drain.during(close):
        drain.done(0)
        send()
        wait(closed)
        assert told == ["SIGTERM"]
        drain.done(1)
        drain.done(9)  # held back
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            drain.done(2)


def test_a_run_with_nothing_under_way_ends_at_once(drain: Drain) -> None:
    started = time.monotonic()
    with drain.during(set), pytest.raises(Stopped):
        struck(signal.SIGINT)
    assert time.monotonic() - started < 10


def test_a_signal_between_rounds_ends_the_run(drain: Drain) -> None:
    with pytest.raises(Stopped):
        struck()


def test_the_second_signal_ends_it_at_once(drain: Drain) -> None:
    closed = threading.Event()

    def close() -> set[int]:
        closed.set()
        return {1}

    with drain.during(close):
        send()
        wait(closed)
        with pytest.raises(Stopped):
            struck(signal.SIGINT)


def test_time_runs_out(told: list[str]) -> None:
    drain = Drain(0.5, told.append)
    started = time.monotonic()
    with drain.listening(), drain.during(lambda: {1}), pytest.raises(Stopped):
        struck()
    assert 0.4 < time.monotonic() - started < 10


def test_an_exception_that_got_lost_is_raised_again(drain: Drain) -> None:
    with drain.during(lambda: {1}):
        send()
        with pytest.raises(Stopped):
            struck()
        with pytest.raises(Stopped):
            drain.done(5)


def test_no_round_begins_after_a_signal(drain: Drain) -> None:
    with drain.during(lambda: {1}):
        send()
        time.sleep(0.2)
    # It ended by itself meanwhile.
    with pytest.raises(Stopped), drain.during(set):
        pytest.fail("it began")


def test_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with Drain(1).listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_gate_that_answers_late_rings_no_alarm_when_nobody_listens(told: list[str]) -> None:
    """The run ended by itself meanwhile; an alarm would kill the process."""
    asked, over = threading.Event(), threading.Event()

    def close() -> set[int]:
        asked.set()
        assert over.wait(20)
        return set()

    before = set(threading.enumerate())
    drain = Drain(30, told.append)
    with drain.listening(), drain.during(close):
        send()
        assert asked.wait(20)
    rings: list[int] = []
    usual = signal.signal(signal.SIGALRM, lambda number, _: rings.append(number))
    try:
        over.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(20)
        assert rings == []
    finally:
        signal.signal(signal.SIGALRM, usual)


def test_a_log_that_nobody_reads_any_more_stops_no_drain() -> None:
    def tell(name: str) -> None:
        raise BrokenPipeError(name)

    drain = Drain(30, tell)
    with drain.listening(), drain.during(set), pytest.raises(Stopped):
        struck()


def test_a_command_ends_with_an_error_before_and_after_the_work() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM"), stoppable():
        struck()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_ray_starts_is_told_as_any_other() -> None:
    def start_as_ray_does() -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        struck()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM"), ours_again():
        start_as_ray_does()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_waits_until_ray_is_there() -> None:
    steps: list[str] = []

    def start() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        steps.append("there")

    with pytest.raises(Stopped, match="stopped by SIGTERM"), stoppable(), signals_wait():
        start()
    assert steps == ["there"]


def test_a_run_that_ends_waits_for_the_thread_that_closes_the_gate(told: list[str]) -> None:
    """Ray would end the process if that thread asked it for something after its shutdown."""
    drain = Drain(30, told.append)
    begun, closed = threading.Event(), threading.Event()

    def close() -> set[int]:
        begun.set()
        time.sleep(0.5)
        closed.set()
        return set()

    with pytest.raises(Stopped), drain.listening(), drain.during(close):
        interrupted(begun)
    assert closed.is_set()


def interrupted(begun: threading.Event) -> None:
    """Get two signals, the second while the gate is being closed."""
    send()
    assert begun.wait(20)
    struck()
