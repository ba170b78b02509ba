"""Sizes that a config.json tells, whatever it calls them; and how sizes are written for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantbatch.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping


def first_of(config: Mapping[str, Any], *names: str) -> int:
    """Return the first of some fields that a configuration has.

    Where each layer has its own (Gemma 3n), that is the largest.

    Raises:
        ModelError: It has none of them, or something else than a size.
    """
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        raise ModelError(
            f"config.json has none of {', '.join(names)}",
            "only models whose layers have attention, and say how much, can be planned and run",
        )
    found = config[name] if isinstance(config[name], list) else [config[name]]
    if not all(isinstance(size, int) for size in found) or max(found, default=0) < 1:
        raise ModelError(f"config.json: {name} is {config[name]!r}", "fetch the model again")
    return int(max(found))


LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def layer_count(config: Mapping[str, Any]) -> int:
    """Return the number of layers."""
    return first_of(config, *LAYER_COUNTS)


def query_heads(config: Mapping[str, Any]) -> int:
    """Return the number of query heads."""
    names = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
    return first_of(config, *names)


def hidden_size(config: Mapping[str, Any]) -> int:
    """Return the width of the residual stream."""
    return first_of(config, "hidden_size", "n_embd", "d_model")


GIB = 2**30


def gib(count: int) -> str:
    """Write a number of bytes for people, in GiB or MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 8 else f"{count / 2**20:.1f} MiB"
