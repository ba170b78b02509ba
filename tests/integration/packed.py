"""Tiny checkpoints in the formats of others, written by hand in the published layouts, so that the
weights that each of them stands for are known.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
GROUP = 32


class Packed(NamedTuple):
    """A quantized checkpoint and what it stands for."""

    tensors: Tensors
    section: dict[str, Any]
    """Its quantization_config."""
    dense: Tensors
    """The weights that its codes mean, by the names of the original."""


def write_packed(original: Path, folder: Path, packed: Packed) -> None:
    """Write a quantized checkpoint, and beside it (`<folder>-dense`) what it means, in float32."""
    dense = load_file(original / "model.safetensors") | packed.dense
    _write(original, folder, packed.tensors, {"quantization_config": packed.section})
    float32 = {name: tensor.float() for name, tensor in dense.items()}
    _write(original, dense_twin(folder), float32, {"dtype": "float32"})


def dense_twin(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-dense")


def _write(original: Path, folder: Path, tensors: Tensors, changes: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    config = json.loads((original / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def pack(
    original: Path, one: Callable[[str, torch.Tensor, Packed], None], **section: Any
) -> Packed:
    """Quantize each linear layer of a model by a function that adds to what it is given."""
    packed = Packed({}, section, {})
    for name, tensor in load_file(original / "model.safetensors").items():
        if name.endswith(("proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            one(name.removesuffix(".weight"), tensor.float(), packed)
        else:
            packed.tensors[name] = tensor
    return packed


# ---- FP8 of DeepSeek and Qwen


def fp8(original: Path) -> Packed:
    """8-bit floats with a float32 scale for each block of 32 by 32 (128 in published models)."""

    def one(name: str, weight: torch.Tensor, packed: Packed) -> None:
        rows, columns = weight.shape
        blocks = weight.view(rows // GROUP, GROUP, columns // GROUP, GROUP)
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448
        codes = (blocks / scales).to(torch.float8_e4m3fn)
        packed.tensors[f"{name}.weight"] = codes.view(weight.shape)
        packed.tensors[f"{name}.weight_scale_inv"] = scales[:, 0, :, 0]
        packed.dense[f"{name}.weight"] = (codes.float() * scales).view(weight.shape)

    return pack(original, one, quant_method="fp8", weight_block_size=[GROUP, GROUP], fmt="e4m3",
                activation_scheme="dynamic")  # fmt: skip


def mxfp8(original: Path) -> Packed:
    """8-bit floats with a power of two, stored as its exponent, for each 32 of a row."""

    def one(name: str, weight: torch.Tensor, packed: Packed) -> None:
        groups = weight.view(weight.shape[0], -1, GROUP)
        exponents = (groups.abs().amax(2, keepdim=True) / 448).log2().ceil()
        codes = (groups / exponents.exp2()).to(torch.float8_e4m3fn)
        packed.tensors[f"{name}.weight"] = codes.view(weight.shape)
        packed.tensors[f"{name}.weight_scale_inv"] = (exponents[..., 0] + 127).to(torch.uint8)
        packed.dense[f"{name}.weight"] = (codes.float() * exponents.exp2()).view(weight.shape)

    return pack(original, one, quant_method="mxfp8", weight_block_size=[1, GROUP], fmt="e4m3",
                activation_scheme="dynamic", scale_fmt="ue8m0")  # fmt: skip


# ---- compressed-tensors of llm-compressor


def _compressed(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def _scheme(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "num_bits": bits, "strategy": strategy, "symmetric": True} | more


def compressed_packed(original: Path, bits: int, columns_a_group: int = GROUP) -> Packed:
    """Integers of any width in 32-bit words, the first in the lowest bits, each more by half the
    range; a bfloat16 scale for each 32 of a row.
    """
    half = 1 << (bits - 1)

    def one(name: str, weight: torch.Tensor, packed: Packed) -> None:
        groups = weight.view(weight.shape[0], -1, columns_a_group)
        scales = (groups.abs().amax(2, keepdim=True) / (half - 1)).bfloat16()
        codes = (groups / scales.float()).round().clamp(-half, half - 1)
        packed.tensors[f"{name}.weight_packed"] = words(
            (codes + half).to(torch.int64).view(weight.shape), bits
        )
        packed.tensors[f"{name}.weight_scale"] = scales[..., 0]
        packed.tensors[f"{name}.weight_shape"] = torch.tensor(weight.shape)
        # compressed-tensors multiplies in the type of the scales.
        packed.dense[f"{name}.weight"] = (codes.bfloat16() * scales).view(weight.shape)

    scheme = _scheme("int", bits, "group", group_size=columns_a_group)
    return pack(original, one, **_compressed("pack-quantized", scheme, None))


def compressed_int8(original: Path) -> Packed:
    """8-bit integers for weights and activations, a bfloat16 scale for each row."""

    def one(name: str, weight: torch.Tensor, packed: Packed) -> None:
        scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
        codes = (weight / scales.float()).round().clamp(-128, 127)
        packed.tensors[f"{name}.weight"] = codes.to(torch.int8)
        packed.tensors[f"{name}.weight_scale"] = scales
        packed.dense[f"{name}.weight"] = codes.bfloat16() * scales

    inputs = _scheme("int", 8, "token", dynamic=True)
    weights = _scheme("int", 8, "channel")
    return pack(original, one, **_compressed("int-quantized", weights, inputs))


def compressed_fp8(original: Path, strategy: str) -> Packed:
    """8-bit floats for weights and activations, a scale for each row or matrix."""

    def one(name: str, weight: torch.Tensor, packed: Packed) -> None:
        most = (
            weight.abs().amax(1, keepdim=True)
            if strategy == "channel"
            else weight.abs().max()[None]
        )
        scales = (most / 448).bfloat16()
        codes = (weight / scales.float()).to(torch.float8_e4m3fn)
        packed.tensors[f"{name}.weight"] = codes
        packed.tensors[f"{name}.weight_scale"] = scales
        packed.dense[f"{name}.weight"] = codes.bfloat16() * scales

    inputs = _scheme("float", 8, "token", dynamic=True)
    weights = _scheme("float", 8, strategy)
    return pack(original, one, **_compressed("float-quantized", weights, inputs))


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the codes of each row into 32-bit words, the first into the lowest bits."""
    per_word = 32 // bits
    assert 32 % bits == 0
    grouped = codes.view(*codes.shape[:-1], -1, per_word)
    packed = (grouped << (bits * torch.arange(per_word))).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


