"""The contenders of `enginebench`, on any device, and stopped when their time is used up.

A slow one is measured over the rows that it finished. So that these are like all rows, rows are
divided into parts that may be left out: for the pipeline they come as they come, and for sorted
batches the batches are run in random order. The continuous ones get all rows at once.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from jobs.enginebench.contenders import (
    Answer,
    Answered,
    Contender,
    Generate,
    Pipeline,
)
from jobs.enginebench.workload import MAX_BUDGET, MAX_PROMPT, Row, Tokens
from jobs.gpubench import engines
from jobs.gpubench.shapes import Built
from quantbatch.records import Request, RequestId
from quantbatch.spec import Sampling

PIPELINE_PART = 32
SEED = 5


@dataclass(frozen=True)
class Ours(Contender):
    """The continuous engine as a replica makes it.

    Args:
        built: The model.
        device: Where it is.
        rows: Rows at once; None for as many as the plan gives.
    """

    built: Built
    device: str
    rows: int | None

    @property
    @override
    def name(self) -> str:
        return f"quantbatch, {self.rows or 'planned'} rows"

    @override
    @contextlib.contextmanager
    def ready(self) -> Iterator[Answer]:
        plan = engines.planned(
            self.built,
            self.device,
            prompt_tokens=MAX_PROMPT,
            new_tokens=MAX_BUDGET,
            rows=self.rows,
        )
        with engines.engine_of(self.built, plan) as engine:

            def answer(rows: Sequence[Row]) -> Answered:
                before = engine.totals.steps
                found = engines.answers(engine, requests(rows))
                tokens = [found[RequestId(0, number)] for number in range(len(rows))]
                steps = engine.totals.steps - before
                return Answered(tokens, {"rows_at_once": plan.batch_size, "steps": steps})

            yield answer


def requests(rows: Sequence[Row]) -> list[Request]:
    """Return rows as greedy requests of their budgets; the model can't end them before."""
    samplings = {budget: Sampling(max_new_tokens=budget) for budget in {r.budget for r in rows}}
    return [
        Request(RequestId(0, i), row.prompt_ids, samplings[row.budget], seed=0)
        for i, row in enumerate(rows)
    ]


@dataclass
class Run:
    """Answers to rows, by their number, and the time that they took."""

    answers: dict[int, Tokens]
    wall_s: float
    figures: dict[str, Any]

    def described(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the figures of a run over rows, of which it may have finished a part."""
        tokens = sum(rows[number].budget for number in self.answers)
        return {
            "rows_finished": len(self.answers),
            "output_tokens": tokens,
            "wall_s": round(self.wall_s, 2),
            "tokens_per_s": round(tokens / self.wall_s, 1),
            **self.figures,
        }


def run(answer: Answer, contender: Contender, rows: Sequence[Row], budget_s: float) -> Run:
    """Answer rows part by part until all are done, or the time is used up."""
    found = Run({}, 0.0, {})
    for part in parts(contender, rows):
        if found.answers and found.wall_s > budget_s:
            break
        began = time.perf_counter()
        answered = answer([rows[number] for number in part])
        found.wall_s += time.perf_counter() - began
        found.answers |= dict(zip(part, answered.tokens, strict=True))
        found.figures |= answered.figures
    for number, tokens in found.answers.items():
        assert len(tokens) == rows[number].budget, (contender.name, number)
    return found


def parts(contender: Contender, rows: Sequence[Row]) -> list[list[int]]:
    """Divide the numbers of rows into what a contender is given at a time."""
    numbers = list(range(len(rows)))
    match contender:
        case Pipeline():
            return _groups(numbers, PIPELINE_PART)
        case Generate(batch_size=size):
            numbers.sort(key=lambda number: -len(rows[number].prompt_ids))
            batches = _groups(numbers, size)
            random.Random(SEED).shuffle(batches)
            return batches
        case _:
            return [numbers]


def _groups(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]
