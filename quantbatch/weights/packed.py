"""Loading what somebody else quantized: GPTQ, AWQ, compressed-tensors, FP8, MXFP4.

Whether its codes are expanded is decided in `model/formats.py` and told to transformers, whose own
choice is made late and in silence. gptqmodel is imported by transformers, and only for such a
checkpoint: it sets environment variables and exchanges functions of transformers as it is imported
(7.7).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from typing import TYPE_CHECKING, Any

from quantbatch.weights import gguf

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from quantbatch.model.checkpoint import Checkpoint

GPTQ_BUFFERS = frozenset({"qweight", "qzeros", "scales", "g_idx", "bias"})
FEW_CORES = 2
"""gptqmodel 7.7 fails at its import on machines with no more cores than that ("Virtual pool
'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1"), unless told to use two."""


def prepare(checkpoint: Checkpoint, config: Any) -> None:  # noqa: ANN401 - of transformers
    """Make ready for loading a checkpoint that is quantized already.

    Args:
        checkpoint: The model's files.
        config: Its configuration, of transformers; what it says on quantization is completed.
    """
    match checkpoint.quantized:
        case "gptq" | "awq":
            _import_gptqmodel()
        case "compressed-tensors":
            section = _section(config)
            section["dequantize"] = checkpoint.expanded
            section["use_optimized_inference"] = not checkpoint.expanded
        case "fp8" | "mxfp8" | "mxfp4":
            _section(config)["dequantize"] = checkpoint.expanded
        case _ if checkpoint.gguf:
            gguf.complete(checkpoint, config)
        case _:
            pass


def _import_gptqmodel() -> None:
    """Import gptqmodel, which prints a banner and its doings to stdout, where ours are results."""
    if (os.cpu_count() or 1) <= FEW_CORES:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(FEW_CORES))
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("gptqmodel")
        importlib.import_module("logbar").LogBar.shared().setLevel("ERROR")


def _section(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the part of a configuration on quantization, from where transformers looks for it."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = config.get_text_config(decoder=True).quantization_config
    assert isinstance(found, dict)
    return found


def settle_dtype(loaded: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give an expanded model one type: what was not quantized is left by transformers in the type
    that it has in the file (5.23, `Fp8Dequantize`), and the first product then fails.
    """
    kept = {*(loaded._keep_in_fp32_modules or ()), *(loaded._keep_in_fp32_modules_strict or ())}
    for name, parameter in loaded.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def buffer_bytes(loaded: torch.nn.Module) -> int:
    """Return what the codes and scales of GPTQ and AWQ take, which are buffers. Not counted is what
    a kernel adds to them, such as a table of shifts (64 bytes a layer at 4 bits on a CPU).
    """
    return sum(
        buffer.numel() * buffer.element_size()
        for module in loaded.modules()
        if hasattr(module, "qweight")
        for name, buffer in module.named_buffers(recurse=False)
        if name in GPTQ_BUFFERS
    )
