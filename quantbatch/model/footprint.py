"""What the weights of a model take, in bytes, from shapes alone.

The sums are exact: bitsandbytes keeps codes and scales for each quantized matrix, and the formulas
here equal the loaded tensors to the byte. Embeddings, the output head, norms and biases stay as
they are. So do the experts of a mixture of experts, which are no nn.Linear in transformers 5
(https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849): a model of 30 billion
parameters that are mostly experts hardly shrinks at "4 bits".
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from quantbatch.errors import ModelError
from quantbatch.model.formats import stored_quantization
from quantbatch.model.packed import code_bytes, code_count, dense_tensors
from quantbatch.model.sizes import LAYER_COUNTS, layer_count
from quantbatch.spec import FourBit, Int8, Unquantized

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.headers import TensorInfo
    from quantbatch.spec import Model, Quantization

DType = Literal["bfloat16", "float16", "float32"]

ITEM_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
STORED_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
"""Bytes of an element by safetensors' name of its type; 1 for all others."""
STORED_DTYPES: dict[str, DType] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

BLOCK = 64
"""Elements that share a scale. Fixed in transformers: BitsAndBytesConfig has no option for it."""
NESTED_BLOCK = 256
"""Scales that share a scale of their own under double quantization (arXiv 2305.14314)."""


HEADS = frozenset({"lm_head", "embed_out", "head", "output"})
ROUTERS = frozenset({"gate", "router"})
EMBEDDING = re.compile(r"embed|(^|_)emb(_|$)|^w[tp]e$")
SCALES = (".SCB", ".scales", ".weight_scale")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
"""Number of the layer that a tensor belongs to."""
CONV1D_MODELS = frozenset({"gpt2", "gpt-sw3", "openai-gpt"})
"""Models whose linear layers are transformers' Conv1D, with weights stored as (in, out)."""
UNQUANTIZED_MODELS = frozenset({"falcon"})
"""Models whose linear layers are a class of their own, which transformers passes over (5.23)."""


class Part(Enum):
    """What a tensor of a checkpoint becomes."""

    LINEAR = "linear"
    """A linear layer, which bitsandbytes quantizes."""
    KEPT = "kept"
    """Stays in the model's type: embeddings, head, norms, biases, routers, skipped layers."""
    EXPERT = "expert"
    """A weight of an expert: stays in the model's type, too."""
    UNUSED = "unused"
    """No parameter of the loaded model: an old buffer, a head that is tied to the embedding, or a
    layer that guesses further tokens."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters and bytes of a loaded model, by what becomes of them."""

    params: Mapping[Part, int]
    bytes: Mapping[Part, int]
    largest_linear: tuple[int, int]
    """Out and in features of the largest linear layer; zeros if there is none."""

    @property
    def total_bytes(self) -> int:
        """All weights on the device."""
        return sum(self.bytes.values())

    @property
    def total_params(self) -> int:
        """All parameters."""
        return sum(self.params.values())


def four_bit_bytes(numel: int, *, double_quant: bool) -> int:
    """Return the bytes of an nf4 or fp4 matrix: two codes a byte, a scale for each block, tables.

    Without double quantization the scales are float32; with it they are codes of 8 bits with a
    float32 scale for each 256 of them, a table of 256 float32 values, and their mean.
    """
    codes, blocks, table = math.ceil(numel / 2), math.ceil(numel / BLOCK), 4 * 16
    if not double_quant:
        return codes + table + 4 * blocks
    return codes + table + blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 * 256 + 4


def int8_bytes(out_features: int, in_features: int) -> int:
    """Return the bytes of an LLM.int8() matrix: a byte for each element, a scale for each row."""
    return out_features * in_features + 4 * out_features


def weigh(checkpoint: Checkpoint, model: Model) -> Weights:
    """Compute what the weights take once they are loaded as the spec asks.

    Raises:
        ModelError: There is nothing to quantize, or a name in skip_modules matches no layer.
    """
    quantization = model.resolved().quantization
    if checkpoint.quantized is None and quantization is not None:
        _check_skip_modules(checkpoint, quantization)
    found = _weigh(checkpoint, model)
    if not found.params[Part.LINEAR] and not isinstance(quantization, Unquantized):
        raise ModelError(
            f"{checkpoint.id} has no layer that bitsandbytes quantizes",
            "load it with model.bits 16",
        )
    return found


