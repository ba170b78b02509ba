"""Random numbers that belong to a row: the same for its seed, step and token in any company.

A token is drawn by the Gumbel-max trick (E. J. Gumbel, 1954; C. J. Maddison et al., arXiv
1411.0030): add to each score noise of the Gumbel distribution and take the greatest; that is a
sample of the softmax. The noise of a token is a hash of (seed, step, token), so it needs no
generator, no order and no neighbour, and is the same on every device. Against walking along
the cumulated probabilities, a difference of rounding between two kernels matters only where two
noisy scores are nearly equal, not wherever some boundary among a whole vocabulary moves.

Shapes: B rows, V words of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_LOW_32 = 0xFFFFFFFF
_STEP_MULTIPLIER = -1640531527
"""2**32 divided by the golden ratio, as a signed number: spreads consecutive steps (Knuth)."""


def gumbel_noise(seeds_B: Tensor, steps_B: Tensor, vocabulary: int) -> Tensor:
    """Return standard Gumbel noise of shape (B, V) in float32.

    Args:
        seeds_B: Seeds of the rows, int64.
        steps_B: How many tokens each row has generated, int64.
        vocabulary: Number of tokens.
    """
    low_B1 = _signed_32(seeds_B & _LOW_32)[:, None]
    high_B1 = _signed_32((seeds_B >> 32) & _LOW_32)[:, None]
    step_B1 = _signed_32((steps_B * _STEP_MULTIPLIER) & _LOW_32)[:, None]
    tokens_V = torch.arange(vocabulary, dtype=torch.int32, device=seeds_B.device)
    key_B1 = _mix(_mix(low_B1 ^ step_B1) ^ high_B1)
    bits_BV = _mix(_mix(tokens_V[None] ^ key_B1) ^ high_B1)
    # 23 bits and a half step: every value is a float32, and none is 0 or 1.
    uniform_BV = ((bits_BV >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    return uniform_BV.log_().neg_().log_().neg_()


def _signed_32(value_B: Tensor) -> Tensor:
    """Return the low 32 bits of an int64 as an int32 with the same bits."""
    return torch.where(value_B >= 2**31, value_B - 2**32, value_B).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """Scramble 32 bits; C. Wellons' lowbias32 (2018), with logical shifts on signed numbers."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
