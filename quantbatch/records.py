"""The nouns: what travels between the parts of a job.

    Slice         a run of rows of one input file
    Chunk         slices that are scheduled, retried and committed together
    Request       what a row wants from an engine: token ids and how to sample
    Completion    what the engine gives back for one request
    Receipt       what became of one chunk, small enough to stream to the driver

A row's id is `<file relative to the input root>:<row number, from 0>`, or the value of the user's
key column. It comes from the input, never from the run, so it is the same in every attempt.

Between the stages of the pipeline a chunk is *one row* of the Ray dataset: its number, and its rows
as an Arrow IPC stream in a binary cell (`pack`, `unpack`). Ray then has no rows of ours to bundle,
slice or convert: a chunk arrives whole whatever `batch_size` a GPU stage needs, and user columns of
any type pass untouched.
"""

from __future__ import annotations

import itertools
import json
import struct
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from quantbatch.wants import Want, Write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.spec import Sampling

WRITE = Write()


class Status(StrEnum):
    """What became of a row; every row has exactly one."""

    OK = "ok"
    TRUNCATED = "truncated"
    """The answer was cut at max_new_tokens; what there is of it is kept."""
    INVALID = "invalid"
    """The answer is complete but not of the form that the task asks for."""
    ERROR = "error"
    """There is no answer; error_type and error_message say why."""


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The model ended it, or a stop string or stop token came."""
    LENGTH = "length"
    """It reached max_new_tokens, or the model's context was full."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of consecutive rows of one input file."""

    file: str
    """The file relative to the input root, with forward slashes: the first half of its rows'
    ids."""
    first_row: int
    rows: int
    mark_row: int = 0
    """A row at or before the first one whose place in a text file is known: where reading
    starts."""
    byte_offset: int = 0
    """Where the marked row begins in a text file, in bytes after decompression; 0 for Parquet."""
    line: int = 1
    """Line number of the marked row in a text file, from 1."""
    size: int = 0
    """Size of the file when it was planned, in bytes."""
    etag: str = ""
    """Version of the file when it was planned; reading another version is refused."""
    partition: str = ""
    """Hive folders of the file, such as `day=2026-01-01`."""


class Again(NamedTuple):
    """A further attempt of some rows of a chunk, see `retries`."""

    retry: int
    """Its number."""
    base: int
    """Number of the retry whose attempt of the chunk it builds on; 0 is the job's own."""
    rows: tuple[int, ...]
    """Places of the rows within the chunk, in order."""


class Blame(NamedTuple):
    """Rows that become error rows because their process died of them, see `suspects`."""

    low: int
    high: int
    """The first row that is not among them; places count among the rows that are answered."""
    kind: str
    """Their `error_type`."""
    message: str
    unread: bool = False
    """Whether it was reading them that killed: they are not even read."""


class Trial(NamedTuple):
    """An attempt that a chunk makes alone, to find the rows that kill, see `suspects`."""

    low: int
    high: int
    """The rows that are answered are from `low` to before this one."""
    blamed: tuple[Blame, ...]
    """Rows that are left out, and become error rows if the attempt commits."""
    rows: int
    """Rows of the chunk."""

    @property
    def asks(self) -> bool:
        """Whether any row is left that it tries."""
        left = set(range(self.low, self.high))
        return not left.issubset(
            row for blame in self.blamed for row in range(blame.low, blame.high)
        )

    @property
    def commits(self) -> bool:
        """Whether it is an attempt with all rows, whose result counts."""
        return self.high - self.low == self.rows


@dataclass(frozen=True, slots=True)
class Chunk:
    """The unit of scheduling, retry, commit and resume: rows of one shard, in input order."""

    id: int
    shard: int
    slices: tuple[Slice, ...]
    again: Again | None = None
    """Which rows are answered, if not all."""
    trial: Trial | None = None
    """Which of them an attempt is made with, if not all."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(piece.rows for piece in self.slices)


class RequestId(NamedTuple):
    """Which row of which chunk a request answers."""

    chunk: int
    row: int
    sample: int = 0
    """Which of a row's samples it is, where there are several (`sampling.n`)."""


