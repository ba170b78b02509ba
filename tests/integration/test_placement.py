"""Where the modules of a model go when its layers are spread over cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from accelerate.utils import check_device_map

from quantbatch.errors import ModelError
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.footprint import weigh_layers
from quantbatch.spec import FourBit, Model
from quantbatch.weights import bnb, dtypes, pretrained
from quantbatch.weights.loading import load
from quantbatch.weights.placement import place
from tests.integration.llama import make_model

if TYPE_CHECKING:
    from pathlib import Path

hf: Any = transformers

KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "int8": {"bits": 8},
    "nf4": {"quantization": FourBit(double_quant=False)},
    "nf4+dq": {"bits": 4},
}


def made(folder: Path, model_type: str, *, tied: bool = False) -> Path:
    layers = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    changes: dict[str, Any] = {layers: 5, "tie_word_embeddings": tied}
    return make_model(folder, model_type, **changes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2", "gpt2", "phi3"])
def test_every_module_has_a_card_and_layers_go_in_order(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    config = hf.AutoConfig.from_pretrained(made(tmp_path, model_type, tied=tied))
    found = place(config, (2, 1, 2))
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    check_device_map(model, found)  # raises for a parameter without a device
    assert [card for name, card in found.items() if name[-1].isdigit()] == [0, 0, 1, 2, 2]
    by_module = {id(module): name for name, module in model.named_modules()}
    embedding = by_module[id(model.get_input_embeddings())]
    assert found[embedding] == 0
    head = by_module[id(model.get_output_embeddings())]
    assert found[head] == (0 if config.tie_word_embeddings else 2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_each_card_takes_what_was_planned(
    tmp_path: Path, model_type: str, kind: str, tied: bool
) -> None:
    folder = made(tmp_path, model_type, tied=tied)
    model = Model(id=str(folder), **KINDS[kind])
    checkpoint = open_checkpoint(model)
    before, layers, after = weigh_layers(checkpoint, dtypes.resolve(checkpoint, model, "cpu"))
    planned = [before + layers[0] + layers[1], layers[2], layers[3] + layers[4] + after]
    loaded = load(checkpoint, model, "cpu").model
    placed = place(pretrained.load_config(checkpoint), (2, 1, 2))
    found, counted = [0, 0, 0], set[int]()
    for name, card in placed.items():
        module = loaded.get_submodule(name)
        new = [p for p in module.parameters() if id(p) not in counted]
        counted.update(map(id, new))
        found[card] += bnb.parameter_bytes(torch.nn.ParameterList(new))
    assert found == planned


def test_other_layers_than_the_files_are_refused(tmp_path: Path) -> None:
    config = hf.AutoConfig.from_pretrained(made(tmp_path, "llama"))
    with pytest.raises(ModelError, match="has 5 layers, but its files 4"):
        place(config, (2, 2))
