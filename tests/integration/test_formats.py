"""Checkpoints in the formats of others: each means the weights that it was made from, takes the
bytes that were planned, and is refused where it would be something else.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quantbatch.errors import ModelError
from quantbatch.model import formats
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.footprint import weigh
from quantbatch.model.formats import GPTQ, Machine
from quantbatch.spec import Model
from quantbatch.weights.dtypes import resolve
from quantbatch.weights.loading import LoadedModel, load
from tests.integration import packed
from tests.integration.llama import make_llama, make_model
from tests.integration.packed import dense_twin, write_packed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

hf: Any = transformers

pytestmark = [
    # optimum 2.3 reads a deprecated property of transformers 5.23.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # gptqmodel 7.7 leaves a temporary folder to the garbage collector.
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]

MISSING = Machine.this().lacks(GPTQ)
needs_gptq = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

EXPANDED: dict[str, Callable[[Path], packed.Packed]] = {
    "fp8": packed.fp8,
    "mxfp8": packed.mxfp8,
    "compressed-tensors W4A16": partial(packed.compressed_packed, bits=4),
    "compressed-tensors W8A16": partial(packed.compressed_packed, bits=8),
    "compressed-tensors W8A8": packed.compressed_int8,
    "compressed-tensors FP8": partial(packed.compressed_fp8, strategy="channel"),
    "compressed-tensors FP8, one scale": partial(packed.compressed_fp8, strategy="tensor"),
}
AS_IS: dict[str, Callable[[Path], packed.Packed]] = {
    "gptq": partial(packed.gptq, bits=4),
    "gptq, 8 bits": partial(packed.gptq, bits=8),
    "gptq, by activity": partial(packed.gptq, bits=4, by_activity=True),
    "gptq, version 2": partial(packed.gptq, bits=4, form="gptq_v2"),
    "awq": packed.awq,
}


MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="session")
def oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oss")
    return make_model(folder, "gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=32)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, original: Path, oss: Path) -> Path:
    """A folder with a checkpoint in each format, and its twin of what it means."""
    folder = tmp_path_factory.mktemp("formats")
    for name, recipe in (EXPANDED | AS_IS).items():
        write_packed(original, folder / name, recipe(original))
    write_packed(oss, folder / "mxfp4", packed.mxfp4(oss))
    return folder


def loaded(folder: Path, **fields: Any) -> LoadedModel:
    model = Model(id=str(folder), **fields)
    return load(open_checkpoint(model), model, "cpu")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(40).view(2, 20)).logits
    return found.float()


def planned(folder: Path, **fields: Any) -> int:
    model = Model(id=str(folder), **fields)
    checkpoint = open_checkpoint(model)
    return weigh(checkpoint, resolve(checkpoint, model, "cpu")).total_bytes


def refusal(folder: Path, **fields: Any) -> str:
    with pytest.raises(ModelError) as caught:
        loaded(folder, **fields)
    return str(caught.value)


# ---- expanded


@pytest.mark.parametrize("name", [*EXPANDED, "mxfp4"])
def test_an_expanded_checkpoint_is_what_its_codes_mean(folders: Path, name: str) -> None:
    asked = {"allow_dequantize": True, "dtype": "float32"}
    found = loaded(folders / name, **asked)
    exact = loaded(dense_twin(folders / name), dtype="float32")
    assert torch.equal(logits(found.model), logits(exact.model))
    assert found.weight_bytes == planned(folders / name, **asked) == exact.weight_bytes


@pytest.mark.parametrize("name", [*EXPANDED, "mxfp4"])
def test_an_expanded_checkpoint_has_the_type_and_the_size_that_the_job_says(
    folders: Path, name: str
) -> None:
    asked = {"allow_dequantize": True, "dtype": "bfloat16"}
    found = loaded(folders / name, **asked)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    in_float32 = planned(folders / name, allow_dequantize=True, dtype="float32")
    assert found.weight_bytes == planned(folders / name, **asked) == in_float32 // 2
    first = logits(found.model)
    assert first.isfinite().all()
    assert sum(p.numel() * 2 for p in found.model.parameters()) == found.weight_bytes
    assert torch.equal(logits(found.model), first)


@pytest.mark.parametrize("name", [*EXPANDED, "mxfp4"])
def test_expanding_has_to_be_allowed(folders: Path, name: str) -> None:
    message = refusal(folders / name)
    assert "is quantized with" in message
    assert "model.allow_dequantize: true" in message
    assert "as much memory as the original" in message


def test_bits_16_is_what_an_expanded_checkpoint_has(folders: Path) -> None:
    found = loaded(folders / "fp8", bits=16, dtype="bfloat16", allow_dequantize=True)
    assert found.model.lm_head.weight.dtype == torch.bfloat16
    message = refusal(folders / "fp8", bits=4, allow_dequantize=True)
    assert "is quantized already (fp8), but the job asks for 4 bits" in message


@pytest.mark.parametrize("name", ["fp8", "compressed-tensors W4A16", "compressed-tensors FP8"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_are_expanded_too(tmp_path: Path, model_type: str, name: str) -> None:
    make_model(tmp_path / "moe", model_type, **MIXTURES[model_type])
    write_packed(tmp_path / "moe", tmp_path / name, EXPANDED[name](tmp_path / "moe"))
    asked = {"allow_dequantize": True, "dtype": "float32"}
    found = loaded(tmp_path / name, **asked)
    exact = loaded(dense_twin(tmp_path / name), dtype="float32")
    error = (logits(found.model) - logits(exact.model)).norm() / logits(exact.model).norm()
    assert error < 2e-3  # compressed-tensors multiplies experts in float32, other layers in 16 bits
    assert found.weight_bytes == planned(tmp_path / name, **asked) == exact.weight_bytes


# ---- as it is


@needs_gptq
@pytest.mark.parametrize("name", AS_IS)
def test_a_packed_checkpoint_means_what_it_was_made_from(folders: Path, name: str) -> None:
    found = loaded(folders / name, dtype="float32")
    exact = loaded(dense_twin(folders / name), dtype="float32")
    error = (logits(found.model) - logits(exact.model)).norm() / logits(exact.model).norm()
    assert error < 2e-3  # its kernels multiply in 16 bits


@needs_gptq
@pytest.mark.parametrize("name", AS_IS)
def test_a_packed_checkpoint_takes_what_was_planned(folders: Path, name: str) -> None:
    found = loaded(folders / name, dtype="float32")
    logits(found.model)
    assert found.weight_bytes == planned(folders / name, dtype="float32")
    assert found.weight_bytes < 0.7 * planned(dense_twin(folders / name), dtype="float32")
    model = Model(id=str(folders / name))
    params = weigh(open_checkpoint(model), model).total_params
    assert params == open_and_weigh(dense_twin(folders / name))


@pytest.mark.skipif(not MISSING, reason="gptqmodel is installed")
@pytest.mark.parametrize("name", AS_IS)
def test_without_the_extra_it_is_named(folders: Path, name: str) -> None:
    message = refusal(folders / name)
    assert "it needs gptqmodel>=" in message
    assert 'pip install "quantbatch[gptq]"' in message


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "name", ["fp8", "compressed-tensors FP8", "compressed-tensors FP8, one scale"]
)
def test_fp8_on_a_card_that_multiplies_it_takes_what_was_planned(
    folders: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    """transformers builds its layers for such a card if it is not asked whether there is one; only
    the card could run them.
    """
    from transformers.quantizers import quantizer_compressed_tensors, quantizer_finegrained_fp8

    def believe(self: Any, *_: object, **__: object) -> None:
        self.use_fp8_kernel = getattr(self.quantization_config, "use_optimized_inference", None)

    for quantizer in (
        quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer,
        quantizer_compressed_tensors.CompressedTensorsHfQuantizer,
    ):
        monkeypatch.setattr(quantizer, "validate_environment", believe)
    packages = dict(Machine.this().packages) | {"kernels": "0.18.2"}
    monkeypatch.setattr(formats, "_installed", lambda: packages)
    model = Model.model_validate({"id": str(folders / name), "dtype": dtype})
    checkpoint = open_checkpoint(model, (8, 9))
    assert not checkpoint.expanded
    found = load(checkpoint, model, "cpu")
    layer: Any = dict(found.model.named_modules())["model.layers.0.mlp.up_proj"]
    assert layer.weight.dtype == torch.float8_e4m3fn
    weights = weigh(checkpoint, model)
    assert found.weight_bytes == weights.total_bytes
    assert weights.total_params == open_and_weigh(dense_twin(folders / name))


def open_and_weigh(folder: Path) -> int:
    model = Model(id=str(folder))
    return weigh(open_checkpoint(model), model).total_params


# ---- never as garbage


def test_an_unknown_method_is_refused(folders: Path, tmp_path: Path) -> None:
    """transformers would warn, and load the codes as weights."""
    write_packed(folders / "fp8-dense", tmp_path / "new", packed.Packed({}, {}, {}))
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp3"}
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    assert "is quantized with fp3 and can't be loaded here" in refusal(tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("fp8", "weight"),
        ("fp8", ""),
        ("compressed-tensors W4A16", "weight_packed"),
        ("compressed-tensors W8A8", ""),
        pytest.param("gptq", "qweight", marks=needs_gptq),
        pytest.param("gptq", "", marks=needs_gptq),
        pytest.param("awq", "scales", marks=needs_gptq),
    ],
)
def test_what_is_missing_or_left_over_is_refused(
    folders: Path, tmp_path: Path, name: str, lost: str
) -> None:
    tensors = load_file(folders / name / "model.safetensors")
    if lost:
        del tensors[f"model.layers.0.mlp.up_proj.{lost}"]
    else:
        tensors["extra"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders / name / "config.json").read_bytes())
    message = refusal(tmp_path, allow_dequantize=True, dtype="float32")
    assert "up_proj" in message or "extra" in message


@pytest.mark.parametrize("name", ["fp8", "compressed-tensors W4A16", "mxfp8"])
def test_codes_without_their_scales_are_refused(folders: Path, tmp_path: Path, name: str) -> None:
    """transformers would take the codes for weights."""
    tensors = load_file(folders / name / "model.safetensors")
    lost = [each for each in tensors if "up_proj.weight_scale" in each]
    for each in lost:
        del tensors[each]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders / name / "config.json").read_bytes())
    message = refusal(tmp_path, allow_dequantize=True, dtype="float32")
    assert "codes without scales" in message
    assert "up_proj" in message


@needs_gptq
def test_gptqmodel_says_nothing_on_stdout(folders: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logits(loaded(folders / "gptq", dtype="float32").model)
    assert capfd.readouterr().out == ""
