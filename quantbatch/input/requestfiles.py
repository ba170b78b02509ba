"""Files of requests for batches: JSON lines whose columns are always the same.

All columns are texts, the body as JSON text: what is wrong within a body is found where it is
rendered, with its custom_id beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from quantbatch.errors import RowError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from quantbatch.input.textfiles import Record, TextFile

CUSTOM_ID = "custom_id"
REQUESTS = pa.schema([(name, pa.string()) for name in (CUSTOM_ID, "method", "url", "body")])


def unnamed_requests(
    records: Sequence[Record],
    columns: Mapping[str, pa.Array],
    file: TextFile,
    known: Container[int],
) -> dict[int, RowError]:
    """Return an error for each line without a custom_id, but for those with an error already."""
    ids = columns.get(CUSTOM_ID)
    if ids is None or not ids.null_count:
        return {}
    return {
        row: RowError("bad_request", f"custom_id: is missing in {file.where(records[row])}")
        for row, there in enumerate(ids.is_valid().to_pylist())
        if not there and row not in known
    }
