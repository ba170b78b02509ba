"""The gate as an actor of Ray's, and the door by which other processes ask it."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from quantbatch import cluster
from quantbatch.gate import Gate, Lost

if TYPE_CHECKING:
    from quantbatch.leases import Permits
    from quantbatch.suspects import Death


class RemoteGate:
    """A gate beside the driver, which ends with it; see `gate.Gate`.

    Args:
        most_deaths: See there.
        permits: See there.
    """

    def __init__(self, most_deaths: int, permits: Permits | None = None) -> None:
        here = ray.get_runtime_context().get_node_id()
        beside_us = NodeAffinitySchedulingStrategy(here, soft=False)
        made = ray.remote(num_cpus=0, scheduling_strategy=beside_us)(Gate)
        self._gate: Any = made.remote(most_deaths, permits=permits)

    def door(self) -> Door:
        """Return what the processes of a round ask."""
        return Door(self._gate, uuid.uuid4().hex[:8])

    def arrived(self, chunk: int) -> None:
        """See `Gate`; does not wait."""
        self._gate.arrived.remote(chunk)

    def close(self) -> set[int]:
        """See `Gate`."""
        # If it is gone, or its round is over, nothing passes any more.
        under_way: set[int] | None = _answer(self._gate.close.remote())
        return under_way or set()

    def lost(self) -> Lost:
        """See `Gate`."""
        found: Lost = ray.get(self._gate.lost.remote())
        return found


class Door:
    """The door of whatever actor holds it; see `gate.Door`.

    A gate that is gone lets nothing pass: the driver hears of it when it asks what was lost.
    """

    def __init__(self, gate: Any, round: str) -> None:  # noqa: ANN401 - Ray's handles have no type
        self._gate = gate
        self._round = round

    @property
    def name(self) -> str:
        """The round's and the actor's, which stays when the actor starts again."""
        return f"{self._round}-{ray.get_runtime_context().get_actor_id()}"

    def starts(self, last: Death) -> str:
        """See `gate.Door`."""
        reason: str | None = _answer(self._gate.starts.remote(self.name, last))
        return reason or ""

    def ready(self) -> None:
        """See `gate.Door`."""
        _answer(self._gate.ready.remote(self.name))

    def begin(self, chunk: int, *, reading: bool = False) -> bool:
        """See `gate.Door`."""
        may: bool | None = _answer(self._gate.begin.remote(self.name, chunk, reading=reading))
        return bool(may)

    def end(self, chunk: int, *, answered: bool) -> None:
        """See `gate.Door`."""
        _answer(self._gate.end.remote(self.name, chunk, answered=answered))


def _answer(asked: Any) -> Any:  # noqa: ANN401 - Ray's references have no type
    """Wait for what a gate says; None if it is gone."""
    try:
        return ray.get(asked)
    except cluster.DEATHS:
        return None
