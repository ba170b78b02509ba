"""What rows that only read get of each step: log-probabilities, and sums of hidden states.

A row notes what it has so far; if it is put back, it begins again. Log-probabilities are those of
the model's own scores, computed in float32 some places at a time, because a vocabulary of 150,000
words makes 600 kB of each.

Shapes: B places scored, K log-probabilities wanted, V words, T tokens, H sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantbatch.engine.kvstore import send
from quantbatch.engine.pieces import PLACES_AT_ONCE
from quantbatch.records import Embedded, Ranked, Scored
from quantbatch.wants import Embed, Rank, Score

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from quantbatch.engine.forward import Output
    from quantbatch.engine.pieces import Piece, Row
    from quantbatch.records import Answer


class Wanted(NamedTuple):
    """One log-probability that a row wants of a step."""

    row: Row
    key: int
    """What the row calls it: the place of the token, or the number of the edge."""
    scores: int
    """Which of the scores it is read from."""
    token: int


@dataclass(slots=True)
class Read:
    """What a row has read so far."""

    logprobs: dict[int, float] = field(default_factory=dict)
    hidden_H: Tensor | None = None
    """The state of the last token, or the sum of all so far, in float32."""


class Reading(NamedTuple):
    """What the rows of a step get of it, still on the device."""

    wanted: list[Wanted]
    logprobs_K: Tensor | None
    done: list[Row]
    """Rows that have all they want, once this has come."""
    vectors: list[Tensor]
    """The vectors (H) of those of them that want one, in their order."""

    @property
    def tensors(self) -> list[Tensor]:
        """What is to be read back."""
        logprobs = [] if self.logprobs_K is None else [self.logprobs_K]
        return logprobs + self.vectors


class Readings:
    """Keeps what rows have read between their steps."""

    def __init__(self) -> None:
        self._read: dict[Row, Read] = {}

    def start(self, row: Row) -> None:
        """Note that a row begins, or begins again."""
        self._read[row] = Read()

    def forget(self, row: Row) -> None:
        """Note that a row is gone."""
        self._read.pop(row, None)

    def take(self, pieces: Sequence[Piece], output: Output) -> Reading | None:
        """Take what rows want of a step; None if no row of it wants anything.

        Call it when the scheduler has counted the step as computed.
        """
        if not any(piece.row.reads for piece in pieces):
            return None
        first = sum(piece.samples for piece in pieces)
        wanted = list(_wanted(pieces, first))
        for piece, begin in output.layout.embedded:
            self._pool(piece, begin, output.hidden_TH)
        done = [piece.row for piece in pieces if piece.row.is_read]
        vectors = [self._vector(row) for row in done if isinstance(row.request.want, Embed)]
        return Reading(wanted, _logprobs(output.scores_BV, wanted), done, vectors)

    def _pool(self, piece: Piece, begin: int, hidden_TH: Tensor | None) -> None:
        want, read = piece.row.request.want, self._read[piece.row]
        assert isinstance(want, Embed)
        assert hidden_TH is not None
        end = begin + piece.end - piece.start
        if want.pooling == "last":
            read.hidden_H = hidden_TH[end - 1].float()
        elif end > begin:
            total_H = hidden_TH[begin:end].float().sum(0)
            read.hidden_H = total_H if read.hidden_H is None else read.hidden_H + total_H

    def _vector(self, row: Row) -> Tensor:
        hidden_H = self._read[row].hidden_H
        assert hidden_H is not None
        assert isinstance(row.request.want, Embed)
        return hidden_H if row.request.want.pooling == "last" else hidden_H / row.length

    def land(
        self, reading: Reading, columns: Sequence[list[float]]
    ) -> Iterator[tuple[Row, Answer]]:
        """Note what has come, and yield the answers of rows that have all they want.

        Args:
            reading: What was taken.
            columns: Its tensors, read back.
        """
        vectors = list(columns)
        if reading.logprobs_K is not None:
            for wanted, logprob in zip(reading.wanted, vectors.pop(0), strict=True):
                if not wanted.row.done:
                    self._read[wanted.row].logprobs[wanted.key] = logprob
        for row in reading.done:
            vector = vectors.pop(0) if isinstance(row.request.want, Embed) else []
            if not row.done:
                yield row, self._answer(row, vector)

    def _answer(self, row: Row, vector: list[float]) -> Answer:
        found, id = self._read[row].logprobs, row.request.id
        match row.request.want:
            case Rank():
                assert row.tree is not None
                return Ranked(
                    id, tuple(tuple(found[edge] for edge in path) for path in row.tree.paths)
                )
            case Score(first=first):
                return Scored(id, tuple(found[place] for place in range(first, row.length)))
            case Embed():
                return Embedded(id, tuple(vector))
            case _:
                raise AssertionError(row.request.want)


def numbers(answer: Answer) -> Iterable[float]:
    """Return the numbers of an answer that was read."""
    match answer:
        case Ranked(logprobs=candidates):
            return (logprob for candidate in candidates for logprob in candidate)
        case Scored(logprobs=logprobs):
            return logprobs
        case Embedded(vector=vector):
            return vector
        case _:
            return ()


def _wanted(pieces: Sequence[Piece], first: int) -> Iterator[Wanted]:
    """Yield what rows want, in the order of `Layout.scored` after its first places."""
    place = first
    for piece in pieces:
        row = piece.row
        for token in piece.scored:
            if row.tree is None:
                yield Wanted(row, token + 1, place, row.tokens[token + 1])
            else:
                for edge in row.tree.first:
                    yield Wanted(row, edge.id, place, edge.token)
            place += 1
        for edges in piece.group.wanted if piece.group else ():
            for edge in edges:
                yield Wanted(row, edge.id, place, edge.token)
            place += 1


def _logprobs(scores_BV: Tensor, wanted: Sequence[Wanted]) -> Tensor | None:
    if not wanted:
        return None
    device = scores_BV.device
    places_K = send([each.scores for each in wanted], device)
    tokens_K = send([each.token for each in wanted], device)
    parts = torch.split(scores_BV, PLACES_AT_ONCE)
    whole_B = torch.cat([part_BV.float().logsumexp(-1) for part_BV in parts])
    return scores_BV[places_K, tokens_K].float() - whole_B[places_K]
