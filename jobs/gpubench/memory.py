"""Planned memory against measured, and a model of 32 billion parameters within a smaller card.

What is measured is what torch took of the card at most, while the engine of a plan answers rows of
the greatest length that the plan allows, more of them than run at once. The CUDA context is beside
it: what the card has in use less what torch has reserved.
"""

from __future__ import annotations

from typing import Any

import torch

from jobs.gpubench import engines, shapes
from jobs.gpubench.engines import on_card
from jobs.gpubench.record import GIB, Record
from quantbatch.model.memory import CUDA_CONTEXT_BYTES, MemoryPlan
from quantbatch.weights import peak

PROMPT_TOKENS, NEW_TOKENS = 960, 64
MORE = 5 / 4
"""Rows that are answered for each that runs at once, so that some enter a batch that is full."""


def measure(
    record: Record, shape: str, kinds: list[str], batch_sizes: list[int], *, prompt_tokens: int
) -> None:
    """Compare plan and peak for each kind of weights and each number of rows."""
    device = record.device

    def use(kind: str, built: shapes.Built) -> None:
        for rows in batch_sizes:
            if not record.has_time():
                record.skip(kind=kind, rows=rows)
                continue
            plan = engines.planned(
                built, device, prompt_tokens=prompt_tokens, new_tokens=NEW_TOKENS, rows=rows
            )
            figures = _run(built, plan, device, prompt_tokens)
            record.add(shape=shape, kind=kind, rows=rows, **figures)

    engines.with_each(record, shape, kinds, use)


def within(record: Record, shape: str, kind: str, card_gib: float, *, prompt_tokens: int) -> None:
    """Run a shape within the memory of a smaller card, with the rows that its plan promises."""
    device, card_bytes = record.device, int(card_gib * GIB)
    if on_card(device):
        context_bytes = max(context(device), CUDA_CONTEXT_BYTES)
        total_bytes = torch.cuda.mem_get_info(device)[1]
        share = (card_bytes - context_bytes) / total_bytes
        torch.cuda.set_per_process_memory_fraction(share, torch.cuda.current_device())
        record.add(note="capped", card_gib=card_gib, torch_may_take_gib=gib(share * total_bytes))
    with record.timed(f"make {shape} {kind}"):
        built = shapes.build(shape, kind, device)
    engines.free(device)
    plan = engines.planned(
        built,
        device,
        prompt_tokens=prompt_tokens,
        new_tokens=NEW_TOKENS,
        device_bytes=card_bytes if on_card(device) else None,
    )
    figures = _run(built, plan, device, prompt_tokens)
    record.add(shape=shape, kind=kind, card_gib=card_gib, rows=plan.batch_size, **figures)


def context(device: str) -> int:
    """Return what this process has of the card beside torch's tensors, if it has it alone."""
    torch.zeros(1, device=device) @ torch.zeros(1, device=device)
    engines.wait_for(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return total_bytes - free_bytes - torch.cuda.memory_reserved(device)


def _run(built: shapes.Built, plan: MemoryPlan, device: str, prompt_tokens: int) -> dict[str, Any]:
    """Answer rows of the greatest length by the engine of a plan, and compare."""
    measured = peak.PeakMemory(device)
    asked = engines.requests(
        int(plan.batch_size * MORE), prompt_tokens=prompt_tokens, new_tokens=NEW_TOKENS
    )
    with engines.engine_of(built, plan) as engine:
        engines.answers(engine, asked)
        totals, peak_bytes = engine.totals, measured.peak_bytes()
        besides = {"context_gib": gib(context(device))} if on_card(device) else {}
    planned_bytes = plan.total - plan.overhead_bytes
    return {
        "planned_gib": gib(planned_bytes),
        "measured_gib": gib(peak_bytes),
        "planned_to_measured": round(planned_bytes / peak_bytes, 3) if peak_bytes else None,
        "enough_and_within_10_percent": peak_bytes <= planned_bytes <= 1.1 * peak_bytes,
        **besides,
        "planned_context_gib": gib(plan.overhead_bytes),
        "weights_gib": gib(plan.weight_bytes),
        "kv_gib": gib(plan.kv_bytes),
        "workspace_gib": gib(plan.workspace_bytes),
        "reserve_gib": gib(plan.reserve_bytes),
        "kv_tokens": plan.kv_tokens,
        "answered": len(asked),
        "mean_rows": round(totals.rows / totals.steps, 1),
        "preemptions": totals.preemptions,
        "out_of_memory": totals.out_of_memory,
    }


def gib(count: float) -> float:
    """Return bytes as GiB, to a megabyte."""
    return round(count / GIB, 3)