class LayeredWeights(NamedTuple):
    """Bytes of a loaded model by where they go when it is spread over cards."""

    besides: int
    """Embeddings and norms: on the first card."""
    layers: tuple[int, ...]
    head: int
    """The output head, if it is not tied to the embedding: on the last card."""


def weigh_layers(checkpoint: Checkpoint, model: Model) -> LayeredWeights:
    """Compute what each layer takes once it is loaded as the spec asks."""
    dtype = weight_dtype(checkpoint, model)
    model = model.resolved().model_copy(update={"dtype": dtype})
    count = layer_count(checkpoint.text_config)
    parts: list[list[TensorInfo]] = [[] for _ in range(count + 2)]
    for tensor in checkpoint.tensors:
        found = LAYER.search(tensor.name)
        if _is_beyond_layers(tensor, checkpoint):
            continue
        if found:
            parts[1 + int(found[1])].append(tensor)
        else:
            is_head = _module(tensor.name).rpartition(".")[2] in HEADS
            parts[-1 if is_head else 0].append(tensor)
    besides, *layers, head = (
        _weigh(replace(checkpoint, tensors=tuple(tensors)), model).total_bytes for tensors in parts
    )
    return LayeredWeights(besides, tuple(layers), head)


def _weigh(checkpoint: Checkpoint, model: Model) -> Weights:
    if checkpoint.quantized is not None and not checkpoint.expanded:
        return _weigh_stored(checkpoint, model)
    tensors = dense_tensors(checkpoint) if checkpoint.expanded else checkpoint.tensors
    quantization = model.resolved().quantization
    assert quantization is not None
    item_bytes = ITEM_BYTES[weight_dtype(checkpoint, model)]
    params, sizes = Counter[Part](), Counter[Part]()
    shapes = [(0, 0)]
    for tensor in tensors:
        part = _part_or_skipped(tensor, checkpoint, quantization)
        params[part] += tensor.numel
        if part is Part.LINEAR:
            shapes.append(_linear_shape(tensor, checkpoint))
            sizes[part] += _linear_bytes(*shapes[-1], quantization, item_bytes)
        else:
            sizes[part] += tensor.numel * item_bytes
    del params[Part.UNUSED], sizes[Part.UNUSED]
    return Weights(params, sizes, max(shapes, key=math.prod))


def _weigh_stored(checkpoint: Checkpoint, model: Model) -> Weights:
    """Weigh a checkpoint that is quantized already: codes and scales are as large as on disk."""
    item_bytes = ITEM_BYTES[weight_dtype(checkpoint, model)]
    codes_a_byte = 2 if isinstance(stored_quantization(checkpoint.config), FourBit) else 1
    names = {tensor.name for tensor in checkpoint.tensors}
    params, sizes = Counter[Part](), Counter[Part]()
    largest = 0
    for tensor in checkpoint.tensors:
        base, is_blob, _ = tensor.name.partition(".quant_state.")
        if part_of(tensor, checkpoint) is Part.UNUSED:
            continue
        if is_blob:
            # JSON, of which only the mean of the nested scales gets to the device.
            sizes[Part.LINEAR] += 4 if f"{base}.nested_absmax" in names else 0
        elif (size := code_bytes(tensor, checkpoint)) is not None:
            params[Part.LINEAR] += code_count(tensor, checkpoint)
            sizes[Part.LINEAR] += size
        elif tensor.dtype in STORED_DTYPES and not _is_scale(tensor.name):
            params[Part.KEPT] += tensor.numel
            sizes[Part.KEPT] += tensor.numel * item_bytes
        else:
            codes = code_count(tensor, checkpoint) * codes_a_byte
            params[Part.LINEAR] += codes
            sizes[Part.LINEAR] += tensor.numel * STORED_BYTES.get(tensor.dtype, 1)
            largest = max(largest, codes)
    return Weights(params, sizes, (largest, 1))


def _is_scale(name: str) -> bool:
    return ".weight." in name or name.endswith(SCALES)


def weight_dtype(checkpoint: Checkpoint, model: Model) -> DType:
    """Return the type of the weights that are not quantized: the spec's, or the checkpoint's own.

    The checkpoint's own is what its config.json says, as in transformers, else the type of most of
    its parameters.
    """
    asked = model.resolved().dtype
    if asked != "auto":
        return asked
    for config in (checkpoint.config, checkpoint.text_config):
        for dtype in get_args(DType):
            if dtype in (config.get("dtype"), config.get("torch_dtype")):
                return dtype  # type: ignore[no-any-return]
    sizes: Counter[DType] = Counter({"float32": 0})
    for tensor in checkpoint.tensors:
        if tensor.dtype in STORED_DTYPES:
            sizes[STORED_DTYPES[tensor.dtype]] += tensor.numel
    return max(sizes, key=sizes.__getitem__)