@dataclass(frozen=True, slots=True)
class Request:
    """What one row wants from an engine."""

    id: RequestId
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    """Seed of this row's own random numbers: derived from the job's seed and the row's id."""
    want: Want = WRITE
    """What it is for; `sampling` counts for `Write` only."""

    def __post_init__(self) -> None:
        assert self.prompt_ids, "an empty prompt is an error row, never a request"


class TokenLogprobs(NamedTuple):
    """What the model thought of one generated token, before anything narrowed the choice.

    Log-probabilities are those of the model's own scores: without temperature, penalties or masks.
    """

    logprob: float
    """Of the token that was taken."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, the likeliest first; as many as `sampling.logprobs` asks
    for."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine gives back for one request."""

    id: RequestId
    text: str
    """The answer without special tokens; cut before a stop string."""
    token_ids: tuple[int, ...]
    """The generated tokens, the one that ended the answer included."""
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each of `token_ids`; None where they were not asked for."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that could not be answered, with the reason for its error row."""

    id: RequestId
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Ranked:
    """What an engine gives back for `wants.Rank`."""

    id: RequestId
    logprobs: tuple[tuple[float, ...], ...]
    """Of each token of each candidate, after the prompt and the candidate's tokens before it."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What an engine gives back for `wants.Score`."""

    id: RequestId
    logprobs: tuple[float, ...]
    """Of each token from the first that counts, after all before it."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """What an engine gives back for `wants.Embed`."""

    id: RequestId
    vector: tuple[float, ...]
    """Not normalized."""


Answer = Completion | Ranked | Scored | Embedded | Failure
"""What becomes of a request."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows by status, and tokens; adds up over chunks and shards.

    Tokens are those of rows that a model was asked for: neither of rows that were wrong before, nor
    of those whose answers were all in `answers_cache`.
    """

    ok: int = 0
    truncated: int = 0
    invalid: int = 0
    error: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unread: int = 0
    """Error rows whose file can't be read, among those of `error`."""
    cached: int = 0
    """Rows whose answers were all in `answers_cache`, whatever their status."""

    @property
    def rows(self) -> int:
        """Rows of every status."""
        return self.ok + self.truncated + self.invalid + self.error

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            *(getattr(self, name) + getattr(other, name) for name in Counts.__dataclass_fields__)
        )

    def to_json(self) -> dict[str, int]:
        """The counts by name, as manifests and reports write them."""
        return {name: getattr(self, name) for name in Counts.__dataclass_fields__}


class Trouble(NamedTuple):
    """A JobError on its way to the driver; exceptions don't survive Ray's processes whole."""

    exit_code: int
    problem: str
    hint: str


class EngineSecond(NamedTuple):
    """What an engine did in about one second of work, as mean or sum over its steps."""

    at_s: float
    """End of the second, in seconds since the engine was made."""
    steps: int
    step_ms: float
    """Mean time of a step."""
    rows: float
    """Mean rows in the batch."""
    kv_share: float
    """Share of the KV pool in use at its end."""
    prefill_tokens: int
    decode_tokens: int
    useful_share: float
    """Share of computed positions that were new tokens of prompts and answers."""
    preemptions: int
    out_of_memory: int

    def joined(self, later: EngineSecond) -> EngineSecond:
        """Return this and the one that follows it as one."""
        steps = self.steps + later.steps

        def mean(name: str) -> float:
            both: float = getattr(self, name) * self.steps + getattr(later, name) * later.steps
            return round(both / max(1, steps), 4)

        return EngineSecond(
            at_s=later.at_s,
            steps=steps,
            step_ms=mean("step_ms"),
            rows=mean("rows"),
            kv_share=max(self.kv_share, later.kv_share),
            prefill_tokens=self.prefill_tokens + later.prefill_tokens,
            decode_tokens=self.decode_tokens + later.decode_tokens,
            useful_share=mean("useful_share"),
            preemptions=self.preemptions + later.preemptions,
            out_of_memory=self.out_of_memory + later.out_of_memory,
        )


