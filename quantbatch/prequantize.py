"""Filling the cache of quantized weights before a job needs it: here, or on a node of the cluster.

Entries are for one kind of device: a card and a CPU round differently.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantbatch.checks import check_weight_cache
from quantbatch.documents import describe_model
from quantbatch.draining import Drain
from quantbatch.errors import JobError, SpecError
from quantbatch.preflight import settled
from quantbatch.sample import best_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantbatch.spec import JobSpec


def prequantize(
    spec: JobSpec, *, on_cluster: bool = False, say: Callable[[str], None]
) -> dict[str, Any]:
    """See that a job's cache has its quantized weights, whole; return what is there as a document.

    Args:
        spec: The job; its input and output need not be there.
        on_cluster: Whether to quantize on the job's Ray cluster instead of in this process.
        say: Told what is being done.

    Raises:
        JobError: The spec names no cache, the model is not quantized here, the cache can't be
            read or written, or the model does not fit.
    """
    if spec.model.cache is None:
        hint = "set it: --set model.cache=s3://my-bucket/weights, or a folder"
        raise SpecError(JobError("model.cache: the spec names no cache to fill", hint))
    check_weight_cache(spec)
    spec = settled(spec).resolved()
    fill = _fill_there if on_cluster else _fill_here
    return {"exit_code": 0, "name": spec.name, "model": describe_model(spec.model)} | fill(
        spec, say
    )


def _fill_here(spec: JobSpec, say: Callable[[str], None]) -> dict[str, Any]:
    device = best_device(spec)
    if device == "cpu" and spec.cluster.gpus_per_replica:
        say("there is no card here: the model is quantized on the CPU, and the entry is for CPUs")
    return _fill(spec, device, str(Path.cwd()))


def _fill_there(spec: JobSpec, say: Callable[[str], None]) -> dict[str, Any]:
    from quantbatch import cluster

    with cluster.connected(spec.cluster) as device, Drain().listening(), cluster.explained():
        say(f"the model is quantized on the cluster, on {device}")
        there = partial(_fill, spec, device, str(Path.cwd()))
        return cluster.run_once(spec, device, there)


def _fill(spec: JobSpec, device: str, folder: str) -> dict[str, Any]:
    from quantbatch.weights import filling  # imports torch

    return filling.fill(spec, device=device, folder=folder).to_json()
