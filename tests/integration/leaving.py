"""Leaves a Ray cluster while one of Ray Data's threads works, and then Python with code 75.

python -m tests.integration.leaving reader | executor
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import ray.data

from quantbatch.cluster import joined
from quantbatch.spec import Cluster

FREEING_S = 1.5
"""For how long a thread frees references: Ray takes less to shut down."""
EXECUTING = "StreamingExecutor"
"""How the names of Ray Data's threads begin that execute datasets."""


def reader() -> None:
    """Close a dataset whose reader then frees references, as it does with those fetched ahead."""
    references = [ray.put(number) for number in range(3000)]
    begun, closed = threading.Event(), threading.Event()

    def free_at_the_second(block: Any) -> Any:
        if block["item"] == [2]:
            begun.set()
            closed.wait(60)
            until = time.monotonic() + FREEING_S
            while references and time.monotonic() < until:
                references.pop()
                time.sleep(0.001)
        return block

    # The one way to have something run in the reader itself.
    two = ray.data.from_items([1, 2], override_num_blocks=2)
    reading = iter(two.iterator()._iter_batches(batch_size=None, _collate_fn=free_at_the_second))
    next(reading)
    assert begun.wait(60)
    reading.close()
    closed.set()


def executor() -> tuple[Any, ...]:
    """Start a dataset that nobody reads, as a signal leaves it that comes at that moment."""
    rows = ray.data.range(2, override_num_blocks=2).map_batches(_slow_after_the_first)
    started: tuple[Any, ...] = rows._execute_to_iterator()
    return started


def _slow_after_the_first(block: Any) -> Any:
    time.sleep(60 * int(block["id"][0]))
    return block


def executing() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(EXECUTING)]


if __name__ == "__main__":
    begin = {"reader": reader, "executor": executor}[sys.argv[1]]
    over: list[str] = []
    shutdown = ray.shutdown

    def watched() -> None:
        # How an executor ends that outlives Ray depends on where it is.
        over.extend(executing())
        shutdown()

    ray.shutdown = watched
    with joined(Cluster()):
        left_behind = begin()
        assert begin is reader or executing()
    sys.exit(f"at the shutdown there were {over}" if over else 75)
