"""Loading: every kind of weights, to the byte, and every way in which it must fail."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quantbatch.errors import DoesNotFit, ModelError
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.footprint import Part, weigh
from quantbatch.model.kv import kv_shape
from quantbatch.model.memory import Work, plan_memory
from quantbatch.spec import FourBit, Int8, Model, Unquantized
from quantbatch.weights import bnb, loading
from quantbatch.weights.dtypes import resolve
from quantbatch.weights.loading import LoadedModel, load
from quantbatch.weights.peak import PeakMemory
from tests.integration.llama import make_llama, make_model

if TYPE_CHECKING:
    from collections.abc import Callable


hf: Any = transformers

KINDS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"bits": 32},
    "int8": {"bits": 8},
    "nf4": {"quantization": FourBit(double_quant=False)},
    "nf4+dq": {"bits": 4},
    "fp4": {"quantization": FourBit(kind="fp4")},
    "skipping": {"quantization": FourBit(skip_modules=["down_proj", "k_proj"])},
}


@pytest.fixture(scope="module", params=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), tied=request.param == "tied")


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "model")


def loaded(folder: Path, **fields: Any) -> LoadedModel:
    model = Model(id=str(folder), **fields)
    return load(open_checkpoint(model), model, "cpu")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(40).view(2, 20)).logits
    return found.float()


# ---- what is loaded


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_is_exact_to_the_byte(folder: Path, kind: str) -> None:
    model = Model(id=str(folder), **KINDS[kind])
    checkpoint = open_checkpoint(model)
    found = load(checkpoint, model, "cpu")
    planned = weigh(checkpoint, resolve(checkpoint, model, "cpu"))
    assert found.weight_bytes == planned.total_bytes
    assert sum(p.numel() for p in found.model.parameters() if p.is_floating_point()) <= (
        planned.total_params
    )
    assert not found.model.training
    assert not any(p.requires_grad for p in found.model.parameters())
    assert logits(found.model).isfinite().all()


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"bos_token_id": 1, "eos_token_id": 1},  # Conv1D
    "qwen2": {},  # biases
    "qwen3": {},
    "gemma2": {"sliding_window": 32, "head_dim": 32},  # no SDPA, tied by default
    "gemma3_text": {"sliding_window": 32, "head_dim": 32},
    "mistral": {"sliding_window": 32},
    "phi3": {},  # fused projections
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere2": {"sliding_window": 32, "head_dim": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_plan_is_exact_for_every_architecture(tmp_path: Path, model_type: str) -> None:
    make_model(tmp_path, model_type, **ARCHITECTURES[model_type])
    model = Model(id=str(tmp_path), dtype="bfloat16")
    checkpoint = open_checkpoint(model)
    for bits in (4, 8):
        fewer = model.model_copy(update={"bits": bits})
        found = load(checkpoint, fewer, "cpu")
        assert found.weight_bytes == weigh(checkpoint, fewer).total_bytes, bits
    found = load(checkpoint, model, "cpu")
    assert found.weight_bytes == weigh(checkpoint, model).total_bytes
    cache = found.model(torch.arange(40)[None], use_cache=True).past_key_values
    held = sum(t.numel() * 2 for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == kv_shape(checkpoint.text_config, 2).row_bytes(40)


def test_a_model_whose_layers_bitsandbytes_passes_over_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path, "falcon")
    with pytest.raises(ModelError, match="no layer that bitsandbytes quantizes"):
        weigh(open_checkpoint(Model(id=str(tmp_path))), Model(id=str(tmp_path), bits=4))
    assert logits(loaded(tmp_path).model).isfinite().all()


def test_more_weights_than_planned_are_reported(
    untied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model(id=str(untied), bits=16)
    monkeypatch.setattr(
        loading, "weigh", lambda checkpoint, _: weigh(checkpoint, Model(id="x", bits=4))
    )
    load(open_checkpoint(model), model, "cpu")
    assert "MiB were planned" in caplog.text


def test_a_model_of_odd_shapes_loads_and_runs(tmp_path: Path) -> None:
    """bitsandbytes 0.50 fails on these on CPUs with AVX512-BF16 unless repacking is off."""
    folder = make_llama(tmp_path, hidden_size=96, intermediate_size=200, head_dim=20)
    model = Model(id=str(folder), bits=4)
    checkpoint = open_checkpoint(model)
    found = load(checkpoint, model, "cpu")
    assert found.weight_bytes == weigh(checkpoint, resolve(checkpoint, model, "cpu")).total_bytes
    assert logits(found.model).isfinite().all()


def test_weights_stay_as_loaded_when_they_are_used(untied: Path) -> None:
    found = loaded(untied, bits=4)
    first = logits(found.model)
    assert bnb.parameter_bytes(found.model) == found.weight_bytes
    assert torch.equal(logits(found.model), first)


def test_quantized_logits_are_near_and_in_the_order_of_bits(untied: Path) -> None:
    exact = logits(loaded(untied, bits=32).model)

    def error(**fields: Any) -> float:
        return float((logits(loaded(untied, **fields).model) - exact).norm() / exact.norm())

    float32 = {"dtype": "float32"}
    int8 = error(bits=8, **float32)
    nf4 = error(quantization=FourBit(compute_dtype="float32"), **float32)
    fp4 = error(quantization=FourBit(kind="fp4", compute_dtype="float32"), **float32)
    assert 0 < int8 < nf4 / 3
    assert nf4 < fp4 < 0.5


def test_every_option_reaches_the_layers(untied: Path) -> None:
    quantization = FourBit(
        kind="fp4", double_quant=False, compute_dtype="float16", skip_modules=["o_proj"]
    )
    found = loaded(untied, quantization=quantization, dtype="float32")
    modules = dict(found.model.named_modules())
    layer: Any = modules["model.layers.0.mlp.up_proj"]
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("fp4", False, 64)
    assert layer.compute_dtype == torch.float16
    assert found.compute_dtype == "float16"
    for name in ("model.layers.0.self_attn.o_proj", "lm_head"):
        assert type(modules[name]) is torch.nn.Linear
    assert found.model.lm_head.weight.dtype == torch.float32
    found = loaded(untied, quantization=Int8(threshold=0.0))
    eight: Any = dict(found.model.named_modules())["model.layers.0.mlp.up_proj"]
    assert isinstance(eight, bitsandbytes.nn.Linear8bitLt)
    assert (eight.state.threshold, eight.state.has_fp16_weights) == (0.0, False)


STORAGE: list[Literal["bfloat16", "float16", "float32"]] = ["bfloat16", "float16", "float32"]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_type_that_codes_are_packed_into_changes_nothing(
    untied: Path, kind: Literal["nf4", "fp4"], storage: Literal["bfloat16", "float16", "float32"]
) -> None:
    plain = loaded(untied, quantization=FourBit(kind=kind))
    packed = loaded(untied, quantization=FourBit(kind=kind, storage_dtype=storage))
    layer: Any = dict(packed.model.named_modules())["model.layers.0.mlp.up_proj"]
    assert layer.weight.dtype == getattr(torch, storage)
    assert packed.weight_bytes == plain.weight_bytes
    assert torch.equal(logits(packed.model), logits(plain.model))
    assert bnb.parameter_bytes(packed.model) == plain.weight_bytes


def test_int8_without_a_threshold_is_the_same_in_any_company(untied: Path) -> None:
    """With one, outliers are chosen over the whole batch."""
    found = loaded(untied, quantization=Int8(threshold=0.0), dtype="float32").model
    random = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 300, (8, 24), generator=random)
    with torch.inference_mode():
        together, alone = found(prompts).logits[:1], found(prompts[:1]).logits
    assert torch.equal(together, alone)


MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_the_experts_of_a_mixture_keep_their_16_bits(
    tmp_path: Path, model_type: str, bits: Literal[4, 8]
) -> None:
    make_model(tmp_path, model_type, **MIXTURES[model_type])
    checkpoint = open_checkpoint(Model(id=str(tmp_path)))
    weights = weigh(checkpoint, Model(id=str(tmp_path), bits=bits, dtype="float32"))
    found = loaded(tmp_path, bits=bits, dtype="float32")
    experts = {n: p for n, p in found.model.named_parameters() if ".experts." in n}
    assert sum(p.numel() for p in experts.values()) == weights.params[Part.EXPERT] > 0
    assert sum(p.numel() * 4 for p in experts.values()) == weights.bytes[Part.EXPERT]
    assert weights.params[Part.EXPERT] > 0.3 * weights.total_params
    quantized = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    attention = [m for n, m in found.model.named_modules() if n.endswith(("q_proj", "o_proj"))]
    assert all(isinstance(module, quantized) for module in attention)
    routers = [p for n, p in found.model.named_parameters() if n.endswith("gate.weight")]
    assert routers
    assert all(p.dtype == torch.float32 for p in routers), "a rounded router picks other experts"
    exact, error = logits(loaded(tmp_path, bits=32).model), logits(found.model)
    assert (error - exact).norm() / exact.norm() < 0.2


def test_a_checkpoint_saved_quantized_loads_to_the_same_numbers(
    untied: Path, tmp_path: Path
) -> None:
    for kind in ("nf4", "nf4+dq", "int8"):
        first = loaded(untied, **KINDS[kind])
        first.model.save_pretrained(tmp_path / kind)
        model = Model(id=str(tmp_path / kind))
        checkpoint = open_checkpoint(model)
        again = load(checkpoint, model, "cpu")
        assert checkpoint.quantized == "bitsandbytes"
        assert torch.equal(logits(again.model), logits(first.model)), kind
        assert again.weight_bytes == first.weight_bytes
        assert weigh(checkpoint, resolve(checkpoint, model, "cpu")).total_bytes == (
            first.weight_bytes
        ), kind
        with pytest.raises(ModelError, match="is quantized already"):
            loaded(tmp_path / kind, bits=4 if kind == "int8" else 8)


def test_the_compute_type_asked_for_wins_over_the_one_saved(untied: Path, tmp_path: Path) -> None:
    saved = loaded(untied, quantization=FourBit(compute_dtype="float16"))
    saved.model.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved", quantization=FourBit(compute_dtype="float32"))
    layers = [m for m in again.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    assert again.compute_dtype == "float32"


def test_types_are_chosen_for_the_cpu(untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(id=str(untied), bits=4)
    checkpoint = open_checkpoint(model)

    def types(flags: dict[str, bool], **changes: Any) -> tuple[str, str]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
        found = resolve(checkpoint, model.model_copy(update=changes), "cpu")
        assert isinstance(found.quantization, FourBit)
        return found.dtype, found.quantization.compute_dtype

    assert types({"avx512_bf16": True}) == ("bfloat16", "bfloat16")
    assert types({"avx2": True, "avx512_bf16": False}) == ("float32", "float32")
    assert types({"avx2": True}, dtype="bfloat16") == ("bfloat16", "float32")
    assert types({"avx512_bf16": True}, dtype="float32") == ("float32", "bfloat16")
    config = checkpoint.config | {"dtype": "float16"}
    checkpoint = dataclasses.replace(checkpoint, config=config)
    assert types({"avx512_bf16": True}) == ("float32", "bfloat16")
    asked = FourBit(compute_dtype="float16")
    assert types({}, bits=None, quantization=asked) == ("float32", "float16")


def test_what_the_model_says_on_sampling_is_forgotten(untied: Path) -> None:
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.7,
            "max_length": 99, "eos_token_id": [2, 3], "pad_token_id": 4}  # fmt: skip
    (untied / "generation_config.json").write_text(json.dumps(said))
    found: Any = loaded(untied).model.generation_config
    assert found.eos_token_id == [2, 3]
    assert found.pad_token_id == 4
    empty = hf.GenerationConfig(eos_token_id=[2, 3], pad_token_id=4)
    assert found.to_diff_dict() == empty.to_diff_dict()


def test_the_end_token_may_be_in_the_configuration_only(untied: Path) -> None:
    (untied / "generation_config.json").unlink()
    assert loaded(untied).model.generation_config.eos_token_id == 1


def test_nothing_is_logged_and_no_bar_is_drawn(
    untied: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        found = loaded(untied, bits=8, dtype="float32")
        logits(found.model)
    assert [
        r for r in caplog.records if r.name.split(".")[0] in ("transformers", "bitsandbytes")
    ] == []
    assert capfd.readouterr().err == ""


# ---- what must fail


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("bits", [4, 16])
def test_a_missing_tensor_is_not_made_up(untied: Path, bits: int) -> None:
    edit(untied, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        loaded(untied, bits=bits)


def test_an_unexpected_tensor_is_not_dropped(untied: Path) -> None:
    edit(untied, lambda tensors: tensors.update(extra=torch.zeros(3)))
    with pytest.raises(ModelError, match="has, unexpectedly, extra"):
        loaded(untied)


def test_a_tensor_of_another_shape_is_named_with_both(untied: Path) -> None:
    edit(untied, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64)}))
    with pytest.raises(ModelError, match=r"another shape model\.norm\.weight .*64.*128"):
        loaded(untied)


def test_a_model_type_that_transformers_does_not_know_is_refused(untied: Path) -> None:
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(ModelError, match=r"can't be loaded: .*unheard_of"):
        loaded(untied)


def test_pickles_are_not_read_even_if_they_come_later(untied: Path) -> None:
    model = Model(id=str(untied))
    checkpoint = open_checkpoint(model)
    tensors = load_file(untied / "model.safetensors")
    (untied / "model.safetensors").unlink()
    torch.save(tensors, untied / "pytorch_model.bin")
    with pytest.raises(ModelError, match="can't be loaded: OSError"):
        load(checkpoint, model, "cpu")


def test_a_tampered_header_that_looks_whole_is_refused_by_the_library(untied: Path) -> None:
    file = untied / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"dtype":"BF16"', b'"dtype":"XF16"', 1))
    with pytest.raises(ModelError, match=r"can't be loaded: SafetensorError"):
        loaded(untied)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_no_room_while_loading_is_no_fault_of_the_model(
    untied: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(DoesNotFit, match="do not fit cpu"):
        loaded(untied)


def test_a_quantized_checkpoint_never_gets_an_empty_quantization(
    untied: Path, tmp_path: Path
) -> None:
    """`quantization_config=None` would load it as random numbers, without an exception."""
    loaded(untied, bits=8).model.save_pretrained(tmp_path / "int8")
    exact = logits(loaded(untied, bits=32).model)
    again = logits(loaded(tmp_path / "int8", quantization=Unquantized()).model)
    assert (again - exact).norm() / exact.norm() < 0.1


# ---- what it takes while it works


def test_the_measured_peak_is_within_the_plan(tmp_path: Path) -> None:
    """At its first forward pass a process also grows by itself, by about 20 MiB here: threads,
    kernels.
    """
    folder = make_llama(
        tmp_path, dtype=torch.float32, hidden_size=512, intermediate_size=1408,
        num_hidden_layers=3, vocab_size=4096, num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    model = Model(id=str(folder), bits=32)
    checkpoint = open_checkpoint(model)
    plan = plan_memory(checkpoint, model, Work(128, 128, batch_size=8), None)
    peak = PeakMemory("cpu")
    found: Any = load(checkpoint, model, "cpu").model
    prompts = torch.randint(5, 4000, (8, 120))
    mask = torch.ones_like(prompts)
    mask[0, :60] = 0
    with torch.inference_mode():
        found.generate(prompts, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert 0.9 * plan.weight_bytes < peak.peak_bytes() < plan.total + 50 * 2**20


def test_the_peak_forgets_what_was_before() -> None:
    block = bytearray(64 * 2**20)
    del block
    peak = PeakMemory("cpu")
    assert peak.peak_bytes() < 16 * 2**20
    block = bytearray(64 * 2**20)
    del block
    assert 60 * 2**20 < peak.peak_bytes() < 90 * 2**20
