"""Sizes of published models, from the values of their config.json and the names and shapes of their
safetensors: parameters to the last one, bytes as computed independently for research/quant.md.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from quantbatch.model.cards import find
from quantbatch.model.footprint import Part, weigh
from quantbatch.model.kv import kv_shape
from quantbatch.model.memory import Work
from quantbatch.model.widths import every_width
from quantbatch.spec import FourBit, Model
from tests.unit.model.test_memory import describe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantbatch.model.checkpoint import Checkpoint

GIB, KIB = 2**30, 2**10
Shape = tuple[str, tuple[int, ...]]


class Config(NamedTuple):
    """A config.json, as far as it decides sizes."""

    model_type: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128
    tied: bool = False
    experts: int = 0
    window: int | None = None


class Known(NamedTuple):
    """What is known of a model."""

    config: Config
    params: int
    """As its repository says."""
    gib: tuple[float, float, float, float]
    """In bfloat16, int8, nf4, and nf4 with double quantization."""
    kv_kib: int
    """Cache of one token before any window is full."""


KNOWN = {
    "Llama 3.2 1B": Known(
        Config("llama", 2048, 8192, 16, 32, 8, 128_256, head_dim=64, tied=True),
        1_235_814_400, (2.30, 1.40, 1.00, 0.96), 32,
    ),
    "Llama 3.1 8B": Known(
        Config("llama", 4096, 14_336, 32, 32, 8, 128_256),
        8_030_261_248, (14.96, 8.46, 5.61, 5.31), 128,
    ),
    "Llama 3.3 70B": Known(
        Config("llama", 8192, 28_672, 80, 64, 8, 128_256),
        70_553_706_496, (131.42, 67.69, 39.78, 36.80), 320,
    ),
    "Mistral 7B v0.3": Known(
        Config("mistral", 4096, 14_336, 32, 32, 8, 32_768),
        7_248_023_552, (13.50, 7.01, 4.16, 3.85), 128,
    ),
    "Mistral Small 24B": Known(
        Config("mistral", 5120, 32_768, 40, 32, 8, 131_072),
        23_572_403_200, (43.91, 23.22, 14.15, 13.18), 160,
    ),
    "Mixtral 8x7B": Known(
        Config("mixtral", 4096, 14_336, 32, 32, 8, 32_000, experts=8),
        46_702_792_704, (86.99, 85.74, 85.19, 85.14), 128,
    ),
    "Qwen 2.5 7B": Known(
        Config("qwen2", 3584, 18_944, 28, 28, 4, 152_064),
        7_615_616_512, (14.19, 8.11, 5.45, 5.17), 56,
    ),
    "Qwen 2.5 14B": Known(
        Config("qwen2", 5120, 13_824, 48, 40, 8, 152_064),
        14_770_033_664, (27.51, 15.21, 9.82, 9.25), 192,
    ),
    "Qwen 2.5 32B": Known(
        Config("qwen2", 5120, 27_648, 64, 40, 8, 152_064),
        32_763_876_352, (61.03, 31.98, 19.25, 17.90), 256,
    ),
    "Qwen3 8B": Known(
        Config("qwen3", 4096, 12_288, 36, 32, 8, 151_936),
        8_190_735_360, (15.26, 8.79, 5.96, 5.66), 144,
    ),
    "Qwen3 32B": Known(
        Config("qwen3", 5120, 25_600, 64, 64, 8, 151_936),
        32_762_123_264, (61.02, 31.98, 19.25, 17.89), 256,
    ),
    "Qwen3 30B-A3B": Known(
        Config("qwen3_moe", 2048, 768, 48, 32, 4, 151_936, experts=128),
        30_532_122_624, (56.87, 56.03, 55.66, 55.62), 96,
    ),
    "Gemma 2 9B": Known(
        Config("gemma2", 3584, 14_336, 42, 16, 8, 256_000, head_dim=256, tied=True, window=4096),
        9_241_705_984, (17.21, 9.47, 6.07, 5.71), 336,
    ),
    "Gemma 2 27B": Known(
        Config("gemma2", 4608, 36_864, 46, 32, 16, 256_000, tied=True, window=4096),
        27_227_128_320, (50.71, 26.47, 15.84, 14.71), 368,
    ),
    "Gemma 3 12B, text": Known(
        Config(
            "gemma3_text", 3840, 15_360, 48, 16, 8, 262_208, head_dim=256, tied=True, window=1024
        ),
        11_766_034_176, (21.92, 11.90, 7.51, 7.05), 384,
    ),
    "Gemma 3 27B, text": Known(
        Config("gemma3_text", 5376, 21_504, 62, 32, 16, 262_208, tied=True, window=1024),
        27_009_346_304, (50.31, 26.48, 16.04, 14.93), 496,
    ),
}  # fmt: skip


def checkpoint_of(config: Config) -> Checkpoint:
    """Return a model by its configuration, tensor for tensor as it is published."""
    known: dict[str, Any] = {
        "model_type": config.model_type,
        "hidden_size": config.hidden,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tied,
        "sliding_window": config.window,
        "dtype": "bfloat16",
    }
    return describe(known, list(_tensors(config)))


def _tensors(config: Config) -> Iterator[Shape]:
    yield "model.embed_tokens.weight", (config.vocabulary, config.hidden)
    for layer in range(config.layers):
        yield from _layer(config, f"model.layers.{layer}")
    yield "model.norm.weight", (config.hidden,)
    if not config.tied:
        yield "lm_head.weight", (config.vocabulary, config.hidden)


def _layer(config: Config, path: str) -> Iterator[Shape]:
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.model_type.startswith("gemma"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    yield from ((f"{path}.{norm}.weight", (config.hidden,)) for norm in norms)
    for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
        yield f"{path}.self_attn.{name}_proj.weight", (heads * config.head_dim, config.hidden)
        if config.model_type == "qwen2":
            yield f"{path}.self_attn.{name}_proj.bias", (heads * config.head_dim,)
    yield f"{path}.self_attn.o_proj.weight", (config.hidden, config.heads * config.head_dim)
    if config.model_type in ("qwen3", "qwen3_moe", "gemma3_text"):
        yield from ((f"{path}.self_attn.{n}_norm.weight", (config.head_dim,)) for n in "qk")
    yield from _feed_forward(config, path)


def _feed_forward(config: Config, path: str) -> Iterator[Shape]:
    up, down = (config.inner, config.hidden), (config.hidden, config.inner)
    match config.model_type:
        case "mixtral":
            yield f"{path}.block_sparse_moe.gate.weight", (config.experts, config.hidden)
            for expert in range(config.experts):
                of = f"{path}.block_sparse_moe.experts.{expert}"
                yield from ((f"{of}.w1.weight", up), (f"{of}.w2.weight", down))
                yield f"{of}.w3.weight", up
        case "qwen3_moe":
            yield f"{path}.mlp.gate.weight", (config.experts, config.hidden)
            for expert in range(config.experts):
                yield from _dense(f"{path}.mlp.experts.{expert}", up, down)
        case _:
            yield from _dense(f"{path}.mlp", up, down)


def _dense(path: str, up: tuple[int, int], down: tuple[int, int]) -> Iterator[Shape]:
    yield from ((f"{path}.{name}_proj.weight", up) for name in ("gate", "up"))
    yield f"{path}.down_proj.weight", down


def model(**fields: Any) -> Model:
    return Model(id="org/model", **fields)


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_bytes(name: str) -> None:
    known = KNOWN[name]
    checkpoint = checkpoint_of(known.config)
    asked = (
        model(),
        model(bits=8),
        model(quantization=FourBit(double_quant=False)),
        model(bits=4),
    )
    assert weigh(checkpoint, asked[0]).total_params == known.params
    for each, gib in zip(asked, known.gib, strict=True):
        found = weigh(checkpoint, each).total_bytes / GIB
        # The table has two places behind the point.
        assert found == pytest.approx(gib, rel=0.0002, abs=0.0051), each


@pytest.mark.parametrize("name", KNOWN)
def test_cache(name: str) -> None:
    known = KNOWN[name]
    shape = kv_shape(checkpoint_of(known.config).config, 2)
    assert shape.bytes_per_token == known.kv_kib * KIB
    assert shape.window_tokens == (known.config.window or 0)


@pytest.mark.parametrize(
    ("name", "growing_kib", "windows_mib"),
    [
        ("Gemma 2 9B", 168, 672),
        ("Gemma 2 27B", 184, 736),
        ("Gemma 3 12B, text", 64, 320),
        ("Gemma 3 27B, text", 80, 416),
    ],
)
def test_what_is_left_to_grow_when_windows_are_full(
    name: str, growing_kib: int, windows_mib: int
) -> None:
    config = KNOWN[name].config
    assert config.window is not None
    shape = kv_shape(checkpoint_of(config).config, 2)
    assert shape.growing_bytes_per_token == growing_kib * KIB
    full = config.window * shape.sliding_bytes_per_token
    assert full == windows_mib * 2**20
    of_window = shape.row_bytes(100_000) - 100_000 * growing_kib * KIB
    assert of_window == full - shape.sliding_bytes_per_token  # the newest token comes on top


@pytest.mark.parametrize(
    ("name", "share"), [("Mixtral 8x7B", 45.097 / 46.703), ("Qwen3 30B-A3B", 28.991 / 30.532)]
)
def test_experts_are_counted_apart(name: str, share: float) -> None:
    weights = weigh(checkpoint_of(KNOWN[name].config), model(bits=4))
    assert weights.params[Part.EXPERT] / weights.total_params == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("name", ["Qwen 2.5 32B", "Qwen3 30B-A3B"])
def test_a_plan_of_every_width_takes_less_than_a_second(name: str) -> None:
    """It takes 0.02 s for 771 tensors, and 0.3 for the 18,867 of 128 experts a layer; the bound
    leaves room for a busy machine.
    """
    checkpoint = checkpoint_of(KNOWN[name].config)
    work = Work(max_tokens=2048, prompt_tokens=1800, step_tokens=2048, greedy=True)
    began = time.monotonic()
    found = every_width(checkpoint, model(bits=4), work, find("L40S").memory_bytes, row_tokens=700)
    assert time.monotonic() - began < 4
    assert len(found) == 4
