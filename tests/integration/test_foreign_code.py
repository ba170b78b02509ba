"""Models with Python code of their own: it runs if the spec says so and pins a commit, and never
else.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from typing_extensions import override

from quantbatch.errors import ModelError
from quantbatch.model.checkpoint import find_checkpoint, open_checkpoint
from quantbatch.model.footprint import weigh
from quantbatch.prompts.chat import require_chat_template
from quantbatch.prompts.tokens import tokenizer_of
from quantbatch.spec import FourBit, Model, Prompt
from quantbatch.weights.dtypes import resolve
from quantbatch.weights.loading import load
from tests.integration.llama import make_llama

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


@pytest.fixture
def plain(tmp_path: Path, tiny_tokenizer_folder: Path) -> Path:
    """A model that needs no code, in a folder."""
    folder = tmp_path / "plain"
    make_llama(folder, vocab_size=403)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_tokenizer_folder / name, folder / name)
    return folder


INERT_CODE = [
    "modeling_llama.py",
    "configuration_llama.py",
    "tokenization_own.py",
    "setup.py",
    "__init__.py",
    "conftest.py",
    "sitecustomize.py",
    "custom_generate/generate.py",
]
PICKLES = [
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pth",
    "adapter_model.bin",
    "tokenizer.pkl",
    "model.ckpt",
]


class Payload:
    """What runs when a pickle of it is read."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    @override
    def __reduce__(self) -> Any:
        return Path.write_text, (self.sentinel, "pickle")


def test_code_and_pickles_beside_a_model_are_inert(plain: Path, sentinel: Path) -> None:
    """All that a folder can hold, and a model that is whole without it: nothing of it runs."""
    code = f"from pathlib import Path\nPath({str(sentinel)!r}).write_text('code')\n"
    for name in INERT_CODE:
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).write_text(code + "def generate(*args, **kwargs): pass\n")
    (plain / "custom_generate" / "requirements.txt").write_text("left-pad\n")
    data = pickle.dumps(Payload(sentinel))
    for name in PICKLES:
        (plain / name).write_bytes(data)
    auto_map = {n: f"modeling_llama.Own{n}" for n in ("AutoConfig", "AutoModelForCausalLM")}
    pipelines = {"text-generation": {"impl": "setup.Own", "pt": ["AutoModel"]}}
    custom = {"custom_generate": "custom_generate", "custom_pipelines": pipelines}
    edit(plain / "config.json", auto_map=auto_map, **custom)
    edit(plain / "generation_config.json", custom_generate="custom_generate")
    edit(plain / "tokenizer_config.json", auto_map={"AutoTokenizer": ["setup.Own", "setup.Own"]})
    for bits in (32, 4):
        model = Model(id=str(plain), bits=bits)
        checkpoint = open_checkpoint(model)
        found: Any = load(checkpoint, model, "cpu").model
        assert logits(found).isfinite().all()
        found.generate(torch.arange(5).view(1, 5), max_new_tokens=2, do_sample=False)
        assert tokenizer_of(checkpoint).encode("hello")
    assert not sentinel.exists()
    print(f"files of code and pickles={len(INERT_CODE + PICKLES)} ran=0")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model.safetensors", "/m.safetensors"])
def test_an_index_names_files_of_its_folder(plain: Path, sentinel: Path, name: str) -> None:
    (plain / "model.safetensors").rename(plain / "kept")
    (plain / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(sentinel)))
    index = {"weight_map": {"lm_head.weight": name}}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"weights are files in the model's own folder"):
        open_checkpoint(Model(id=str(plain)))
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "field",
    ["attn_implementation", "_attn_implementation", "_attn_implementation_internal",
     "_experts_implementation"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["stranger/kernel", "paged|stranger/kernel@main:f"])
def test_kernels_of_a_configuration_are_refused(plain: Path, field: str, value: str) -> None:
    edit(plain / "config.json", **{field: value})
    with pytest.raises(ModelError, match=rf"takes code from elsewhere: {field} is"):
        open_checkpoint(Model(id=str(plain)))
    edit(plain / "config.json", **{field: {"": value}})
    with pytest.raises(ModelError, match="takes code from elsewhere"):
        open_checkpoint(Model(id=str(plain)))


def test_another_attention_of_a_configuration_is_not_used(plain: Path) -> None:
    edit(plain / "config.json", _attn_implementation_internal="flash_attention_2")
    model = Model(id=str(plain), dtype="float32")
    found: Any = load(open_checkpoint(model), model, "cpu").model
    assert found.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b'{"a": ' + b"[" * 100_000, "config.json can't be read"),
        ("config.json", b"[]", "holds no JSON object"),
        ("config.json", b"\xff", "config.json can't be read"),
        ("model.safetensors", b"\xff" * 100, "is no safetensors file"),
        ("model.safetensors", (90_000).to_bytes(8, "little") + b"[" * 90_000, "damaged header"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja can't be read"),
    ],
)
def test_files_that_are_not_what_they_are_called(
    plain: Path, name: str, content: bytes, said: str
) -> None:
    (plain / name).write_bytes(content)
    with pytest.raises(ModelError, match=said):
        open_checkpoint(Model(id=str(plain)))


def test_chat_templates_of_another_form_are_passed_over(plain: Path) -> None:
    (plain / "chat_template.jinja").unlink()
    for odd in ([1], [{"name": "default"}], [{"template": "x"}], {"a": "b"}, 7):
        edit(plain / "tokenizer_config.json", chat_template=odd)
        assert open_checkpoint(Model(id=str(plain))).chat_template is None


def test_a_hostile_chat_template_is_refused_before_a_card_is_asked_for(plain: Path) -> None:
    (plain / "chat_template.jinja").write_text("{{ 'a' * 10**9 }}" + "{% for x in y %}" * 30)
    template = open_checkpoint(Model(id=str(plain))).chat_template
    with pytest.raises(ModelError, match="the model's chat template, line 1"):
        require_chat_template(Prompt(column="text"), template)
