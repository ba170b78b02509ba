"""The memory plan: published sizes from shapes alone, what fits, and what is said when not."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbatch.errors import DoesNotFit, ModelError
from quantbatch.model import memory
from quantbatch.model.checkpoint import Checkpoint
from quantbatch.model.footprint import (
    Part,
    four_bit_bytes,
    int8_bytes,
    weigh,
    weigh_layers,
    weight_dtype,
)
from quantbatch.model.headers import TensorInfo
from quantbatch.model.kv import kv_shape, unpackable
from quantbatch.model.memory import (
    CUDA_CONTEXT_BYTES,
    MAX_PADDED_ROWS,
    MemoryPlan,
    Work,
    plan_memory,
)
from quantbatch.model.workspace import activation_bytes, dequantized_bytes, score_bytes
from quantbatch.spec import FourBit, Int8, Model

if TYPE_CHECKING:
    from collections.abc import Iterable

GIB, KIB = 2**30, 2**10
CARD = int(23.6 * GIB)
"""What a card sold as 24 GB has, as torch reports it."""


def describe(
    config: dict[str, Any], shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: str = "BF16"
) -> Checkpoint:
    tensors = tuple(TensorInfo(name, dtype, shape) for name, shape in shapes)
    method = (config.get("quantization_config") or {}).get("quant_method")
    return Checkpoint(Path("/m"), "org/model", "", config, tensors, None, None, method, "0")


def llama_like(
    *,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    head_dim: int = 128,
    tied: bool = False,
    biases: bool = False,
    experts: int = 0,
    **config: Any,
) -> Checkpoint:
    """The tensors of a Llama, Qwen or Mixtral, from its configuration."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(layers):
        path = f"model.layers.{layer}"
        for name, width in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes.append((f"{path}.self_attn.{name}_proj.weight", (width * head_dim, hidden)))
            if biases:
                shapes.append((f"{path}.self_attn.{name}_proj.bias", (width * head_dim,)))
        shapes.append((f"{path}.self_attn.o_proj.weight", (hidden, heads * head_dim)))
        if experts:
            shapes.append((f"{path}.mlp.gate.weight", (experts, hidden)))
            shapes += [(f"{path}.self_attn.{n}_norm.weight", (head_dim,)) for n in "qk"]
        for mlp in [f"mlp.experts.{i}" for i in range(experts)] or ["mlp"]:
            shapes += [
                (f"{path}.{mlp}.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up")
            ]
            shapes.append((f"{path}.{mlp}.down_proj.weight", (hidden, inner)))
        shapes += [(f"{path}.{name}_layernorm.weight", (hidden,)) for name in ("input", "post")]
    shapes.append(("model.norm.weight", (hidden,)))
    shapes.append(("lm_head.weight", (vocab, hidden)))
    known: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }
    return describe(known | config, shapes)


@functools.cache
def qwen_32b() -> Checkpoint:
    return llama_like(
        hidden=5120, inner=27648, layers=64, heads=40, kv_heads=8, vocab=152064, biases=True
    )


@functools.cache
def llama_8b() -> Checkpoint:
    return llama_like(hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, vocab=128256)


@functools.cache
def llama_1b() -> Checkpoint:
    return llama_like(
        hidden=2048,
        inner=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        vocab=128256,
        tied=True,
    )


@functools.cache
def qwen_30b_a3b() -> Checkpoint:
    return llama_like(
        hidden=2048, inner=768, layers=48, heads=32, kv_heads=4, vocab=151936, experts=128
    )


def tiny(**changes: Any) -> Checkpoint:
    sizes: dict[str, Any] = {"hidden": 64, "inner": 128, "layers": 2, "heads": 4, "kv_heads": 2}
    return llama_like(**sizes | {"head_dim": 16, "vocab": 100} | changes)


SCHEMES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"bits": 8},
    "nf4": {"quantization": FourBit(double_quant=False)},
    "nf4+dq": {"bits": 4},
}


def model(**fields: Any) -> Model:
    return Model(id="org/model", **fields)


# ---- weights


