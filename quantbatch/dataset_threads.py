"""Ends Ray Data's threads before Ray itself ends.

While `ray.shutdown()` takes the core worker down, the freeing of one reference in any other thread
ends the process at once and without a word, with code 1 (`CoreWorkerProcess::GetCoreWorker`, Ray
2.60). A dataset that is left before its end leaves two kinds of threads behind. The one by which it
is read hears of it up to 0.1 s later, and frees the references that it had fetched ahead as it
ends: about one stop in 30 ended with code 1 of it. The one that executes it goes on where a signal
came between its start and the first block.
"""

from __future__ import annotations

import logging
import threading
import time

from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

READER = "iter_threaded"
"""How Ray Data names the thread by which a dataset is read."""
LONGEST_S = 5.0
"""Longest wait in seconds for all of them, beside up to 2 for each execution that is stopped; they
take 0.1 s. An execution whose thread a signal caught before its first line is not stopped, and
outlives that."""


def end() -> None:
    """Stop the execution of datasets, and wait for their threads."""
    threads = threading.enumerate()
    executors = [thread for thread in threads if isinstance(thread, StreamingExecutor)]
    for executor in executors:
        try:
            executor.shutdown(force=False)  # does nothing if it was called before
        except RayError as error:
            # What ends the run is already on its way, and is not to be told otherwise.
            logger.debug("the execution of a dataset was not stopped: %s", error)
    deadline = time.monotonic() + LONGEST_S
    for thread in (*executors, *(thread for thread in threads if thread.name == READER)):
        thread.join(max(0.0, deadline - time.monotonic()))
