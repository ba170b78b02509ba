"""The prompts of a job a second time, for `verify --prompts`.

A commit record has the digest of its chunk's prompts as a run rendered and tokenized them, wherever
that was. Rendering them again, here and now, shows whether that was done with the same template,
the same tokenizer and the same values of the rows: a worker with another version of a library, or
with another file in the model's folder, shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantbatch import preflight, rows, stages
from quantbatch.commits import Commit, commit_key, record_of
from quantbatch.errors import Refused
from quantbatch.records import unpack

if TYPE_CHECKING:
    from quantbatch.records import Chunk
    from quantbatch.spec import JobSpec
    from quantbatch.storage import Store
    from quantbatch.verify_problems import Problems


def check_prompts(spec: JobSpec, problems: Problems) -> int:
    """Render all committed chunks again, and note those whose prompts were others.

    Left out are rows that were answered again, in which other limits may apply, chunks with rows of
    a file that could not be read, and those of a version that kept no digest.

    Returns:
        The number of rows whose prompts are the same.

    Raises:
        JobError: The model's tokenizer is not there, or the input is another one.
    """
    # New files are none of this.
    job = preflight.examine(spec, extend=True)
    same = 0
    for chunk in job.ledger.plan.each_chunk() if job.ledger.plan else ():
        commit = _commit(job.ledger.store, chunk, problems)
        if commit is None or not commit.prompts or commit.counts.unread:
            continue
        _, found = unpack(stages.read_and_render(chunk, job=job.read_job))
        facts = rows.facts_of(found)
        if facts.trouble:
            problems.note("prompts that can't be rendered now", facts.trouble.problem)
        elif facts.prompts != commit.prompts:
            problems.note("prompts that are others now", _named(chunk))
        else:
            same += chunk.rows
    return same


def _commit(store: Store, chunk: Chunk, problems: Problems) -> Commit | None:
    key = commit_key(chunk.id)
    try:
        return record_of(Commit, store.read(key))
    except FileNotFoundError:
        return None  # not answered yet
    except Refused as error:
        problems.note("records that are damaged", f"{key}: {error.problem}")
        return None


def _named(chunk: Chunk) -> str:
    first, last = chunk.slices[0], chunk.slices[-1]
    end = last.first_row + last.rows - 1
    return f"among {first.file}:{first.first_row} to {last.file}:{end}"
