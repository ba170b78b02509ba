"""Models of known shapes with random weights, made on the device matrix by matrix.

Neither disk nor host memory holds the model, and the device no more than the quantized model and
one matrix in 16 bits: the model is made on the meta device, its linear layers are replaced by
bitsandbytes' as transformers does when it loads, and then each weight is drawn, quantized and
forgotten. Buffers, such as the frequencies of the rotary embedding, are made as transformers makes
them for a checkpoint, which does not hold them.

What is seen to beside the shape, as in `enginebench/model.py`: matrices are scaled so that scores
and attention spread as there, whatever the width, and only words of the tokenizer have a row in the
output head that is not zero, special tokens not among them. So no answer ends before its budget,
and answers can be written as text. In 16 bits, near-ties still turn answers around.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer

from quantbatch.model.checkpoint import Checkpoint
from quantbatch.model.headers import INDEX_FILE, TensorInfo
from quantbatch.prompts.tokens import load_tokenizer
from quantbatch.spec import FourBit, Int8, Model
from quantbatch.weights import bnb, dtypes

hf: Any = transformers

TOKENIZER = Path(__file__).parents[2] / "configs" / "quickstart" / "model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SEED = 7
GAIN = 0.05 * math.sqrt(512)
"""Standard deviation of a matrix times the root of the hidden size: that of `enginebench`."""
SHARD_BYTES = 4 * 2**30

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"bits": 32},
    "bf16": {"bits": 16},
    "int8": {"bits": 8},
    "nf4": {"quantization": {"kind": "nf4", "double_quant": False}},
    "nf4-dq": {"bits": 4},
}


@dataclass(frozen=True)
class Shape:
    """What a model's config.json says, as far as memory and speed depend on it."""

    model_type: str
    fields: dict[str, Any]


