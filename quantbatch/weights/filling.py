"""Storing a job's quantized weights in its cache, and nothing else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbatch import storage
from quantbatch.checks import input_limit
from quantbatch.errors import JobError, SpecError
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.memory import plan_memory
from quantbatch.sizing import work_of
from quantbatch.weights import dtypes, loading, peak
from quantbatch.weights.cache import NoEntryError, WeightCache
from quantbatch.weights.identity import no_use_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.spec import JobSpec, Model
    from quantbatch.weights.cache import Record


class Filled(NamedTuple):
    """An entry that is whole now."""

    cache: WeightCache
    record: Record
    stored: bool
    """Whether we stored it, and it was not there already."""
    damage: str
    """What was wrong with the entry that it replaces; empty if there was none."""
    elapsed_s: float

    def to_json(self) -> dict[str, Any]:
        """Return it as a document."""
        return {
            "outcome": "stored" if self.stored else "already_there",
            "uri": self.cache.uri,
            "key": self.cache.key,
            "of": self.cache.document,
            "files": len(self.record.files),
            "bytes": self.record.total_bytes,
            "damage": self.damage,
            "elapsed_s": round(self.elapsed_s, 2),
        }


def fill(spec: JobSpec, *, device: str, folder: str) -> Filled:
    """Quantize a job's model and store it, unless a whole entry is there.

    Args:
        spec: The job.
        device: `cpu`, `cuda` or `cuda:<number>`.
        folder: What relative paths of the model are relative to.

    Raises:
        JobError: It can't be quantized, or not be stored.
    """
    started = time.monotonic()
    model = spec.model.seen_from(folder)
    checkpoint = open_checkpoint(model, dtypes.capability(device))
    model = dtypes.resolve(checkpoint, model, device)
    if no_use := no_use_for(checkpoint, model):
        raise SpecError(JobError(f"model.cache: {no_use}", "only what is quantized here is kept"))
    cache = WeightCache.of(checkpoint, model, device)
    assert cache is not None
    try:
        with cache.whole() as (record, _):
            return Filled(cache, record, False, "", time.monotonic() - started)
    except NoEntryError as error:
        version, damage = error.version + 1, str(error)
    # Better now than after minutes of quantizing.
    storage.probe(cache.store)
    layers = _card_layers(spec, checkpoint, model, device)
    plain = model.model_copy(update={"cache": None})
    loaded = loading.load(checkpoint, plain, device, card_layers=layers)
    stored = cache.put(loaded.model, version)
    return Filled(cache, stored.record, stored.ours, damage, time.monotonic() - started)


def _card_layers(spec: JobSpec, checkpoint: Checkpoint, model: Model, device: str) -> Sequence[int]:
    """Return how a model that needs several cards is spread over them, as its replicas do it."""
    if device == "cpu" or spec.cluster.gpus_per_replica <= 1:
        return ()
    work = work_of(spec, checkpoint, input_limit(spec, checkpoint))
    device_bytes = peak.device_bytes(device, spec.cluster.gpus_per_replica)
    return plan_memory(checkpoint, model, work, device_bytes).card_layers
