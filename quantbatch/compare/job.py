"""A comparison from its beginning to its end: `prepare` here, `measure` where the card is.

`compare` does both in this process; `jobs/compare_bits.py` sends the second to a cluster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantbatch import checks, sizing
from quantbatch.compare.candidates import Candidate, candidates_of, name_of, plan_field
from quantbatch.compare.rows import spread_rows
from quantbatch.draining import Drain
from quantbatch.errors import DoesNotFit, JobError, ModelError, SpecError
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.spec import Generate

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantbatch.compare.candidates import Field
    from quantbatch.compare.figures import Measured
    from quantbatch.compare.kept import Kept
    from quantbatch.compare.rows import ComparedRows
    from quantbatch.compare.runner import FirstRun, Setting
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.spec import JobSpec

Report = dict[str, Any]
"""A document of JSON types."""

UNFINISHED = "_unfinished"
"""Folder beside the report for widths that are done, until all are."""
DEFAULT_BITS = "16,8,4"
DEFAULT_ROWS = 300
"""If none of 300 labels flips, fewer than 1 % do; 64 rows are enough for the divergence alone."""


@dataclass(frozen=True)
class Choices:
    """What is compared, as the user says it."""

    bits: str = DEFAULT_BITS
    rows: int = DEFAULT_ROWS
    reference: str | None = None
    gold: str | None = None
    with_prompts: bool = False


@dataclass(frozen=True)
class Prepared:
    """A comparison that may start."""

    spec: JobSpec
    """The job, greedy."""
    choices: Choices
    checkpoint: Checkpoint
    candidates: tuple[Candidate, ...]
    reference: str | None
    """Name of the width that was asked for as the reference."""
    rows: ComparedRows
    max_tokens: int
    samples: bool
    """Whether the job itself would draw its answers, which are compared greedily all the same."""

    @property
    def has_form(self) -> bool:
        """Whether the job's answers have a form, which would hide what a model would have said."""
        task = self.spec.task
        return isinstance(task, Generate) and task.response is not None


@dataclass(frozen=True)
class Outcome:
    """What was measured."""

    reference: Measured
    again: Measured
    """The reference in other batches."""
    others: tuple[Measured, ...]
    skipped: dict[str, str]
    """Widths that could not take part, with the reason."""
    device: str


def compare(spec: JobSpec, choices: Choices, out: Path, say: Callable[[str], None]) -> Report:
    """Compare in this process, write the report and return it.

    Args:
        spec: The job.
        choices: What to compare.
        out: Folder of the report. Widths that are done are kept there until it is written: after an
            interruption the same call goes on with the others.
        say: Told what is being done.

    Raises:
        JobError: The comparison can't run.
    """
    from quantbatch.compare import report
    from quantbatch.compare.kept import Kept
    from quantbatch.sample import best_device

    prepared = prepare(spec, choices)
    report.check_folder(out, spec.output)
    device = best_device(spec)
    if device == "cpu" and spec.cluster.gpus_per_replica:
        say("there is no card here: the models run on the CPU")
    kept = Kept(out / UNFINISHED, prepared, device)
    outcome = measure(prepared, device=device, folder=str(Path.cwd()), say=say, kept=kept)
    document = report.describe(prepared, outcome)
    report.save(document, out)
    kept.clear()
    return document


def compare_there(spec: JobSpec, choices: Choices, out: Path, say: Callable[[str], None]) -> Report:
    """Do the same with the models on the job's Ray cluster; nothing is kept on the way."""
    from quantbatch import cluster
    from quantbatch.compare import report

    prepared = prepare(spec, choices)
    report.check_folder(out, spec.output)
    with cluster.connected(spec.cluster) as device, Drain().listening(), cluster.explained():
        say(f"the models run on the cluster, on {device}")
        here = str(Path.cwd())
        there = partial(measure, prepared, device=device, folder=here, say=_quiet)
        outcome = cluster.run_once(spec, device, there)
    document = report.describe(prepared, outcome)
    report.save(document, out)
    return document


def _quiet(_: str) -> None:
    """Say nothing: what a process of Ray prints is lost or comes in between."""


