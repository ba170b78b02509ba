"""How a job's model meets a card: which card that is, and whether the model fits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from quantbatch.model import cards, memory, thiscard

if TYPE_CHECKING:
    from quantbatch.model.cards import Card
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.memory import MemoryPlan
    from quantbatch.spec import Cluster, JobSpec


def card_of(spec: JobSpec) -> Card | None:
    """Return the card that a replica would get, as far as that is known without Ray: the one that
    the spec names, else the smallest of this machine if the job would run on it.
    """
    cluster = spec.cluster
    if cluster.gpus_per_replica == 0 or spec.engine.kind == "echo":
        return None
    if cluster.card is not None:
        return cards.find(cluster.card)
    if cluster.gpu_memory_gib is not None:
        return cards.of_memory(cluster.gpu_memory_gib)
    if cluster.address or os.environ.get("RAY_ADDRESS"):
        return None
    return min(thiscard.local_cards(), key=lambda card: card.memory_gib, default=None)


def share_bytes(cluster: Cluster, card: Card) -> int:
    """Return what a replica has of a card's memory."""
    return int(card.memory_bytes * min(cluster.gpus_per_replica, 1))


def work_of(spec: JobSpec, checkpoint: Checkpoint, max_input_tokens: int) -> memory.Work:
    """Return the work of one of a job's replicas."""
    device = "cuda" if spec.cluster.gpus_per_replica > 0 else "cpu"
    return memory.Work.of(spec, checkpoint, max_input_tokens=max_input_tokens, device=device)


def fit(
    spec: JobSpec, checkpoint: Checkpoint, max_input_tokens: int, card: Card | None
) -> MemoryPlan | None:
    """Plan a replica's memory; None for an engine without a model.

    Raises:
        DoesNotFit: It needs more than the card has.
    """
    if spec.engine.kind == "echo":
        return None
    device_bytes = share_bytes(spec.cluster, card) if card else None
    work = work_of(spec, checkpoint, max_input_tokens)
    return memory.plan_memory(checkpoint, spec.model, work, device_bytes)
