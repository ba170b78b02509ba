"""What a run did: the document that it ends with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from quantbatch.records import Counts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantbatch.records import EngineSecond, Receipt, ReplicaStats


TIMELINE_POINTS = 300
"""Points of a replica's timeline in a report: a point a second for five minutes, then fewer."""


class Outcome(StrEnum):
    """How a job stands when a run ends without an error of its own."""

    DONE = "done"
    NOTHING_TO_DO = "nothing_to_do"
    """The job was done before."""
    TOO_MANY_ERRORS = "too_many_errors"
    """Every row is answered, and more of them than allowed with an error."""
    INPUT_UNREADABLE = "input_unreadable"
    """Some input files can't be read; the rows of all others are answered."""


@dataclass(frozen=True)
class RunReport:
    """What a run did. `counts` are those of the whole job, the rates those of this run."""

    name: str
    outcome: Outcome
    output: str
    counts: Counts
    parts: int
    """Files that readers see."""
    unreadable: Mapping[str, str]
    """Input that could not be read, with the reason."""
    run: RunFigures

    @property
    def exit_code(self) -> int:
        """0 if every row is answered within the allowed errors, else 1."""
        return 0 if self.outcome in (Outcome.DONE, Outcome.NOTHING_TO_DO) else 1

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {
            "name": self.name,
            "outcome": self.outcome.value,
            "exit_code": self.exit_code,
            "output": self.output,
            "rows": self.counts.rows,
            "counts": self.counts.to_json(),
            "parts": self.parts,
            "unreadable": dict(self.unreadable),
            "run": self.run.to_json(),
        }


@dataclass
class RunFigures:
    """What one run measured, filled in while it goes on. Times are in seconds from its start."""

    counts: Counts = field(default_factory=Counts)
    """Of the chunks that this run committed."""
    plan_s: float | None = None
    """When the job was planned."""
    cluster_s: float | None = None
    """When Ray was there."""
    first_commit_s: float | None = None
    """When the first chunk was committed."""
    last_commit_s: float | None = None
    total_s: float | None = None
    replicas: dict[str, ReplicaStats] = field(default_factory=dict)
    """The latest figures of each replica."""
    timeline: dict[str, list[EngineSecond]] = field(default_factory=dict)
    """What each replica's engine did, second by second; thinned out as a run gets long."""
    _started: float = field(default_factory=time.monotonic, repr=False)

    @property
    def elapsed_s(self) -> float:
        """Time since the run began."""
        return time.monotonic() - self._started

    def record(self, receipt: Receipt) -> None:
        """Note a committed chunk."""
        self.counts += receipt.counts
        self.last_commit_s = self.elapsed_s
        if self.first_commit_s is None:
            self.first_commit_s = self.last_commit_s
        name = receipt.replica.replica
        if name:
            self.replicas[name] = receipt.replica
            seconds = self.timeline.get(name, []) + list(receipt.replica.engine.seconds)
            self.timeline[name] = thinned(seconds, TIMELINE_POINTS)

    @property
    def rows_per_s(self) -> float:
        """Rows committed over the time from Ray's being there, model loading included."""
        return self._per_s(self.counts.rows)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the same time."""
        return self._per_s(self.counts.completion_tokens)

    @property
    def planned_bytes(self) -> int:
        """Largest memory that was planned for a replica."""
        return max((stats.planned_bytes for stats in self.replicas.values()), default=0)

    @property
    def peak_bytes(self) -> int:
        """Largest memory that a replica's model and work took."""
        return max((stats.peak_bytes for stats in self.replicas.values()), default=0)

    @property
    def engine(self) -> dict[str, float]:
        """What the engines of all replicas did together; empty for an engine that does not tell."""
        found: dict[str, float] = {}
        for stats in self.replicas.values():
            for name, value in stats.engine.totals.items():
                found[name] = found.get(name, 0) + value
        if found.get("steps"):
            wasted, positions = found["wasted_positions"], max(found["positions"], 1)
            found["mean_rows"] = round(found["rows"] / found["steps"], 1)
            found["useful_share"] = round(1 - wasted / positions, 4)
        return found

    def _per_s(self, amount: int) -> float:
        began = self.cluster_s or 0.0
        ended = self.last_commit_s or began
        return amount / (ended - began) if ended > began else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON types."""
        times = ("plan_s", "cluster_s", "first_commit_s", "last_commit_s", "total_s")
        return {
            **self.counts.to_json(),
            "rows": self.counts.rows,
            **{name: _rounded(getattr(self, name)) for name in times},
            "load_s": _rounded(max((s.load_s for s in self.replicas.values()), default=None)),
            "rows_per_s": _rounded(self.rows_per_s),
            "tokens_per_s": _rounded(self.tokens_per_s),
            "planned_bytes": self.planned_bytes,
            "peak_bytes": self.peak_bytes,
            "replicas": len(self.replicas),
            "devices": sorted({stats.device for stats in self.replicas.values()}),
            "engine": self.engine,
        }

    def timeline_json(self) -> dict[str, list[dict[str, float]]]:
        """Return the timelines as JSON types; long, so not part of what is printed."""
        return {
            name: [second._asdict() for second in seconds]
            for name, seconds in self.timeline.items()
        }


def thinned(seconds: list[EngineSecond], most: int) -> list[EngineSecond]:
    """Join neighbours, two by two, until there are few enough."""
    while len(seconds) > most:
        pairs = zip(seconds[::2], seconds[1::2], strict=False)
        seconds = [a.joined(b) for a, b in pairs] + seconds[len(seconds) // 2 * 2 :]
    return seconds


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
