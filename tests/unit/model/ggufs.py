"""GGUF files byte by byte, as the specification has them."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.block_count": 1,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["<end>", "a", "b"],
    "tokenizer.ggml.eos_token_id": 0,
}
TENSORS: dict[str, tuple[int, tuple[int, ...]]] = {
    "token_embd.weight": (8, (3, 64)),
    "blk.0.attn_norm.weight": (0, (64,)),
    "blk.0.ffn_up.weight": (2, (96, 64)),
}
"""Number of the type and shape, outermost first: Q8_0, F32 and Q4_0."""
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34)}


def gguf_bytes(
    values: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...]]]
) -> bytes:
    """Return a file with values of the types that Python has for them, and data of zeros."""
    infos, end = b"", 0
    for name, (kind, shape) in tensors.items():
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += _text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, end)
        elements, bytes_each = BLOCKS[kind]
        end += -(-(math.prod(shape) // elements * bytes_each) // 32) * 32
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    header += b"".join(_text(key) + _value(value) for key, value in values.items()) + infos
    return header + bytes(-len(header) % 32) + bytes(end)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
        case _:
            return struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)