@pytest.mark.parametrize(
    ("checkpoint", "sizes"),
    [
        (qwen_32b(), {"bf16": 61.03, "int8": 31.98, "nf4": 19.25, "nf4+dq": 17.90}),
        (llama_8b(), {"bf16": 14.96, "int8": 8.46, "nf4": 5.61, "nf4+dq": 5.31}),
        (llama_1b(), {"bf16": 2.30, "int8": 1.40, "nf4": 1.00, "nf4+dq": 0.96}),
        (qwen_30b_a3b(), {"bf16": 56.87, "int8": 56.03, "nf4": 55.66, "nf4+dq": 55.62}),
    ],
    ids=["Qwen2.5-32B", "Llama-3.1-8B", "Llama-3.2-1B", "Qwen3-30B-A3B"],
)
def test_sizes_are_those_of_the_real_models(
    checkpoint: Checkpoint, sizes: dict[str, float]
) -> None:
    for name, gib in sizes.items():
        found = weigh(checkpoint, model(**SCHEMES[name])).total_bytes / GIB
        assert found == pytest.approx(gib, abs=0.006), name


def test_parameters_are_counted_by_what_becomes_of_them() -> None:
    weights = weigh(qwen_32b(), model(bits=4))
    assert weights.total_params == 32_763_876_352
    assert weights.params[Part.LINEAR] / 1e9 == pytest.approx(31.206, abs=0.001)
    assert weights.largest_linear == (27648, 5120)
    weights = weigh(qwen_30b_a3b(), model(bits=4))
    assert weights.params[Part.LINEAR] / 1e9 == pytest.approx(0.906, abs=0.001)
    assert weights.params[Part.EXPERT] / 1e9 == pytest.approx(28.99, abs=0.01)


def test_the_formulas_by_hand() -> None:
    assert four_bit_bytes(64 * 64, double_quant=False) == 2048 + 4 * 64 + 64
    assert four_bit_bytes(64 * 64, double_quant=True) == 2048 + 64 + 64 + 4 + 1024 + 4
    assert four_bit_bytes(65, double_quant=False) == 33 + 4 * 2 + 64
    assert int8_bytes(3, 5) == 15 + 12


def test_a_tied_head_counts_once() -> None:
    tied, untied = weigh(tiny(tied=True), model()), weigh(tiny(), model())
    assert untied.total_bytes - tied.total_bytes == 100 * 64 * 2
    nested = tiny(text_config={"tie_word_embeddings": True})
    del nested.config["tie_word_embeddings"]
    assert weigh(nested, model()).total_bytes == tied.total_bytes


def test_old_buffers_count_nothing() -> None:
    buffers = [
        ("h.0.attn.bias", (1, 1, 1024, 1024)),
        ("gpt_neox.layers.0.attention.masked_bias", ()),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (64,)),
    ]
    assert weigh(describe({"dtype": "float16"}, buffers), model()).total_bytes == 0


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "gpt_neox.embed_in.weight",
        "embed_out.weight",
        "transformer.word_embeddings.weight",
        "model.decoder.embed_positions.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "lm_head.weight",
    ],
)
def test_embeddings_heads_and_routers_are_not_quantized(name: str) -> None:
    shapes = [(name, (128, 64)), ("model.layers.0.mlp.up_proj.weight", (64, 64))]
    weights = weigh(describe({"dtype": "bfloat16"}, shapes), model(bits=4))
    assert weights.params == {Part.KEPT: 128 * 64, Part.LINEAR: 64 * 64}
    assert weights.bytes[Part.KEPT] == 128 * 64 * 2


def test_gpt2_stores_its_matrices_the_other_way_round() -> None:
    shapes = [("h.0.mlp.c_fc.weight", (64, 256))]
    assert weigh(describe({"model_type": "gpt2"}, shapes), model(bits=8)).total_bytes == (
        int8_bytes(256, 64)
    )
    assert weigh(describe({"model_type": "gpt_bigcode"}, shapes), model(bits=8)).total_bytes == (
        int8_bytes(64, 256)
    )


