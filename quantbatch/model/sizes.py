"""Sizes that a config.json tells, whatever it calls them; and how sizes are written for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantbatch.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping


def first_of(config: Mapping[str, Any], *names: str) -> int:
    """Return the first of some fields that a configuration has.

    Raises:
        ModelError: It has none of them.
    """
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise ModelError(f"config.json has none of {', '.join(names)}")


def query_heads(config: Mapping[str, Any]) -> int:
    """Return the number of query heads."""
    return first_of(config, "num_attention_heads", "n_head", "n_heads")


def hidden_size(config: Mapping[str, Any]) -> int:
    """Return the width of the residual stream."""
    return first_of(config, "hidden_size", "n_embd", "d_model")


GIB = 2**30


def gib(count: int) -> str:
    """Write a number of bytes for people, in GiB or MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 8 else f"{count / 2**20:.1f} MiB"
