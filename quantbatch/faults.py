"""The rows of a job without a good answer, by kind, with examples: `quantbatch errors`.

It reads what readers see of a job, and of files that are not published yet what is committed:
nothing but the columns that it shows, and only where the records count such rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from quantbatch.commits import rows_key
from quantbatch.documents import recorded
from quantbatch.prompts.rendering import compile_templates
from quantbatch.reread import Unreadable, open_parquet, parquet_batches
from quantbatch.storage import redact

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from quantbatch.ledger import Ledger
    from quantbatch.records import Counts, Status
    from quantbatch.spec import Prompt, Storage

PROMPT_CHARS = 200
"""Of a prompt's column, in an example."""
_OURS = ("row_id", "status", "error_type", "error_message")


@dataclass
class Kind:
    """Rows of one status and type of error."""

    status: str
    error_type: str | None
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "status": self.status,
            "error_type": self.error_type,
            "rows": self.count,
            "examples": self.examples,
        }


def describe_faults(
    uri: str, storage: Storage, statuses: Sequence[Status], examples: int
) -> dict[str, Any]:
    """Return the rows of a job that have some statuses, by kind, the most frequent first.

    Args:
        uri: The job's output.
        storage: How to reach it.
        statuses: Which rows.
        examples: How many to give of each kind.

    Raises:
        InputError: No job has begun there.
        Refused: The records are those of another version of quantbatch.
    """
    record, ledger = recorded(uri, storage)
    wanted = [status.value for status in statuses]
    kinds: dict[tuple[str, str | None], Kind] = {}
    damaged: dict[str, str] = {}
    for key in _files(ledger, wanted):
        try:
            for batch in _batches(ledger, key):
                _note(kinds, batch.filter(pc.is_in(batch["status"], pa.array(wanted))), examples)
        except (Unreadable, FileNotFoundError) as error:
            damaged[key] = str(error)
    found = sorted(kinds.values(), key=lambda kind: -kind.count)
    return {
        "outcome": "damaged" if damaged else "listed",
        "exit_code": 1 if damaged else 0,
        "name": record["name"],
        "output": redact(ledger.store.uri),
        "finished": ledger.finished,
        "rows_done": ledger.counts.rows,
        "rows": sum(kind.count for kind in found),
        "statuses": wanted,
        "kinds": [kind.to_json() for kind in found],
        "damaged": damaged,
    }


def _files(ledger: Ledger, statuses: Sequence[str]) -> Iterator[str]:
    """Yield the keys of the files that have such rows, in the input's order."""

    def has_any(counts: Counts) -> bool:
        found = counts.to_json()
        return any(found[status] for status in statuses)

    for shard in ledger.plan.shards if ledger.plan else ():
        if shard.id in ledger.published and has_any(ledger.published[shard.id].counts):
            yield from ledger.rows_of(shard)
    for chunk, counts in sorted(ledger.commits.items()):
        if has_any(counts):
            yield rows_key(ledger.store, chunk)


def _batches(ledger: Ledger, key: str) -> Iterator[pa.Table]:
    """Yield a file's rows: our columns by the names that they have on the way, and the prompt's."""
    prefix = ledger.spec.output.prefix
    with open_parquet(ledger.store, key) as file:
        names = file.schema_arrow.names
    prompt = _prompt_column(ledger.spec.prompt, names)
    columns = {prefix + name: name for name in _OURS} | ({prompt: "prompt"} if prompt else {})
    for batch in parquet_batches(ledger.store, key, list(columns)):
        yield pa.table({new: batch[old] for old, new in columns.items()})


def _prompt_column(prompt: Prompt, names: Sequence[str]) -> str | None:
    """Return the first column of the output that the prompt reads."""
    read = {prompt.column}.union(*(template.columns for template in compile_templates(prompt)))
    return next((name for name in names if name in read), None)


def _note(kinds: dict[tuple[str, str | None], Kind], rows: pa.Table, examples: int) -> None:
    """Count rows, and take examples of those kinds that have too few."""
    tally = rows.group_by(["status", "error_type"]).aggregate([([], "count_all")])
    for found in tally.to_pylist():
        key = (found["status"], found["error_type"])
        kind = kinds.setdefault(key, Kind(*key))
        kind.count += found["count_all"]
        lacking = examples - len(kind.examples)
        if lacking > 0:
            of_kind = rows.filter(_is_of(rows, kind)).slice(0, lacking)
            kind.examples += [_example(row) for row in of_kind.to_pylist()]


def _is_of(rows: pa.Table, kind: Kind) -> pa.ChunkedArray:
    same = pc.equal(rows["status"], kind.status)
    types = rows["error_type"]
    if kind.error_type is None:
        return pc.and_(same, pc.is_null(types))
    return pc.and_(same, pc.fill_null(pc.equal(types, kind.error_type), False))


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt = row.get("prompt")
    return {
        "row_id": row["row_id"],
        "message": row["error_message"],
        "prompt": None if prompt is None else str(prompt)[:PROMPT_CHARS],
    }
