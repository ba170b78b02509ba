"""Responses to lines: the output file of a shard, and beside it the file of the requests that
failed, each in the order of the input.

A request that was refused has a response all the same, with the status and the body that a hosted
API answers; one that could not even be read has none, and an `error` instead. An answer that is
whole but has not the form that its request asked for is in the output file, with both.

Where the job has a cache of answers, each line tells with `cached` whether its answers were there.

The id of a line counts the rows of its shard. So the two files can be put together again in the
order of the input, as `verify` does.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantbatch.batchfile.refusals import BAD_REQUEST, UNSUPPORTED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TextIO

    import pyarrow as pa

ROWS_AT_ONCE = 1024
_REFUSED = {
    BAD_REQUEST: None,
    UNSUPPORTED: "unsupported_value",
    "prompt_too_long": "context_length_exceeded",
    "chat_template": None,
    "empty_prompt": None,
    "bad_messages": None,
    "control_token": None,
}
"""Kinds of errors that are the request's own, with the API's code; others are the server's."""
_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Characters that JSON leaves as they are, and at which some readers divide lines."""
_UNREAD = frozenset({"bad_json", "bad_text", "wrong_type", "unreadable_file"})
"""Kinds of errors of rows of which nothing is known."""


def output_key(key: str) -> str:
    """Return the name of a shard's output file, from that of its Parquet file."""
    return key.removesuffix(".parquet") + ".jsonl"


def errors_key(key: str) -> str:
    """Return the name of the file of failed requests beside an output file."""
    return key.removesuffix(".jsonl") + ".errors.jsonl"


@dataclass
class Lines:
    """Writes the lines of a shard.

    Args:
        shard: Number of the shard.
        created: When the job began, in seconds since 1970.
        output: Takes the lines of requests that were answered.
        errors: Takes those of requests that failed.
    """

    shard: int
    created: int
    output: TextIO
    errors: TextIO
    answered: int = 0
    failed: int = 0

    def write(self, rows: pa.Table) -> None:
        """Write rows as they were committed."""
        for batch in rows.to_batches(ROWS_AT_ONCE):
            for row in batch.to_pylist():
                number = self.answered + self.failed
                line = line_of(row, f"batch_req_{self.shard:06d}_{number:09d}", self.created)
                if row["status"] == "error":
                    self.failed += 1
                    self.errors.write(line)
                else:
                    self.answered += 1
                    self.output.write(line)


def line_of(row: Mapping[str, Any], id: str, created: int) -> str:
    """Return the line of a committed row."""
    named = row["custom_id"] is not None
    request_id = f"req_{hashlib.sha256(row['row_id'].encode()).hexdigest()[:24]}"
    kind, why = row["error_type"], row["error_message"]
    response: dict[str, Any] | None
    error = None
    if row["status"] != "error":
        body = with_created(json.loads(row["response"]), created)
        response = {"status_code": 200, "request_id": request_id, "body": body}
        error = {"code": kind, "message": why} if kind else None
    elif not named or kind in _UNREAD:
        response, error = None, {"code": kind, "message": why}
        if not named:
            error["row_id"] = row["row_id"]  # all that there is to tell which row it was
    else:
        status = 400 if kind in _REFUSED else 500
        body = {"error": _refusal(kind, why)}
        response = {"status_code": status, "request_id": request_id, "body": body}
    line = {"id": id, "custom_id": row["custom_id"], "response": response, "error": error}
    if "cached" in row:
        line["cached"] = row["cached"]
    return json.dumps(line, ensure_ascii=False).translate(_LINE_BREAKS) + "\n"


def _refusal(kind: str, why: str) -> dict[str, Any]:
    if kind not in _REFUSED:
        return {"message": why, "type": "server_error", "param": None, "code": kind}
    has_name = kind in (BAD_REQUEST, UNSUPPORTED)
    name = why.partition(":")[0] if has_name else None
    code = _REFUSED[kind] or kind
    return {"message": why, "type": "invalid_request_error", "param": name, "code": code}


def with_created(body: dict[str, Any], created: int) -> dict[str, Any]:
    """Return a body with its time, where bodies of its kind have one."""
    return {**body, "created": created} if "choices" in body else body
