"""Output tokens per second over rows of mixed lengths: what else there is, and ours.

The rows and their budgets are those of `enginebench`: prompts of 20 to 400 tokens, answers of 1 to
128. Ours goes first, and the others' answers are compared with its: in 16 bits few need be equal,
since near-ties are turned around by the shape of a batch.

What the continuous ones do once, such as recording graphs, they do in a first pass over all rows;
the second is the better one, and both are told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from jobs.enginebench import workload
from jobs.enginebench.contenders import Contender, Generate, Pipeline
from jobs.enginebench.model import Loaded
from jobs.enginebench.workload import Row
from jobs.gpubench import contenders, engines, shapes
from jobs.gpubench.contenders import Ours, Run
from jobs.gpubench.engines import on_card
from jobs.gpubench.paged import PagedOnCard
from jobs.gpubench.record import GIB, Record
from quantbatch.weights.fused import use_where_faster

FUSED = "fused"
"""All contenders multiply by our 4-bit kernel, where it is faster."""
WARM_UP_ROWS = 8
PASSES = 2
FAILURES = (RuntimeError, ValueError, AssertionError, MemoryError, TimeoutError, OSError)
"""What a contender may end with; the others go on. torch's own errors are among them."""


def race(
    record: Record, shape: str, kind: str, *, rows: int, contender_budget_s: float, only: str = ""
) -> None:
    """Answer the same rows by each contender.

    Args:
        record: Takes the results.
        shape: The model's shape.
        kind: Of its weights.
        rows: How many rows.
        contender_budget_s: Seconds after which a contender gets no further batch.
        only: Parts of the names of those that run, with `|` between them; ours always does.
    """
    with record.timed(f"make {shape} {kind}"):
        built = shapes.build(shape, kind, record.device)
    if record.options.get("kernel") == FUSED:
        use_where_faster(built.model)
    engines.free(record.device)
    work = workload.make("mixed", built.tokenizer, rows)
    record.add(shape=shape, kind=kind, workload=workload.facts(work))
    first: Run | None = None
    coming = deque(_contenders(built, record.device, kind, contender_budget_s))
    while coming:
        contender = coming.popleft()
        if first is not None and not any(part in contender.name for part in only.split("|")):
            continue
        common = {"shape": shape, "kind": kind, "contender": contender.name}
        if not record.has_time():
            record.skip(**common)
            continue
        try:
            best, figures = _measure(contender, work, contender_budget_s, record.device)
        except FAILURES as error:
            record.add(**common, failed=f"{type(error).__name__}: {str(error)[:300]}")
            engines.free(record.device)
            coming.extendleft(_instead_of(contender))
            continue
        first = first or best
        record.add(**common, **figures, equal_rows=_equal(best, first))


def _instead_of(failed: Contender) -> list[Contender]:
    """Return what is tried in place of one that failed: the same without recording its steps."""
    if isinstance(failed, PagedOnCard) and failed.flash and failed.graphs is None:
        return [replace(failed, graphs=False, note=", unrecorded")]
    return []


def _contenders(built: shapes.Built, device: str, kind: str, budget_s: float) -> list[Contender]:
    loaded = Loaded(built.model, built.tokenizer)
    # LLM.int8 looks at its activations from Python, which can't be recorded.
    graphs = False if kind == "int8" else None

    def paged(rows: int, *, flash: bool) -> PagedOnCard:
        return PagedOnCard(loaded, rows, flash=flash, graphs=graphs, patience_s=2 * budget_s)

    return [
        Ours(built, device, 128),
        Ours(built, device, None),
        Generate(loaded, 64),
        Generate(loaded, 32),
        Pipeline(loaded),
        paged(128, flash=False),
        paged(128, flash=True),
        paged(256, flash=True),
    ]


def _measure(
    contender: Contender, work: Sequence[Row], budget_s: float, device: str
) -> tuple[Run, dict[str, Any]]:
    """Return the best run of a contender, and what to tell of it."""
    continuous = isinstance(contender, Ours | PagedOnCard)
    if on_card(device):
        torch.cuda.reset_peak_memory_stats(device)
    runs = []
    with contender.ready() as answer:
        answer(work[:WARM_UP_ROWS])
        for _ in range(PASSES if continuous else 1):
            runs.append(contenders.run(answer, contender, work, budget_s))
    best = min(runs, key=lambda each: each.wall_s / max(1, len(each.answers)))
    figures = best.described(work)
    if continuous:
        figures["walls_s"] = [round(each.wall_s, 2) for each in runs]
    if isinstance(contender, PagedOnCard):
        figures |= contender.facts()
    if on_card(device):
        figures["peak_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB, 2)
    engines.free(device)
    return best, figures


def _equal(run: Run, first: Run) -> int:
    return sum(first.answers.get(number) == tokens for number, tokens in run.answers.items())
