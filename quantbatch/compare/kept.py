"""Widths that are done, kept beside the report until it is written: an interrupted comparison goes
on with those that are left.

The record of a width is one JSON file. It counts for the same rows, model, width, device and
versions only, and only if the reference, which is run again, gives the very same answers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from quantbatch.compare.divergence import Differences
from quantbatch.compare.figures import Loading, Measured, Said
from quantbatch.ledger import versions
from quantbatch.records import Completion, Failure, FinishReason, RequestId
from quantbatch.spec import Storage
from quantbatch.storage import open_store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from quantbatch.compare.candidates import Candidate
    from quantbatch.compare.job import Prepared
    from quantbatch.records import Answer


@dataclass(frozen=True)
class Kept:
    """The records of one comparison.

    Args:
        folder: Where they are, and nothing else is.
        prepared: The comparison.
        device: What it runs on.
    """

    folder: Path
    prepared: Prepared
    device: str

    def load(self, candidate: Candidate, reference: Said) -> Measured | None:
        """Return a width that is done; None if it is not, or was done otherwise."""
        path = self.folder / f"{candidate.name}.json"
        try:
            found = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if found.get("key") != self._key(candidate, reference):
            return None
        return _measured(found)

    def save(self, measured: Measured, candidate: Candidate, reference: Said) -> None:
        """Keep a width that is done."""
        record = {"key": self._key(candidate, reference), **_record(measured)}
        store = open_store(str(self.folder), Storage())
        store.put(f"{candidate.name}.json", json.dumps(record).encode())

    def clear(self) -> None:
        """Forget them all: the report has what they were kept for."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _key(self, candidate: Candidate, reference: Said) -> str:
        prepared = self.prepared
        deciding = [
            prepared.spec.fingerprint(model=prepared.checkpoint.digest),
            candidate.model.model_dump(mode="json"),
            prepared.choices.with_prompts,
            self.device,
            versions(),
            [(row.id, row.prompt_ids) for row in prepared.rows.rows],
            _answers(reference.answers),
        ]
        return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()


def _record(measured: Measured) -> dict[str, Any]:
    found = measured.differences
    assert found is not None, "the reference is always run"
    columns = {field.name: np.asarray(getattr(found, field.name)) for field in fields(found)}
    return {
        "name": measured.name,
        "loading": asdict(measured.loading),
        "generate_s": measured.said.generate_s,
        "answers": _answers(measured.said.answers),
        "differences": {name: column.tolist() for name, column in columns.items()},
    }


def _answers(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [_answer_record(answer) for answer in answers]


def _answer_record(answer: Answer) -> dict[str, Any]:
    if isinstance(answer, Failure):
        return {"kind": answer.kind, "message": answer.message}
    assert isinstance(answer, Completion), "a comparison asks for completions"
    reason = answer.finish_reason.value
    return {"text": answer.text, "token_ids": list(answer.token_ids), "finish_reason": reason}


def _measured(found: dict[str, Any]) -> Measured:
    columns: dict[str, Any] = found["differences"]
    not_finite = columns.pop("not_finite")
    differences: dict[str, Any] = {
        name: np.array(column, _dtype(name)) for name, column in columns.items()
    }
    answers = tuple(_answer(row, answer) for row, answer in enumerate(found["answers"]))
    return Measured(
        found["name"],
        Loading(**found["loading"]),
        Said(answers, found["generate_s"]),
        Differences(**differences, not_finite=not_finite),
    )


def _dtype(column: str) -> type:
    """Return the type of a column of `Differences`; one without tokens does not tell."""
    return {"row_P": np.int64, "in_prompt_P": np.bool_, "same_top_P": np.bool_}.get(
        column, np.float64
    )


def _answer(row: int, found: dict[str, Any]) -> Answer:
    id = RequestId(0, row)
    if "kind" in found:
        return Failure(id, **found)
    reason = FinishReason(found["finish_reason"])
    return Completion(id, found["text"], tuple(found["token_ids"]), reason)