def prepare(spec: JobSpec, choices: Choices) -> Prepared:
    """Check what can be checked without a card, and read and render the rows.

    Raises:
        JobError: The comparison can't run, with the reason and the remedy.
    """
    if spec.engine.kind in ("echo", "llama_cpp"):
        raise SpecError(
            JobError(
                f"engine.kind is {spec.engine.kind}: it has no model whose bits could be compared",
                "compare with --set engine.kind=continuous",
            )
        )
    if spec.task.kind != "generate":
        raise SpecError(
            JobError(
                f"task.kind is {spec.task.kind}: only generated answers are compared",
                "compare with --set task.kind=generate, or run the job at both bit widths",
            )
        )
    samples = spec.sampling.temperature > 0
    greedy = spec.sampling.model_copy(update={"temperature": 0.0, "n": 1, "logprobs": None})
    # Any number of bits is about to be asked for: what the job says is but one of them.
    plain = spec.model.model_copy(update={"bits": None, "quantization": None})
    checkpoint = open_checkpoint(plain)
    model = spec.model.model_copy(update={"bits": None})
    spec = spec.model_copy(update={"sampling": greedy, "model": model})
    reference, bits = None, choices.bits
    if choices.reference is not None:
        reference = name_of(choices.reference, "--reference", checkpoint)
        bits = f"{reference},{bits}"
    candidates = candidates_of(bits, model, checkpoint)
    limit = checks.input_limit(spec, checkpoint)
    rows = spread_rows(spec, checkpoint, choices.rows, choices.gold)
    max_tokens = limit + greedy.max_new_tokens
    return Prepared(
        spec, choices, checkpoint, tuple(candidates), reference, rows, max_tokens, samples
    )


def measure(
    prepared: Prepared,
    *,
    device: str,
    folder: str,
    say: Callable[[str], None],
    kept: Kept | None = None,
) -> Outcome:
    """Run each width, the reference first; one model at a time.

    Args:
        prepared: What to compare.
        device: `cuda` or `cpu`.
        folder: What a relative path of the model is relative to.
        say: Told what is being done.
        kept: Takes widths that are done, and has those of an interrupted comparison.

    Raises:
        JobError: No width fits, or the reference does not run.
    """
    from quantbatch.compare.runner import Setting, run_candidate

    setting = Setting(
        prepared.spec,
        prepared.rows.rows,
        device,
        prepared.max_tokens,
        folder,
        prepared.choices.with_prompts,
    )
    field = _field(prepared, device, folder)
    for name, why in field.skipped.items():
        say(f"{name} is skipped: {why}")
    first = _first_run(setting, field, say)
    skipped, others = dict(field.skipped), []
    for candidate in (planned.candidate for planned in field.fitting[1:]):
        done = kept.load(candidate, first.reference.said) if kept else None
        if done is not None:
            others.append(done)
            say(f"{candidate.name}: done before")
            continue
        began = time.perf_counter()
        try:
            measured = run_candidate(setting, candidate, first.reference)
        except (DoesNotFit, ModelError) as error:
            skipped[candidate.name] = error.problem.split("\n", 1)[0]
            say(f"{candidate.name} is skipped: {skipped[candidate.name]}")
            continue
        others.append(measured)
        if kept:
            kept.save(measured, candidate, first.reference.said)
        say(f"{candidate.name}: {len(setting.rows)} rows in {time.perf_counter() - began:.1f} s")
    return Outcome(first.measured, first.again, tuple(others), skipped, device)


def _field(prepared: Prepared, device: str, folder: str) -> Field:
    from quantbatch.weights import dtypes, peak

    spec = prepared.spec
    limit = prepared.max_tokens - spec.sampling.max_new_tokens
    work = sizing.work_of(spec, prepared.checkpoint, limit)
    named = sizing.card_of(spec)
    rooms = [
        peak.device_bytes(device, spec.cluster.gpus_per_replica),
        sizing.share_bytes(spec.cluster, named) if named else None,
    ]
    room = min((size for size in rooms if size is not None), default=None)
    models = [
        Candidate(candidate.name, candidate.model.seen_from(folder))
        for candidate in prepared.candidates
    ]
    capability = dtypes.capability(device)
    return plan_field(models, prepared.reference, work, room, capability)


def _first_run(setting: Setting, field: Field, say: Callable[[str], None]) -> FirstRun:
    from quantbatch.compare.runner import run_reference

    candidate = field.fitting[0].candidate
    began = time.perf_counter()
    first = run_reference(setting, candidate)
    took = time.perf_counter() - began
    say(f"{candidate.name}, the reference: {len(setting.rows)} rows, twice, in {took:.1f} s")
    return first
