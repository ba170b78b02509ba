"""What is read out of the figures of several processes; imports nothing that takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def disagreeing(document: dict[str, Any]) -> list[str]:
    """Return who gave other answers than the first in float32, where all must be equal."""
    if not document["case"].endswith("-32"):
        return []
    rows = document["workload"]["rows"]
    return [c["name"] for c in document["contenders"] if c["equal_rows"] != rows]


def compared(runs: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the ratios that the runs were made for, from the best of each kind."""
    ratios: dict[str, float | None] = {}
    for threads in sorted({run["threads"] for run in runs if "alone_s" in run}):
        mine = [run for run in runs if run["threads"] == threads]
        alone_s = min(run["alone_s"] for run in mine if "alone_s" in run)
        whole = [run for run in mine if run.get("replicas") == 1]
        for name in ("busy_s", "answering_s"):
            ratio = min(run[name] for run in whole) / alone_s
            ratios[f"{name}_to_alone_{threads}_threads"] = round(ratio, 3)
    one, two = _best_rate(runs, replicas=1), _best_rate(runs, replicas=2)
    return ratios | {"two_replicas_to_one": round(two / one, 2) if one and two else None}


def _best_rate(runs: Sequence[dict[str, Any]], *, replicas: int) -> float | None:
    """Return the best rows/s of jobs with one thread a replica, in which every replica worked.

    Ray may give all chunks of a small job to the replica that is ready first.
    """
    rates = [
        run["answering_rows_per_s"]
        for run in runs
        if run["threads"] == 1
        and run.get("replicas") == replicas
        and len(run["arrivals_s"]) == replicas
    ]
    return max(rates, default=None)
