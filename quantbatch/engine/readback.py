"""The results of a step on their way from the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from quantbatch.engine.reading import Reading
    from quantbatch.engine.sampling import Chosen


class Readback:
    """The results of a step on their way to the host, without waiting for them."""

    def __init__(self, chosen: Chosen, reading: Reading | None) -> None:
        self._tensors = [chosen.tokens_B, chosen.sound_B]
        if chosen.logprobs is not None:
            self._tensors += chosen.logprobs[1:]
        if reading is not None:
            self._tensors += reading.tensors
        self._event: torch.cuda.Event | None = None
        if chosen.tokens_B.device.type == "cuda":
            self._tensors = [_on_its_way(tensor) for tensor in self._tensors]
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> list[list[Any]]:
        """Return the tokens, whether the scores of each were numbers, the log-probabilities of
        those taken, with the likeliest tokens and theirs, if any row asks, and what rows read.
        """
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._tensors]


def _on_its_way(tensor: Tensor) -> Tensor:
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
