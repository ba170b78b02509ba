"""The rows of a shard's output and error lines a second time, for `verify`: put together again in
the order of the input, with the columns that the same rows have in Parquet.

Written apart from `batchfile.lines` on purpose, as `reread` is from `sources`.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from quantbatch.reread import WINDOW, Unreadable, open_parquet, parquet_batches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantbatch.storage import Store

_SCHEMA = pa.schema(
    [
        ("custom_id", pa.string()),
        ("row_id", pa.string()),
        ("status", pa.string()),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
        ("response", pa.string()),
        ("completion_tokens", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("attempt", pa.string()),
    ]
)


def errors_beside(key: str) -> str:
    """Return the name of the error file of an output file."""
    return key.removesuffix(".jsonl") + ".errors.jsonl"


def is_lines(key: str) -> bool:
    """Tell whether a file holds lines."""
    return key.endswith(".jsonl")


def part_schema(store: Store, key: str) -> pa.Schema:
    """Return the columns of an output file.

    Raises:
        Unreadable: It is damaged.
    """
    if is_lines(key):
        return _schema_of(next(_merged(store, key), {}))
    with open_parquet(store, key) as file:
        return file.schema_arrow


def part_batches(store: Store, key: str, columns: list[str] | None) -> Iterator[pa.Table]:
    """Yield the rows of an output file, with the failed ones that are in a file beside it.

    Raises:
        Unreadable: It is damaged.
    """
    if not is_lines(key):
        yield from parquet_batches(store, key, columns)
        return
    held: list[dict[str, Any]] = []
    for row in _merged(store, key):
        held.append(row)
        if len(held) == WINDOW:
            yield _table(held, columns)
            held = []
    if held:
        yield _table(held, columns)


def _table(rows: list[dict[str, Any]], columns: list[str] | None) -> pa.Table:
    table = pa.Table.from_pylist(rows, schema=_schema_of(rows[0]))
    return table if columns is None else table.select(columns)


def _schema_of(row: dict[str, Any]) -> pa.Schema:
    return _SCHEMA.append(pa.field("cached", pa.bool_())) if "cached" in row else _SCHEMA


def _merged(store: Store, key: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of both files by the numbers in their lines' ids."""
    good, bad = _lines(store, key), _lines(store, errors_beside(key))
    answered, failed = next(good, None), next(bad, None)
    while answered or failed:
        if failed and (answered is None or failed["id"] < answered["id"]):
            yield _row(failed, failed=True)
            failed = next(bad, None)
        elif answered:
            yield _row(answered, failed=False)
            answered = next(good, None)


def _lines(store: Store, key: str) -> Iterator[dict[str, Any]]:
    try:
        raw: Any = store.open(key, sequential=True)
    except FileNotFoundError:
        return  # no request failed, or the file is gone: then rows are missing
    with raw, io.TextIOWrapper(io.BufferedReader(raw), "utf-8", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                found = json.loads(line)
                if not (isinstance(found, dict) and isinstance(found.get("id"), str)):
                    raise Unreadable(f"line {number} is no object with an id")
                yield found
        except ValueError as error:
            raise Unreadable(f"{key}: {error}") from error


def _row(line: dict[str, Any], *, failed: bool) -> dict[str, Any]:
    """Return the columns of a row.

    Raises:
        Unreadable: The line has not the form of one.
    """
    try:
        found = _failed_row(line) if failed else _answered_row(line)
        return found | ({"cached": line["cached"]} if "cached" in line else {})
    except (KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"the line {line['id']} has not the form of one: {error!r}") from error


def _failed_row(line: dict[str, Any]) -> dict[str, Any]:
    response, error = line["response"], line["error"]
    if response is not None:
        if response["status_code"] < 400:
            raise KeyError("a status of an error")
        error = response["body"]["error"]
    custom_id = line["custom_id"]
    return {
        "custom_id": custom_id,
        "row_id": error["row_id"] if custom_id is None else custom_id,
        "status": "error",
        "error_type": error["code"],
        "error_message": error["message"],
    }


def _answered_row(line: dict[str, Any]) -> dict[str, Any]:
    response, error = line["response"], line["error"]
    body = response["body"]
    if response["status_code"] != 200 or not body.get("choices", body.get("data")):
        raise KeyError("an answer")
    ends = {choice["finish_reason"] for choice in body.get("choices", ())}
    status = "truncated" if "length" in ends else "invalid" if error else "ok"
    return {
        "custom_id": line["custom_id"],
        "row_id": line["custom_id"],
        "status": status,
        "error_type": error and error["code"],
        "error_message": error and error["message"],
        "response": json.dumps(body, ensure_ascii=False),
        "completion_tokens": body["usage"].get("completion_tokens", 0),
        "prompt_tokens": body["usage"]["prompt_tokens"],
    }
