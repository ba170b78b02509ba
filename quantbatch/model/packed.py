"""What becomes of a checkpoint that somebody else quantized: its tensors once they are expanded, or
their bytes as they are kept.

Names and shapes are those of the formats as their makers write them: GPTQ and AWQ of gptqmodel,
compressed-tensors of llm-compressor, FP8 of DeepSeek and Qwen, MXFP4 of gpt-oss.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from quantbatch.model.formats import quant_section
from quantbatch.model.headers import TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantbatch.model.checkpoint import Checkpoint

BESIDE_WEIGHTS = (
    *(".weight_scale", ".weight_scale_inv", ".weight_zero_point", ".weight_g_idx"),
    *(".weight_shape", ".weight_global_scale", ".activation_scale", "_proj_scales"),
    *(".input_scale", ".input_zero_point", ".input_global_scale"),
)
"""Ends of names of what belongs to a weight's codes, and is gone when they are expanded."""

PAIRED = frozenset({"compressed-tensors", "fp8", "mxfp8", "mxfp4"})
"""Formats of which each tensor of codes has one of scales beside it, by its name."""
WEIGHT_SCALES = (".weight_scale", ".weight_scale_inv", "_proj_scales")
CODES = frozenset({"F8_E4M3", "F8_E5M2", "I8"})
"""Types, in the words of safetensors, that mean nothing without a scale."""


def dense_tensors(checkpoint: Checkpoint) -> Iterator[TensorInfo]:
    """Yield the tensors of a checkpoint as they are once its codes are expanded.

    The shape of a matrix of compressed-tensors is that of its codes; where these don't fill a
    32-bit word, as with 3 bits, it may be up to a word wider than the matrix is.
    """
    for tensor in checkpoint.tensors:
        if tensor.name.endswith(BESIDE_WEIGHTS) and checkpoint.quantized != "gguf":
            continue
        yield _dense(tensor, checkpoint)


def _dense(tensor: TensorInfo, checkpoint: Checkpoint) -> TensorInfo:
    name, dtype, shape = tensor
    if name.endswith("_blocks"):  # MXFP4: (experts, out, groups, 16), two codes a byte
        *rows, groups, codes = shape
        return TensorInfo(name.removesuffix("_blocks"), "BF16", (*rows, groups * codes * 2))
    if name.endswith(".weight_packed"):
        *rows, columns = shape
        width = columns * 2 if dtype == "U8" else columns * 32 // _code_bits(checkpoint)
        return TensorInfo(name.removesuffix("_packed"), "BF16", (*rows, width))
    return tensor


def _code_bits(checkpoint: Checkpoint) -> int:
    groups = quant_section(checkpoint.config)["config_groups"]
    return int(next(iter(groups.values()))["weights"]["num_bits"])


def code_bytes(tensor: TensorInfo, checkpoint: Checkpoint) -> int | None:
    """Return what a tensor of an FP8 checkpoint takes that is kept as it is; None for others.

    transformers keeps scales as float32: those of compressed-tensors one for each row, however many
    the file has (5.23).
    """
    name, dtype, shape = tensor
    match checkpoint.quantized:
        case "compressed-tensors" if name.endswith((".weight_scale", ".input_scale")):
            return 0  # counted with its matrix
        case "compressed-tensors" if dtype in CODES:
            return tensor.numel + 4 * shape[0]
        case "fp8" if name.endswith((".weight_scale_inv", ".activation_scale")):
            return 4 * tensor.numel
        case _:
            return None


def code_count(tensor: TensorInfo, checkpoint: Checkpoint) -> int:
    """Return how many parameters the codes of a tensor stand for that is kept as it is."""
    if tensor.name.endswith(".qweight"):
        return tensor.numel * 32 // int(quant_section(checkpoint.config).get("bits", 4))
    if tensor.name.endswith("_blocks"):
        return tensor.numel * 2
    return tensor.numel if tensor.name.endswith(".weight") else 0


def is_scale(name: str) -> bool:
    """Tell whether a tensor belongs to the scales that bitsandbytes stores."""
    return name.endswith(".SCB") or ".quant_state." in name


def without_partner(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the tensors of codes that have no scales, and of scales that have no codes.

    transformers would take such codes for weights, without an error (FP8, 5.23, measured).
    """
    names = {tensor.name for tensor in checkpoint.tensors}
    for name, dtype, _ in checkpoint.tensors:
        weight = name.removesuffix("_packed").removesuffix("_blocks")
        if name.endswith(WEIGHT_SCALES):
            weight = re.sub(r"_scales?(_inv)?$", "", name)
            if not names & {weight, f"{weight}_packed", f"{weight}_blocks"}:
                yield name
        elif name != weight or (dtype in CODES and not name.endswith(BESIDE_WEIGHTS)):
            module = name.removesuffix(".weight")
            scales = {f"{weight}_scale", f"{weight}_scale_inv", f"{weight}_scales"}
            if not names & (scales | {f"{module}.scale", f"{module}.qscale_weight"}):
                yield name
