"""All contenders in turn over the same rows, in one process, and whether they agree."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.enginebench import model as models
from jobs.enginebench.model import Loaded
from jobs.enginebench.workload import Row, Tokens, Words, mixed
from jobs.labelbench.contenders import (
    Contender,
    Numbers,
    classifying,
    embedding,
    ready,
    scoring,
)

SEED = 20_260_102
PROMPTS = {"classify": (0, 200), "short": (0, 20), "shared": (192, 20)}
"""Tokens of a beginning that all rows share, and of a row's own prompt, of the cases that label. Of
192 all are whole blocks, which are computed once."""
LABEL_TOKENS = (1, 1, 2, 2, 3, 3, 4, 4)
"""Tokens of each label."""
WARM_UP_ROWS = 8


def race(folder: Path, case: str, *, rows: int, repetitions: int, threads: int) -> dict[str, Any]:
    """Run a case, such as `classify-32`: a task, by a model of so many bits.

    Args:
        folder: The model's.
        case: The task and the bits.
        rows: Rows of the workload.
        repetitions: Rounds; the best of each contender counts.
        threads: Threads of the model's operations.
    """
    torch.set_num_threads(threads)
    task, _, bits = case.partition("-")
    loaded = models.load(folder, int(bits))
    work, contenders = _workload(task, loaded, rows)
    for contender in contenders:
        with ready(loaded, contender):
            contender.answer(work[:WARM_UP_ROWS])
    runs: dict[str, list[dict[str, float]]] = {each.name: [] for each in contenders}
    answers: dict[str, list[Numbers]] = {}
    for _ in range(repetitions):
        for contender in contenders:
            with ready(loaded, contender):
                cpu, wall = time.process_time(), time.perf_counter()
                answers[contender.name] = contender.answer(work)
                took = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
            runs[contender.name].append({name: round(s, 2) for name, s in took.items()})
            print(f"{case}, {contender.name}: {took}", file=sys.stderr, flush=True)
    return _described(case, work, contenders, runs, answers)


def _workload(task: str, loaded: Loaded, count: int) -> tuple[list[Row], list[Contender]]:
    words = Words(loaded.tokenizer)
    random = np.random.default_rng(SEED)
    match task:
        case "classify" | "short" | "shared":
            rows = labeled(words, random, task, count)
            return rows, classifying(loaded, labels(words, random))
        case "score":
            return mixed(words, count), scoring(loaded)
        case "embed":
            return mixed(words, count), embedding(loaded)
        case _:
            raise ValueError(f"no task is called {task}")


def labeled(words: Words, random: np.random.Generator, task: str, count: int) -> list[Row]:
    """Return the rows of one of `PROMPTS`."""
    shared, own = PROMPTS[task]
    [beginning] = words.prompts(random, [shared])
    prompts = [beginning + each for each in words.prompts(random, [own] * count)]
    return words.rows(prompts, [1] * count)


def labels(words: Words, random: np.random.Generator) -> list[Tokens]:
    """Return the labels of `LABEL_TOKENS`."""
    return [tuple(each) for each in words.prompts(random, LABEL_TOKENS)]


def _described(
    case: str,
    work: Sequence[Row],
    contenders: Sequence[Contender],
    runs: dict[str, list[dict[str, float]]],
    answers: dict[str, list[Numbers]],
) -> dict[str, Any]:
    first = contenders[0].name
    best = {name: min(run["cpu_s"] for run in taken) for name, taken in runs.items()}
    return {
        "case": case,
        "rows": len(work),
        "prompt_tokens": sum(len(row.prompt_ids) for row in work),
        "contenders": [
            {
                "name": each.name,
                "rows_per_cpu_s": round(len(work) / best[each.name], 2),
                "first_is_faster_by": round(best[each.name] / best[first], 2),
                "furthest_off": furthest(answers[first], answers[each.name])
                if each.compared
                else None,
                "runs": runs[each.name],
            }
            for each in contenders
        ],
    }


def furthest(some: Sequence[Numbers], others: Sequence[Numbers]) -> float:
    """Return how far two contenders' numbers are apart, of their size."""
    pairs = [(np.array(a), np.array(b)) for a, b in zip(some, others, strict=True)]
    return float(max((np.abs(a - b) / np.maximum(1, np.abs(a))).max() for a, b in pairs))
