"""One forward pass over a step: pieces of rows in, the scores of their next tokens out.

The pieces are packed one after the other into a batch of one (see `attention.py`), with the
position of each token in its own row. Scores are computed for the last tokens of pieces only: for a
vocabulary of 150,000 words the scores of a prompt would take more than all else.

Shapes: T tokens of the packed sequence, B of them whose scores are wanted, V words, H sizes.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbatch.engine import attention
from quantbatch.engine.attention import PassThroughCache, UnsupportedModelError, attending
from quantbatch.engine.kvstore import Span, send
from quantbatch.wants import Embed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from quantbatch.engine.kvstore import KvStore
    from quantbatch.engine.pieces import Piece


class Layout(NamedTuple):
    """Where the pieces of a step are in its packed sequence."""

    spans: list[Span]
    positions: list[int]
    """Of each token in its own row."""
    scored: list[int]
    """Tokens of the sequence whose scores are wanted: first those after which rows choose, then,
    piece by piece, what rows want that only read."""
    embedded: list[tuple[Piece, int]]
    """Pieces of rows that want hidden states, with their beginning in the sequence."""

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Layout:
        """Lay out a step: the pieces of rows, then the tokens of candidates."""
        found = cls([], [], [], [])
        choosing: list[int] = []
        begins: list[int] = []
        for piece in pieces:
            row, start, end, samples, _ = piece
            begins.append(len(found.positions))
            if end > start:
                found.spans.append(Span(row.slot, start, end, begins[-1], row.blocks))
            found.positions.extend(range(start, end))
            if samples:
                choosing.append(len(found.positions) - 1)
            if isinstance(row.request.want, Embed):
                found.embedded.append((piece, begins[-1]))
        for piece, begin in zip(pieces, begins, strict=True):
            found.scored.extend(place - piece.start + begin for place in piece.scored)
            found.add_candidates(piece)
        return found._replace(scored=choosing + found.scored)

    def add_candidates(self, piece: Piece) -> None:
        """Lay out the tokens of a piece's candidates."""
        if piece.group is None:
            return
        begin, length = len(self.positions), piece.row.length
        tokens = len(piece.group.tokens)
        self.spans.append(
            Span(
                piece.row.slot,
                length,
                length + tokens,
                begin,
                piece.row.blocks,
                piece.group.parents,
            )
        )
        self.positions.extend(length + depth for depth in piece.group.depths)
        self.scored.extend(range(begin, begin + tokens))


class Output(NamedTuple):
    """What a step computed."""

    scores_BV: Tensor
    """Scores of `layout.scored`."""
    layout: Layout
    hidden_TH: Tensor | None
    """Hidden states of the last layer, if any row wants them."""


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

    def __call__(self, pieces: Sequence[Piece], tokens_T: Tensor) -> Output:
        """Run a step.

        Args:
            pieces: In the order of the packed sequence.
            tokens_T: Their token ids; those of candidates after all others.
        """
        layout = Layout.of(pieces)
        self.store.begin(layout.spans)
        device = tokens_T.device
        positions_T, ends_B = send(layout.positions, device), send(layout.scored, device)
        with self._last_hidden(wanted=bool(layout.embedded)) as hidden:
            scores_BV = self.run(tokens_T, positions_T, ends_B)
        return Output(scores_BV, layout, hidden[0][0] if hidden else None)

    @contextlib.contextmanager
    def _last_hidden(self, *, wanted: bool) -> Iterator[list[Tensor]]:
        """Catch the hidden states of the last layer, (1, T, H), if they are wanted."""
        found: list[Tensor] = []
        if not wanted:
            yield found
            return
        base: Any = self.model.base_model
        hook = base.register_forward_hook(lambda *call: found.append(call[-1].last_hidden_state))
        try:
            yield found
        finally:
            hook.remove()

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
