"""One forward pass over a step: pieces of rows in, the scores of their next tokens out.

The pieces are packed one after the other into a batch of one (see `attention.py`), with the
position of each token in its own row. Scores are computed for the last tokens of pieces only: for a
vocabulary of 150,000 words the scores of a prompt would take more than all else.

Shapes: T tokens of the packed sequence, B rows whose next token is chosen, V words.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from quantbatch.engine import attention
from quantbatch.engine.attention import PassThroughCache, UnsupportedModelError, attending
from quantbatch.engine.kvstore import Span, send

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from quantbatch.engine.kvstore import KvStore
    from quantbatch.engine.scheduler import Piece


class Forward:
    """Runs a model over packed sequences.

    Args:
        model: Its attention implementation is changed to ours.
        store: Keys and values.

    Raises:
        UnsupportedModelError: The model has no exchangeable attention.
    """

    def __init__(self, model: PreTrainedModel, store: KvStore) -> None:
        self.model = model
        self.store = store
        self._cache = PassThroughCache()
        _set_attention(model)
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            raise UnsupportedModelError(f"{type(model).__name__} scores whole prompts only")

    def __call__(self, pieces: Sequence[Piece], tokens_T: Tensor) -> Tensor:
        """Run a step.

        Args:
            pieces: In the order of the packed sequence.
            tokens_T: Their token ids.

        Returns:
            Scores (B, V) after the pieces that sample, in their order.
        """
        spans: list[Span] = []
        positions: list[int] = []
        ends: list[int] = []
        offset = 0
        for row, start, end, samples in pieces:
            spans.append(Span(row.slot, start, end, offset, row.blocks))
            positions += range(start, end)
            offset += end - start
            if samples:
                ends.append(offset - 1)
        self.store.begin(spans)
        device = tokens_T.device
        return self.run(tokens_T, send(positions, device), send(ends, device))

    def run(self, tokens_T: Tensor, positions_T: Tensor, ends_B: Tensor) -> Tensor:
        """Run the model with the store as it was prepared."""
        model: Any = self.model
        with attending(self.store):
            output = model(
                input_ids=tokens_T[None],
                position_ids=positions_T[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=ends_B,
            )
        scores_BV: Tensor = output.logits[0]
        assert scores_BV.shape[0] == ends_B.shape[0], "the model scored other tokens than asked"
        return scores_BV


def _set_attention(model: PreTrainedModel) -> None:
    attention.install()
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(f"{type(model).__name__} has an attention of its own")
    model.set_attn_implementation(attention.NAME)
    if model.config._attn_implementation != attention.NAME:
        raise UnsupportedModelError(f"{type(model).__name__} does not let its attention be set")
