"""Readers wait for replicas: a bound on the chunks that are rendered and not yet taken.

Ray lets a stage run ahead of the next one until half of the object store's budget is used (2.60),
however long that queue then is: a slow model had one rendered chunk more in the queue for every two
answered (measured), and chunks under 100 kB lie in the driver's own memory. So this counts chunks.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray.data import DataContext
    from ray.data._internal.execution.interfaces import PhysicalOperator

_MOST_AHEAD = "quantbatch.most_ahead"


class FewAhead(BackpressurePolicy):  # type: ignore[misc]
    """Holds a stage back while enough chunks wait for the next one."""

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """See `BackpressurePolicy`."""
        return self._room_after(op)

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        """See `BackpressurePolicy`."""
        return None if self._room_after(op) else 0

    def _room_after(self, op: PhysicalOperator) -> bool:
        most: int = self._data_context.get_config(_MOST_AHEAD)
        stages = [self._topology[next] for next in op.output_dependencies]
        return all(stage.total_enqueued_input_blocks() < most for stage in stages)


@contextlib.contextmanager
def bounded(context: DataContext, most_ahead: int) -> Iterator[None]:
    """Bound the chunks that may wait before a stage, in datasets made meanwhile."""
    policies = [*ENABLED_BACKPRESSURE_POLICIES, FewAhead]
    context.set_config(_MOST_AHEAD, most_ahead)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
    try:
        yield
    finally:
        context.remove_config(_MOST_AHEAD)
        context.remove_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY)
