"""Input and output side by side, for `verify`.

Where the two differ, the nearest pair of equal ids within the windows is where they go on; what was
passed over on the one side is missing, on the other it is too much, and an id that is both is only
out of order. From a job that is not finished nothing is missing as long as the gap lies between its
files: shards are published whole, in any order.
"""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quantbatch.records import Counts, Status
from quantbatch.reread import ROW_ID, Buffer, InputRows, Unreadable
from quantbatch.reread_lines import is_lines, part_batches, part_schema
from quantbatch.rows import UNREADABLE_FILE
from quantbatch.verify_answers import odd_rows, of_answers
from quantbatch.verify_problems import EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from quantbatch.spec import JobSpec
    from quantbatch.storage import Store
    from quantbatch.verify_problems import Problems

MAX_ODD_IDS = 1_000_000
"""Ids out of place that are remembered, 50 bytes each; beyond this they are counted only."""
NEAR = 64
"""Rows that are looked through first where the two sides differ: most often one is missing."""
MAX_SEARCHES = 100
"""Searches of the rest of the input for rows that are not there; each may read all of it."""

# Columns that every job adds. Written out here again: what readers are promised does not change
# because the code that writes it did.
_OF_ROWS = {
    "row_id": pa.string(),
    "status": pa.string(),
    "error_type": pa.string(),
    "error_message": pa.string(),
    "prompt_tokens": pa.int32(),
    "attempt": pa.string(),
}


@dataclass(frozen=True)
class Part:
    """A file that readers see."""

    key: str
    number: int

    @property
    def folder(self) -> str:
        """Its Hive folders."""
        return posixpath.dirname(self.key)


@dataclass(frozen=True)
class Claims:
    """What the output says of itself."""

    finished: bool
    rows: Mapping[str, int]
    """Rows of each file that is said to be published."""
    counts: Counts | None
    """Counts of the whole job; None if it is not said to be finished."""
    fingerprint: str


def our_fields(spec: JobSpec) -> list[pa.Field]:
    """Return the columns that a job adds, as its output names them."""
    types = _OF_ROWS | of_answers(spec)
    types |= dict.fromkeys(_cached(spec), pa.bool_())
    return [pa.field(spec.output.prefix + name, kind) for name, kind in types.items()]


def _cached(spec: JobSpec) -> list[str]:
    return ["cached"] if spec.answers_cache else []


@dataclass
class _Ids:
    """Ids that are out of place on one side."""

    count: int = 0
    held: list[pa.Array] = field(default_factory=list)

    def add(self, ids: pa.ChunkedArray) -> None:
        if self.count < MAX_ODD_IDS:
            self.held += ids.chunks
        self.count += len(ids)

    def array(self) -> pa.Array:
        return pa.concat_arrays([pa.array([], pa.string()), *self.held])