@pytest.mark.parametrize(
    ("key", "skipped"),
    [("down_proj", 2), (r"model\.layers\.1", 7), ("model.layers.0.mlp", 3), ("v_proj", 2)],
)
def test_skipped_layers_stay_in_16_bits(key: str, skipped: int) -> None:
    plain, skipping = model(bits=4), model(quantization=FourBit(skip_modules=[key]))
    matrices = [t for t in tiny().tensors if "_proj" in t.name]
    matches = [re.match(key, t.name) or t.name.endswith(f"{key}.weight") for t in matrices]
    assert sum(map(bool, matches)) == skipped
    difference = sum(
        t.numel * 2 - four_bit_bytes(t.numel, double_quant=True)
        for t, match in zip(matrices, matches, strict=True)
        if match
    )
    grown = weigh(tiny(), skipping).total_bytes - weigh(tiny(), plain).total_bytes
    assert grown == difference


def test_a_name_that_skips_nothing_is_an_error() -> None:
    with pytest.raises(ModelError, match="'up_porj' matches no linear layer") as caught:
        weigh(tiny(), model(quantization=Int8(skip_modules=["up_porj"])))
    assert "down_proj, gate_proj, k_proj" in caught.value.hint
    with pytest.raises(ModelError, match=r"'\(' is no regular expression"):
        weigh(tiny(), model(quantization=Int8(skip_modules=["("])))


def test_nothing_to_quantize_is_an_error() -> None:
    falcon = describe({"model_type": "falcon"}, [("h.0.mlp.dense_h_to_4h.weight", (64, 16))])
    with pytest.raises(ModelError, match="no layer that bitsandbytes quantizes"):
        weigh(falcon, model(bits=8))
    assert weigh(falcon, model()).total_bytes == 64 * 16 * 2


def test_the_type_of_the_weights() -> None:
    shapes = [("a.weight", (8, 8)), ("norm.weight", (8,))]
    assert weight_dtype(describe({"dtype": "float16"}, shapes), model()) == "float16"
    assert weight_dtype(describe({"torch_dtype": "bfloat16"}, shapes), model()) == "bfloat16"
    assert (
        weight_dtype(describe({"text_config": {"dtype": "float16"}}, shapes), model()) == "float16"
    )
    assert weight_dtype(describe({}, shapes, "F16"), model()) == "float16"
    assert weight_dtype(describe({}, shapes, "F16"), model(dtype="float32")) == "float32"
    assert weigh(describe({}, shapes, "F16"), model(bits=32)).total_bytes == 4 * 72