@dataclass(frozen=True, slots=True)
class EngineProgress:
    """What an engine tells of itself with a receipt."""

    totals: dict[str, float] = field(default_factory=dict)
    """Its counters since it was made, see `engine.telemetry.Totals`."""
    seconds: tuple[EngineSecond, ...] = ()
    """The seconds since the receipt before."""

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> EngineProgress:
        """Read what `dataclasses.asdict` made, after a way through JSON."""
        return cls(found["totals"], tuple(EngineSecond(*second) for second in found["seconds"]))


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """What a replica measured, as of one chunk."""

    replica: str = ""
    """Id of the replica's actor."""
    device: str = ""
    load_s: float = 0.0
    planned_bytes: int = 0
    peak_bytes: int = 0
    """Most memory that the model and its work took: on CUDA as the allocator reserved it, on a CPU
    the growth of the process over what it was before loading."""
    busy_s: float = 0.0
    """Time that the engine has worked so far, in seconds."""
    engine: EngineProgress = field(default_factory=EngineProgress)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> ReplicaStats:
        """Read what `dataclasses.asdict` made, after a way through JSON."""
        return cls(**found | {"engine": EngineProgress.from_json(found["engine"])})


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one chunk.

    Committed (`counts` are those of the attempt that won, or those of the rows that were answered
    again), or undone, because of `trouble`.
    """

    chunk: int
    shard: int
    counts: Counts = field(default_factory=Counts)
    trouble: Trouble | None = None
    """Why the chunk is not committed: it concerns the job, not the chunk, and ends the run."""
    committed: bool = True
    """Not if the run takes no more chunks, or if only some of the rows were tried."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Files whose rows could not be read, with the reason; they are error rows."""
    replica: ReplicaStats = field(default_factory=ReplicaStats)

    def to_json(self) -> str:
        """Return the receipt as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        """Read what `to_json` wrote."""
        found = json.loads(text)
        nested = {
            "counts": Counts(**found["counts"]),
            "replica": ReplicaStats.from_json(found["replica"]),
            "trouble": found["trouble"] and Trouble(*found["trouble"]),
        }
        return cls(**found | nested)


def from_token_lists(lists: Sequence[Sequence[int] | None]) -> pa.ListArray:
    """Return token ids as Arrow lists of int32; 30 times faster than `pa.array` (measured)."""
    lengths = [0 if ids is None else len(ids) for ids in lists]
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    flat = itertools.chain.from_iterable(ids for ids in lists if ids is not None)
    values = np.fromiter(flat, np.int32, count=int(offsets[-1]))
    missing = pa.array([ids is None for ids in lists], pa.bool_())
    return pa.ListArray.from_arrays(offsets, values, mask=missing)


def to_token_lists(column: pa.ChunkedArray) -> list[list[int] | None]:
    """Return the lists that `from_token_lists` made; 5 times faster than `to_pylist` (measured)."""
    lists: list[list[int] | None] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy().tolist()
        offsets = chunk.offsets.to_numpy().tolist()
        valid = chunk.is_valid().to_numpy(zero_copy_only=False).tolist()
        lists += [
            values[start:end] if there else None
            for start, end, there in zip(offsets, offsets[1:], valid, strict=False)
        ]
    return lists


CHUNK_CELL = pa.schema([("chunk", pa.int64()), ("cell", pa.large_binary())])
"""Schema of the Ray dataset between stages: one row a chunk."""


def pack(chunk: int, rows: pa.Table) -> pa.Table:
    """Put the rows of a chunk in one row of the Ray dataset, without copying the encoded bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    cell = sink.getvalue()
    offsets = pa.py_buffer(struct.pack("<qq", 0, cell.size))
    cells = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, cell])
    return pa.Table.from_arrays([pa.array([chunk], pa.int64()), cells], schema=CHUNK_CELL)


def unpack(block: pa.Table) -> tuple[int, pa.Table]:
    """Take the one chunk out of a block that `pack` made.

    Returns:
        The chunk's number and its rows, which share the block's memory.
    """
    assert block.num_rows == 1, f"a block holds one chunk, this one holds {block.num_rows}"
    cell = block["cell"][0].as_buffer()
    return block["chunk"][0].as_py(), pa.ipc.open_stream(cell).read_all()
