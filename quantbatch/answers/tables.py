"""Answers as rows of an Arrow table, and back; a `Failure` is no answer and is never kept.

Numbers are kept as they are (float64), so what comes back is equal to what was kept.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from quantbatch.records import (
    Completion,
    Embedded,
    FinishReason,
    Ranked,
    RequestId,
    Scored,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from quantbatch.records import Answer

NOBODY = RequestId(-1, -1)
"""Id of a kept answer; whoever takes it puts the request's."""

SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("kind", pa.string()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float64())),
        ("lengths", pa.list_(pa.int32())),
        ("top_ids", pa.list_(pa.int32())),
        ("top_values", pa.list_(pa.float64())),
    ]
)


def to_table(answers: Mapping[bytes, Answer]) -> pa.Table:
    """Return answers by their keys as a table."""
    rows = [{"key": key, **_row(answer)} for key, answer in answers.items()]
    return pa.Table.from_pylist(rows, SCHEMA)


def from_table(table: pa.Table) -> Iterator[Answer]:
    """Yield the answers of a table, of nobody's request."""
    for row in table.to_pylist():
        yield _answer(row)


def _row(answer: Answer) -> dict[str, Any]:
    match answer:
        case Completion():
            return {
                "kind": "write",
                "text": answer.text,
                "finish_reason": answer.finish_reason.value,
                "token_ids": answer.token_ids,
                **_logprobs(answer.logprobs),
            }
        case Ranked(logprobs=logprobs):
            flat = list(itertools.chain.from_iterable(logprobs))
            return {"kind": "rank", "values": flat, "lengths": [len(each) for each in logprobs]}
        case Scored(logprobs=values):
            return {"kind": "score", "values": values}
        case Embedded(vector=values):
            return {"kind": "embed", "values": values}
        case _:
            raise AssertionError(answer)


def _logprobs(tokens: Sequence[TokenLogprobs] | None) -> dict[str, Any]:
    if tokens is None:
        return {}
    tops = list(itertools.chain.from_iterable(token.top for token in tokens))
    return {
        "values": [token.logprob for token in tokens],
        "lengths": [len(token.top) for token in tokens],
        "top_ids": [token_id for token_id, _ in tops],
        "top_values": [value for _, value in tops],
    }


def _answer(row: Mapping[str, Any]) -> Answer:
    values = row["values"]
    match row["kind"]:
        case "write":
            reason, token_ids = FinishReason(row["finish_reason"]), tuple(row["token_ids"])
            logprobs = None if values is None else tuple(_tokens(row))
            return Completion(NOBODY, row["text"], token_ids, reason, logprobs)
        case "rank":
            return Ranked(NOBODY, tuple(_cut(values, row["lengths"])))
        case "score":
            return Scored(NOBODY, tuple(values))
        case "embed":
            return Embedded(NOBODY, tuple(values))
        case kind:
            raise ValueError(f"an answer of the kind {kind!r}")


def _tokens(row: Mapping[str, Any]) -> Iterator[TokenLogprobs]:
    tops = _cut(list(zip(row["top_ids"], row["top_values"], strict=True)), row["lengths"])
    return itertools.starmap(TokenLogprobs, zip(row["values"], tops, strict=True))


def _cut(flat: Sequence[Any], lengths: Iterable[int]) -> Iterator[tuple[Any, ...]]:
    done = 0
    for length in lengths:
        yield tuple(flat[done : done + length])
        done += length
