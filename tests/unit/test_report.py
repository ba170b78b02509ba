"""What a run says of its engines: sums over replicas, and timelines of bounded length."""

from __future__ import annotations

from quantbatch.records import (
    Counts,
    EngineProgress,
    EngineSecond,
    Receipt,
    ReplicaStats,
)
from quantbatch.report import TIMELINE_POINTS, RunFigures, thinned


def second(at_s: float, **changes: float) -> EngineSecond:
    found = EngineSecond(at_s, 10, 5.0, 4.0, 0.5, 100, 40, 1.0, 0, 0)
    return found._replace(**changes)  # type: ignore[arg-type]


def receipt(replica: str, at_s: float, totals: dict[str, float]) -> Receipt:
    progress = EngineProgress(totals, (second(at_s),))
    stats = ReplicaStats(replica=replica, engine=progress)
    sent = Receipt(0, 0, Counts(ok=1), replica=stats).to_json()
    return Receipt.from_json(sent)


def test_totals_are_the_latest_of_each_replica_added_up() -> None:
    figures = RunFigures()
    totals = {"steps": 4.0, "rows": 8.0, "positions": 90.0, "wasted_positions": 9.0}
    figures.record(receipt("a", 1, dict.fromkeys(totals, 1.0)))
    figures.record(receipt("a", 2, totals))
    figures.record(receipt("b", 1, totals))
    assert figures.engine["steps"] == 8
    assert figures.engine["mean_rows"] == 2
    assert figures.engine["useful_share"] == 0.9
    assert [point["at_s"] for point in figures.timeline_json()["a"]] == [1, 2]


def test_an_engine_that_tells_nothing_has_no_figures() -> None:
    figures = RunFigures()
    figures.record(Receipt(0, 0, replica=ReplicaStats(replica="echo")))
    assert figures.to_json()["engine"] == {}


def test_joined_seconds_are_means_and_sums() -> None:
    joined = second(1).joined(second(2, steps=30, rows=8.0, kv_share=0.9, out_of_memory=1))
    assert joined == EngineSecond(2, 40, 5.0, 7.0, 0.9, 200, 80, 1.0, 0, 1)


def test_a_long_timeline_is_thinned_and_loses_nothing() -> None:
    seconds = [second(i) for i in range(5 * TIMELINE_POINTS + 1)]
    found = thinned(seconds, TIMELINE_POINTS)
    assert TIMELINE_POINTS / 2 < len(found) <= TIMELINE_POINTS
    assert sum(point.decode_tokens for point in found) == 40 * len(seconds)
    assert found[-1].at_s == seconds[-1].at_s
    assert [p.at_s for p in found] == sorted(p.at_s for p in found)
