"""Loading a GGUF file through transformers, which expands it.

What its loader takes from its own defaults though the file says it is set here (5.23, read): the
size of a head, and the tokens that begin, end and pad; with those of Llama's configuration a model
would not stop where it should.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantbatch.model.checkpoint import Checkpoint

SAID = ("head_dim", "bos_token_id", "eos_token_id", "pad_token_id")


def complete(checkpoint: Checkpoint, config: Any) -> None:  # noqa: ANN401 - of transformers
    """Complete a configuration that transformers made of a GGUF file."""
    for name in SAID:
        if name in checkpoint.config:
            setattr(config, name, checkpoint.config[name])
