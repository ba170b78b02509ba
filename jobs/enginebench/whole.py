"""A whole job through Ray against its engine alone: what everything around an engine costs.

Both answer the same texts with the same engine, made by the same function, on as many threads. The
engine alone gets all rows at once, as requests. In the job they come from Parquet, are tokenized,
travel as chunks, and are committed. Compared are

    alone_s      answering all rows, in a process that does nothing else
    busy_s       time in the engine's steps, in the replica that has worked longest
    answering_s  from the arrival of the first chunk at a replica to the last commit

The arrival is noted by the replica itself, in a file: it can't be had from the receipts. (The time
of a commit less the work until then is no measure of it: whatever time is lost moves that moment
too, and what comes out is `busy_s` again.) The monotonic clock is the same for all processes of a
machine. With two replicas the first arrival counts, so the other's later start is in the time;
`arrivals_s` tells how late it was; if it has one entry, one replica did it all and nothing was
compared. All rows have one budget, since a job has.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import override

from jobs.enginebench import workload
from jobs.enginebench.model import TOKENIZER
from quantbatch import pipeline, rounds
from quantbatch.progress import Silent
from quantbatch.prompts.tokens import load_tokenizer
from quantbatch.records import Request, RequestId
from quantbatch.replica import Replica, ReplicaJob, load_engine
from quantbatch.spec import JobSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.engine import Engine
    from quantbatch.records import Receipt
    from quantbatch.report import RunFigures

ROOT = Path(__file__).parents[2]
ROWS_PER_CHUNK = 32
BATCH_ROWS = 64
BUDGET = 36
"""The mean of the mixed workload."""
WARM_UP_ROWS = 8


def spec_of(folder: Path, *, kind: str, replicas: int, threads: int) -> JobSpec:
    """Return the job over the texts in a folder, which holds the model too."""
    return JobSpec.model_validate(
        {
            "name": "bench",
            "input": {"uri": str(folder / "in"), "rows_per_chunk": ROWS_PER_CHUNK},
            "model": {"id": str(folder / "model"), "bits": 32},
            "prompt": {"column": "text", "format": "text"},
            "sampling": {"max_new_tokens": BUDGET, "min_new_tokens": BUDGET},
            "engine": {"kind": kind, "batch_size": BATCH_ROWS},
            "cluster": {
                "cpu_fallback": True,
                "gpus_per_replica": 0,
                "replicas": replicas,
                "cpus_per_replica": threads,
            },
            "output": {"uri": str(folder / "out"), "keep": []},
        }
    )


def texts(rows: int) -> list[workload.Row]:
    """Return the prompts of the mixed workload, with one budget."""
    mixed = workload.make("mixed", load_tokenizer(TOKENIZER), rows)
    return workload.with_budget(mixed, BUDGET)


class TimedReplica(Replica):
    """Notes when its first chunk comes, in a folder beside the job's output."""

    @override
    async def __call__(self, block: pa.Table) -> pa.Table:
        note = Path(self._spec.output.uri).with_name("arrivals") / self._stats.replica
        if not note.exists():
            note.parent.mkdir(exist_ok=True)
            note.write_text(str(time.monotonic()))
        return await super().__call__(block)


class _Commits(Silent):
    """Notes when the last chunk was committed, by the same clock."""

    def __init__(self) -> None:
        self.last_s = 0.0

    @override
    def committed(self, receipt: Receipt, figures: RunFigures) -> None:
        self.last_s = time.monotonic()


def job(folder: Path, *, rows: int, kind: str, replicas: int, threads: int) -> dict[str, Any]:
    """Run the job and return its figures."""
    (folder / "in").mkdir()
    table = pa.table({"text": [row.text for row in texts(rows)]})
    pq.write_table(table, folder / "in" / "rows.parquet")
    commits, began = _Commits(), time.monotonic()
    spec = spec_of(folder, kind=kind, replicas=replicas, threads=threads)
    # Ray's processes must find this module, and inherit the surroundings of the driver.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with patch.object(rounds, "Replica", TimedReplica):
        report = pipeline.run(spec, progress=commits)
    assert report.counts.truncated == rows, report.counts
    assert report.counts.completion_tokens == rows * BUDGET, report.counts
    arrivals = sorted(float(note.read_text()) for note in (folder / "arrivals").iterdir())
    figures, answering_s = report.run, commits.last_s - arrivals[0]
    times = {name: value for name, value in figures.to_json().items() if name.endswith("_s")}
    return times | {
        "rows": rows,
        "replicas": replicas,
        "threads": threads,
        "arrivals_s": [round(at - began, 2) for at in arrivals],
        "answering_s": round(answering_s, 2),
        "busy_s": round(max(stats.busy_s for stats in figures.replicas.values()), 2),
        "answering_rows_per_s": round(rows / answering_s, 2),
    }


def alone(folder: Path, *, rows: int, kind: str, threads: int) -> dict[str, Any]:
    """Answer the rows of the job by its engine, without the job."""
    spec = spec_of(folder, kind=kind, replicas=1, threads=threads)
    longest = workload.MAX_PROMPT + BUDGET
    engine = load_engine(ReplicaJob(spec, "cpu", longest, str(Path.cwd()))).engine
    asked = [
        Request(RequestId(0, i), row.prompt_ids, spec.sampling, seed=0)
        for i, row in enumerate(texts(rows + WARM_UP_ROWS))
    ]
    _answer(engine, asked[rows:])
    cpu, wall = time.process_time(), time.perf_counter()
    _answer(engine, asked[:rows])
    wall_s = time.perf_counter() - wall
    return {
        "rows": rows,
        "threads": threads,
        "alone_s": round(wall_s, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "rows_per_s": round(rows / wall_s, 2),
    }


def _answer(engine: Engine, asked: Sequence[Request]) -> None:
    engine.add(asked)
    while engine.has_work():
        engine.step()
