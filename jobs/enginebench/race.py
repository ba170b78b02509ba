"""Contenders in turn over the same rows, in one process: speed, and whether they agree.

The machine is shared and its speed drifts, so no contender runs all of its repetitions at once:
each repetition is one round of all. Time is the process's CPU time, user and system, of all of its
threads, beside the wall's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from jobs.enginebench import model as models
from jobs.enginebench import outside, workload
from jobs.enginebench.contenders import Contender, Generate, Ours, Pipeline
from jobs.enginebench.paged import Paged
from jobs.enginebench.workload import Row, Tokens

WARM_UP_ROWS = 8


class Took(NamedTuple):
    """What answering all rows took."""

    cpu_s: float
    wall_s: float


@dataclass
class Lane:
    """One contender and its runs."""

    contender: Contender
    runs: list[dict[str, float]] = field(default_factory=list)
    answers: list[Tokens] = field(default_factory=list)

    def warm_up(self, rows: Sequence[Row]) -> None:
        """Answer some rows, so that what is done only once is done."""
        with self.contender.ready() as answer:
            answer(rows)

    def run(self, rows: Sequence[Row]) -> None:
        """Answer all rows and note what it took."""
        with self.contender.ready() as answer:
            cpu, wall = time.process_time(), time.perf_counter()
            answered = answer(rows)
            took = Took(time.process_time() - cpu, time.perf_counter() - wall)
        self.answers = answered.tokens
        useful = sum(row.budget for row in rows)
        run = {
            "cpu_s": round(took.cpu_s, 2),
            "wall_s": round(took.wall_s, 2),
            "tokens_per_cpu_s": round(useful / took.cpu_s, 1),
            "tokens_per_wall_s": round(useful / took.wall_s, 1),
            **answered.figures,
        }
        self.runs.append(run)
        print(f"{self.contender.name}: {run}", file=sys.stderr, flush=True)

    def best(self, figure: str) -> float:
        """Return the highest of its runs."""
        return max(run[figure] for run in self.runs)


def race(
    folder: Path, case: str, *, rows: int, repetitions: int, threads: int, only: str = ""
) -> dict[str, Any]:
    """Run a case, such as `mixed-32`: the rows of a workload, by a model of so many bits.

    Args:
        folder: The model's.
        case: The workload and the bits.
        rows: Rows of the workload.
        repetitions: Rounds.
        threads: Threads of the model's operations.
        only: Parts of the names of the contenders that run, with `|` between them; the first one
            always does.
    """
    torch.set_num_threads(threads)
    name, _, bits = case.partition("-")
    loaded = models.load(folder, int(bits))
    work = workload.make(name, loaded.tokenizer, rows)
    first, *others = contenders(name, loaded)
    lanes = [
        Lane(first),
        *(Lane(other) for other in others if any(part in other.name for part in only.split("|"))),
    ]
    compete(lanes, work, repetitions)
    return {
        "case": case,
        "threads": threads,
        "workload": workload.facts(work),
        "contenders": [described(lane, lanes[0]) for lane in lanes],
    }


def race_outside(
    folder: Path, *, rows: int, repetitions: int, threads: int, only: str = ""
) -> dict[str, Any]:
    """Run the mixed rows by ours and by the engines of other packages that are installed.

    Args:
        folder: The model's.
        rows: Rows of the workload.
        repetitions: Rounds.
        threads: Threads of each engine.
        only: Parts of the names of the contenders that run, with `|` between them; the first one
            always does.
    """
    torch.set_num_threads(threads)
    loaded = models.load(folder, 32)
    work = workload.make("mixed", loaded.tokenizer, rows)
    first, *others = [
        Pipeline(loaded),
        Ours(loaded, 64),
        *outside.installed(loaded, folder, threads),
    ]
    lanes = [
        Lane(first),
        *(Lane(other) for other in others if any(part in other.name for part in only.split("|"))),
    ]
    compete(lanes, work, repetitions)
    return {
        "threads": threads,
        "not_installed": outside.not_installed(),
        "workload": workload.facts(work),
        "contenders": [described(lane, lanes[0]) for lane in lanes],
    }


def compete(lanes: Sequence[Lane], rows: Sequence[Row], repetitions: int) -> None:
    """Run rounds of all contenders, after one that does not count."""
    for lane in lanes:
        lane.warm_up(rows[:WARM_UP_ROWS])
    for _ in range(repetitions):
        for lane in lanes:
            lane.run(rows)


def described(lane: Lane, first: Lane) -> dict[str, Any]:
    """Return the figures of a contender, beside those of the first one."""
    ratios = {
        f"{figure}_to_first": round(lane.best(figure) / first.best(figure), 2)
        for figure in ("tokens_per_cpu_s", "tokens_per_wall_s")
    }
    pairs = zip(lane.runs, first.runs, strict=True)
    return {
        "name": lane.contender.name,
        "best_tokens_per_cpu_s": lane.best("tokens_per_cpu_s"),
        "best_tokens_per_wall_s": lane.best("tokens_per_wall_s"),
        **ratios,
        "cpu_to_first_by_round": [
            round(a["tokens_per_cpu_s"] / b["tokens_per_cpu_s"], 2) for a, b in pairs
        ],
        "equal_rows": sum(a == b for a, b in zip(lane.answers, first.answers, strict=True)),
        "runs": lane.runs,
    }


def contenders(name: str, loaded: models.Loaded) -> list[Contender]:
    """Return who competes on a workload; the first is what the others are compared with."""
    first = Pipeline(loaded)
    match name:
        case "mixed":
            return [
                first,
                Generate(loaded, 8),
                Generate(loaded, 32),
                Paged(loaded, 32, flash=False),
                Paged(loaded, 64, flash=False),
                Paged(loaded, 32, flash=True),
                Paged(loaded, 64, flash=True),
                Ours(loaded, 32),
                Ours(loaded, 64),
            ]
        case "prefix":
            return [
                first,
                Generate(loaded, 32),
                Paged(loaded, 64, flash=True, note=", nothing shared"),
                Paged(loaded, 64, flash=True, share=True, note=", prefix shared"),
                Ours(loaded, 64, share_prefixes=False, note=", nothing shared"),
                Ours(loaded, 64, note=", prefix shared"),
            ]
        case "duplicates":
            return [
                first,
                Ours(loaded, 32, share_prefixes=False, note=", each row answered"),
                Ours(loaded, 32, deduplicate=True, note=", equal rows answered once"),
                Ours(loaded, 64, share_prefixes=False, note=", each row answered"),
                Ours(loaded, 64, deduplicate=True, note=", equal rows answered once"),
            ]
        case _:
            raise ValueError(f"no workload is called {name}")
