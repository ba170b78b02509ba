"""Headers of GGUF files: what is read from them, and what is refused."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from quantbatch.errors import ModelError
from quantbatch.model import gguf
from quantbatch.model.formats import How, Machine, judge
from quantbatch.model.gguf import as_header, config_of, parse, read_gguf
from quantbatch.model.headers import TensorInfo
from tests.unit.model.ggufs import LLAMA, TENSORS, gguf_bytes


def test_a_header_says_what_config_and_shards_say_elsewhere() -> None:
    header = parse(gguf_bytes(LLAMA | {"more": [1, 2], "yes": True}, TENSORS), "x")
    assert header.metadata == LLAMA | {"tokenizer.ggml.tokens": 3, "more": [1, 2], "yes": True}
    assert as_header(header).tensors == (
        TensorInfo("model.embed_tokens.weight", "Q8_0", (3, 64)),
        TensorInfo("model.layers.0.attn_norm.weight", "F32", (64,)),
        TensorInfo("model.layers.0.ffn_up.weight", "Q4_0", (96, 64)),
    )
    config = config_of(header)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"]
    assert config["dtype"] == "bfloat16"
    assert (config["vocab_size"], config["eos_token_id"]) == (3, 0)
    assert (config["hidden_size"], config["num_key_value_heads"]) == (64, 2)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(0, "float32"), (1, "float16"), (2, "bfloat16"), (8, "bfloat16")]
)
def test_the_type_is_that_of_the_matrices(kind: int, dtype: str) -> None:
    tensors = {name: (kind, shape) for name, (_, shape) in TENSORS.items()}
    header = parse(gguf_bytes(LLAMA, tensors), "x")
    assert config_of(header)["dtype"] == dtype
    assert config_of(header)["quantization_config"]["types"] == [gguf.BLOCKS[kind][0]]


def test_no_damage_is_anything_but_an_error(tmp_path: Path) -> None:
    whole = gguf_bytes(LLAMA, TENSORS)
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    assert read_gguf(path).file_bytes <= len(whole)
    for length in range(0, len(whole) - 32, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.gguf"):
            read_gguf(path)
    chance = random.Random(0)
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[chance.randrange(700)] = chance.randrange(256)
        try:
            parse(bytes(damaged), "x")
        except ModelError:
            continue


def test_huge_counts_are_not_believed() -> None:
    head = gguf_bytes({}, {})[:8]
    for counts in ("ffffffffffffffff", "ffffffffffffff7f"):
        for content in (bytes.fromhex(counts) + bytes(8), bytes(8) + bytes.fromhex(counts)):
            started = time.process_time()
            with pytest.raises(ModelError, match="damaged header"):
                parse(head + content, "x")
            assert time.process_time() - started < 0.5


def test_a_vocabulary_of_150_000_words_is_read_in_half_a_second() -> None:
    words = {"tokenizer.ggml.tokens": [f"word {i}" for i in range(150_000)]}
    content = gguf_bytes(LLAMA | words | {"tokenizer.ggml.merges": words.popitem()[1]}, TENSORS)
    started = time.process_time()
    parse(content, "x")
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    "values",
    [
        {"llama.rope.scaling.type": "linear"},
        {"llama.rope.scaling.factor": 2.0},
        {"llama.attention.sliding_window": 4096},
        {"llama.something.new": 1},
        {"split.count": 3},
        {"general.name": "mistral"},
    ],
)
def test_what_transformers_would_overlook_is_refused(values: dict[str, Any]) -> None:
    section = section_of(LLAMA | values)
    assert section["ignored"] == [next(iter(values))]
    found = judge("gguf", section, Machine({"gguf": "0.19.0"}))
    assert found.how is How.REFUSED
    assert next(iter(values)) in found.reason
    assert "engine: {kind: llama_cpp}" in found.remedy


def test_rope_factors_as_a_tensor_are_refused() -> None:
    """Llama 3.1 has its scaling there, and transformers does not look (5.23)."""
    header = parse(gguf_bytes(LLAMA, TENSORS | {"rope_freqs.weight": (0, (8,))}), "x")
    assert config_of(header)["quantization_config"]["ignored"] == ["rope_freqs.weight"]


def test_other_architectures_are_for_llama_cpp() -> None:
    section = section_of(LLAMA | {"general.architecture": "mamba"})
    found = judge("gguf", section, Machine({"gguf": "0.19.0"}))
    assert found.how is How.REFUSED
    assert "architecture mamba is not tested" in found.reason


def section_of(values: dict[str, Any]) -> dict[str, Any]:
    section: dict[str, Any] = config_of(parse(gguf_bytes(values, TENSORS), "x"))[
        "quantization_config"
    ]
    return section


def test_what_means_no_scaling_is_let_in() -> None:
    values = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0, "split.count": 1}
    assert (
        config_of(parse(gguf_bytes(LLAMA | values, TENSORS), "x"))["quantization_config"]["ignored"]
        == []
    )


def test_sizes_of_blocks_are_those_of_gguf_py() -> None:
    library = pytest.importorskip("gguf")
    for kind, (name, elements, size) in gguf.BLOCKS.items():
        found = library.GGMLQuantizationType(kind)
        assert found.name == name
        assert library.GGML_QUANT_SIZES[found] == (elements, size)
