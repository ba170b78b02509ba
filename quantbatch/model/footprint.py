"""What a model, its cache and a forward pass take, in bytes, from shapes alone.

*Weights* are exact. bitsandbytes keeps codes and scales for each quantized matrix, and the formulas
here equal the loaded tensors to the byte. Embeddings, the output head, norms and biases stay as
they are. So do the experts of a mixture of experts, which are no nn.Linear in transformers 5
(https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849): a model of 30 billion
parameters that are mostly experts hardly shrinks at "4 bits".

The *KV cache* holds a key and a value for each token, layer and key-value head; layers with a
sliding window stop growing. The *workspace* is what a forward pass needs for a moment.
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

ACTIVATIONS_OF_HIDDEN, ACTIVATIONS_OF_INNER = 6, 3
"""Most activations alive at once in a prefill, in multiples of the hidden and the intermediate size
for each token: residual, norm, queries, keys, values, output; gate, up and their product. Read from
transformers' Llama; not measured on a card."""
LOGIT_BYTES = 2 + 4 + 30
"""For each row and word of the vocabulary: 16-bit logits, the float32 copy that `generate` makes of
them, and what choosing a token takes, most of all sorting for top_p: the warped scores, sorted
scores and their places, probabilities and their sums (4 + 4 + 8 + 4 + 4), masks and the result
(2 + 4). Counted in transformers/generation/logits_process.py, 5.23."""
GREEDY_LOGIT_BYTES = 2 + 4
"""The same for a row that takes the likeliest token and nothing else."""
COUNT_BYTES = 2 * (1 + 4)
"""For each row and word of the vocabulary, in the continuous engine with penalties: whether it is
in the prompt and how often in the answer, kept for each place of a batch and taken out for a
step."""
QUERY_BLOCK = 256
"""Tokens of a prompt whose attention scores are there at once in the continuous engine, for models
that compute them as a whole."""
INT8_OUTPUT_BYTES = 4 + 2
"""int8 products are accumulated in 32 bits and then scaled to 16 (bitsandbytes 0.50)."""

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
EAGER_MODELS = frozenset(
    {
        *("bloom", "codegen", "gemma2", "gpt_neo", "gpt_oss", "gptj", "granite_swa", "mpt"),
        *("granitemoe_swa", "mimo_v2_flash", "openai-gpt", "vaultgemma", "xglm"),
    }
)
"""Models without SDPA, whose attention scores are there as a whole (`_supports_sdpa`, 5.23)."""
UNPACKABLE_MODELS = frozenset(
    {
        *("bloom", "codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gpt_oss", "gptj", "mpt"),
        *("openai-gpt", "stablelm", "xglm", "biogpt", "cpmant", "blt"),
    }
)
"""Models that do not let their attention be exchanged (`_supports_attention_backend`, 5.23), or ask
for more than scale, window and softcap (gpt_oss: sinks). Those with state of another kind are known
by their layers."""
SLIDING_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}
"""Each how many-th layer sees everything, where an older config.json leaves that to the code."""
ALL_SLIDING = frozenset({"mistral", "mixtral", "phi3", "starcoder2"})
"""Models that, without `layer_types`, use their `sliding_window` in every layer."""


# ---- weights


class Part(Enum):
    """What a tensor of a checkpoint becomes."""

    LINEAR = "linear"
    """A linear layer, which bitsandbytes quantizes."""
    KEPT = "kept"
    """Stays in the model's type: embeddings, head, norms, biases, routers, skipped layers."""
    EXPERT = "expert"
    """A weight of an expert: stays in the model's type, too."""
    UNUSED = "unused"
    """No parameter of the loaded model: an old buffer, or a head that is tied to the embedding."""


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
    count = _first(checkpoint.text_config, "num_hidden_layers", "n_layer", "n_layers")
    parts: list[list[TensorInfo]] = [[] for _ in range(count + 2)]
    for tensor in checkpoint.tensors:
        found = LAYER.search(tensor.name)
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
    if "experts" in module.split("."):
        return Part.EXPERT
    is_matrix = tensor.name.endswith(".weight") and len(tensor.shape) == 2
    is_special = last in HEADS or last in ROUTERS or EMBEDDING.search(last)
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


# ---- KV cache


