"""What the header of a GGUF file says: which tensors, of which shape, and which model.

A GGUF file is a whole model: its header holds what is config.json, tokenizer and chat template
elsewhere (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). It is read here without the
package `gguf`, whose reader takes seconds for the words of a vocabulary.

transformers (5.23) expands the weights of these architectures, and ignores what it does not know of
a header. So a model with something else in it, such as rope scaling, would be loaded and answer
wrongly: it is refused.
"""

from __future__ import annotations

import math
import mmap
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbatch.errors import ModelError
from quantbatch.model.headers import Header, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9

BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Types of tensors by number, with the elements and bytes of a block (`ggml.c`)."""

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Architectures that are tested, with their class in transformers."""
CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
}
HARMLESS_KEYS = frozenset(
    {
        *("attention.layer_norm_rms_epsilon", "attention.value_length", "rope.dimension_count"),
        *("rope.freq_base", "rope.scaling.finetuned", "rope.scaling.type", "rope.scaling.factor"),
    }
)
"""Further keys that transformers follows, or that `_ignored` looks at."""
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
}


class GgufHeader(NamedTuple):
    """The header of a GGUF file."""

    metadata: Mapping[str, Any]
    """Its values; of an array of texts, which is a vocabulary, only the length."""
    tensors: tuple[TensorInfo, ...]
    """As they are once they are expanded, with their types in the words of GGUF."""
    size: int
    """Bytes of the header: where the data begins."""
    file_bytes: int
    """What the file must have."""


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of a file, and check that the file is as long as it says.

    Raises:
        ModelError: It is cut short, damaged, or no GGUF file.
    """
    size = path.stat().st_size
    if size == 0:
        raise ModelError(f"{path} is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        header = parse(content, str(path))
    if size < header.file_bytes:
        raise ModelError(
            f"{path} has {size:,} bytes, but its header describes {header.file_bytes:,}",
            "the file is cut short: fetch it again",
        )
    return header


def parse(content: bytes | mmap.mmap, where: str) -> GgufHeader:
    """Read a header from the beginning of a file.

    Raises:
        ModelError: It is damaged, of another version, or longer than what is there.
    """
    reader = _Reader(content)
    try:
        if reader.take(4) != MAGIC:
            raise ModelError(f"{where} is no GGUF file")
        version = reader.scalar("I")
        if version not in VERSIONS:
            raise ModelError(f"{where} has version {version} of GGUF", "convert the model again")
        tensor_count, value_count = reader.scalar("Q"), reader.scalar("Q")
        metadata = {reader.text(): reader.value(reader.scalar("I")) for _ in range(value_count)}
        described = [reader.tensor() for _ in range(tensor_count)]
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, RecursionError) as error:
        raise ModelError(f"{where} has a damaged header, or is cut short: {error!r}") from error
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    start = -(-reader.at // alignment) * alignment
    ends = [each.offset + _tensor_bytes(each) for each in described]
    tensors = tuple(TensorInfo(t.name, BLOCKS[t.kind][0], t.shape) for t in described)
    return GgufHeader(metadata, tensors, start, start + max(ends, default=0))


class _Described(NamedTuple):
    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int


def _tensor_bytes(tensor: _Described) -> int:
    _, elements, bytes_each = BLOCKS[tensor.kind]
    return math.prod(tensor.shape) // elements * bytes_each


class _Reader:
    """Reads values one after the other; what is not there is a struct.error."""

    def __init__(self, content: bytes | mmap.mmap) -> None:
        self._content = content
        self.at = 0

    def take(self, count: int) -> bytes:
        found = self._content[self.at : self.at + count]
        if len(found) < count:
            raise struct.error("the file ends here")
        self.at += count
        return found

    def scalar(self, kind: str) -> Any:  # noqa: ANN401 - what the file holds
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def value(self, kind: int) -> Any:  # noqa: ANN401 - what the file holds
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            for _ in range(count):
                self.take(self.scalar("Q"))
            return count
        if kind == _ARRAY:
            return [self.value(kind) for _ in range(count)]
        packed = self.take(count * struct.calcsize(_SCALARS[kind]))
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", packed))

    def tensor(self) -> _Described:
        name, dimensions = self.text(), self.scalar("I")
        if dimensions > MOST_DIMENSIONS:
            raise struct.error(f"{name} has {dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
        kind = self.scalar("I")
        BLOCKS[kind]
        return _Described(name, kind, shape, self.scalar("Q"))


def stored_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Return what the tensors of a file take as they are."""
    sizes = {name: (elements, size) for name, elements, size in BLOCKS.values()}
    return sum(t.numel // sizes[t.dtype][0] * sizes[t.dtype][1] for t in tensors)


# ---- as transformers would have it


def as_header(header: GgufHeader) -> Header:
    """Return the tensors by the names that a checkpoint of transformers has, as far as these decide
    what becomes of them.
    """
    return Header(tuple(_renamed(tensor) for tensor in header.tensors), header.size)


def _renamed(tensor: TensorInfo) -> TensorInfo:
    name, dot, rest = tensor.name.partition(".")
    if name == "blk":
        return tensor._replace(name=f"model.layers.{rest}")
    return tensor._replace(name=TENSOR_NAMES.get(name, name) + dot + rest)


def config_of(header: GgufHeader) -> dict[str, Any]:
    """Return what would be the config.json of a file, as far as plans need it.

    Its section on quantization holds what decides whether transformers can load it.
    """
    metadata = header.metadata
    architecture = str(metadata.get("general.architecture"))
    found = {
        ours: _of_all_layers(metadata[f"{architecture}.{theirs}"])
        for theirs, ours in CONFIG_KEYS.items()
        if f"{architecture}.{theirs}" in metadata
    }
    found.setdefault("vocab_size", metadata.get("tokenizer.ggml.tokens"))
    floats = {tensor.dtype for tensor in header.tensors if len(tensor.shape) > 1}
    return found | {
        "model_type": architecture,
        "architectures": [ARCHITECTURES.get(architecture, f"{architecture} (GGUF)")],
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in header.tensors),
        "dtype": {"F16": "float16", "F32": "float32"}.get("".join(floats), "bfloat16"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "quantization_config": {
            "quant_method": "gguf",
            "architecture": architecture,
            "types": sorted({tensor.dtype for tensor in header.tensors}),
            "ignored": _ignored(header, architecture),
        },
    }


def _of_all_layers(value: Any) -> Any:  # noqa: ANN401 - what the file holds
    """Return the most of a value that is given for each layer."""
    return max(value, default=0) if isinstance(value, list) else value


def _ignored(header: GgufHeader, architecture: str) -> list[str]:
    """Return what of a file transformers would overlook."""
    metadata, prefix = header.metadata, f"{architecture}."
    known = {prefix + key for key in (*CONFIG_KEYS, *HARMLESS_KEYS)}
    ignored = [key for key in metadata if key.startswith(prefix) and key not in known]
    if metadata.get(f"{prefix}rope.scaling.type", "none") != "none":
        ignored.append(f"{prefix}rope.scaling.type")
    if metadata.get(f"{prefix}rope.scaling.factor", 1.0) != 1.0:
        ignored.append(f"{prefix}rope.scaling.factor")
    ignored += [tensor.name for tensor in header.tensors if tensor.name.startswith("rope_freqs")]
    if metadata.get("split.count", 1) > 1:
        ignored.append("split.count")
    if str(metadata.get("general.name")) == "mistral":
        ignored.append("general.name")  # by which transformers adds a window of 4,096 tokens
    return ignored
