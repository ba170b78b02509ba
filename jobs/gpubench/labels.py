"""What reading costs on a card against writing, and a form against free text.

The cases and contenders are those of `labelbench`. Ours has one engine for a case, as a replica of
such a job makes it. What it does once, such as recording steps, it does in a first pass over as
many rows of the same lengths; the better one of the next two counts, and both are told. Every pass
has words of its own: what one leaves in the cache is of no use to the next, but the beginning that
all rows of a pass share is computed once, as in a job.

What others do is measured over as many rows as its kind needs, after a warm-up, and told by rows
per second. A loop with padding is asked for the very rows of our last pass. By 4-bit weights
ours has its own kernel where that is faster, as in a job, and the others have bitsandbytes alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from jobs.enginebench.contenders import attention
from jobs.enginebench.model import Loaded
from jobs.enginebench.workload import Row, Words, mixed
from jobs.gpubench import engines, shapes
from jobs.gpubench.engines import on_card, wait_for
from jobs.gpubench.record import GIB, Record
from jobs.gpubench.speed import FAILURES
from jobs.labelbench import contenders, race, structured, vocabulary
from jobs.labelbench.contenders import ANSWER_TOKENS, Numbers
from jobs.labelbench.race import PROMPTS, SEED
from quantbatch.engine.continuous import ContinuousEngine
from quantbatch.model.memory import plan_memory
from quantbatch.wants import Embed, Rank, Score, Want, Write
from quantbatch.weights import fused, peak

PASSES = 2
PIPELINE_ROWS = 64
PADDED_ROWS = 32
"""Rows of a padded batch."""
FORMS_ROUNDS = 2
LIBRARIES = "llguidance", "jsonschema"
"""What follows a form and what checks answers by it."""

Answer = Callable[[Sequence[Row]], list[Numbers]]


def measure(record: Record, shape: str, kind: str, *, rows: int, only: str = "") -> None:
    """Measure all tasks by one model.

    Args:
        record: Takes the results.
        shape: The model's shape.
        kind: Of its weights.
        rows: How many rows ours is asked for at once, and the padded loops in all.
        only: Tasks, with `|` between them; empty for all.
    """
    with record.timed(f"make {shape} {kind}"):
        built = shapes.build(shape, kind, record.device)
    if on_card(record.device):
        with record.timed("find where our 4-bit kernel is faster"):
            fused.use_where_faster(built.model)
    engines.free(record.device)
    bench = _Bench(record, built, {"shape": shape, "kind": kind}, rows)
    parts: dict[str, Callable[[], None]] = {
        **{task: partial(bench.label, task) for task in PROMPTS},
        "score": partial(bench.read, "score", Score(1), contenders.padded_scores),
        "embed": partial(bench.read, "embed", Embed("mean"), contenders.padded_vectors),
        "structured": bench.forms,  # last: it changes the model
    }
    for task, part in parts.items():
        if only and task not in only.split("|"):
            continue
        if not record.has_time():
            record.skip(case=task)
            continue
        try:
            part()
        except FAILURES as error:
            failed = f"{type(error).__name__}: {str(error)[:300]}"
            record.add(case=task, failed=failed)
        engines.free(record.device)


@dataclasses.dataclass(frozen=True)
class _Bench:
    """The tasks by one model."""

    record: Record
    built: shapes.Built
    common: dict[str, str]
    count: int

    def label(self, task: str) -> None:
        """Label rows, and generate for them."""
        words = Words(self.built.tokenizer)
        labels = race.labels(words, np.random.default_rng(SEED))
        coming = partial(self._prompts, words, task)
        record, rank = self.record, Rank(tuple(labels))
        with self._engine(sum(PROMPTS[task])) as engine:
            writing = self._ours(engine, Write(), [coming(seed) for seed in range(1 + PASSES)])
            self._add(task, f"generate {ANSWER_TOKENS}", writing, of_generating=1.0)
            passes = [coming(PASSES + 1 + seed) for seed in range(1 + PASSES)]
            ranking = self._ours(engine, rank, passes)
        of_writing = ranking["rows_per_s"] / writing["rows_per_s"]
        self._add(task, "classify", ranking, of_generating=round(of_writing, 2))
        if not record.has_time():
            record.skip(case=task, contender="pipeline, batch 8")
            return
        some = coming(2 * PASSES + 2)[:PIPELINE_ROWS]
        loaded = Loaded(self.built.model, self.built.tokenizer)
        pipeline = self._others(partial(contenders.pipeline, loaded), some, warm_up=8)[0]
        self._add(
            task,
            "pipeline, batch 8",
            pipeline,
            of_generating=round(pipeline["rows_per_s"] / writing["rows_per_s"], 3),
            classify_is_faster_by=round(ranking["rows_per_s"] / pipeline["rows_per_s"], 2),
        )

    def read(self, task: str, want: Want, padded: Callable[..., list[Numbers]]) -> None:
        """Score or embed rows of mixed lengths, ours and in a padded loop."""
        words = Words(self.built.tokenizer)
        like = mixed(words, self.count)
        passes = [_renewed(words, like, seed) for seed in range(1 + PASSES)]
        longest = max(len(row.prompt_ids) for row in like)
        numbers: list[Numbers] = []
        with self._engine(longest) as engine:
            ours = self._ours(engine, want, passes, keep=numbers)
        self._add(task, task, ours)
        name = f"padded, batch {PADDED_ROWS}"
        if not self.record.has_time():
            self.record.skip(case=task, contender=name)
            return
        loop = partial(padded, Loaded(self.built.model, self.built.tokenizer), size=PADDED_ROWS)
        theirs, found = self._others(loop, passes[-1], warm_up=2 * PADDED_ROWS)
        same = [[sum(each)] for each in numbers] if isinstance(want, Score) else numbers
        self._add(
            task,
            name,
            theirs,
            ours_is_faster_by=round(ours["rows_per_s"] / theirs["rows_per_s"], 2),
            furthest_off=round(race.furthest(found, same), 5),
        )

    def forms(self) -> None:
        """Answer in a form and freely, by a vocabulary of the model's own size."""
        lacking = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
        if lacking:
            self.record.skip(f"{' and '.join(lacking)} can't be imported", case="structured")
            return
        size = int(self.built.model.config.vocab_size)
        with self.record.timed(f"make a vocabulary of {size:,} words"):
            tokenizer = vocabulary.make(size)
            _speak(self.built.model, tokenizer)
        built = self.built._replace(tokenizer=tokenizer)
        plan = engines.planned(
            built,
            self.record.device,
            prompt_tokens=structured.PROMPT_TOKENS[1],
            new_tokens=structured.NEW_TOKENS,
            rows=structured.BATCH,
        )
        with engines.engine_of(built, plan) as engine:
            found = structured.compare(
                engine, size, rows=self.count // 2, rounds=FORMS_ROUNDS, temperature=0.0
            )
        self.record.add(case="structured", **self.common, rows_at_once=plan.batch_size, **found)

    def _prompts(self, words: Words, task: str, seed: int) -> list[Row]:
        return race.labeled(words, np.random.default_rng([SEED, seed]), task, self.count)

    def _engine(self, prompt_tokens: int) -> Any:
        """Return an engine as a replica with such prompts makes it."""
        device = self.record.device
        # Labels have fewer tokens than are generated.
        work = engines.work_of(device, prompt_tokens=prompt_tokens, new_tokens=ANSWER_TOKENS)
        plan = plan_memory(
            self.built.checkpoint,
            self.built.spec,
            dataclasses.replace(work, reads=True),
            peak.device_bytes(device, 1),
        )
        return engines.engine_of(self.built, plan, share_prefixes=True)

    def _ours(
        self,
        engine: ContinuousEngine,
        want: Want,
        passes: Sequence[Sequence[Row]],
        keep: list[Numbers] | None = None,
    ) -> dict[str, Any]:
        """Answer passes, of which the first does not count.

        Args:
            engine: It was asked for none of these rows before.
            want: What of each.
            passes: Rows.
            keep: Gets the numbers of the last one.
        """
        device = self.record.device
        if on_card(device):
            torch.cuda.reset_peak_memory_stats(device)
        found = contenders.by_engine(engine, passes[0], want)
        walls_s, steps = [], engine.totals.steps
        for rows in passes[1:]:
            wait_for(device)
            began = time.perf_counter()
            found = contenders.by_engine(engine, rows, want)
            wait_for(device)
            walls_s.append(time.perf_counter() - began)
        if keep is not None:
            keep += found
        figures = _figures(passes[-1], walls_s)
        figures["steps_of_a_pass"] = (engine.totals.steps - steps) // len(walls_s)
        figures["rows_at_once"] = engine._limits.rows
        return figures | self._peak()

    def _others(
        self, answer: Answer, rows: Sequence[Row], *, warm_up: int
    ) -> tuple[dict[str, Any], list[Numbers]]:
        """Answer rows once, after some of them; return the figures and the numbers."""
        device = self.record.device
        if on_card(device):
            torch.cuda.reset_peak_memory_stats(device)
        with attention(self.built.model, "sdpa"), _without_our_kernel(self.built.model):
            answer(rows[:warm_up])
            wait_for(device)
            began = time.perf_counter()
            found = answer(rows)
            wait_for(device)
            took_s = time.perf_counter() - began
        return _figures(rows, [took_s]) | self._peak(), found

    def _peak(self) -> dict[str, float]:
        device = self.record.device
        if not on_card(device):
            return {}
        return {"peak_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 2)}

    def _add(self, task: str, contender: str, figures: dict[str, Any], **ratios: float) -> None:
        self.record.add(case=task, contender=contender, **self.common, **figures, **ratios)


def _figures(rows: Sequence[Row], walls_s: Sequence[float]) -> dict[str, Any]:
    tokens = sum(len(row.prompt_ids) for row in rows)
    best = min(walls_s)
    return {
        "rows": len(rows),
        "prompt_tokens": tokens,
        "rows_per_s": round(len(rows) / best, 2),
        "walls_s": [round(each, 3) for each in walls_s],
    }


def _renewed(words: Words, rows: Sequence[Row], seed: int) -> list[Row]:
    """Return rows of the same lengths with other words."""
    lengths = [len(row.prompt_ids) for row in rows]
    prompts = words.prompts(np.random.default_rng([SEED, seed]), lengths)
    return words.rows(prompts, [row.budget for row in rows])


@contextlib.contextmanager
def _without_our_kernel(model: Any) -> Iterator[None]:
    """Have a model multiply as it was loaded."""
    ours = {
        module: module.forward
        for module in model.modules()
        if isinstance(vars(module).get("forward"), fused.FusedForward)
    }
    for module in ours:
        del module.forward  # uncovers that of its class
    try:
        yield
    finally:
        for module, forward in ours.items():
            module.forward = forward


@torch.no_grad()
def _speak(model: Any, tokenizer: Any) -> None:
    """Have a model of `shapes` say all words of another tokenizer, but never end an answer.

    Its head scores only the words of the tokenizer that it was made for.
    """
    head = model.lm_head.weight
    random = torch.Generator(head.device).manual_seed(shapes.SEED)
    head.normal_(0.0, shapes.GAIN / head.shape[1] ** 0.5, generator=random)
    head[tokenizer.all_special_ids] = 0.0
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