@dataclass(frozen=True, slots=True)
class KvShape:
    """What the cache of one row takes, as a function of its tokens."""

    growing_bytes_per_token: int
    """Layers that see everything."""
    sliding_bytes_per_token: int
    """Layers that see a window."""
    window_tokens: int
    fixed_bytes: int
    """State of linear attention, whatever the length."""
    layers: int

    @property
    def bytes_per_token(self) -> int:
        """What one more token takes as long as no window is full."""
        return self.growing_bytes_per_token + self.sliding_bytes_per_token

    def row_bytes(self, tokens: int) -> int:
        """What a row of so many tokens takes while it is decoded."""
        seen = min(tokens, max(0, self.window_tokens - 1))
        growing = tokens * self.growing_bytes_per_token
        return growing + seen * self.sliding_bytes_per_token + self.fixed_bytes

    def prefill_row_bytes(self, tokens: int) -> int:
        """What a row takes right after its prompt was read: layers with a window still hold all of
        it, since transformers keeps a view of the whole until the next step (5.23, measured).
        """
        return tokens * self.bytes_per_token + self.fixed_bytes


def kv_shape(config: Mapping[str, Any], item_bytes: int) -> KvShape:
    """Derive the cache from the configuration of a language model.

    Args:
        config: The text part of config.json.
        item_bytes: Bytes of a cached number: those of the model's type.
    """
    layers = _first(config, "num_hidden_layers", "n_layer", "n_layers")
    types = _layer_types(config, layers)
    sliding = sum(kind in ("sliding_attention", "chunked_attention") for kind in types)
    linear = types.count("linear_attention")
    per_layer = _kv_numel(config) * item_bytes
    return KvShape(
        growing_bytes_per_token=(layers - sliding - linear) * per_layer,
        sliding_bytes_per_token=sliding * per_layer,
        window_tokens=config.get("sliding_window") or config.get("attention_chunk_size") or 0,
        fixed_bytes=linear * _linear_attention_bytes(config, item_bytes) if linear else 0,
        layers=layers,
    )


def _kv_numel(config: Mapping[str, Any]) -> int:
    """Return the numbers that one layer caches for one token."""
    if config.get("kv_lora_rank"):
        # Multi-head latent attention: transformers 5.23 caches the latent (measured).
        return int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])
    heads = _heads(config)
    head_dim = config.get("head_dim") or hidden_size(config) // heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 2 * int(head_dim)  # Falcon 7B, StarCoder
    return 2 * int(config.get("num_key_value_heads") or heads) * int(head_dim)


def _layer_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """Return what each layer sees. What is not known counts as all: that errs on the safe side."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    model_type = str(config.get("model_type"))
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return ["full_attention"] * layers
    if model_type in ALL_SLIDING:
        return ["sliding_attention"] * layers
    every = config.get("sliding_window_pattern") or SLIDING_PATTERNS.get(model_type, 1)
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]


def _linear_attention_bytes(config: Mapping[str, Any], item_bytes: int) -> int:
    """Return the state of one gated delta layer: a float32 matrix for each head, and the window of
    its convolution (55,296 bytes measured on a small Qwen3-Next, as computed).
    """
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    convolution = channels * config["linear_conv_kernel_dim"] * item_bytes
    return int(value_heads * key_dim * value_dim * 4 + convolution)


def _first(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise ModelError(f"config.json has none of {', '.join(names)}")


def _heads(config: Mapping[str, Any]) -> int:
    return _first(config, "num_attention_heads", "n_head", "n_heads")


def hidden_size(config: Mapping[str, Any]) -> int:
    """Return the width of the residual stream."""
    return _first(config, "hidden_size", "n_embd", "d_model")


def unpackable(config: Mapping[str, Any], max_tokens: int) -> str | None:
    """Return why rows of a model can't be packed into one batch, as far as its configuration tells.

    The continuous engine then leaves it to the static one; what the configuration does not tell is
    found out by trying (`engine/probe.py`).

    Args:
        config: The text part of config.json.
        max_tokens: Prompt and answer of the longest row, in tokens.
    """
    if config.get("model_type") in UNPACKABLE_MODELS:
        return f"{config['model_type']} has an attention of its own"
    if _rope_depends_on_batch(config, max_tokens):
        return "positions whose encoding depends on the longest row of a batch (longrope, dynamic)"
    if config.get("kv_lora_rank"):
        return "multi-head latent attention, whose cache would be unpacked"
    kinds = set(_layer_types(config, _first(config, "num_hidden_layers", "n_layer", "n_layers")))
    other = sorted(kinds - {"full_attention", "sliding_attention"})
    return f"layers of the kind {', '.join(other)}" if other else None


def _rope_depends_on_batch(config: Mapping[str, Any], max_tokens: int) -> bool:
    """Tell whether rows beyond the original context change how all rows of their batch are encoded
    (transformers 5.23, `modeling_rope_utils.dynamic_rope_update`).
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [found, *(each for each in found.values() if isinstance(each, dict))]
    for rope in kinds:
        if (rope.get("rope_type") or rope.get("type")) in ("longrope", "dynamic"):
            original = rope.get("original_max_position_embeddings")
            original = original or config.get("original_max_position_embeddings")
            if max_tokens > int(original or config.get("max_position_embeddings") or 0):
                return True
    return False


