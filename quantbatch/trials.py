"""Tries chunks alone, in Ray actors of their own: the experiments of `suspects`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import ray
import ray.exceptions

from quantbatch import cluster, stages
from quantbatch.errors import Stopped
from quantbatch.gate import NoDoor
from quantbatch.replica import Replica
from quantbatch.suspects import Death

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantbatch.preflight import Job
    from quantbatch.records import Chunk, Receipt


class Trials:
    """A reader and a replica, and new ones after each death; they end with the `with` block.

    Args:
        job: The job.
        device: What replicas work on.
    """

    def __init__(self, job: Job, device: str) -> None:
        self._job = job
        name = f"trial-{uuid.uuid4().hex[:8]}"
        reader = functools.partial(stages.Reader, job.read_job, NoDoor(f"{name}-reader"))
        replica = functools.partial(Replica, job.replica_job(device), NoDoor(name))
        attempts = job.spec.limits.attempts
        self._reader = _Process(reader, {"num_cpus": cluster.READER_CPUS}, attempts)
        self._replica = _Process(replica, cluster.replica_needs(job.spec, device), attempts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.end()
        self._replica.end()

    def attempt(self, chunk: Chunk) -> Receipt | Death:
        """Read, answer and, if its trial says so, commit a chunk.

        Returns:
            Its receipt; or how the process ended that died of it.

        Raises:
            Stopped: A process died several times before it was ready.
        """
        _, items = stages.to_items([chunk])
        read = self._reader.call(stages.item_table(items[0]))
        if isinstance(read, Death):
            return replace(read, unread=True)
        answered = self._replica.call(read)
        if isinstance(answered, Death):
            return answered
        block = stages.commit(answered, store=self._job.ledger.store, target=self._job.target)
        return stages.receipts(block)[0]


class _Process:
    """An actor that is started when it is needed, and again when it died."""

    def __init__(self, make: Callable[[], Any], needs: dict[str, Any], attempts: int) -> None:
        self._make = make
        self._needs = needs
        self._attempts = attempts
        self._actor: Any = None

    def call(self, block: Any) -> Any:  # noqa: ANN401 - an Arrow table, or a Death
        """Hand a block to the process; return what it makes of it, or how it died."""
        if self._actor is None:
            self._start()
        try:
            return ray.get(self._actor.call.remote(block))
        except cluster.DEATHS:
            self.end()
            # The next one tells how this one ended.
            return self._start()

    def _start(self) -> Death:
        reason = ""
        for _ in range(self._attempts):
            self._actor = ray.remote(**self._needs)(_Worker).remote(self._make)
            try:
                before: Death = ray.get(self._actor.before.remote())
            except cluster.DEATHS as error:
                self.end()
                reason = cluster.first_line(error)
            else:
                return before
        raise Stopped(
            f"a process died {self._attempts} times before it was ready: {reason}",
            "the same command continues the job",
        )

    def end(self) -> None:
        """End the process, if there is one."""
        if self._actor is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self._actor)
        self._actor = None


class _Worker:
    """What runs in the actor: a reader or a replica."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._stage = make()

    def before(self) -> Death:
        """Return how the process of this name before this one ended."""
        found: Death = self._stage.before
        return found

    async def call(self, block: Any) -> Any:  # noqa: ANN401 - an Arrow table
        """Do what the stage does with a block."""
        made = self._stage(block)
        return await made if inspect.isawaitable(made) else made
