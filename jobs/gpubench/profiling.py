"""Which kernels the time goes to, in decode steps and in steps full of prompts."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from jobs.gpubench import engines, floor, shapes
from jobs.gpubench.engines import on_card, wait_for
from jobs.gpubench.record import Record
from quantbatch.engine.continuous import ContinuousEngine

STEPS = 8
TOP = 15
PROMPT_TOKENS = 1024


def measure(record: Record, shape: str, kinds: list[str], *, rows: int) -> None:
    """Profile some decode steps, recorded and not, and some prefill steps of each kind."""
    device = record.device

    def use(kind: str, built: shapes.Built) -> None:
        common = {"shape": shape, "kind": kind, "rows": rows}
        for recorded in (True, False) if on_card(device) else (False,):
            with floor.decoding(built, device, rows, STEPS, record_steps=recorded) as engine:
                found = _profiled(engine, device)
            _tell(record, {**common, "phase": "decode", "recorded": recorded}, found)
        _tell(record, {**common, "phase": "prefill"}, _prefill(built, device, rows))

    engines.with_each(record, shape, kinds, use)


def _prefill(built: shapes.Built, device: str, rows: int) -> list[dict[str, Any]]:
    plan = engines.planned(built, device, prompt_tokens=PROMPT_TOKENS, new_tokens=1, rows=rows)
    steps = STEPS + 4
    asked = steps * (plan.step_tokens or 0) // PROMPT_TOKENS + 1
    with engines.engine_of(built, plan) as engine:
        engine.add(engines.requests(asked, prompt_tokens=PROMPT_TOKENS, new_tokens=1))
        for _ in range(2):
            engine.step()
        return _profiled(engine, device)


def _profiled(engine: ContinuousEngine, device: str) -> list[dict[str, Any]]:
    """Run some steps and return the kernels that took most, each with its share."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_card(device)
    wait_for(device)
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            engine.step()
        wait_for(device)
    times = [
        (each.key, _microseconds(each, device), each.count) for each in profiler.key_averages()
    ]
    times = sorted((each for each in times if each[1] > 0), key=lambda each: -each[1])
    whole = sum(each[1] for each in times)
    return [
        {
            "kernel": key[:110],
            "share": round(took / whole, 4),
            "ms_per_step": round(took / 1000 / STEPS, 4),
            "calls_per_step": round(count / STEPS, 1),
        }
        for key, took, count in times[:TOP]
    ]


def _microseconds(event: Any, device: str) -> float:
    """Return an event's own time: of a kernel on the card, else of an operation."""
    if not on_card(device):
        return float(event.self_cpu_time_total)
    if event.device_type.name != "CUDA":
        return 0.0  # the operation that launched it, to which its time is counted as well
    return float(event.self_device_time_total)


def _tell(record: Record, common: dict[str, Any], found: list[dict[str, Any]]) -> None:
    record.add(**common, kernels=found)
    table = Table("share", "ms/step", "calls", "kernel", title=str(common))
    for each in found:
        share, took, calls = f"{each['share']:.1%}", each["ms_per_step"], each["calls_per_step"]
        table.add_row(share, str(took), str(calls), each["kernel"])
    Console(file=sys.stderr, width=150).print(table)
