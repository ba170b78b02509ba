"""The command line with a replica that notes each chunk that it begins: so work done twice counts.

    python -m tests.integration.counted run job.yaml

The notes are beside the job's input, which lies on the local disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from quantbatch.replica import Replica

if TYPE_CHECKING:
    import pyarrow as pa


def notes_of(input: str) -> Path:
    """Return where the replicas of a job note what they begin."""
    return Path(input).parent / "begun"


def rows_begun(input: str) -> int:
    """Return how many rows the replicas of a job began to answer, in all its attempts."""
    notes = notes_of(input)
    return sum(int(line) for line in notes.read_text().split()) if notes.exists() else 0


class CountingReplica(Replica):
    """Appends the number of rows of each chunk that it begins to a file."""

    @override
    async def _answered(self, chunk: int, rows: pa.Table) -> pa.Table:
        with notes_of(str(self._spec.input.uri)).open("a") as notes:
            notes.write(f"{rows.num_rows}\n")
        return await super()._answered(chunk, rows)


if __name__ == "__main__":
    from unittest.mock import patch

    from quantbatch import cli, rounds
    from tests.integration import counted

    # By its import path, not that of __main__: Ray's processes import it.
    with patch.object(rounds, "Replica", counted.CountingReplica):
        cli.main()
