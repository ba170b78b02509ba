"""What `plan` and `status` say, as JSON documents: what a run of a job would do, and how far a job
is by the records on its output.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from quantbatch.errors import InputError, Refused
from quantbatch.job_record import read_job
from quantbatch.ledger import SUMMARY, Ledger, read_document
from quantbatch.model import formats
from quantbatch.model.kv import unpackable
from quantbatch.model.widths import USEFUL_ROWS
from quantbatch.records import Completion, Failure
from quantbatch.spec import FourBit, Int8, JobSpec, Storage
from quantbatch.storage import open_store, redact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.forecast import Forecast, ModelForecast
    from quantbatch.lengths import Lengths
    from quantbatch.model.cards import Card
    from quantbatch.model.widths import Width
    from quantbatch.preflight import Job
    from quantbatch.sample import Sampled
    from quantbatch.spec import Model

SHOWN_NUMBERS = 8
"""Numbers of a vector that a sample shows."""


def describe_plan(job: Job, forecast: Forecast) -> dict[str, Any]:
    """Return what a run of a job would do, and what to expect of it."""
    spec, plan, ledger = job.spec, job.plan, job.ledger
    beyond = {
        "error": "a longer one becomes an error row",
        "truncate_left": "a longer one loses its beginning",
        "truncate_right": "a longer one loses its end",
    }[spec.engine.too_long]
    new_files = len(job.new_generation.known_files) if job.new_generation and ledger.plan else 0
    return {
        "outcome": "nothing_to_do" if ledger.finished and not job.new_generation else "planned",
        "exit_code": 0,
        "name": spec.name,
        "fingerprint": ledger.fingerprint,
        "input": {
            "uri": _shown_uris(spec),
            "rows": plan.rows,
            "files": len(plan.known_files),
            "new_files": new_files,
            "unreadable": job.unreadable,
        },
        "chunks": {"count": plan.chunks, "rows_each": plan.rows_per_chunk},
        "done": {
            "rows": ledger.counts.rows,
            "chunks": _chunks_done(ledger),
            "files": len(ledger.published),
        },
        "model": describe_model(spec.model),
        "memory": _describe_memory(job) if job.memory else None,
        "does_not_fit": job.misfit is not None,
        "card": describe_card(job.card, cards=max(1, int(spec.cluster.gpus_per_replica))),
        "prompt": {
            "max_input_tokens": job.max_input_tokens,
            "max_new_tokens": spec.answer_tokens,
            "beyond": beyond,
            "sample": describe_lengths(forecast.lengths),
        },
        "widths": [describe_width(width) for width in _fitting_first(forecast.widths)],
        "row_tokens": forecast.row_tokens,
        "advice": forecast.advice,
        "output": {
            "uri": redact(ledger.store.uri),
            "files": len(plan.shards),
            "columns": [{"name": f.name, "type": str(f.type)} for f in job.target.schema],
        },
    }


def _shown_uris(spec: JobSpec) -> str:
    uri = spec.input.uri
    return redact(uri if isinstance(uri, str) else ", ".join(uri))


def describe_model(model: Model) -> str:
    """Say which model is loaded, and in how many bits."""
    name = f"{model.id}@{model.revision}" if model.revision else model.id
    match model.resolved().quantization:
        case FourBit(kind=kind, double_quant=double_quant):
            return f"{name}, 4 bits ({kind}{', double quantization' if double_quant else ''})"
        case Int8():
            return f"{name}, 8 bits (int8)"
        case _:
            dtype = model.resolved().dtype
            return f"{name}, {'in its own type' if dtype == 'auto' else dtype}"


def describe_formats(card: Card | None) -> dict[str, Any]:
    """Return what this machine, with a card, does with each format of checkpoints."""
    capability = card.capability if card else None
    machine = formats.Machine.this(capability)
    rows = [row._asdict() | {"how": row.how.value} for row in formats.table(machine)]
    return {
        "outcome": "ok",
        "exit_code": 0,
        "card": card.name if card else None,
        "capability": ".".join(map(str, capability)) if capability else None,
        "packages": dict(sorted(machine.packages.items())),
        "formats": rows,
        "notes": [f"expanded: {formats.ALLOW}", f"refused: {formats.ORIGINAL}"],
    }


def _describe_memory(job: Job) -> dict[str, Any]:
    memory = job.memory
    assert memory is not None
    continuous = job.spec.engine.kind == "continuous"
    memory_tokens = job.max_input_tokens + job.spec.answer_tokens
    return {
        "weights_bytes": memory.weight_bytes,
        "kv_bytes": memory.kv_bytes,
        "kv_bytes_per_token": memory.kv_bytes_per_token,
        "workspace_bytes": memory.workspace_bytes,
        "overhead_bytes": memory.overhead_bytes,
        "reserve_bytes": memory.reserve_bytes,
        "total_bytes": memory.total,
        "batch_size": memory.batch_size,
        "kv_tokens": memory.kv_tokens,
        "step_tokens": memory.step_tokens,
        "static_because": unpackable(job.checkpoint.text_config, memory_tokens)
        if continuous
        else None,
        "card_layers": list(memory.card_layers),
        "device_bytes": memory.device_bytes,
        "fits": None if memory.device_bytes is None else memory.fits,
    }


def describe_card(card: Card | None, *, cards: int = 1) -> dict[str, Any] | None:
    """Return what the cards of a replica have for programs, each."""
    if card is None:
        return None
    return {"name": card.name, "memory_bytes": card.memory_bytes, "count": cards}


def describe_width(width: Width) -> dict[str, Any]:
    """Return what a model takes in one width."""
    return dataclasses.asdict(width) | {
        "bits_per_param": round(width.bits_per_param, 3),
        "quantized_share": round(width.quantized_share, 4),
        "saved_of_32_bits": round(width.saved_of_32_bits, 4),
        "saved_of_16_bits": round(width.saved_of_16_bits, 4),
    }


def _fitting_first(widths: Sequence[Width]) -> list[Width]:
    """Sort the widths of a model that does not fit as it was asked for: what would fit first."""
    if not any(width.chosen and width.verdict == "no" for width in widths):
        return list(widths)
    return sorted(widths, key=lambda width: ("fits", "tight", "no").index(width.verdict or "no"))


def describe_model_plan(forecast: ModelForecast) -> dict[str, Any]:
    """Return what to expect of a model on a card."""
    return {
        "outcome": "planned",
        "exit_code": 0,
        "model": describe_model(forecast.model),
        "card": describe_card(forecast.card),
        "widths": [describe_width(width) for width in _fitting_first(forecast.widths)],
        "row_tokens": forecast.row_tokens,
        "advice": forecast.advice,
    }


def describe_lengths(lengths: Lengths) -> dict[str, Any]:
    """Return how long the sampled prompts are, and what follows for all rows."""
    return {
        "rows": lengths.rows,
        "p50_tokens": lengths.quantile(0.5),
        "p95_tokens": lengths.quantile(0.95),
        "max_tokens": lengths.quantile(1),
        "counted_to_tokens": lengths.counted_to,
        "input_tokens": round(lengths.mean * lengths.total_rows),
        "too_long": lengths.too_long,
        "too_long_expected": lengths.expected(lengths.too_long),
        "unseen_at_most": lengths.unseen_at_most,
        "errors": lengths.errors,
        "errors_expected": lengths.expected(sum(lengths.errors.values())),
    }


def describe_choice(job: Job) -> str | None:
    """Say what `model.bits: auto` was resolved to just now, and for what."""
    if job.chosen_for is None or job.card is None:
        return None
    rows = job.spec.engine.batch_size
    rows = USEFUL_ROWS if rows == "auto" else rows
    tokens = job.chosen_for.lengths.usual_long() + job.spec.answer_tokens
    card = job.card.name or f"a card of {job.card.memory_gib:g} GiB"
    return (
        f"model.bits auto is {describe_model(job.spec.model)}: the widest of 16, 8 and 4 bits with"
        f" room on {card} for {rows} rows of {tokens:,} tokens, or for the most"
    )


def _chunks_done(ledger: Ledger) -> int:
    assert ledger.plan is not None or not ledger.published
    shards = ledger.plan.shards if ledger.plan else ()
    return len(ledger.commits) + sum(s.chunks for s in shards if s.id in ledger.published)


def describe_status(uri: str, storage: Storage) -> dict[str, Any]:
    """Return how far the job on an output is, from its records alone.

    Args:
        uri: The output.
        storage: How to reach it.

    Raises:
        InputError: No job has begun there.
        Refused: The records are those of another version of quantbatch.
    """
    record, ledger = recorded(uri, storage)
    store = ledger.store
    plan, counts = ledger.plan, ledger.counts
    return {
        "outcome": _state(ledger),
        "exit_code": 0,
        "name": record["name"],
        "fingerprint": record["fingerprint"],
        "output": redact(store.uri),
        "model": describe_model(ledger.spec.model),
        "rows": plan.rows if plan else 0,
        "rows_done": counts.rows,
        "counts": counts.to_json(),
        "chunks": plan.chunks if plan else 0,
        "chunks_done": _chunks_done(ledger),
        "files": len(plan.shards) if plan else 0,
        "files_done": len(ledger.published),
        "unreadable": plan.unreadable if plan else {},
        "versions": record["versions"],
        "last_run": read_document(store, SUMMARY),
    }


def _state(ledger: Ledger) -> str:
    if ledger.succeeded():
        return "finished"
    return "input_unreadable" if ledger.finished else "unfinished"


class Recorded(NamedTuple):
    """A job as its output knows it."""

    record: dict[str, Any]
    """What `job.json` holds."""
    ledger: Ledger


def recorded(uri: str, storage: Storage) -> Recorded:
    """Open the job on an output by its records alone.

    Raises:
        InputError: No job has begun there.
        Refused: The records are those of another version of quantbatch.
    """
    store = open_store(uri, storage)
    record = read_job(store)
    if record is None:
        raise InputError(
            f"{redact(store.uri)}: no job has begun here",
            "quantbatch run begins it; check output.uri if it has run",
        )
    return Recorded(record, _ledger(record, uri, storage))


def _ledger(record: dict[str, Any], uri: str, storage: Storage) -> Ledger:
    """Open the ledger by the spec that the output itself keeps: the model need not be there."""
    try:
        spec = JobSpec.model_validate(record["spec"])
        digest = record["identity"]["model.digest"]
    except (ValidationError, KeyError) as error:
        version = record.get("versions", {}).get("quantbatch", "unknown")
        raise Refused(
            f"{redact(uri)}: its records were written by quantbatch {version}",
            "look at it with that version",
        ) from error
    output = spec.output.model_copy(update={"uri": uri, "storage": storage})
    return Ledger.open(spec.model_copy(update={"output": output}), digest)


def describe_sample(row: Sampled) -> dict[str, Any]:
    """Return a sampled row: its prompt and answer, or what is wrong with it."""
    error: dict[str, str] | None = None
    failure = row.error or (row.answer if isinstance(row.answer, Failure) else None)
    if failure:
        error = {"type": failure.kind, "message": failure.message}
    answer = row.answer if isinstance(row.answer, Completion) else None
    return {
        "row_id": row.row_id,
        "prompt": row.prompt if row.error is None else None,
        "prompt_tokens": len(row.prompt_ids),
        "error": error,
        "completion": answer and answer.text,
        "finish_reason": answer and answer.finish_reason.value,
        "completion_tokens": len(answer.token_ids) if answer else 0,
        "answer": {name: _shortened(value) for name, value in row.cells.items()} or None,
    }


def _shortened(value: Any) -> Any:  # noqa: ANN401 - of any column
    """Return the first numbers of a list of many, and dots."""
    is_long = isinstance(value, list) and len(value) > SHOWN_NUMBERS
    return [*value[:SHOWN_NUMBERS], "..."] if is_long else value