class SideBySide:
    """Goes through input and output side by side.

    Args:
        spec: The job.
        store: The output's.
        rows: The input.
        claims: What the output says of itself.
        problems: Takes what is wrong.
    """

    def __init__(
        self,
        spec: JobSpec,
        store: Store,
        rows: InputRows,
        claims: Claims,
        problems: Problems,
    ) -> None:
        self._spec = spec
        self._store = store
        self._input = rows
        self._claims = claims
        self._problems = problems
        self._missing, self._surplus = _Ids(), _Ids()
        self._searches = 0
        self._is_ahead = False
        """Whether the output's next rows are known to come further ahead in the input."""
        self._previous = -1
        self._in_gap = False
        """Whether the rows that come next in the input may be in a file that is not published."""
        self.counts = Counts()
        self.rows_in = 0
        self.rows_left = 0

    def read(self, part: Part, schema: pa.Schema) -> bool:
        """Compare a file with the rows of the input that come next; tell whether it goes with
        them.
        """
        noted = self._noted
        self._in_gap = not self._claims.finished and part.number > self._previous + 1
        self._previous = part.number
        before = self.counts.rows
        try:
            self._check_form(part, schema)
            found = Buffer(self._checked(part))
            while (rows := found.peek()) is not None:
                found.take(self._compare(rows, part))
        except Unreadable as error:
            self._problems.note("files that are damaged", f"{part.key}: {error}")
            return False
        rows_there = self.counts.rows - before
        said = self._claims.rows.get(part.key)
        if said is not None and said != rows_there:
            self._problems.note(
                "files of the wrong length", f"{part.key}: {rows_there:,} rows, {said:,} were said"
            )
        return self._noted == noted

    @property
    def _noted(self) -> int:
        return self._problems.total + self._missing.count + self._surplus.count

    def end(self, parts: list[Part]) -> None:
        """Go through what is left of the input, and tell what the ids out of place are."""
        self._rest_of_input()
        for name, why in self._input.unreadable.items():
            self._problems.note("input files that can't be read", f"{name}: {why}")
        if parts:
            self._check_kept_names()
        missing, surplus = self._missing.array(), self._surplus.array()
        moved = pc.is_in(surplus, value_set=missing)
        self._note_ids("rows out of order", surplus.filter(moved))
        gone = missing.filter(pc.invert(pc.is_in(missing, value_set=surplus)))
        self._note_ids("rows that are missing", gone, self._missing.count - len(missing))
        extra = surplus.filter(pc.invert(moved))
        doubled = self._seen_twice(extra, parts)
        again = pc.is_in(extra, value_set=doubled)
        self._note_ids("rows that are there twice", extra.filter(again))
        strangers = extra.filter(pc.invert(again))
        self._note_ids(
            "rows that the input does not have", strangers, self._surplus.count - len(surplus)
        )

    def _note_ids(self, kind: str, ids: pa.Array, more: int = 0) -> None:
        for id in ids[:EXAMPLES].to_pylist():
            self._problems.note(kind, id)
        rest = max(len(ids) - EXAMPLES, 0) + more
        if rest:
            self._problems.note(kind, "and others", rest)

    # ---- one file by itself

    def _check_form(self, part: Part, schema: pa.Schema) -> None:
        found = part_schema(self._store, part.key)
        odd = {field.name for field in set(found) ^ set(schema)}
        if odd:
            raise Unreadable(f"has not the columns of the other files: {', '.join(sorted(odd))}")
        if is_lines(part.key):
            return  # lines have no room for what wrote them
        written_by = json.loads((found.metadata or {}).get(b"quantbatch", b"{}"))
        if written_by.get("fingerprint") != self._claims.fingerprint:
            self._problems.note("files of another job", part.key)

    def _checked(self, part: Part) -> Iterator[pa.Table]:
        """Yield the rows of a file, having counted and checked what a job adds to them."""
        prefix = self._spec.output.prefix
        for batch in part_batches(self._store, part.key, None):
            names = (*_OF_ROWS, *of_answers(self._spec), *_cached(self._spec))
            ours = {name: batch[prefix + name] for name in names}
            self._count(ours)
            self._check_answers(ours)
            yield batch.append_column(ROW_ID, pc.fill_null(ours["row_id"], ""))

    def _count(self, ours: Mapping[str, pa.ChunkedArray]) -> None:
        found = {r["values"]: r["counts"] for r in pc.value_counts(ours["status"]).to_pylist()}
        known = {status.value: found.pop(status.value, 0) for status in Status}
        for status, count in found.items():
            self._problems.note("rows with an unknown status", repr(status), count)
        counted = ("prompt_tokens", "completion_tokens")
        none = pa.array([False] * len(ours["status"]))
        cached = ours.get("cached", none)
        numbers = {name: ours[name].filter(pc.invert(cached)) for name in counted if name in ours}
        if self._spec.task.kind == "generate" and self._spec.sampling.n > 1:
            numbers["completion_tokens"] = pc.list_flatten(numbers["completion_tokens"])
        tokens = {name: pc.sum(column).as_py() or 0 for name, column in numbers.items()}
        unread = pc.sum(pc.equal(ours["error_type"], UNREADABLE_FILE)).as_py() or 0
        copies = pc.sum(cached).as_py() or 0
        self.counts += Counts(**known, **tokens, unread=unread, cached=copies)
        # A row of an unknown status is a row all the same.
        self.counts += Counts(invalid=sum(found.values()))

    def _check_answers(self, ours: Mapping[str, pa.ChunkedArray]) -> None:
        for kind, odd in odd_rows(self._spec, ours).items():
            for id in ours["row_id"].filter(odd).to_pylist():
                self._problems.note(kind, str(id))

    # ---- both sides

    def _compare(self, found: pa.Table, part: Part) -> int:
        """Compare the next rows of both sides; return how many of the output are done."""
        ids = found[ROW_ID]
        expected = self._input.peek(ids[0].as_py())
        if expected is None:
            self._surplus.add(ids)
            return len(ids)
        same = _common_length(expected[ROW_ID], ids)
        if not same:
            return self._meet_again(expected, found)
        self._in_gap = self._is_ahead = False
        self._check_folder(part)
        self._check_kept(expected.slice(0, same), found.slice(0, same))
        self.rows_in += same
        self._input.take(same)
        return same

    def _meet_again(self, expected: pa.Table, found: pa.Table) -> int:
        """Pass over rows of both sides up to the nearest pair of the same id."""
        ids = found[ROW_ID]
        all_of_it = max(len(ids), expected.num_rows)
        pair = _nearest_pair(expected[ROW_ID], ids, NEAR)
        pair = pair or _nearest_pair(expected[ROW_ID], ids, all_of_it)
        if pair is None:
            return self._search(expected, ids)
        in_input, in_output = pair
        self._pass_over(expected.slice(0, in_input))
        self._surplus.add(ids.slice(0, in_output))
        return in_output

    def _search(self, expected: pa.Table, ids: pa.ChunkedArray) -> int:
        """Go on in the input if these ids are further ahead in it, else leave them as surplus."""
        if not self._is_ahead and self._searches < MAX_SEARCHES:
            self._is_ahead = self._input.is_ahead(ids.combine_chunks())
        if self._is_ahead:
            self._pass_over(expected)
            return 0
        self._searches += 1
        self._surplus.add(ids)
        return len(ids)

    def _pass_over(self, expected: pa.Table) -> None:
        """Note rows of the input that the output does not have here."""
        if self._in_gap:
            self.rows_left += expected.num_rows
        else:
            self._missing.add(expected[ROW_ID])
        self.rows_in += expected.num_rows
        if expected.num_rows:
            self._input.take(expected.num_rows)

    def _check_folder(self, part: Part) -> None:
        assert self._input.file is not None
        if part.folder != self._input.file.folder:
            self._problems.note(
                "files in the wrong folder", f"{part.key}: rows of {self._input.file.name}"
            )

    def _check_kept(self, expected: pa.Table, found: pa.Table) -> None:
        for name in expected.column_names:
            if name == ROW_ID or expected[name].equals(found[name]):
                continue
            pairs = zip(expected[name].to_pylist(), found[name].to_pylist(), strict=True)
            # As text, because NaN is not equal to itself.
            odd = [row for row, (a, b) in enumerate(pairs) if a != b and repr(a) != repr(b)]
            for row in odd:
                what = f"{name} of {found[ROW_ID][row]}"
                self._problems.note("values that differ from the input's", what)

    def _rest_of_input(self) -> None:
        """Pass over the rows that no file of the output reached."""
        self._in_gap = not self._claims.finished
        begun = self._input.file
        while (expected := self._input.peek(None)) is not None:
            if self._claims.finished and self._input.file is not begun:
                self._note_unanswered_file()
                continue
            self._pass_over(expected)

    def _note_unanswered_file(self) -> None:
        file = self._input.file
        assert file is not None
        rows = self._input.skip_file()
        self.rows_in += rows
        self._problems.note(
            "input files without an answer",
            f"{file.name}: {rows:,} rows; if it came later, quantbatch run --extend answers it",
        )

    def _check_kept_names(self) -> None:
        """Compare the names of the kept columns with those that the spec asks for."""
        keep, there = self._spec.output.keep, set(self._input.kept.names)
        # Not every key of JSON lines is a column, so only what is missing of other formats is told.
        wanted = self._input.columns if keep == "all" else set(keep)
        for name in sorted(wanted - self._input.partition_keys - there):
            self._problems.note("columns that are missing", name)
        for name in sorted(there - set(keep)) if keep != "all" else ():
            self._problems.note("columns that are too many", name)

    def _seen_twice(self, ids: pa.Array, parts: Iterable[Part]) -> pa.Array:
        """Return those ids that are more than once in the output."""
        if not len(ids):
            return ids
        column = self._spec.output.prefix + "row_id"
        found: list[pa.Array] = [pa.array([], pa.string())]
        for part in parts:
            try:
                for batch in part_batches(self._store, part.key, [column]):
                    here = batch[column].combine_chunks()
                    found.append(here.filter(pc.is_in(here, value_set=ids)))
            except (Unreadable, KeyError):
                continue  # noted before
        tally = pc.value_counts(pa.concat_arrays(found))
        return tally.field("values").filter(pc.greater(tally.field("counts"), 1))


def _nearest_pair(a: pa.ChunkedArray, b: pa.ChunkedArray, length: int) -> tuple[int, int] | None:
    """Return where the first items of two arrays are equal, the nearest such pair."""
    a, b = a.slice(0, length), b.slice(0, length)
    places = pc.index_in(b, value_set=a.combine_chunks())
    if places.null_count == len(places):
        return None
    in_a = pc.drop_null(places).to_numpy()
    in_b = np.flatnonzero(pc.is_valid(places).to_numpy())
    nearest = int(np.argmin(in_a + in_b))
    return int(in_a[nearest]), int(in_b[nearest])


def _common_length(a: pa.ChunkedArray, b: pa.ChunkedArray) -> int:
    """Return how many of the first items of two arrays are the same."""
    length = min(len(a), len(b))
    differs = pc.index(pc.equal(a.slice(0, length), b.slice(0, length)), value=False).as_py()
    return length if differs < 0 else int(differs)
