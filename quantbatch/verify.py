"""Is every row of the input answered exactly once? A proof from the two ends of a job.

For this `verify` trusts nothing that a run kept for itself: neither the plan nor the commit
records. It lists the files that readers see, reads them and the input side by side, and compares
row ids and kept columns as they come. Memory is bounded by a window of rows and by the number of
rows out of place, not by the size of the job.

What is proven: each row of the input has exactly one row in the output, the rows of an input file
are in its order, and the columns that are kept hold the input's values; status and answer of a row
go together; and the counts in `_SUCCESS` are those of the rows.

That an answer is the one that was computed can't be seen from the two ends. For it each file is
held against the records in between, see `verify_records`: it has the bytes, or at least the rows,
of the attempts that were committed, and none of its rows was answered again since. That a prompt is
the one that the template makes of the row is proven if it is asked for, see `verify_prompts`.
"""

from __future__ import annotations

import functools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from quantbatch.errors import InputError
from quantbatch.job_record import refuse_other_format
from quantbatch.records import Counts
from quantbatch.reread import InputRows, Unreadable
from quantbatch.reread_lines import part_schema
from quantbatch.spec import Embed
from quantbatch.storage import PRIVATE, open_store, redact
from quantbatch.verify_problems import Problem, Problems
from quantbatch.verify_records import Committed
from quantbatch.verify_rows import Claims, Part, SideBySide, our_fields

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantbatch.spec import JobSpec
    from quantbatch.storage import Store

READS_AT_ONCE = 16


