"""Ways to answer rows: ours, and what a user of transformers would write instead.

Every answer has exactly its row's budget of tokens, and only those count. `generate` and the
pipeline run a batch until its longest budget is reached: a stopping rule ends each row at its own
budget and the batch with its last row, so that none generates to the common maximum. (In
`generate` a row that has ended still takes its place in the batch; that is what they cost.) Rows
of ours carry their budget as max_new_tokens and min_new_tokens.

What is counted is generous to the others: the pipeline turns texts into tokens as it does for
everybody, but like `generate` it is spared turning answers into texts, which ours does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from transformers import StoppingCriteria
from typing_extensions import override

from jobs.enginebench.model import Loaded
from jobs.enginebench.workload import LONGEST_ROW, MAX_BUDGET, Row, Tokens
from quantbatch.engine import Engine
from quantbatch.engine.continuous import ContinuousEngine, EngineLimits
from quantbatch.engine.dedup import Deduplicated
from quantbatch.records import Completion, Request, RequestId
from quantbatch.spec import Sampling

hf: Any = transformers

STEP_TOKENS = 512
"""Most tokens of one step, for ours and for transformers' continuous batching."""


class Answered(NamedTuple):
    """The answers to rows, in their order, and what the contender tells of its work."""

    tokens: list[Tokens]
    figures: Mapping[str, float]


Answer = Callable[[Sequence[Row]], Answered]


class Contender(Protocol):
    """A way to answer rows."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def ready(self) -> AbstractContextManager[Answer]:
        """Get ready, with nothing kept from earlier rows; what the function takes is measured."""
        ...


@contextlib.contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Have a model attend by the function of this name; each contender says which it wants."""
    # Not by set_attn_implementation: for a name with "flash" in it, that looks for a package of
    # kernels and then on the hub (5.23).
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = "sdpa"


class OwnBudgets(StoppingCriteria):
    """Ends each row at its own budget.

    Args:
        batches: The budgets of the rows of each batch, in the order in which they will be run.
    """

    def __init__(self, batches: Iterator[Sequence[int]]) -> None:
        self._batches = batches
        self._budgets: torch.Tensor | None = None
        self._prompt_tokens = 0

    @override
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self._budgets is None:
            self._budgets = torch.tensor(next(self._batches), device=input_ids.device)
            self._prompt_tokens = input_ids.shape[1] - 1
        done = input_ids.shape[1] - self._prompt_tokens >= self._budgets
        if done.all():
            self._budgets = None  # the next call is about the next batch
        return done


def batches(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Divide rows into batches, in their order."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def budgets(groups: Sequence[Sequence[Row]]) -> OwnBudgets:
    """Return the rule that ends the rows of batches."""
    return OwnBudgets(iter([[row.budget for row in group] for group in groups]))


@dataclass(frozen=True)
class Pipeline:
    """What the first page of the manual says: rows as they come, eight at a time."""

    loaded: Loaded
    batch_size: int = 8
    name: str = "pipeline, batch 8"

    @contextlib.contextmanager
    def ready(self) -> Iterator[Answer]:
        """See `Contender`."""
        model, tokenizer = self.loaded
        with attention(model, "sdpa"):
            pipe = hf.pipeline("text-generation", model=model, tokenizer=tokenizer)
            yield lambda rows: self._answer(pipe, rows)

    def _answer(self, pipe: Any, rows: Sequence[Row]) -> Answered:
        groups = batches(rows, self.batch_size)
        found = pipe(
            [row.text for row in rows],
            batch_size=self.batch_size,
            return_tensors=True,
            generation_config=hf.GenerationConfig(max_new_tokens=MAX_BUDGET, do_sample=False),
            stopping_criteria=[budgets(groups)],
        )
        padded = [max(len(row.prompt_ids) for row in group) for group in groups for _ in group]
        return Answered(
            [
                tuple(answer["generated_token_ids"][begin : begin + row.budget])
                for [answer], begin, row in zip(found, padded, rows, strict=True)
            ],
            {},
        )


@dataclass(frozen=True)
class Generate:
    """What somebody writes who read on: batches of rows of similar length, longest first."""

    loaded: Loaded
    batch_size: int

    @property
    def name(self) -> str:
        """See `Contender`."""
        return f"generate, sorted, batch {self.batch_size}"

    @contextlib.contextmanager
    def ready(self) -> Iterator[Answer]:
        """See `Contender`."""
        with attention(self.loaded.model, "sdpa"):
            yield self._answer

    def _answer(self, rows: Sequence[Row]) -> Answered:
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt_ids))
        groups = batches([rows[i] for i in order], self.batch_size)
        rule = budgets(groups)
        answers = [answer for group in groups for answer in self._batch(group, rule)]
        by_row = dict(zip(order, answers, strict=True))
        return Answered([by_row[i] for i in range(len(rows))], {})

    def _batch(self, group: Sequence[Row], rule: OwnBudgets) -> list[Tokens]:
        model, tokenizer = self.loaded
        prompts = [list(row.prompt_ids) for row in group]
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
        found = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=hf.GenerationConfig(max_new_tokens=MAX_BUDGET, do_sample=False),
            stopping_criteria=[rule],
        )
        begin = inputs["input_ids"].shape[1]
        return [
            tuple(ids[begin : begin + row.budget])
            for ids, row in zip(found.tolist(), group, strict=True)
        ]


