"""One file of requests in, one file of responses out: a job without a spec.

Beside the output, in `<output>.job`, are the job's spec and its records; the same command finds
them and goes on. The output appears when all of it is answered, whole and in the input's order, and
beside it the file of the requests that failed, if there are any.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from quantbatch.batchfile.lines import errors_key
from quantbatch.errors import JobError, Refused, SpecError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence


class OneFile(NamedTuple):
    """Where all of such a job is."""

    output: Path

    @property
    def errors(self) -> Path:
        """The file of the requests that failed."""
        return self.output.with_name(errors_key(self.output.name))

    @property
    def folder(self) -> Path:
        """The job's own folder."""
        return self.output.with_name(f"{self.output.name}.job")

    @property
    def spec(self) -> Path:
        """The job's spec."""
        return self.folder / "job.yaml"

    @property
    def finished(self) -> Path:
        """Is there from when the job puts its output: what is in its place before is somebody's."""
        return self.folder / "finished"

    @property
    def records(self) -> Path:
        """The job's output folder."""
        return self.folder / "output"


def begin(input: Path, output: Path, *, model: str, bits: int | str | None) -> OneFile:
    """Write the spec of a job over one file of requests.

    Args:
        input: The requests.
        output: Where the responses are to be.
        model: A folder, a GGUF file or a repository.
        bits: As in `model.bits`.

    Raises:
        JobError: The input is not there, or the output is somebody's.
    """
    if not input.is_file():
        raise SpecError(JobError(f"--openai-batch {input}: there is no such file"))
    if not output.name.endswith(".jsonl"):
        raise SpecError(JobError(f"--output {output}: should end in .jsonl"))
    made = OneFile(output.absolute())
    if not made.finished.exists() and (there := _first_there(made.output, made.errors)):
        raise Refused(f"{there} exists", "choose another name, or remove it")
    fields: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", input.stem).lstrip("._-")[:63] or "batch",
        "input": {"uri": str(input.absolute()), "format": "openai-batch"},
        "model": {"id": str(Path(model).absolute()) if Path(model).exists() else model},
        "output": {"uri": str(made.records)},
    }
    if bits is not None:
        fields["model"]["bits"] = bits
    try:
        made.folder.mkdir(parents=True, exist_ok=True)
        made.spec.write_text(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise StorageError(f"{made.folder}: {error.strerror}") from error
    return made


def _first_there(*paths: Path) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def finish(job: OneFile) -> None:
    """Put the lines of a finished job together where they were asked for.

    Raises:
        StorageError: They can't be written there.
    """
    parts = sorted(job.records.glob("part-*.jsonl"))
    failed = [path for path in parts if path.name.endswith(".errors.jsonl")]
    try:
        job.finished.touch()
        if failed:
            _join(failed, job.errors)
        else:
            job.errors.unlink(missing_ok=True)
        _join([path for path in parts if path not in failed], job.output)
    except OSError as error:
        raise StorageError(f"{job.output}: {error.strerror}") from error


def _join(parts: Sequence[Path], target: Path) -> None:
    """Write files one after another; the whole appears at once."""
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with scratch.open("xb") as joined:
            for part in parts:
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, joined, 1 << 20)
            joined.flush()
            os.fsync(joined.fileno())
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