def _part_or_skipped(
    tensor: TensorInfo, checkpoint: Checkpoint, quantization: Quantization
) -> Part:
    part = part_of(tensor, checkpoint)
    if part is Part.LINEAR and _is_skipped(_module(tensor.name), _skip_modules(quantization)):
        return Part.KEPT
    return part


def part_of(tensor: TensorInfo, checkpoint: Checkpoint) -> Part:
    """Tell from its name and shape what a tensor becomes, with no skip_modules of the user's."""
    module = _module(tensor.name)
    last = module.rpartition(".")[2]
    if _is_buffer(tensor) or (last in HEADS and _is_tied(checkpoint.config)):
        return Part.UNUSED
    if _is_beyond_layers(tensor, checkpoint):
        return Part.UNUSED
    if "experts" in module.split("."):
        return Part.EXPERT
    is_matrix = tensor.name.endswith(".weight") and len(tensor.shape) == 2
    # Granite's router is a layer within, in its files only (5.23).
    is_router = last in ROUTERS or module.endswith(".router.layer")
    is_special = last in HEADS or is_router or EMBEDDING.search(last)
    passed_over = checkpoint.config.get("model_type") in UNQUANTIZED_MODELS
    return Part.LINEAR if is_matrix and not is_special and not passed_over else Part.KEPT


def _module(tensor_name: str) -> str:
    return tensor_name.rpartition(".")[0]


def _is_buffer(tensor: TensorInfo) -> bool:
    """Recognize what transformers does not load: masks and frequencies in old checkpoints of GPT-2,
    GPT-NeoX and Llama, and a mark that bitsandbytes leaves beside int8 weights.
    """
    if tensor.name.endswith(("masked_bias", "rotary_emb.inv_freq", ".weight_format")):
        return True
    return tensor.name.endswith(".bias") and len(tensor.shape) > 1


def _is_beyond_layers(tensor: TensorInfo, checkpoint: Checkpoint) -> bool:
    """Recognize the layers that guess further tokens, after the last one or under a name of their
    own: transformers does not load them (DeepSeek V3, GLM 4.5, Qwen3-Next).
    """
    if "mtp" in tensor.name.split("."):
        return True
    found = LAYER.search(tensor.name)
    config = checkpoint.text_config
    if found is None or all(config.get(name) is None for name in LAYER_COUNTS):
        return False
    return int(found[1]) >= layer_count(config)


def _is_tied(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _skip_modules(quantization: Quantization) -> list[str]:
    return [] if isinstance(quantization, Unquantized) else quantization.skip_modules


def _is_skipped(module: str, keys: Iterable[str]) -> bool:
    """Tell whether skip_modules means a module, as transformers 5.23 decides it
    (`should_convert_module`): by its beginning up to a dot, as a regular expression, or by its end.
    """
    return any(
        re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(key) for key in keys
    )


def _check_skip_modules(checkpoint: Checkpoint, quantization: Quantization) -> None:
    linears = [t.name for t in checkpoint.tensors if part_of(t, checkpoint) is Part.LINEAR]
    for key in _skip_modules(quantization):
        try:
            found = any(_is_skipped(_module(name), [key]) for name in linears)
        except re.error as error:
            raise ModelError(f"skip_modules: {key!r} is no regular expression: {error}") from error
        if not found:
            names = sorted({_module(name).rpartition(".")[2] for name in linears})
            raise ModelError(
                f"skip_modules: {key!r} matches no linear layer of {checkpoint.id}",
                f"they are called {', '.join(names)}",
            )


def _linear_shape(tensor: TensorInfo, checkpoint: Checkpoint) -> tuple[int, int]:
    rows, columns = tensor.shape
    transposed = checkpoint.config.get("model_type") in CONV1D_MODELS
    return (columns, rows) if transposed else (rows, columns)


def _linear_bytes(
    out_features: int, in_features: int, quantization: Quantization, item_bytes: int
) -> int:
    match quantization:
        case Unquantized():
            return out_features * in_features * item_bytes
        case Int8():
            return int8_bytes(out_features, in_features)
        case FourBit(double_quant=double_quant):
            return four_bit_bytes(out_features * in_features, double_quant=double_quant)