# ---- workspace


def dequantized_bytes(weights: Weights, quantization: Quantization, tokens: int) -> int:
    """Return what multiplying by the largest quantized matrix takes.

    A 4-bit matrix is expanded to the compute type whenever many tokens meet it; int8 quantizes the
    activations instead, and accumulates in 32 bits.
    """
    out_features, in_features = weights.largest_linear
    match quantization:
        case Unquantized():
            return 0
        case Int8():
            return tokens * (in_features + out_features * INT8_OUTPUT_BYTES)
        case FourBit(compute_dtype=dtype):
            return out_features * in_features * ITEM_BYTES.get(dtype, 2)


def activation_bytes(config: Mapping[str, Any], tokens: int, item_bytes: int) -> int:
    """Return the activations of a prefill of so many tokens, over all rows."""
    hidden = hidden_size(config)
    inner = config.get("intermediate_size") or config.get("n_inner") or config.get("ffn_dim")
    of_inner = ACTIVATIONS_OF_INNER * int(inner or 4 * hidden)
    return tokens * (ACTIVATIONS_OF_HIDDEN * hidden + of_inner) * item_bytes


def mask_bytes(rows: int, tokens: int, item_bytes: int) -> int:
    """Return the attention mask of a padded batch: boolean, and as numbers for the kernel.

    A single row has no padding, and so no mask.
    """
    if rows == 1:
        return 0
    return rows * tokens * tokens * (1 + item_bytes)


def score_bytes(config: Mapping[str, Any], rows: int, tokens: int, item_bytes: int) -> int:
    """Return the attention scores of one layer, for models that compute them as a whole: raw, with
    the mask, and as float32 and rounded probabilities.
    """
    if config.get("model_type") not in EAGER_MODELS:
        return 0
    return rows * _heads(config) * tokens * tokens * (3 * item_bytes + 4)


def expanded_latent_bytes(
    config: Mapping[str, Any], rows: int, tokens: int, item_bytes: int
) -> int:
    """Return keys and values of one layer with multi-head latent attention: they are expanded from
    the cached latent at each step, for all tokens (`expand_kv` of DeepSeek V3 in transformers 5.23:
    one tensor of both, and the keys once more with their rotary part).
    """
    if not config.get("kv_lora_rank"):
        return 0
    nope, rope = int(config["qk_nope_head_dim"]), int(config["qk_rope_head_dim"])
    numbers = 2 * nope + rope + int(config["v_head_dim"])
    return rows * tokens * _heads(config) * numbers * item_bytes


def packed_score_bytes(config: Mapping[str, Any], tokens: int, item_bytes: int) -> int:
    """Return the attention scores of one row's piece of a prompt in the continuous engine."""
    if config.get("model_type") not in EAGER_MODELS:
        return 0
    return _heads(config) * QUERY_BLOCK * tokens * (3 * item_bytes + 4)


def logit_bytes(config: Mapping[str, Any], rows: int, *, greedy: bool = False) -> int:
    """Return what choosing the next token of each row takes."""
    return rows * _first(config, "vocab_size") * (GREEDY_LOGIT_BYTES if greedy else LOGIT_BYTES)


def scores_kept_bytes(config: Mapping[str, Any], rows: int, item_bytes: int) -> int:
    """Return the scores of a recorded step, which stay where they are."""
    return rows * _first(config, "vocab_size") * item_bytes


def count_bytes(config: Mapping[str, Any], rows: int) -> int:
    """Return what it takes to count the tokens that each row has said, and to look that up."""
    return rows * _first(config, "vocab_size") * COUNT_BYTES


def cache_growth_bytes(shape: KvShape, rows: int, tokens: int) -> int:
    """Return the copy of one layer that a growing cache makes at each step."""
    return rows * tokens * shape.bytes_per_token // max(1, shape.layers)
