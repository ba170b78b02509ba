"""A replica whose engine does what the row says: for tests of rows that kill.

Ray's processes import it by name, so it is a module of its own.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import signal
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from quantbatch import replica
from quantbatch.engine.echo import EchoEngine
from quantbatch.input import sources
from quantbatch.model.checkpoint import find_checkpoint
from quantbatch.prompts.tokens import tokenizer_of
from quantbatch.replica import LoadedEngine, Replica
from quantbatch.stages import Reader

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from quantbatch.gate import Door
    from quantbatch.input.sources import SliceRows
    from quantbatch.records import Answer, Request, Slice
    from quantbatch.replica import ReplicaJob
    from quantbatch.stages import ReadJob
    from quantbatch.storage import Store


def kill(how: str) -> None:
    """Do to this process what a row can do."""
    match how:
        case "segfault":
            ctypes.string_at(0)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "hang":
            ctypes.PyDLL(None).sleep(600)  # holds Python's lock, as a stuck kernel may
        case _:
            raise ValueError("a row that the model can't take")


class KillingEngine(EchoEngine):
    """Echoes, but for rows that say `please <something>`."""

    _failed: Sequence[Request] = ()

    @override
    def step(self) -> Sequence[Answer]:
        batch = list(itertools.islice(self._queue, self._batch_size))
        for text in self._decode([request.prompt_ids for request in batch]):
            if found := re.search(r"please (\w+)", text):
                self._failed = [self._queue.popleft() for _ in batch]
                kill(found[1])
        return super().step()

    @override
    def evict(self) -> Sequence[Request]:
        return self._failed


def _load(job: ReplicaJob) -> LoadedEngine:
    tokenizer = tokenizer_of(find_checkpoint(job.spec.model))

    def decode(answers: list[Sequence[int]]) -> list[str]:
        return tokenizer.batch_decode([list(answer) for answer in answers])

    return LoadedEngine(KillingEngine(decode, batch_size=8))


class KillingReplica(Replica):
    """A replica with that engine."""

    def __init__(self, job: ReplicaJob, door: Door | None = None) -> None:
        replica.load_engine = _load
        super().__init__(job, door)


class KillingReader(Reader):
    """A reader that a file named `deadly` kills, as a damaged one may kill the library."""

    def __init__(self, job: ReadJob, door: Door) -> None:
        super().__init__(job, door)
        module: Any = sources
        real = module.read_slice

        def read(store: Store, piece: Slice, *rest: Any) -> SliceRows:
            if piece.file.startswith("deadly"):
                kill("segfault")
            found: SliceRows = real(store, piece, *rest)
            return found

        module.read_slice = read


class DoomedReplica(Replica):
    """Dies with every chunk, as on a machine whose driver is broken."""

    @override
    async def _answered(self, chunk: int, rows: pa.Table) -> pa.Table:
        os._exit(9)


def _hang(job: ReplicaJob) -> LoadedEngine:
    kill("hang")
    return _load(job)


class StuckReplica(Replica):
    """Loads for ever."""

    def __init__(self, job: ReplicaJob, door: Door | None = None) -> None:
        replica.load_engine = _hang
        super().__init__(job, door)
