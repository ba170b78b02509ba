"""Which type of number a device computes in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantbatch.model.footprint import DType, weight_dtype
from quantbatch.spec import FourBit

if TYPE_CHECKING:
    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.spec import Model

BFLOAT16_CPU_FLAGS = ("avx512_bf16", "amx_bf16")


def resolve(checkpoint: Checkpoint, model: Model, device: str) -> Model:
    """Return the model's section with its types chosen for a device.

    A checkpoint in bfloat16 is loaded as float16 on a card without bfloat16 (before Ampere). On a
    CPU, 16 bits are kept only where it multiplies bfloat16 itself: elsewhere bfloat16 is 4 times
    slower than float32 (measured).
    """
    model = model.resolved()
    own, fast = weight_dtype(checkpoint, model), fast_dtype(device)
    if model.dtype == "auto" and own not in ("float32", fast):
        own = "float32" if device == "cpu" else "float16"
    if checkpoint.quantized == "awq" and device != "cpu":
        own = "float16"  # transformers casts it in any case: its kernels have no other (5.23)
    quantization = model.quantization
    if isinstance(quantization, FourBit) and quantization.compute_dtype == "auto":
        quantization = quantization.model_copy(update={"compute_dtype": fast})
    return model.model_copy(update={"dtype": own, "quantization": quantization})


def capability(device: str) -> tuple[int, int] | None:
    """Return the compute capability of a card; None for a CPU."""
    return None if device == "cpu" else torch.cuda.get_device_capability(device)


def fast_dtype(device: str) -> DType:
    """Return the type that a device multiplies fastest in, with the range of bfloat16 if it can."""
    if device == "cpu":
        flags = torch.cpu.get_capabilities()
        return "bfloat16" if any(flags.get(name) for name in BFLOAT16_CPU_FLAGS) else "float32"
    with torch.cuda.device(device):
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float16"
