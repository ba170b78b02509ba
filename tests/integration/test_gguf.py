"""GGUF files through transformers: expanded, and the same model, tokenizer and template."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("gguf")

import transformers
from safetensors.torch import load_file, save_file

from quantbatch.errors import ModelError
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.footprint import weigh
from quantbatch.prompts.tokens import load_tokenizer, tokenizer_of
from quantbatch.spec import Model
from quantbatch.weights.dtypes import resolve
from quantbatch.weights.loading import load
from tests.conftest import CHAT_TEMPLATE, SENTENCES
from tests.integration.ggufs import write_gguf
from tests.integration.llama import make_model

if TYPE_CHECKING:
    from pathlib import Path

hf: Any = transformers

KINDS = ["Q4_0", "Q8_0", "Q5_1", "F16", "F32"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "llama, tied, wide heads": {"tie_word_embeddings": True, "head_dim": 64},
}
FULL: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    for name, changes in MODELS.items():
        make_model(folder / name, name.partition(",")[0], vocab_size=403, **FULL, **changes)
    return folder


def twin(model: Path, folder: Path, meant: dict[str, torch.Tensor]) -> Path:
    """Save what a GGUF file means as a model of transformers, in float32."""
    folder.mkdir()
    assert meant.keys() == load_file(model / "model.safetensors").keys()
    whole = {name: tensor.contiguous() for name, tensor in meant.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model: Model) -> tuple[torch.Tensor, int, int]:
    checkpoint = open_checkpoint(model)
    found = load(checkpoint, model, "cpu")
    planned = weigh(checkpoint, resolve(checkpoint, model, "cpu")).total_bytes
    with torch.inference_mode():
        scores: torch.Tensor = found.model(torch.arange(40).view(2, 20)).logits
    return scores.float(), found.weight_bytes, planned


def refusal(model: Model) -> str:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(model)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_what_its_codes_mean(
    models: Path, tmp_path: Path, tiny_tokenizer_folder: Path, name: str, kind: str
) -> None:
    path = tmp_path / "model.gguf"
    meant = write_gguf(models / name, path, kind, tokenizer=tiny_tokenizer_folder)
    exact, _, _ = logits(Model(id=str(twin(models / name, tmp_path / "twin", meant))))
    model = Model(id=str(path), allow_dequantize=True, dtype="float32")
    found, taken, planned = logits(model)
    assert torch.equal(found, exact)
    assert taken == planned
    _, taken, planned = logits(model.model_copy(update={"dtype": "bfloat16"}))
    assert taken == planned == logits(model)[1] // 2


def test_only_a_quantized_file_needs_leave(
    models: Path, tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    for kind in ("Q8_0", "F16"):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(models / "llama", path, kind, tokenizer=tiny_tokenizer_folder)
    assert "model.allow_dequantize: true" in refusal(Model(id=str(tmp_path / "Q8_0.gguf")))
    plain = open_checkpoint(Model(id=str(tmp_path / "F16.gguf")))
    assert (plain.quantized, plain.expanded) == ("gguf", False)
    for kind in ("F16", "Q8_0"):
        message = refusal(
            Model(id=str(tmp_path / f"{kind}.gguf"), bits=4, allow_dequantize=kind == "Q8_0")
        )
        assert "is quantized already (gguf), but the job asks for 4 bits" in message
    asked = Model(id=str(tmp_path), file="Q8_0.gguf", allow_dequantize=True)
    expanded = open_checkpoint(asked)
    assert (expanded.quantized, expanded.expanded) == ("gguf", True)
    assert expanded.context_tokens == 256
    assert expanded.digest != plain.digest
    by_path = open_checkpoint(Model(id=str(tmp_path / "Q8_0.gguf"), allow_dequantize=True))
    assert by_path == dataclasses.replace(expanded, id=by_path.id)


def test_tokenizer_and_template_are_the_file_s(
    models: Path, tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(
        models / "llama", path, "Q8_0", tokenizer=tiny_tokenizer_folder, chat_template=CHAT_TEMPLATE
    )
    model = Model(id=str(path), allow_dequantize=True)
    checkpoint = open_checkpoint(model)
    assert checkpoint.chat_template == CHAT_TEMPLATE
    found, original = tokenizer_of(checkpoint), load_tokenizer(tiny_tokenizer_folder)
    for text in [*SENTENCES, "<|im_start|>user\nHello<|im_end|>", "1234  déjà\n\n<think>"]:
        assert found.encode(text) == original.encode(text), text
        assert found.decode(found.encode(text)) == text
    assert found.eos_token_id == original.eos_token_id
    messages = [{"role": "user", "content": "Hello"}]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    assert found.apply_chat_template(messages, **options) == original.apply_chat_template(
        messages, **options
    )
    loaded: Any = load(checkpoint, model, "cpu").model
    assert loaded.generation_config.eos_token_id == original.eos_token_id


def test_a_tokenizer_beside_the_file_is_preferred(
    models: Path, tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(models / "llama", path, "Q8_0", tokenizer=tiny_tokenizer_folder, chat_template="T")
    (tmp_path / "tokenizer.json").write_bytes(
        (tiny_tokenizer_folder / "tokenizer.json").read_bytes()
    )
    found = tokenizer_of(open_checkpoint(Model(id=str(path), allow_dequantize=True)))
    assert found.name_or_path == str(tmp_path)
    assert found.chat_template == "T"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type"),
        ({"llama__rope__scaling__factor": 4.0}, "rope.scaling.factor"),
        ({"llama__attention__sliding_window": 4096}, "attention.sliding_window"),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"split__count": 2}, "split.count"),
    ],
)
def test_what_transformers_ignores_is_refused(
    models: Path, tmp_path: Path, tiny_tokenizer_folder: Path, values: dict[str, Any], words: str
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(models / "llama", path, "Q8_0", tokenizer=tiny_tokenizer_folder, **values)
    message = refusal(Model(id=str(path), allow_dequantize=True))
    assert words in message
    assert "and would answer wrongly" in message


def test_damage_is_noticed(models: Path, tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(models / "llama", path, "Q8_0", tokenizer=tiny_tokenizer_folder)
    whole = path.read_bytes()
    for length in (0, 3, 4, 20, 300, 5000, len(whole) - 64):
        path.write_bytes(whole[:length])
        assert "model.gguf" in refusal(Model(id=str(path), allow_dequantize=True))
    path.write_bytes(b"FUGG" + whole[4:])
    assert "is no GGUF file" in refusal(Model(id=str(path)))
    path.write_bytes(whole[:4] + b"\x01" + whole[5:])
    assert "version 1" in refusal(Model(id=str(path)))
    (tmp_path / "other.gguf").write_bytes(whole)
    message = refusal(Model(id=str(tmp_path), file="mode.gguf"))
    assert "there are model.gguf, other.gguf" in message
    assert "leave out model.file" in refusal(Model(id=str(path), file="other.gguf"))
    assert f"did you mean {path}?" in refusal(Model(id=str(tmp_path / "modle.gguf")))


def test_an_architecture_that_is_not_tested_is_refused(
    models: Path, tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(models / "llama", path, "Q8_0", tokenizer=tiny_tokenizer_folder)
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    assert "architecture mamba is not tested" in refusal(Model(id=str(path)))


def test_a_file_of_a_repository_is_loaded_from_the_cache(
    models: Path, tmp_path: Path, tiny_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--somebody--packed"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    write_gguf(
        models / "llama",
        folder / "model-q8_0.gguf",
        "Q8_0",
        tokenizer=tiny_tokenizer_folder,
        chat_template=CHAT_TEMPLATE,
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = Model(id="somebody/packed", file="model-q8_0.gguf", allow_dequantize=True)
    checkpoint = open_checkpoint(model)
    assert (checkpoint.commit, checkpoint.chat_template) == (commit, CHAT_TEMPLATE)
    found, taken, planned = logits(model)
    assert taken == planned
    here = Model(id=str(folder / "model-q8_0.gguf"), allow_dequantize=True)
    assert torch.equal(found, logits(here)[0])
    original = load_tokenizer(tiny_tokenizer_folder)
    assert tokenizer_of(checkpoint).encode(SENTENCES[0]) == original.encode(SENTENCES[0])
    gone = dataclasses.replace(checkpoint, gguf="gone.gguf")
    with pytest.raises(ModelError, match=r"gone\.gguf of somebody/packed can't be fetched"):
        tokenizer_of(gone)