# ---- GPTQ and AWQ


def gptq(original: Path, bits: int, *, form: str = "gptq", by_activity: bool = False) -> Packed:
    """Codes packed along the input, eight to a word at 4 bits; zero points along the output, stored
    less one but in the form `gptq_v2`; a float16 scale for each group and output; `g_idx` names the
    group of each input, which are in any order if they were sorted by activity.
    """
    less = 0 if form == "gptq_v2" else 1

    def one(name: str, weight: torch.Tensor, packed: Packed) -> None:
        columns = weight.shape[1]
        order = torch.randperm(columns) if by_activity else torch.arange(columns)
        place = order.argsort()
        codes, zeros, scales = _asymmetric(weight[:, order], bits)
        dense = ((codes - zeros) * scales.float()).view(weight.shape)
        packed.tensors[f"{name}.qweight"] = words(codes.view(weight.shape)[:, place], bits).T
        packed.tensors[f"{name}.qzeros"] = words((zeros[..., 0] - less).T.contiguous(), bits)
        packed.tensors[f"{name}.scales"] = scales[..., 0].T
        packed.tensors[f"{name}.g_idx"] = (place // GROUP).to(torch.int32)
        packed.dense[f"{name}.weight"] = dense[:, place]

    torch.manual_seed(4)
    return pack(original, one, quant_method="gptq", bits=bits, group_size=GROUP, sym=False,
                desc_act=by_activity, checkpoint_format=form)  # fmt: skip


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ's kernels want the eight outputs of a word in this order."""


def awq(original: Path) -> Packed:
    """Codes and zero points packed along the output, eight to a word, in an order of their own."""

    def one(name: str, weight: torch.Tensor, packed: Packed) -> None:
        codes, zeros, scales = _asymmetric(weight, 4)
        packed.tensors[f"{name}.qweight"] = _awq_words(codes.view(weight.shape).T)
        packed.tensors[f"{name}.qzeros"] = _awq_words(zeros[..., 0].T)
        packed.tensors[f"{name}.scales"] = scales[..., 0].T
        packed.dense[f"{name}.weight"] = ((codes - zeros) * scales.float()).view(weight.shape)

    return pack(original, one, quant_method="awq", bits=4, group_size=GROUP, zero_point=True,
                version="gemm")  # fmt: skip


def _awq_words(codes: torch.Tensor) -> torch.Tensor:
    ordered = codes.reshape(codes.shape[0], -1, 8)[..., AWQ_ORDER]
    return words(ordered.reshape(codes.shape), 4)


def _asymmetric(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes (out, groups, 32), zero points and scales (out, groups, 1)."""
    top = (1 << bits) - 1
    groups = weight.view(weight.shape[0], -1, GROUP)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scales = ((high - low) / top).half()
    zeros = (-low / scales.float()).round().clamp(1, top)
    codes = (groups / scales.float() + zeros).round().clamp(0, top)
    return codes.long(), zeros.long(), scales


# ---- MXFP4 of gpt-oss

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def mxfp4(original: Path) -> Packed:
    """Random codes for the experts of a gpt-oss: two a byte, with an exponent for each 32."""
    packed = Packed({}, {"quant_method": "mxfp4", "modules_to_not_convert": []}, {})
    random = torch.Generator().manual_seed(3)
    for name, tensor in load_file(original / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed.tensors[name] = tensor
            continue
        experts, columns, rows = tensor.shape  # of x @ weight
        shape = (experts, rows, columns // 32, 16)
        codes = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        exponents = torch.randint(119, 123, shape[:-1], generator=random, dtype=torch.uint8)
        packed.tensors[f"{name}_blocks"] = codes
        packed.tensors[f"{name}_scales"] = exponents
        both = torch.stack([codes & 15, codes >> 4], -1).long()
        values = torch.tensor(FP4)[both] * (exponents.float() - 127).exp2()[..., None, None]
        packed.dense[name] = values.reshape(experts, rows, columns).transpose(1, 2)
    return packed
