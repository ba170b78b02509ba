"""Models with Python code of their own: it runs if the spec says so and pins a commit, and never
else.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from quantbatch.errors import ModelError
from quantbatch.model.checkpoint import find_checkpoint, open_checkpoint
from quantbatch.model.footprint import weigh
from quantbatch.prompts.tokens import tokenizer_of
from quantbatch.spec import FourBit, Model
from quantbatch.weights.dtypes import resolve
from quantbatch.weights.loading import load
from tests.integration.llama import make_llama

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "fedcba9876543210fedcba9876543210fedcba98"
NAME = "somebody/own-model"

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig

Path({sentinel!r}).write_text("configuration")

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

Path({sentinel!r}).write_text("model")

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 2
        return found
"""
TOKENIZATION = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({sentinel!r}).write_text("tokenizer")

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
CODE = {
    "configuration_own.py": CONFIGURATION,
    "modeling_own.py": MODELING,
    "tokenization_own.py": TOKENIZATION,
}
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """A file that the repository's code writes, whatever of it runs."""
    return tmp_path / "it-ran"


@pytest.fixture
def snapshot(
    tmp_path: Path, tiny_tokenizer_folder: Path, sentinel: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A repository with code of its own in a hub cache, without a network."""
    from huggingface_hub import constants
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    repository = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    folder = repository / "snapshots" / COMMIT
    make_llama(folder, vocab_size=403)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_tokenizer_folder / name, folder / name)
    for name, code in CODE.items():
        (folder / name).write_text(code.format(sentinel=str(sentinel)))
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP}
    edit(folder / "config.json", **own)
    auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_is_offline_mode", True, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    modules = str(tmp_path / "modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.setattr("sys.path", [*__import__("sys").path, modules])
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def trusted(**fields: Any) -> Model:
    return Model(id=NAME, revision=COMMIT, trust_remote_code=True, **fields)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(40).view(2, 20)).logits
    return found.float()


def test_without_leave_the_code_never_runs(snapshot: Path, sentinel: Path) -> None:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(Model(id=NAME))
    assert "needs Python code of its own" in str(caught.value)
    assert "model.trust_remote_code: true" in str(caught.value)
    assert f"model.revision: {COMMIT}" in str(caught.value)
    checkpoint = find_checkpoint(Model(id=NAME, revision=COMMIT))
    with pytest.raises(ModelError, match=r"can't be loaded"):
        load(checkpoint, Model(id=NAME), "cpu")
    with pytest.raises(ModelError, match=r"model\.trust_remote_code"):
        tokenizer_of(checkpoint)
    assert not sentinel.exists()


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12], COMMIT.upper()])
def test_leave_has_to_pin_a_commit(revision: str | None) -> None:
    with pytest.raises(ValidationError, match="pin it"):
        Model(id=NAME, revision=revision, trust_remote_code=True)


def test_with_leave_the_code_is_the_model(snapshot: Path, sentinel: Path, tmp_path: Path) -> None:
    model = trusted(dtype="float32")
    checkpoint = open_checkpoint(model)
    assert not sentinel.exists(), "planning runs no code"
    assert (checkpoint.trusted, checkpoint.is_native) == (True, False)
    found = load(checkpoint, model, "cpu")
    assert sentinel.read_text() == "model"
    assert found.weight_bytes == weigh(checkpoint, resolve(checkpoint, model, "cpu")).total_bytes
    twin = shutil.copytree(snapshot, tmp_path / "twin")
    edit(twin / "config.json", model_type="llama", architectures=["LlamaForCausalLM"], auto_map={})
    plain = Model(id=str(twin), dtype="float32")
    exact = load(open_checkpoint(plain), plain, "cpu")
    assert torch.equal(logits(found.model), 2 * logits(exact.model))
    assert type(tokenizer_of(checkpoint)).__name__ == "OwnTokenizer"
    assert sentinel.read_text() == "tokenizer"


@pytest.mark.parametrize("skipped", [[], ["down_proj"]])
def test_a_model_with_its_own_code_is_quantized_as_planned(
    snapshot: Path, skipped: list[str]
) -> None:
    model = trusted(quantization=FourBit(skip_modules=skipped))
    checkpoint = open_checkpoint(model)
    found = load(checkpoint, model, "cpu")
    assert found.weight_bytes == weigh(checkpoint, resolve(checkpoint, model, "cpu")).total_bytes
    assert logits(found.model).isfinite().all()


def test_code_of_yet_another_repository_is_refused(snapshot: Path, sentinel: Path) -> None:
    elsewhere = {name: f"stranger/code--{place}" for name, place in AUTO_MAP.items()}
    edit(snapshot / "config.json", auto_map=elsewhere)
    with pytest.raises(ModelError, match="stranger/code"):
        open_checkpoint(trusted())
    assert not sentinel.exists()


def test_a_tokenizer_s_code_of_another_repository_is_refused(
    snapshot: Path, sentinel: Path
) -> None:
    """Nobody pins it: its newest commit would run."""
    auto_map = {"AutoTokenizer": [None, "stranger/code--tokenization_own.OwnTokenizer"]}
    edit(snapshot / "tokenizer_config.json", auto_map=auto_map)
    with pytest.raises(ModelError, match="stranger/code"):
        open_checkpoint(trusted())
    assert not sentinel.exists()


def test_a_repository_may_name_itself(snapshot: Path) -> None:
    """As transformers writes it into what it saves."""
    edit(snapshot / "config.json", auto_map={k: f"{NAME}--{v}" for k, v in AUTO_MAP.items()})
    model = trusted(dtype="float32")
    assert logits(load(open_checkpoint(model), model, "cpu").model).isfinite().all()


def test_a_model_with_its_own_code_comes_from_the_cache_of_weights(
    snapshot: Path, tmp_path: Path
) -> None:
    model = trusted(bits=4, cache=str(tmp_path / "cache"))
    first = load(open_checkpoint(model), model, "cpu")
    assert any((tmp_path / "cache").rglob("*.safetensors"))
    again = load(open_checkpoint(model), model, "cpu")
    assert torch.equal(logits(again.model), logits(first.model))
    assert type(again.model).__name__ == "OwnForCausalLM"


def test_a_folder_can_not_be_pinned(snapshot: Path, sentinel: Path) -> None:
    with pytest.raises(ModelError, match="a folder has no commit to pin"):
        open_checkpoint(Model(id=str(snapshot), revision=COMMIT, trust_remote_code=True))
    with pytest.raises(ModelError, match=r"model\.id as the name of a repository"):
        open_checkpoint(Model(id=str(snapshot)))
    assert not sentinel.exists()


def test_another_commit_than_the_pinned_one_is_not_run(snapshot: Path, sentinel: Path) -> None:
    with pytest.raises(ModelError, match="nor wholly in the hub's cache"):
        open_checkpoint(Model(id=NAME, revision=OTHER, trust_remote_code=True))
    assert not sentinel.exists()