def test_a_quantized_checkpoint_weighs_what_is_in_it() -> None:
    blocks = 64 * 128 // 64
    tensors = {
        "model.layers.0.mlp.up_proj.weight": ("U8", (64 * 128 // 2, 1)),
        "model.layers.0.mlp.up_proj.weight.absmax": ("U8", (blocks,)),
        "model.layers.0.mlp.up_proj.weight.quant_map": ("F32", (16,)),
        "model.layers.0.mlp.up_proj.weight.nested_absmax": ("F32", (1,)),
        "model.layers.0.mlp.up_proj.weight.nested_quant_map": ("F32", (256,)),
        "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4": ("U8", (120,)),
        "model.norm.weight": ("BF16", (64,)),
    }
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    checkpoint = describe({"quantization_config": section, "dtype": "bfloat16"}, [])
    infos = tuple(TensorInfo(name, dtype, shape) for name, (dtype, shape) in tensors.items())
    weights = weigh(replace_tensors(checkpoint, infos), model())
    assert weights.bytes[Part.LINEAR] == four_bit_bytes(64 * 128, double_quant=True)
    assert weights.params == {Part.LINEAR: 64 * 128, Part.KEPT: 64}
    assert weights.total_bytes == four_bit_bytes(64 * 128, double_quant=True) + 128


def replace_tensors(checkpoint: Checkpoint, tensors: tuple[TensorInfo, ...]) -> Checkpoint:
    return Checkpoint(
        checkpoint.folder,
        checkpoint.id,
        "",
        checkpoint.config,
        tensors,
        None,
        None,
        "bitsandbytes",
        "",
    )


# ---- KV cache


@pytest.mark.parametrize(
    ("config", "kib"),
    [
        (qwen_32b().config, 256),
        (llama_8b().config, 128),
        (qwen_30b_a3b().config, 96),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, 36),
        ({"n_layer": 40, "n_head": 48, "n_embd": 6144, "multi_query": True}, 20),
        ({"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 68.625),
        (
            {
                "num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
                "index_head_dim": 128,
            },
            61 * (512 + 64 + 128) * 2 / KIB,
        ),
        ({"num_layers": 12, "num_heads": 12, "hidden_size": 768}, 36),
        ({"num_layers": 24, "attention_heads": 16, "d_model": 1024}, 96),
        (
            {
                "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
                "num_key_value_heads": [1, 2],
            },
            2 * 2 * 2 * 32 * 2 / KIB,
        ),
    ],
    ids=[
        "Qwen2.5-32B", "Llama-3.1-8B", "Qwen3-30B-A3B", "GPT-2", "StarCoder", "DeepSeek-V3",
        "DeepSeek-V3.2", "GPT-Neo", "XGLM", "heads of each layer",
    ],
)  # fmt: skip
def test_the_cache_of_a_token(config: dict[str, Any], kib: float) -> None:
    assert kv_shape(config, 2).bytes_per_token == kib * KIB


GEMMA_2_9B = {
    "model_type": "gemma2", "num_hidden_layers": 42, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 256, "hidden_size": 3584, "sliding_window": 4096,
}  # fmt: skip
GEMMA_3_27B = {
    "model_type": "gemma3_text", "num_hidden_layers": 62, "num_attention_heads": 32,
    "num_key_value_heads": 16, "head_dim": 128, "hidden_size": 5376, "sliding_window": 1024,
    "sliding_window_pattern": 6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "kib", "growing_kib", "fixed_mib"),
    [(GEMMA_2_9B, 336, 168, 672), (GEMMA_3_27B, 496, 80, 416)],
    ids=["Gemma-2-9B", "Gemma-3-27B"],
)
def test_windows_stop_growing(
    config: dict[str, Any], kib: int, growing_kib: int, fixed_mib: int
) -> None:
    shape = kv_shape(config, 2)
    assert shape.bytes_per_token == kib * KIB
    assert shape.growing_bytes_per_token == growing_kib * KIB
    assert shape.row_bytes(100) == shape.prefill_row_bytes(100) == 100 * kib * KIB
    long = 50_000
    windows = shape.row_bytes(long) - long * growing_kib * KIB
    assert windows / 2**20 == pytest.approx(fixed_mib, rel=0.002)
    assert shape.prefill_row_bytes(long) == long * kib * KIB


@pytest.mark.parametrize(
    ("config", "sliding"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, 0),
        ({"model_type": "unheard_of", "sliding_window": 4096}, 0),
        ({"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}, 2),
    ],
)
def test_which_layers_have_a_window(config: dict[str, Any], sliding: int) -> None:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64}
    shape = kv_shape(sizes | config, 2)
    assert shape.sliding_bytes_per_token == sliding * 2 * 64 * 2


def test_layers_of_gemma_4_that_see_everything_have_heads_of_their_own() -> None:
    gemma_4 = {
        "model_type": "gemma4_text", "num_hidden_layers": 30, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "hidden_size": 2816, "sliding_window": 1024,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
        "global_head_dim": 512, "num_global_key_value_heads": 2, "attention_k_eq_v": True,
    }  # fmt: skip
    shape = kv_shape(gemma_4, 2)
    assert shape.sliding_bytes_per_token == 25 * 2 * 8 * 256 * 2
    assert shape.growing_bytes_per_token == 5 * 2 * 2 * 512 * 2
    assert kv_shape(gemma_4 | {"attention_k_eq_v": False}, 2).growing_bytes_per_token == (
        5 * 2 * 8 * 512 * 2
    )


@pytest.mark.parametrize(
    "wrong",
    [{"num_hidden_layers": "two"}, {"num_attention_heads": 0}, {"head_dim": [64, None]}],
    ids=str,
)
def test_what_is_no_size_is_named(wrong: dict[str, Any]) -> None:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64}
    with pytest.raises(ModelError, match=rf"config.json: {next(iter(wrong))} is "):
        kv_shape(sizes | wrong, 2)


def test_linear_attention_of_unknown_size_counts_as_attention() -> None:
    minimax = {
        "model_type": "minimax", "num_hidden_layers": 4, "num_attention_heads": 8,
        "hidden_size": 64, "layer_types": ["linear_attention", "full_attention"] * 2,
    }  # fmt: skip
    assert kv_shape(minimax, 2).growing_bytes_per_token == 4 * 2 * 64 * 2


def test_layers_that_guess_further_tokens_count_nothing() -> None:
    plain = tiny()
    extra = tuple(
        TensorInfo(name, "BF16", (64, 64))
        for name in (
            "model.layers.2.eh_proj.weight", "model.layers.3.self_attn.q_proj.weight",
            "mtp.layers.0.mlp.up_proj.weight", "model.mtp.fc.weight",
        )
    )  # fmt: skip
    longer = replace(plain, tensors=(*plain.tensors, *extra))
    for bits in (4, 16):
        assert weigh(longer, model(bits=bits)) == weigh(plain, model(bits=bits))
        assert weigh_layers(longer, model(bits=bits)) == weigh_layers(plain, model(bits=bits))


def test_linear_attention_takes_the_same_whatever_the_length() -> None:
    shape = kv_shape(
        {
            "num_hidden_layers": 48,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
        },
        2,
    )
    assert shape.bytes_per_token == 24 * KIB
    assert shape.fixed_bytes / 2**20 == pytest.approx(74, abs=0.5)
    assert shape.row_bytes(10) == 240 * KIB + shape.fixed_bytes


# ---- workspace


def test_the_workspace_of_a_32b_model() -> None:
    """The sum that research made for a prefill of 4,096 tokens: 0.87 and 0.26 GiB; 0.74 at int8."""
    checkpoint = qwen_32b()
    weights = weigh(checkpoint, model(bits=4))
    assert activation_bytes(checkpoint.config, 4096, 2) / GIB == pytest.approx(0.87, abs=0.01)
    assert dequantized_bytes(weights, FourBit(), 4096) == 27648 * 5120 * 2
    assert dequantized_bytes(weights, Int8(), 4096) / GIB == pytest.approx(0.65, abs=0.01)


def test_whole_attention_scores_count_where_there_is_no_sdpa() -> None:
    sizes = {"num_attention_heads": 16}
    assert score_bytes(sizes | {"model_type": "llama"}, 8, 2048, 2) == 0
    assert score_bytes(sizes | {"model_type": "gemma2"}, 8, 2048, 2) == 8 * 16 * 2048**2 * 10


# ---- the plan


def plan(checkpoint: Checkpoint, bits: int | None = 4, **changes: Any) -> MemoryPlan:
    device_bytes = changes.pop("device_bytes", CARD)
    fields = {"max_tokens": 1024} | changes
    fields["prompt_tokens"] = min(fields.get("prompt_tokens", 1 << 62), fields["max_tokens"])
    return plan_memory(checkpoint, model(bits=bits), Work(**fields), device_bytes)


def test_a_32b_model_at_4_bits_fits_a_24_gb_card() -> None:
    found = plan(qwen_32b())
    assert found.weight_bytes / GIB == pytest.approx(17.90, abs=0.01)
    assert found.kv_bytes_per_token == 256 * KIB
    assert found.kv_bytes == found.batch_size * 1024 * 256 * KIB
    assert found.total <= CARD
    assert 8 <= found.batch_size <= 14
    flat = plan_memory(
        qwen_32b(),
        model(quantization=FourBit(double_quant=False)),
        Work(max_tokens=1024, prompt_tokens=1024),
        CARD,
    )
    assert 5 <= flat.batch_size < found.batch_size


def test_the_sum_is_the_sum() -> None:
    found = plan(llama_8b(), max_tokens=4096, prompt_tokens=1024)
    parts = found.weight_bytes + found.kv_bytes + found.workspace_bytes
    assert found.total == parts + found.overhead_bytes + found.reserve_bytes
    assert found.overhead_bytes == CUDA_CONTEXT_BYTES
    assert found.reserve_bytes == pytest.approx(0.05 * (found.kv_bytes + found.workspace_bytes))


def test_auto_takes_what_fits_up_to_64_rows() -> None:
    assert plan(llama_8b(), max_tokens=256).batch_size == MAX_PADDED_ROWS == 64
    long = plan(llama_8b(), max_tokens=2048)
    assert 1 < long.batch_size < 64
    with pytest.raises(DoesNotFit):
        plan(llama_8b(), max_tokens=2048, batch_size=long.batch_size + 1)


def test_without_a_limit_everything_fits() -> None:
    found = plan(qwen_32b(), bits=16, device_bytes=None)
    assert (found.batch_size, found.device_bytes, found.overhead_bytes) == (32, None, GIB // 4)
    assert plan(qwen_32b(), bits=16, device_bytes=None, batch_size=7).batch_size == 7


def refusal(checkpoint: Checkpoint, **changes: Any) -> DoesNotFit:
    with pytest.raises(DoesNotFit) as caught:
        plan(checkpoint, **changes)
    return caught.value


def test_a_refusal_shows_the_sum() -> None:
    problem = refusal(qwen_32b(), bits=8).problem
    assert "org/model at 8 bits (int8) does not fit: it needs 3" in problem
    assert "the device has 23.60 GiB" in problem
    for part in (
        r"weights 31\.98 GiB", r"KV cache 0\.25 GiB \(1 x 1,024 tokens, 256 KiB each\)",
        r"workspace \S+ [GM]iB", r"CUDA context 0\.78 GiB", r"reserve \S+ MiB",
    ):  # fmt: skip
        assert re.search(part, problem), (part, problem)


def test_the_cheapest_help_comes_first() -> None:
    assert refusal(llama_8b(), max_tokens=2048, batch_size=64).hint.startswith("engine.batch_size ")
    assert re.match(r"rows of [\d,]+ tokens fit", refusal(llama_8b(), max_tokens=10**6).hint)
    assert refusal(qwen_32b(), bits=8).hint.startswith("model.bits 4 fits: its weights take 17.90")
    assert refusal(llama_8b(), bits=32).hint.startswith("model.bits 16 fits")
    moe = refusal(qwen_30b_a3b()).hint
    assert moe.startswith("cluster.gpus_per_replica 4 fits")
    assert moe.endswith("so does one A100 with 79.14 GiB")
    one = refusal(qwen_30b_a3b(), device_bytes=5 * GIB).hint
    assert one == "it takes a larger card, such as one A100 with 79.14 GiB, or a smaller model"


def test_where_the_answer_alone_is_too_long_the_help_says_so() -> None:
    sizes = {"batch_size": 1, "max_tokens": 200_000}
    assert "max_new_tokens" not in refusal(qwen_32b(), prompt_tokens=199_000, **sizes).hint
    hint = refusal(qwen_32b(), prompt_tokens=1_000, **sizes).hint
    assert "lower sampling.max_new_tokens, which is 199,000, and" in hint


def test_help_really_helps() -> None:
    rows = re.match(r"engine.batch_size (\d+) fits", refusal(llama_8b(), batch_size=64).hint)
    assert rows
    plan(llama_8b(), batch_size=int(rows[1]))
    tokens = re.match(r"rows of ([\d,]+) tokens", refusal(llama_8b(), max_tokens=10**6).hint)
    assert tokens
    plan(llama_8b(), max_tokens=int(tokens[1].replace(",", "")))


def test_experts_are_named_when_they_are_why() -> None:
    assert "54.00 GiB of the weights are experts, which stay in 16 bits" in (
        refusal(qwen_30b_a3b()).problem
    )


# ---- the continuous engine


def packed(checkpoint: Checkpoint, bits: int | None = 4, **changes: Any) -> MemoryPlan:
    return plan(checkpoint, bits, **{"step_tokens": 2048, "greedy": True} | changes)


def test_what_reading_takes_on_a_card() -> None:
    checkpoint = qwen_32b()
    writes, reads = (packed(checkpoint, batch_size=4, reads=each) for each in (False, True))
    shape = kv_shape(checkpoint.text_config, 2)
    # Scores, some of them in float32 and once more, and one layer of 8,192 tokens, twice.
    scores = 512 * 2**20 + 64 * 152_064 * 2 * 4
    copies = 2 * 8192 * shape.bytes_per_token // shape.layers
    assert reads.workspace_bytes - writes.workspace_bytes == scores + copies


@pytest.mark.parametrize("step_tokens", [None, 2048])
def test_the_workspaces_of_cublas(step_tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def workspace_bytes() -> int:
        return plan(llama_8b(), batch_size=2, step_tokens=step_tokens).workspace_bytes

    found = workspace_bytes()
    monkeypatch.setattr(memory, "CUBLAS_BYTES", 0)
    assert found - workspace_bytes() == 4 * 32 * 2**20


def test_the_pool_is_what_the_card_has_left() -> None:
    found = packed(qwen_32b(), max_tokens=8192)
    assert found.fits
    assert found.kv_tokens % 16 == 0
    assert found.kv_bytes == found.kv_tokens * 256 * KIB
    assert 12_000 < found.kv_tokens < 20_000
    assert found.device_bytes is not None
    assert 0 <= found.device_bytes - found.total < 16 * 256 * KIB
    parts = found.weight_bytes + found.kv_bytes + found.workspace_bytes
    assert found.total == parts + found.overhead_bytes + found.reserve_bytes


def test_the_pool_is_no_larger_than_its_rows_could_use() -> None:
    found = packed(llama_8b(), max_tokens=100, batch_size=8)
    assert found.kv_tokens == 8 * 112  # whole blocks of 16 for each row
    assert found.total < CARD // 2


def test_rows_that_share_a_pool_are_more_than_padded_ones() -> None:
    padded, shared = plan(qwen_32b(), max_tokens=4096), packed(qwen_32b(), max_tokens=4096)
    assert shared.batch_size > 4 * padded.batch_size
    assert shared.kv_tokens >= shared.batch_size * 512


def test_a_number_of_rows_is_obeyed_and_one_row_of_the_greatest_length_must_fit() -> None:
    assert packed(qwen_32b(), max_tokens=8192, batch_size=100).batch_size == 100
    problem = refusal(qwen_32b(), max_tokens=40_000, step_tokens=2048).problem
    assert "one row of 40,000 tokens" in problem


def test_what_is_drawn_takes_more_than_what_is_likeliest() -> None:
    greedy = packed(qwen_32b(), batch_size=64).workspace_bytes
    drawn = packed(qwen_32b(), batch_size=64, greedy=False).workspace_bytes
    assert drawn - greedy == 64 * 152_064 * 30


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, None),
        ({"layer_types": ["full_attention", "sliding_attention"]}, None),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"kv_lora_rank": 512}, "latent"),
        ({"model_type": "gpt_oss"}, "attention of its own"),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}, None),
        (
            {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 999},
            "longest",
        ),
        ({"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 512}, "longest"),
        ({"rope_parameters": {"rope_type": "llama3"}, "max_position_embeddings": 512}, None),
    ],
)
def test_what_no_paged_cache_holds_is_known_from_the_configuration(
    config: dict[str, Any], why: str | None
) -> None:
    found = unpackable({"num_hidden_layers": 2} | config, max_tokens=1000)
    assert (found is None) if why is None else (found is not None and why in found)


# ---- laws

BITS = st.sampled_from([4, 8, 16, 32])
TOKENS = st.integers(1, 4096)
ROWS = st.integers(1, 64)


@settings(deadline=None, max_examples=60)
@given(bits=BITS, tokens=TOKENS, rows=ROWS, hidden=st.integers(1, 8), layers=st.integers(1, 3))
def test_no_part_is_negative_and_more_takes_more(
    bits: int, tokens: int, rows: int, hidden: int, layers: int
) -> None:
    checkpoint = tiny(hidden=64 * hidden, layers=layers)

    def planned(bits: int = bits, tokens: int = tokens, rows: int = rows) -> MemoryPlan:
        return plan(checkpoint, bits, max_tokens=tokens, batch_size=rows, device_bytes=None)

    found = planned()
    parts = (found.weight_bytes, found.kv_bytes, found.workspace_bytes, found.reserve_bytes)
    assert min(parts) >= 0
    assert found.total < planned(tokens=tokens + 1).total
    assert found.total < planned(rows=rows + 1).total
    if bits < 32:
        assert found.weight_bytes < planned(bits=2 * bits).weight_bytes


@settings(deadline=None, max_examples=60)
@given(tokens=TOKENS, prompt=st.integers(0, 4096), gib=st.floats(5, 80))
def test_a_larger_card_and_shorter_rows_never_hold_fewer_rows(
    tokens: int, prompt: int, gib: float
) -> None:
    checkpoint = tiny(layers=1)

    def rows(tokens: int, device: float) -> int:
        try:
            return plan(
                checkpoint,
                max_tokens=tokens,
                prompt_tokens=prompt,
                device_bytes=int(device * 2**20),
            ).batch_size
        except DoesNotFit:
            return 0

    found = rows(tokens, 512 + gib)
    assert 0 <= found <= rows(tokens, 512 + gib + 1) <= MAX_PADDED_ROWS
    assert found <= rows(max(1, tokens // 2), 512 + gib)


@settings(deadline=None, max_examples=60)
@given(numel=st.integers(1, 10**9))
def test_4_bits_are_less_than_8_and_more_than_half_a_byte(numel: int) -> None:
    for double_quant in (False, True):
        assert numel / 2 < four_bit_bytes(numel, double_quant=double_quant)
    if numel > 30_000:  # below, the table of nested scales is larger than what it saves
        assert four_bit_bytes(numel, double_quant=True) < four_bit_bytes(numel, double_quant=False)
        assert four_bit_bytes(numel, double_quant=False) < numel


# ---- over several cards


@functools.cache
def llama_70b() -> Checkpoint:
    return llama_like(hidden=8192, inner=28672, layers=80, heads=64, kv_heads=8, vocab=128256)


def test_70_billion_parameters_fit_two_cards_of_24_gb() -> None:
    work = Work(max_tokens=2048, prompt_tokens=1800, step_tokens=512, greedy=True, cards=2)
    plan = plan_memory(llama_70b(), model(bits=4), work, CARD)
    assert plan.fits
    assert sum(plan.card_layers) == 80
    assert plan.weight_bytes == weigh(llama_70b(), model(bits=4)).total_bytes
    assert plan.device_bytes == 2 * CARD
    # The fuller card bounds the cache.
    layers = weigh_layers(llama_70b(), model(bits=4))
    first = layers.besides + sum(layers.layers[: plan.card_layers[0]])
    last = layers.head + sum(layers.layers[plan.card_layers[0] :])
    besides = (plan.workspace_bytes + plan.overhead_bytes + plan.reserve_bytes) // 2
    for weights, count in ((first, plan.card_layers[0]), (last, plan.card_layers[1])):
        kv_bytes = plan.kv_bytes * count // 80
        assert weights + kv_bytes + besides <= CARD


def test_a_model_that_fits_no_single_card_is_told_of_several() -> None:
    work = Work(max_tokens=1024, prompt_tokens=512, step_tokens=512, greedy=True)
    with pytest.raises(DoesNotFit) as caught:
        plan_memory(llama_70b(), model(bits=4), work, CARD)
    assert "cluster.gpus_per_replica 2 fits" in caught.value.hint


def test_layers_that_do_not_divide_are_refused() -> None:
    checkpoint = tiny(layers=2)
    work = Work(max_tokens=64, prompt_tokens=32, step_tokens=64, greedy=True, cards=3)
    with pytest.raises(DoesNotFit, match="has 2 layers, which can't be spread over 3") as caught:
        plan_memory(checkpoint, model(bits=4), work, CARD)
    assert caught.value.hint == "cluster.gpus_per_replica is at most 2"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_layers_add_up_to_the_whole(scheme: str, tied: bool) -> None:
    checkpoint = tiny(tied=tied, biases=True)
    asked = model(**SCHEMES[scheme])
    before, layers, after = weigh_layers(checkpoint, asked)
    assert before + sum(layers) + after == weigh(checkpoint, asked).total_bytes


@pytest.mark.parametrize("rows", [1, 8])
def test_padded_rows_over_cards_have_their_room_on_each(rows: int) -> None:
    work = Work(max_tokens=2048, prompt_tokens=1024, batch_size=rows, cards=2)
    one = plan_memory(llama_8b(), model(bits=4), replace(work, cards=1), CARD)
    two = plan_memory(llama_8b(), model(bits=4), work, CARD)
    assert two.kv_bytes == one.kv_bytes
    assert two.workspace_bytes == 2 * one.workspace_bytes
    assert sum(two.card_layers) == 32