@dataclass(frozen=True)
class Verdict:
    """What is true of an output."""

    name: str
    output: str
    finished: bool
    """Whether the output claims to be whole."""
    rows_in: int
    files_in: int
    rows_out: int
    files_out: int
    rows_left: int
    """Rows of the input that an unfinished job has not published yet."""
    files_as_committed: int
    """Files of the output that were found to be what was committed."""
    prompts_same: int | None
    """Rows whose prompts are rendered now as they were then; None if that was not asked."""
    counts: Counts
    """As counted from the output's rows."""
    problems: tuple[Problem, ...]

    @property
    def outcome(self) -> str:
        """`proven`, `problems`, or `unfinished`: what is there is right, and more is to come."""
        if self.problems:
            return "problems"
        return "proven" if self.finished else "unfinished"

    @property
    def exit_code(self) -> int:
        """0 proven, 1 problems, 75 unfinished."""
        return {"proven": 0, "problems": 1, "unfinished": 75}[self.outcome]

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON types."""
        return {
            "outcome": self.outcome,
            "exit_code": self.exit_code,
            "name": self.name,
            "output": self.output,
            "rows_in": self.rows_in,
            "files_in": self.files_in,
            "rows_out": self.rows_out,
            "files_out": self.files_out,
            "rows_left": self.rows_left,
            "files_as_committed": self.files_as_committed,
            "prompts_same": self.prompts_same,
            "counts": self.counts.to_json(),
            "problems": [
                {"kind": p.kind, "count": p.count, "examples": list(p.examples)}
                for p in self.problems
            ],
        }


def verify(spec: JobSpec, *, prompts: bool = False) -> Verdict:
    """Read input and output of a job again and compare them.

    Args:
        spec: The job.
        prompts: Render the prompts again too, and compare them with those that were answered: for
            this the model's tokenizer has to be there.

    Raises:
        InputError: There is no job on the output, or the input can't be listed.
        Refused: The output's records are of another format.
        JobError: The prompts can't be rendered again.
        StorageError: A store can't be reached.
    """
    store = open_store(spec.output.uri, spec.output.storage)
    problems = Problems()
    claims = _claims(store, problems)
    parts = _parts(store, claims, problems, lines=spec.output.format == "openai-batch")
    spec = _with_dimensions(store, parts, spec)
    schema = _schema(store, parts, spec, problems)
    ours = {field.name for field in our_fields(spec)}
    rows = InputRows(spec.input, pa.schema([f for f in schema if f.name not in ours]))
    files_in = len(rows.left)
    both = SideBySide(spec, store, rows, claims, problems)
    committed = Committed(store, problems, spec.output.prefix)
    # A file that does not go with the input is wrong already: how, is told.
    proven = sum(both.read(part, schema) and committed.check(part) for part in parts)
    both.end(parts)
    prompts_same = None
    if prompts:
        from quantbatch.verify_prompts import check_prompts  # takes seconds to import

        prompts_same = check_prompts(spec, problems)
    counts = both.counts
    if claims.counts and spec.output.format == "openai-batch":
        # The line of a failed request does not tell its prompt's tokens.
        counts = replace(counts, prompt_tokens=claims.counts.prompt_tokens)
    if claims.counts and claims.counts != counts:
        said = f"_SUCCESS says {claims.counts.to_json()}, the files have "
        problems.note("counts that are wrong", f"{said}{both.counts.to_json()}")
    return Verdict(
        name=spec.name,
        output=redact(store.uri),
        finished=claims.finished,
        rows_in=both.rows_in,
        files_in=files_in,
        rows_out=both.counts.rows,
        files_out=len(parts),
        rows_left=both.rows_left,
        files_as_committed=proven,
        prompts_same=prompts_same,
        counts=both.counts,
        problems=problems.found(),
    )


def _claims(store: Store, problems: Problems) -> Claims:
    """Read what the output says of itself: `_SUCCESS`, and the records of published shards."""
    job = _document(store, f"{PRIVATE}/job.json", problems)
    if job is None:
        raise InputError(
            f"{redact(store.uri)}: no job has begun here",
            "quantbatch run begins it; check output.uri if it has run",
        )
    if "format" in job:
        refuse_other_format(store, job)
    fingerprint = str(job.get("fingerprint"))
    published: dict[str, int] = {}
    keys = [info.key for info in store.list(f"{PRIVATE}/shards")]
    with ThreadPoolExecutor(READS_AT_ONCE, "records") as pool:
        read = functools.partial(_document, store, problems=problems)
        for key, shard in zip(keys, pool.map(read, keys), strict=True):
            if counts := _counts(shard or {}, key, problems):
                published[str((shard or {}).get("key"))] = counts.rows
    success = _document(store, "_SUCCESS", problems)
    if success is None:
        return Claims(False, published, None, fingerprint)
    named = {str(file["file"]): int(file["rows"]) for file in success.get("files", [])}
    if success.get("fingerprint") != fingerprint:
        problems.note("manifests of another job", "_SUCCESS")
    # While new files are being added to a finished job, its old manifest still stands.
    if set(published) - set(named):
        return Claims(False, published, None, fingerprint)
    counts = _counts(success, "_SUCCESS", problems)
    # Nor are its counts those of the files while rows are being answered again.
    return Claims(True, named, None if _retry_is_open(store) else counts, fingerprint)


def _retry_is_open(store: Store) -> bool:
    names = {info.key.rpartition("/")[2] for info in store.list(f"{PRIVATE}/retries")}
    begun = {name.partition(".")[0] for name in names}
    return any(f"{number}.done.json" not in names for number in begun)


def _document(store: Store, key: str, problems: Problems) -> dict[str, Any] | None:
    """Read a JSON object; None if it is not there, and empty if it is damaged."""
    try:
        found = json.loads(store.read(key))
    except FileNotFoundError:
        return None
    except ValueError as error:
        problems.note("records that are damaged", f"{key}: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def _counts(document: Mapping[str, Any], key: str, problems: Problems) -> Counts | None:
    try:
        return Counts(**document["counts"])
    except (KeyError, TypeError):
        if document:
            problems.note("records that are damaged", f"{key}: no counts")
    return None


def _parts(store: Store, claims: Claims, problems: Problems, *, lines: bool) -> list[Part]:
    """List the files that readers see, in the order in which they hold the input."""
    seen = {
        info.key: info.size
        for info in store.list()
        if not any(name.startswith(("_", ".")) for name in info.key.split("/"))
    }
    parts = []
    ending = "jsonl" if lines else "parquet"
    for key in seen:
        beside = key.removesuffix(".errors.jsonl") + ".jsonl"
        if lines and beside != key + ".jsonl" and beside in seen:
            continue  # read with the file that it is beside
        numbered = re.search(rf"(?:^|/)part-(\d+)\.{ending}$", key)
        if numbered is None or (claims.finished and key not in claims.rows):
            problems.note("files that are not the job's", key)
        if numbered is not None:
            parts.append(Part(key, int(numbered[1])))
    for key in claims.rows:
        if key not in seen:
            problems.note("files that are gone", key)
    return sorted(parts, key=lambda part: (part.number, part.key))


def _with_dimensions(store: Store, parts: list[Part], spec: JobSpec) -> JobSpec:
    """Return a spec with `task.dimensions: auto` as the output has it; verify needs no model."""
    if not isinstance(spec.task, Embed) or spec.task.dimensions != "auto":
        return spec
    size, name = 1, f"{spec.output.prefix}embedding"
    for part in parts:
        try:
            found = part_schema(store, part.key)
        except Unreadable:
            continue  # reading it will tell
        if name in found.names and pa.types.is_fixed_size_list(found.field(name).type):
            size = found.field(name).type.list_size
            break
    return spec.model_copy(update={"task": spec.task.model_copy(update={"dimensions": size})})


def _schema(store: Store, parts: list[Part], spec: JobSpec, problems: Problems) -> pa.Schema:
    """Return the schema of the output: that of the first file that has one."""
    for part in parts:
        try:
            schema = part_schema(store, part.key)
        except Unreadable:
            continue  # reading it will tell
        odd = [
            f.name
            for f in our_fields(spec)
            if f.name not in schema.names or schema.field(f.name).type != f.type
        ]
        if not odd:
            return schema
        problems.note(
            "columns that are missing or of another type", f"{part.key}: {', '.join(odd)}"
        )
    return pa.schema(our_fields(spec))
