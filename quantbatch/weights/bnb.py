"""Quantizing with bitsandbytes, at 4 or 8 bits.

Its options' defaults are wrong for us and silent: fp4 with float32 compute for 4 bits, and a skip
list that replaces the library's and so quantizes the output head. None is left to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
import transformers
from transformers.quantizers.base import get_keys_to_not_convert

from quantbatch.spec import FourBit, Int8
from quantbatch.weights import pieces
from quantbatch.weights.dtypes import fast_dtype
from quantbatch.weights.pretrained import empty_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from quantbatch.spec import Model

# Most of what is called of it has no types, or wrong ones (5.23).
hf: Any = transformers

pieces.register()


def quantization_config(
    quantization: Int8 | FourBit,
    config: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Return a BitsAndBytesConfig that leaves nothing open.

    Args:
        quantization: What to quantize to.
        config: The model's configuration, of transformers.
    """
    skip_modules = _skip_modules(config, quantization.skip_modules)
    eight, four = Int8(), FourBit()
    match quantization:
        case Int8():
            eight = quantization
        case FourBit():
            four = quantization
    return hf.BitsAndBytesConfig(
        load_in_8bit=isinstance(quantization, Int8),
        load_in_4bit=isinstance(quantization, FourBit),
        llm_int8_threshold=eight.threshold,
        llm_int8_skip_modules=skip_modules,
        llm_int8_enable_fp32_cpu_offload=False,
        llm_int8_has_fp16_weight=False,
        bnb_4bit_quant_type=four.kind,
        bnb_4bit_use_double_quant=four.double_quant,
        bnb_4bit_compute_dtype=None if four.compute_dtype == "auto" else four.compute_dtype,
        bnb_4bit_quant_storage=four.storage_dtype,
    )


def _skip_modules(config: Any, own: list[str]) -> list[str] | None:  # noqa: ANN401
    """Return what not to quantize: the library's list and the user's.

    A list that is given replaces the library's, and with it the output head would be quantized,
    which tripled the divergence (measured).
    """
    if not own:
        return None  # the library's own
    empty = empty_model(config)
    return sorted({*get_keys_to_not_convert(empty), *own})


def settle_four_bit_layers(loaded: PreTrainedModel, model: Model, device: str) -> str:
    """Make 4-bit layers compute in the type that the spec says, and keep their weights as loaded.

    A checkpoint that was saved quantized brings its own compute type, which transformers prefers to
    the one asked for. And on CPUs with AVX512-BF16, bitsandbytes 0.50 would repack each matrix at
    its first use. That is off, though it is 2.5 times faster for up to 16 rows (1.5 for 32, nothing
    from 64 on): it ignores the compute type, undoes double quantization, takes 6 bytes for each
    element of a matrix while it works, and fails on matrices whose height is no multiple of 32.

    Returns:
        The compute type of the model.
    """
    layers = [m for m in loaded.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    if not layers:
        return model.dtype
    quantization = model.quantization
    asked = quantization.compute_dtype if isinstance(quantization, FourBit) else "auto"
    compute_dtype = fast_dtype(device) if asked == "auto" else asked
    for layer in layers:
        layer.compute_dtype = getattr(torch, compute_dtype)
        layer.compute_type_is_set = True
        layer.support_avx512bf16_for_cpu = False
    return compute_dtype


def parameter_bytes(loaded: torch.nn.Module) -> int:
    """Return what a model's parameters take, the scales and tables of quantized ones included."""
    return sum(_tensor_bytes(tensor) for tensor in _parameter_tensors(loaded))


def _parameter_tensors(loaded: torch.nn.Module) -> Iterator[torch.Tensor]:
    for parameter in loaded.parameters():
        yield parameter
        if isinstance(parameter, bitsandbytes.nn.Int8Params):
            yield parameter.SCB
        elif isinstance(parameter, bitsandbytes.nn.Params4bit):
            state = parameter.quant_state
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
