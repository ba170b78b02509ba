"""Two replicas on one card against one: processes of their own, without Ray.

Each of two plans with half of the card and answers half of the rows. They begin together, when both
are ready; what counts is the time until the last is done.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from jobs.gpubench.record import Record

READY_S = 240.0
"""Longest wait for models to be made and engines to have recorded their steps."""


class Half(NamedTuple):
    """What one process is to do."""

    shape: str
    kind: str
    device: str
    number: int
    """Which of the processes it is."""
    processes: int
    rows: int
    """Rows of all processes together."""


def compare(record: Record, shape: str, kind: str, *, rows: int) -> None:
    """Answer the rows by one process, and then by two."""
    walls = {}
    for processes in (1, 2):
        if not record.has_time():
            record.skip(processes=processes)
            continue
        halves = [
            Half(shape, kind, record.device, number, processes, rows) for number in range(processes)
        ]
        found = _run(halves)
        wall_s = max(each["ended"] for each in found) - min(each["began"] for each in found)
        walls[processes] = wall_s
        tokens = sum(each["output_tokens"] for each in found)
        record.add(
            shape=shape,
            kind=kind,
            processes=processes,
            rows=sum(each["rows"] for each in found),
            rows_at_once=[each["rows_at_once"] for each in found],
            wall_s=round(wall_s, 2),
            tokens_per_s=round(tokens / wall_s, 1),
            peak_gib=[each["peak_gib"] for each in found],
        )
    if len(walls) == 2:
        record.add(shape=shape, kind=kind, two_to_one=round(walls[1] / walls[2], 3))


def _run(halves: list[Half]) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    barrier = context.Barrier(len(halves))
    processes = [
        context.Process(target=_work, args=(half, barrier, results), daemon=True) for half in halves
    ]
    for process in processes:
        process.start()
    try:
        return _collect(results, processes)
    finally:
        for process in processes:
            process.join(timeout=30 if process.exitcode is None else 0)
            if process.is_alive():
                process.terminate()


def _collect(results: Any, processes: Sequence[BaseProcess]) -> list[dict[str, Any]]:
    """Return what the processes found; if one ends without, don't wait for the others."""
    found: list[dict[str, Any]] = []
    while len(found) < len(processes):
        try:
            found.append(results.get(timeout=1.0))
        except queue.Empty:
            broken = [process.exitcode for process in processes if process.exitcode]
            if broken:
                for process in processes:
                    process.terminate()
                raise RuntimeError(f"a process ended with {broken[0]}") from None
    return found


def _work(half: Half, barrier: Any, results: Any) -> None:
    """Make the model and the engine, wait for the others, and answer this process's rows."""
    import torch

    from jobs.enginebench import workload
    from jobs.gpubench import contenders, engines, shapes
    from jobs.gpubench.record import GIB
    from quantbatch.weights import peak

    torch.set_num_threads(1)
    built = shapes.build(half.shape, half.kind, half.device)
    engines.free(half.device)
    plan = engines.planned(
        built,
        half.device,
        prompt_tokens=workload.MAX_PROMPT,
        new_tokens=workload.MAX_BUDGET,
        device_bytes=peak.device_bytes(half.device, 1 / half.processes),
    )
    rows = workload.make("mixed", built.tokenizer, half.rows)[half.number :: half.processes]
    asked, measured = contenders.requests(rows), peak.PeakMemory(half.device)
    with engines.engine_of(built, plan) as engine:
        engines.answers(engine, asked)  # records steps of all sizes
        barrier.wait(timeout=READY_S)
        began = time.monotonic()
        engines.answers(engine, asked)
        ended = time.monotonic()
        peak_gib = round(measured.peak_bytes() / GIB, 2)
    results.put(
        {
            "began": began,
            "ended": ended,
            "rows": len(rows),
            "rows_at_once": plan.batch_size,
            "output_tokens": sum(row.budget for row in rows),
            "peak_gib": peak_gib,
        }
    )
