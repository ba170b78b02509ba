"""What decides the bytes of quantized weights, and whether they are worth keeping."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from quantbatch.spec import FourBit, Int8

if TYPE_CHECKING:
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.spec import Model

FORMAT = 1
"""Version of the cache's records and files."""


def no_use_for(checkpoint: Checkpoint, model: Model) -> str:
    """Say why a cache would gain nothing for a model; empty if it would."""
    if checkpoint.quantized:
        return f"{checkpoint.id} is quantized already"
    if not isinstance(model.resolved().quantization, Int8 | FourBit):
        return f"{checkpoint.id} is loaded without quantizing it"
    return ""


def identity(checkpoint: Checkpoint, model: Model, device: str) -> dict[str, Any]:
    """Return all that decides the bytes of quantized weights, in JSON types.

    Compute type and int8's threshold are not in it: they act on activations. torch is, because the
    mean that double quantization subtracts is its work. On a CPU the last bit of that mean depends
    on the number of threads, for matrices of more than 2 million elements (measured): so do the
    products that make the answers, and the number is not in it.
    """
    quantization = model.quantization
    options: dict[str, Any] = {}
    if isinstance(quantization, FourBit):
        options = {
            "double_quant": quantization.double_quant,
            "storage_dtype": quantization.storage_dtype,
        }
    assert isinstance(quantization, Int8 | FourBit)
    skip_modules = sorted(set(quantization.skip_modules))
    return {
        "format": FORMAT,
        "model": checkpoint.digest,
        "quantization": {"kind": quantization.kind, "skip_modules": skip_modules} | options,
        "dtype": model.dtype,
        "device": torch.device(device).type,
        "versions": {
            name: metadata.version(name) for name in ("bitsandbytes", "torch", "transformers")
        },
    }
