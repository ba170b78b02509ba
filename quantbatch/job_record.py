"""Whose an output is: the record that the first driver claims there, and who is refused by it.

    OUT/_quantbatch/job.json    format, name, fingerprint, identity, spec, versions, created, claim

`identity` is what decides the output: the spec's deciding fields and the model's digest.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from quantbatch.commits import JOB
from quantbatch.errors import Refused
from quantbatch.spec import JobSpec
from quantbatch.storage import PRIVATE, redact

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantbatch.storage import Store

FORMAT = 2
"""Version of the records in `_quantbatch/`; another version is refused."""
_SHOWN_CHARS = 80


def refuse_strangers(store: Store) -> None:
    """Refuse an output that holds something though no job has begun on it."""
    for info in store.list():
        if info.key.split("/")[0] != PRIVATE:
            raise Refused(
                f"{redact(store.uri)}: not empty ({info.key}), and not the output of a job",
                "choose an empty output.uri",
            )


def read_job(store: Store) -> dict[str, Any] | None:
    """Return the record of the job that has begun on an output; None if there is none.

    Raises:
        Refused: It is damaged, or of another format.
    """
    try:
        found = json.loads(store.read(JOB))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if isinstance(found, dict) and "format" in found:
        refuse_other_format(store, found)
    if not isinstance(found, dict) or not {"format", "identity", "spec"} <= found.keys():
        raise Refused(
            f"{redact(store.uri)}/{JOB} is damaged: it holds no record of a job",
            "restore it, or choose another output.uri and run the job again",
        )
    return found


def refuse_other_format(store: Store, job: Mapping[str, Any]) -> None:
    """Refuse records of another version than ours, which may mean something else."""
    if job["format"] != FORMAT:
        raise Refused(
            f"{redact(store.uri)}: written in format {job['format']}, this is format {FORMAT}",
            "use the version of quantbatch that wrote it, or another output.uri",
        )


def refuse_other_job(store: Store, job: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse to go on with a job that another spec or another model began.

    Args:
        store: Of the output.
        job: Its record.
        identity: What decides what the job that was asked for writes.

    Raises:
        Refused: They differ; named is in what.
    """
    where = redact(store.uri)
    refuse_other_format(store, job)
    before = _grown_identity(job)
    changed = [
        f"{name} was {_beside(before.get(name), identity.get(name))}"
        for name in {**before, **identity}
        if before.get(name) != identity.get(name)
    ]
    if changed:
        raise Refused(
            f"{where} belongs to another job: {'; '.join(changed)}",
            "undo the change to continue that job, or choose another output.uri for this one",
        )


def _grown_identity(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a job's output, with the fields that came after it began.

    Their defaults stand for what was done before there were such fields.
    """
    known: dict[str, Any] = job["identity"]
    try:
        return JobSpec.model_validate(job["spec"]).deciding() | known
    except ValidationError:  # a field of then is gone: what differs is told by the names of then
        return known


def _beside(was: object, now: object) -> str:
    """Show two JSON values; of long ones, what is around the place where they begin to differ."""
    texts = [json.dumps(value, sort_keys=True) for value in (was, now)]
    if max(map(len, texts)) <= _SHOWN_CHARS:
        return ", now ".join(texts)
    pairs = enumerate(zip(*texts, strict=False))
    differs = next((at for at, (a, b) in pairs if a != b), min(map(len, texts)))
    start = max(0, differs - _SHOWN_CHARS // 2)
    shown = [text[start : start + _SHOWN_CHARS] for text in texts]
    before = "..." if start else ""
    after = ["..." if len(text) > start + _SHOWN_CHARS else "" for text in texts]
    return ", now ".join(f"{before}{s}{end}" for s, end in zip(shown, after, strict=True))
