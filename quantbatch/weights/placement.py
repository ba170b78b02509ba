"""Which module of a model goes to which card, from the number of layers that each card takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from quantbatch.errors import ModelError
from quantbatch.weights.pretrained import empty_model

if TYPE_CHECKING:
    from collections.abc import Sequence


def place(config: Any, card_layers: Sequence[int]) -> dict[str, int]:  # noqa: ANN401
    """Return a device map for accelerate: the number of a card by the name of a module.

    What is beside the layers is on the first card, the last norm too, because the inputs of a
    forward are there, among them which tokens to score. The output head is on the last card, unless
    it is tied to the embedding.

    Args:
        config: The model's configuration, of transformers.
        card_layers: Layers of each card, in order; see `model.spread`.

    Raises:
        ModelError: The model has other layers than its files.
    """
    model = empty_model(config)
    path, layers = _layers(model)
    if len(layers) != sum(card_layers):
        raise ModelError(
            f"{type(model).__name__} has {len(layers)} layers, but its files {sum(card_layers)}"
        )
    placed: dict[str, int] = {}
    _place_besides(model, "", path, placed)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head_path = next(name for name, module in model.named_modules() if module is head)
        placed[head_path] = len(card_layers) - 1
    cards = [card for card, count in enumerate(card_layers) for _ in range(count)]
    return placed | {f"{path}.{index}": card for index, card in enumerate(cards)}


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the longest list of modules, and its name: the decoder's layers."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of layers to spread over cards")
    # Lists of experts may be as long, but are deeper.
    return max(lists, key=lambda item: (len(item[1]), -item[0].count(".")))


def _place_besides(module: nn.Module, name: str, path: str, placed: dict[str, int]) -> None:
    """Place everything beside the layers on the first card."""
    for child_name, child in module.named_children():
        child_path = f"{name}.{child_name}" if name else child_name
        if path.startswith(f"{child_path}."):
            _place_besides(child, child_path, path, placed)
        elif child_path != path:
            placed[child_path] = 0