SHAPES: dict[str, Shape] = {
    # https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
    "8b": Shape(
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    # https://huggingface.co/Qwen/Qwen2.5-32B-Instruct/blob/main/config.json
    "32b": Shape(
        "qwen2",
        {
            "hidden_size": 5120,
            "intermediate_size": 27_648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "vocab_size": 152_064,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
    "tiny": Shape(
        "llama",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 2304,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "tiny-qwen": Shape(
        "qwen2",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 2304,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
}


class Built(NamedTuple):
    """A model in memory, and what plans it."""

    model: Any
    tokenizer: Any
    checkpoint: Checkpoint
    spec: Model
    """How it was made, with its types chosen."""
    weight_bytes: int


def build(shape: str, kind: str, device: str) -> Built:
    """Make a model with random weights on a device.

    Args:
        shape: One of `SHAPES`.
        kind: One of `KINDS`.
        device: `cpu` or `cuda`.
    """
    checkpoint = describe(shape)
    spec = dtypes.resolve(checkpoint, Model.model_validate({"id": shape, **KINDS[kind]}), device)
    dtype = getattr(torch, spec.dtype)
    model = _empty(shape, dtype)
    quantizer = _prepare(model, spec, device)
    _make_buffers(model, device)
    weights = Weights(device)
    for name, parameter in list(model.named_parameters()):
        value = weights.draw(name, parameter.shape).to(dtype)
        if quantizer is not None and quantizer.param_needs_quantization(model, name):
            value = quantizer.get_quantize_ops().convert(
                {name: [value]}, full_layer_name=name, model=model
            )[name]
        else:
            value = nn.Parameter(value, requires_grad=False)
        _put(model, name, value)
    model.eval()  # the modules of bitsandbytes came later
    bnb.settle_four_bit_layers(model, spec, device)
    model.hf_device_map = {"": device}  # a pipeline then leaves it where it is
    # A copy of its own: whoever sets its padding side shares it with nobody.
    tokenizer = hf.AutoTokenizer.from_pretrained(TOKENIZER, padding_side="left")
    return Built(model, tokenizer, checkpoint, spec, bnb.parameter_bytes(model))


def describe(shape: str) -> Checkpoint:
    """Return a shape as if its 16-bit weights were files: enough to plan it."""
    empty = _empty(shape)
    tensors = [TensorInfo(name, "BF16", tuple(p.shape)) for name, p in empty.named_parameters()]
    return Checkpoint(
        folder=TOKENIZER,
        id=f"random weights in the shape {shape}",
        commit="",
        config=empty.config.to_dict(),
        tensors=tuple(tensors),
        chat_template=None,
        context_tokens=empty.config.max_position_embeddings,
        quantized=None,
        digest=f"random-{shape}-{SEED}",
    )


def write(folder: Path, shape: str, device: str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the weights that `build` makes on this device as a checkpoint in bfloat16.

    Memory holds one file of it at a time.
    """
    tensors = describe(shape).tensors
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder / name)
    _empty(shape).config.save_pretrained(folder)
    weights, shards = Weights(device), _shards(tensors, shard_bytes)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        drawn = {each.name: weights.draw(each.name, each.shape).cpu() for each in shard}
        save_file(drawn, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(drawn, file)
    total_bytes = 2 * sum(each.numel for each in tensors)
    document = {"metadata": {"total_size": total_bytes}, "weight_map": index}
    (folder / INDEX_FILE).write_text(json.dumps(document), encoding="utf-8")


class Weights:
    """Draws weights: each the same for its name and the kind of device, in any order.

    Args:
        device: Where they are drawn.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._random = torch.Generator(device)
        tokenizer = load_tokenizer(TOKENIZER)
        self._words = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))

    def draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the weight of a name in bfloat16."""
        self._random.manual_seed(SEED + zlib.crc32(name.encode()))
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        if "norm" in name:
            return drawn.fill_(1.0)
        # A matrix in the residual stream's width, or one that reads or writes it: all as wide.
        drawn.normal_(0.0, 1.0, generator=self._random)
        if name.endswith("bias"):
            return drawn.mul_(0.1)
        if name == "lm_head.weight":
            drawn[self._other_tokens(len(drawn))] = 0.0
        return drawn.mul_(GAIN / math.sqrt(self._width(name, shape)))

    def _other_tokens(self, count: int) -> torch.Tensor:
        other = torch.ones(count, dtype=torch.bool)
        other[self._words] = False
        return other.to(self._device)

    @staticmethod
    def _width(name: str, shape: tuple[int, ...]) -> int:
        """Return the hidden size: what `down_proj` and `o_proj` write, and all others read."""
        return shape[0] if name.endswith(("down_proj.weight", "o_proj.weight")) else shape[1]


def _empty(shape: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a shape on the meta device."""
    config = _config(SHAPES[shape])
    with torch.device("meta"):
        empty = hf.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    empty.eval().requires_grad_(requires_grad=False)
    empty.config.architectures = [type(empty).__name__]
    tokens = {name: getattr(config, name) for name in ("eos_token_id", "pad_token_id")}
    empty.generation_config = hf.GenerationConfig(**tokens)
    return empty


def _config(shape: Shape) -> Any:
    tokenizer = load_tokenizer(TOKENIZER)
    return hf.AutoConfig.for_model(
        shape.model_type,
        **shape.fields,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )


def _prepare(model: Any, spec: Model, device: str) -> Any:
    """Replace linear layers by bitsandbytes', as `from_pretrained` does; return its quantizer."""
    if not isinstance(spec.quantization, Int8 | FourBit):
        return None
    options = bnb.quantization_config(spec.quantization, model.config)
    model.config.quantization_config = options
    quantizer = AutoHfQuantizer.from_config(options, pre_quantized=False)
    place = {"device_map": {"": device}}
    quantizer.validate_environment(**place)
    quantizer.preprocess_model(model=model, dtype=model.dtype, **place)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    return quantizer


def _make_buffers(model: Any, device: str) -> None:
    """Make what is no weight, as transformers does for what a checkpoint lacks (5.23)."""
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            assert not list(module.parameters(recurse=False)), type(module)
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)


def _put(model: Any, name: str, value: nn.Parameter) -> None:
    path, _, own = name.rpartition(".")
    setattr(model.get_submodule(path), own, value)


def _shards(tensors: tuple[TensorInfo, ...], shard_bytes: int) -> list[list[TensorInfo]]:
    """Divide tensors into files of at most so many bytes, but for single ones."""
    shards: list[list[TensorInfo]] = [[]]
    used = 0
    for tensor in tensors:
        size = 2 * tensor.numel
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards
