"""Planned bytes are those of real tensors: weights of every kind and architecture, tied or not, of
odd shapes; and the cache, in each place where it is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from quantbatch.engine.blocks import BLOCK_TOKENS
from quantbatch.engine.continuous import ContinuousEngine, EngineLimits
from quantbatch.engine.slots import GROWTH_TOKENS, SlotStore
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.footprint import weigh
from quantbatch.model.kv import kv_shape
from quantbatch.model.memory import Work, plan_memory
from quantbatch.model.widths import every_width
from quantbatch.records import Request, RequestId
from quantbatch.spec import FourBit, Int8, Model, Sampling
from quantbatch.weights.bnb import parameter_bytes
from quantbatch.weights.loading import load
from tests.integration.llama import SIZES, make_model, make_tokenizer
from tests.integration.test_continuous_engine import InPages

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

hf: Any = transformers

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    # Neither rows nor columns are whole blocks; 75 x 97 has an odd number of codes.
    "llama, odd": {
        "hidden_size": 75, "intermediate_size": 97, "head_dim": 14, "vocab_size": 301,
        "num_attention_heads": 3, "num_key_value_heads": 1,
    },
    "qwen2": {},  # biases of queries, keys and values
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 48},
    "mistral": {"sliding_window": 32},
    "gemma2": {"sliding_window": 32, "head_dim": 32},
    "gemma3_text": {"sliding_window": 32, "head_dim": 32},
    "phi3": {},  # fused projections
    "gpt2": {"bos_token_id": 1, "eos_token_id": 1},  # Conv1D, biases, learned positions
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": MOE,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"bits": 32},
    "bf16": {"bits": 16},
    "int8": {"quantization": Int8()},
    "nf4": {"quantization": FourBit(double_quant=False)},
    "nf4+dq": {"bits": 4},
    "fp4": {"quantization": FourBit(kind="fp4", double_quant=False)},
    "fp4+dq": {"quantization": FourBit(kind="fp4")},
}


def made(folder: Path, name: str) -> Path:
    return make_model(folder, name.partition(",")[0], **ARCHITECTURES[name])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_planned_to_the_byte(tmp_path: Path, name: str) -> None:
    folder = made(tmp_path, name)
    for kind, fields in KINDS.items():
        model = Model.model_validate({"id": str(folder), "dtype": "auto", **fields})
        if kind != "fp32":
            model = model.model_copy(update={"dtype": "bfloat16"})
        checkpoint = open_checkpoint(model)
        found = load(checkpoint, model, "cpu")
        planned = weigh(checkpoint, model)
        assert planned.total_bytes == found.weight_bytes, kind
        assert found.weight_bytes == parameter_bytes(found.model), kind
        if kind in ("fp32", "bf16"):
            assert planned.total_params == sum(p.numel() for p in found.model.parameters())


def test_the_table_of_widths_is_exact_too(tmp_path: Path) -> None:
    folder = made(tmp_path, "qwen2")
    model = Model(id=str(folder), bits=4, dtype="bfloat16")
    checkpoint = open_checkpoint(model)
    work = Work(max_tokens=64, prompt_tokens=32)
    for width in every_width(checkpoint, model, work, None, row_tokens=64):
        asked = model.model_copy(update={"bits": None, **KINDS[width.kind]})
        if "quantization" in KINDS[width.kind]:
            asked = asked.model_copy(update={"bits": None})
        assert width.weight_bytes == load(checkpoint, asked, "cpu").weight_bytes, width.kind


# ---- the cache


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


PACKED = ["llama", "llama, odd", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2"]


def engine_of(folder: Path, kind: type[ContinuousEngine], limits: EngineLimits) -> Any:
    model = Model(id=str(folder), bits=32)
    engine = kind(load(open_checkpoint(model), model, "cpu").model, make_tokenizer(), limits)
    ids = (5, 6, 7, 8, 9)
    sampling = Sampling(max_new_tokens=3)
    engine.add([Request(RequestId(0, 0), ids, sampling, 0)])
    while engine.has_work():
        engine.step()
    return engine


@pytest.mark.parametrize("name", PACKED)
def test_the_pool_in_pages_takes_what_is_planned(tmp_path: Path, name: str) -> None:
    """And one block for padding, which is planned with what recorded steps take."""
    folder = made(tmp_path, name)
    model = Model(id=str(folder), bits=32)
    checkpoint = open_checkpoint(model)
    work = Work(max_tokens=100, prompt_tokens=80, batch_size=3, step_tokens=64, greedy=True)
    plan = plan_memory(checkpoint, model, work, 2**30)
    limits = EngineLimits(rows=3, kv_tokens=plan.kv_tokens, step_tokens=64)
    engine = engine_of(folder, InPages, limits)
    pages = [tensor for pair in engine._forward.store._pages.values() for tensor in pair]
    assert len(pages) == 2 * kv_shape(checkpoint.text_config, 4).layers
    padding = BLOCK_TOKENS * plan.kv_bytes_per_token
    assert bytes_of(pages) == plan.kv_bytes + padding
    assert plan.kv_bytes == plan.kv_tokens * plan.kv_bytes_per_token
    assert plan.workspace_bytes > padding


@pytest.mark.parametrize("name", PACKED)
def test_slots_take_a_token_s_bytes_for_each_of_theirs(tmp_path: Path, name: str) -> None:
    folder = made(tmp_path, name)
    limits = EngineLimits(rows=3, kv_tokens=320, step_tokens=64)
    store = engine_of(folder, ContinuousEngine, limits)._forward.store
    assert isinstance(store, SlotStore)
    slots = [tensor for layer in store._layers.values() for tensor in layer.tensors]
    shape = kv_shape(open_checkpoint(Model(id=str(folder))).text_config, 4)
    assert bytes_of(slots) == 3 * GROWTH_TOKENS * shape.bytes_per_token


OTHER_CACHES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    "qwen3_next": {
        **MOE, "num_hidden_layers": 4, "head_dim": 32, "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
    },
    "gemma3_text": {"num_hidden_layers": 7, "sliding_window": 16, "head_dim": 32},
    "qwen3": {},
}  # fmt: skip
"""Multi-head latent attention; linear attention; windows; and the usual."""


@pytest.mark.parametrize("model_type", OTHER_CACHES)
def test_the_cache_of_transformers_takes_what_is_planned(model_type: str) -> None:
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(model_type, **SIZES | OTHER_CACHES[model_type])
    model = hf.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    with torch.inference_mode():
        cache = model(torch.arange(40)[None], use_cache=True).past_key_values
        cache = model(torch.tensor([[5]]), past_key_values=cache, use_cache=True).past_key_values
    held = [
        tensor
        for layer in cache.layers
        for part in vars(layer).values()
        for tensor in (part.values() if isinstance(part, dict) else [part])
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 0
    ]
    shape = kv_shape(config.to_dict(), 2)
    assert bytes_of(held) == shape.row_bytes(41)
    assert (shape.fixed_bytes > 0) == (model_type == "qwen3_next")
