"""Can this model run over packed sequences? Asked of the model itself, before any row.

No list of architectures could be complete. Two short rows are run through the packed forward, in
pieces and token by token, and their scores are compared with those of the model's plain forward. A
model with state of another kind (linear attention), with an attention of its own, or that drops
what it should pass on, fails here, and its rows are answered by the static engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from quantbatch.engine.attention import UnsupportedModelError
from quantbatch.engine.blocks import blocks_for
from quantbatch.engine.pieces import Piece, Row
from quantbatch.records import Request, RequestId
from quantbatch.spec import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from quantbatch.engine.blocks import BlockPool
    from quantbatch.engine.forward import Forward

LENGTHS = (23, 9)
STEPS = (((0, 0, 10), (1, 0, 8)), ((1, 8, 9), (0, 10, 22)), ((0, 22, 23),))
"""Pieces of each step: row, start, end. Whole prompts, pieces, single tokens, and a mix."""
CLOSE, CLOSE_IN_FLOAT32 = 0.1, 1e-3
"""Greatest distance between scores as a share of their size. Kernels of 16-bit types differ by
about 0.01, a wrong position or a token that should not be seen by far more."""
NOISE = 2
"""How many times its own noise a model may differ whose rows depend on their batch: int8 with a
threshold takes outliers from all of it. A random 8B model differed by 0.12 (H100)."""


class Probe:
    """Two rows and the scores that the plain forward gives them; made before the attention is
    exchanged.

    Args:
        model: As it was loaded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        plain: Any = model
        vocabulary = plain.get_input_embeddings().num_embeddings
        random = torch.Generator().manual_seed(0)
        self._ids = [torch.randint(vocabulary, (n,), generator=random) for n in LENGTHS]
        self._device = model.device
        with torch.inference_mode():
            self._plain = [
                plain(input_ids=ids[None].to(self._device), use_cache=False).logits[0].float()
                for ids in self._ids
            ]
            self._noise = self._own_noise(plain) if depends_on_batch(model) else 0.0

    def _own_noise(self, plain: Any) -> float:  # noqa: ANN401 - a model that is called
        """Return how far a model's scores of a row alone are from those of it in company."""
        length = min(LENGTHS)
        together_BT = torch.stack([ids[:length] for ids in self._ids]).to(self._device)
        scores_BTV = plain(input_ids=together_BT, use_cache=False).logits.float()
        alone_BTV = torch.stack([scores[:length] for scores in self._plain])
        return _relative(scores_BTV - alone_BTV, alone_BTV)

    def check(self, forward: Forward, pool: BlockPool, block_tokens: int) -> None:
        """Compare.

        Args:
            forward: The packed forward.
            pool: Blocks for the two rows; they are given back.
            block_tokens: Tokens of a block.

        Raises:
            UnsupportedModelError: The scores differ, or the model needs what there is not.
        """
        rows = [
            _row(slot, ids, pool.allocate(min(pool.available, blocks_for(len(ids), block_tokens))))
            for slot, ids in enumerate(self._ids)
        ]
        try:
            distances = [self._distance(forward, rows, step) for step in STEPS]
        except UnsupportedModelError:
            raise
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does with a cache that is none of its own
            raise UnsupportedModelError(f"{type(error).__name__}: {error}") from error
        finally:
            for row in rows:
                pool.release(row.blocks)
        if not max(distances) <= max(_close(forward.model), NOISE * self._noise):
            raise UnsupportedModelError(
                f"its scores over packed rows differ from its own by {max(distances):.2g}"
            )

    def _distance(
        self, forward: Forward, rows: Sequence[Row], step: Sequence[tuple[int, int, int]]
    ) -> float:
        pieces = [Piece(rows[i], start, end, samples=True) for i, start, end in step]
        tokens_T = torch.cat([self._ids[i][start:end] for i, start, end in step])
        with torch.inference_mode():
            scores_BV = forward(pieces, tokens_T.to(self._device)).scores_BV.float()
        plain_BV = torch.stack([self._plain[i][end - 1] for i, _, end in step])
        return _relative(scores_BV - plain_BV, plain_BV)


def _relative(difference: Tensor, whole: Tensor) -> float:
    return float(difference.norm() / whole.norm().clamp(min=1e-6))


def _close(model: PreTrainedModel) -> float:
    """Return the greatest distance at which a model's scores count as the same."""
    is_float32 = model.get_input_embeddings().weight.dtype == torch.float32
    return CLOSE_IN_FLOAT32 if is_float32 else CLOSE


def depends_on_batch(model: torch.nn.Module) -> bool:
    """Tell whether rows depend on their batch: LLM.int8() with a threshold looks for outliers in
    all of it, and from Python.
    """
    # By its name: bitsandbytes takes a second to import, and says things when it is.
    int8: list[Any] = [m for m in model.modules() if type(m).__name__ == "Linear8bitLt"]
    return any(module.state.threshold > 0 for module in int8)


def _row(slot: int, ids: Tensor, blocks: Sequence[int]) -> Row:
    prompt = tuple(ids.tolist())
    request = Request(RequestId(-1, slot), prompt, Sampling(max_new_tokens=1), 0)
    limit = len(prompt) + 1
    return Row(request, (0, 0, 0), list(prompt), limit, limit, blocks=list(blocks), slot=slot)