@dataclass(frozen=True)
class Ours:
    """The continuous engine.

    Args:
        share_prefixes: Whether beginnings that rows have in common are computed once.
        deduplicate: Whether equal requests are answered once.
    """

    loaded: Loaded
    rows: int
    share_prefixes: bool = True
    deduplicate: bool = False
    note: str = field(default="", kw_only=True)

    @property
    def name(self) -> str:
        """See `Contender`."""
        return f"quantbatch, {self.rows} rows{self.note}"

    @contextlib.contextmanager
    def ready(self) -> Iterator[Answer]:
        """See `Contender`."""
        with attention(self.loaded.model, "sdpa"):
            engine = new_engine(self)
            yield lambda rows: Answered(drain(engine, rows), figures(engine))


def new_engine(way: Ours) -> ContinuousEngine | Deduplicated:
    """Return a fresh engine."""
    limits = EngineLimits(
        rows=way.rows,
        kv_tokens=kv_tokens(way.rows),
        step_tokens=STEP_TOKENS,
        share_prefixes=way.share_prefixes,
    )
    engine = ContinuousEngine(way.loaded.model, way.loaded.tokenizer, limits)
    return Deduplicated(engine) if way.deduplicate else engine


def drain(engine: Engine, rows: Sequence[Row]) -> list[Tokens]:
    """Answer all rows; every one must come back whole."""
    engine.add(requests(rows))
    answers: dict[RequestId, Tokens] = {}
    while engine.has_work():
        for answer in engine.step():
            assert isinstance(answer, Completion), answer
            answers[answer.id] = answer.token_ids
    return [answers[RequestId(0, i)] for i in range(len(rows))]


def requests(rows: Sequence[Row]) -> list[Request]:
    """Return rows as an engine takes them."""
    samplings = {
        budget: Sampling(max_new_tokens=budget, min_new_tokens=budget)
        for budget in {row.budget for row in rows}
    }
    return [
        Request(RequestId(0, i), row.prompt_ids, samplings[row.budget], seed=0)
        for i, row in enumerate(rows)
    ]


def figures(engine: Engine) -> dict[str, float]:
    """Return what a continuous engine counted."""
    copied = {}
    if isinstance(engine, Deduplicated):
        copied, engine = {"copied_answers": engine.copied}, engine.engine
    assert isinstance(engine, ContinuousEngine)
    totals = engine.totals
    return {
        "steps": totals.steps,
        "mean_rows": round(totals.rows / max(1, totals.steps), 1),
        "useful_share": round(totals.useful_share, 4),
        "outside_forward": round(1 - totals.forward_s / (totals.step_s or 1), 4),
        "prefill_tokens": totals.prefill_tokens,
        "reused_tokens": totals.reused_tokens,
        "preemptions": totals.preemptions,
        **copied,
    }


def kv_tokens(rows: int) -> int:
    """Return room for as many of the longest rows: nobody is to wait for memory here."""
    return rows * LONGEST_ROW
