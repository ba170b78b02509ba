"""Steps of single tokens on a card, recorded once and replayed.

Launching the some thousand kernels of a step from Python takes longer than the card needs for them.
A CUDA graph launches them all at once, with the same addresses each time: so a recorded step reads
its inputs from fixed tensors, and a batch is padded to the next size that was recorded. What pads
it writes to a page of its own.

Not everything can be recorded: LLM.int8() with a threshold looks at its activations from Python, as
mixtures of experts may. A model that fails to be recorded runs unrecorded.

Shapes: R rows, V words.
"""

from __future__ import annotations

import bisect
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from quantbatch.engine.kvstore import Span, send
from quantbatch.engine.probe import depends_on_batch
from quantbatch.model.memory import recorded_sizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from quantbatch.engine.forward import Forward
    from quantbatch.engine.paged import PagedStore
    from quantbatch.engine.pieces import Piece

logger = logging.getLogger(__name__)


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs_3R: Tensor
    """Slots, positions and places in the pool."""
    ends_R: Tensor
    """Kept, because the graph reads it where it is."""


class RecordedSteps:
    """Replays steps in which every row computes its newest token.

    Args:
        forward: Runs the model.
        store: Its keys and values.
        last_tokens_S: The newest token of each slot, on the card, with one for padding.
        rows: Most rows of a step.
    """

    def __init__(
        self, forward: Forward, store: PagedStore, last_tokens_S: Tensor, rows: int
    ) -> None:
        self._forward = forward
        self._store = store
        self._last_tokens_S = last_tokens_S
        self._sizes = recorded_sizes(rows)
        self._recorded: dict[int, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._scores_RV: Tensor | None = None
        """Where every recorded step leaves its scores."""
        self._usable = not depends_on_batch(forward.model)
        self.padding = 0
        """Positions that were computed for nothing so far."""

    def can_run(self, pieces: Sequence[Piece]) -> bool:
        """Tell whether a step consists of newest tokens only."""
        return self._usable and all(p.samples and p.end - p.start == 1 for p in pieces)

    def run(self, pieces: Sequence[Piece]) -> Tensor | None:
        """Replay a step.

        Returns:
            The scores (R, V), valid until the next step; None if it can't be recorded.
        """
        self._store.update_tables(
            [Span(p.row.slot, p.start, p.end, 0, p.row.blocks) for p in pieces]
        )
        size = self._sizes[bisect.bisect_left(self._sizes, len(pieces))]
        if size not in self._recorded and not self._record(size):
            return None
        recorded = self._recorded[size]
        padding = size - len(pieces)
        numbers = [p.row.slot for p in pieces] + [self._store.padding_slot] * padding
        numbers += [p.start for p in pieces] + [0] * padding
        numbers += [self._store.place(p.row.blocks, p.start) for p in pieces]
        numbers += [self._store.padding_place] * padding
        recorded.inputs_3R.view(-1).copy_(send(numbers, recorded.inputs_3R.device))
        recorded.graph.replay()
        self.padding += padding
        assert self._scores_RV is not None
        return self._scores_RV[: len(pieces)]

    def _record(self, size: int) -> bool:
        store = self._store
        row = (store.padding_slot, 0, store.padding_place)
        device = self._last_tokens_S.device
        inputs_3R = send([number for number in row for _ in range(size)], device).view(3, size)
        ends_R = torch.arange(size, device=device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step(inputs_3R, ends_R)
            scores_RV = self._step(inputs_3R, ends_R)
        torch.cuda.current_stream().wait_stream(self._stream)
        if self._scores_RV is None:
            self._scores_RV = scores_RV.new_empty(self._sizes[-1], scores_RV.shape[1])
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._scores_RV[:size].copy_(self._step(inputs_3R, ends_R))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._usable = False
            logger.warning("steps can't be recorded and run slower: %s", error)
            return False
        self._recorded[size] = _Recorded(graph, inputs_3R, ends_R)
        return True

    def _step(self, inputs_3R: Tensor, ends_R: Tensor) -> Tensor:
        slots_R, positions_R, places_R = inputs_3R
        self._store.begin_singles(slots_R, positions_R, places_R)
        return self._forward.run(self._last_tokens_S[slots_R], positions_R, ends_R)
