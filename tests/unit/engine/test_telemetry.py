"""The seconds that an engine tells of add up to its totals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbatch.engine.telemetry import MAX_SECONDS, Telemetry, Totals
from quantbatch.records import EngineSecond

STEPS = st.lists(
    st.tuples(
        st.floats(0.001, 3.0), st.integers(0, 50), st.integers(0, 50), st.integers(0, 9),
        st.booleans(),
    ),
    max_size=60,
)  # fmt: skip


@given(STEPS)
def test_seconds_add_up(steps: list[tuple[float, int, int, int, bool]]) -> None:
    telemetry, now = Telemetry(100.0), 100.0
    seconds: list[EngineSecond] = []
    for number, (took_s, prefill, decode, wasted, idle) in enumerate(steps):
        now += took_s
        totals = telemetry.totals
        totals.step_s += took_s
        totals.prefill_tokens += prefill
        totals.decode_tokens += decode
        totals.rows += decode
        totals.positions += prefill + decode + wasted
        totals.wasted_positions += wasted
        totals.preemptions += wasted > 5
        totals.out_of_memory += wasted > 7
        last = number == len(steps) - 1
        telemetry.stepped(now, kv_share=0.5, idle=idle or last)
        if number % 7 == 0 or last:
            seconds += telemetry.take().seconds
    totals = telemetry.totals
    assert totals.steps == len(steps) == sum(s.steps for s in seconds)
    for name in ("prefill_tokens", "decode_tokens", "preemptions", "out_of_memory"):
        assert sum(getattr(s, name) for s in seconds) == getattr(totals, name)
    assert sum(s.steps * s.step_ms for s in seconds) == pytest.approx(
        1000 * totals.step_s, abs=0.01 * max(1, len(steps))
    )
    assert [s.at_s for s in seconds] == sorted(s.at_s for s in seconds)
    assert all(0 <= s.useful_share <= 1 for s in seconds)
    if seconds:
        assert seconds[-1].at_s == pytest.approx(now - 100.0, abs=0.01)


def test_a_second_is_a_second_of_steps() -> None:
    telemetry = Telemetry(0.0)
    for step in range(1, 26):
        telemetry.totals.rows += 4
        telemetry.stepped(step / 10, kv_share=step / 100, idle=False)
    progress = telemetry.take()
    assert [(s.at_s, s.steps, s.rows, s.kv_share) for s in progress.seconds] == [
        (1.0, 10, 4.0, 0.1), (2.0, 10, 4.0, 0.2),
    ]  # fmt: skip
    assert progress.totals["steps"] == 25
    assert telemetry.take().seconds == ()


def test_old_seconds_are_dropped_and_their_totals_are_not() -> None:
    telemetry = Telemetry(0.0)
    for step in range(MAX_SECONDS + 50):
        telemetry.totals.decode_tokens += 1
        telemetry.stepped(2.0 * step, kv_share=0, idle=False)
    progress = telemetry.take()
    assert len(progress.seconds) == MAX_SECONDS
    assert progress.totals["decode_tokens"] == MAX_SECONDS + 50


def test_totals_since() -> None:
    earlier = Totals(steps=3, positions=10, wasted_positions=5)
    later = Totals(steps=5, positions=30, wasted_positions=10)
    assert later.since(earlier) == Totals(steps=2, positions=20, wasted_positions=5)
    assert later.since(earlier).useful_share == 0.75
    assert Totals().useful_share == 1.0
