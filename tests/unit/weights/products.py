"""Products of activations and matrices in 4 bits to try a fused kernel with."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from bitsandbytes import functional
from typing_extensions import override

from quantbatch.weights.four_bit import Tiles, packed_of

if TYPE_CHECKING:
    from torch import Tensor


class Case(NamedTuple):
    """A product, and how it is divided."""

    m: int
    n: int
    k: int
    rows: int = 16
    columns: int = 64
    splits: int = 1
    kind: str = "nf4"
    nested: bool = True
    block: int = 64
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False

    @override
    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in self)


CASES = [
    Case(1, 64, 64),
    Case(2, 64, 128, nested=False),
    Case(7, 72, 192, kind="fp4"),
    Case(7, 72, 192, kind="fp4", nested=False, dtype=torch.float16),
    Case(16, 130, 320, bias=True),
    Case(5, 128, 256, block=128),
    Case(5, 100, 384, block=128, kind="fp4", nested=False, bias=True),
    Case(13, 200, 448, splits=4, bias=True),  # 7 blocks: 2, 2, 2 and 1
    Case(13, 96, 320, splits=4),  # 5 blocks: three programs of 2 at most, and none for a fourth
    Case(3, 64, 64, splits=8),
    Case(32, 200, 640, rows=32, columns=128, splits=2, dtype=torch.float16),
    Case(33, 257, 256, rows=64, columns=128),
    Case(128, 192, 320, rows=128, columns=128, splits=2, bias=True),
    Case(100, 60, 4160, rows=128, splits=8, nested=False),
    Case(37, 100, 192, rows=16, splits=2, bias=True),  # three programs of 16 rows
]


def weights(case: Case, device: torch.device) -> tuple[Tensor, Any]:
    """Return a matrix as bitsandbytes quantizes it: bytes, and what belongs to them."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    full = torch.randn(case.n, case.k, generator=generator).to(case.dtype)
    full *= torch.rand(case.n, 1, generator=generator) + 0.1  # so that rows differ in their scales
    packed, state = functional.quantize_4bit(
        full.to(device),
        blocksize=case.block,
        compress_statistics=case.nested,
        quant_type=case.kind,
    )
    return packed, state


def check(case: Case, device: torch.device, *, most: float) -> float:
    """Compare a product with that in float64, and its distance with that of bitsandbytes' weights.

    Args:
        case: The product.
        device: Where.
        most: How many times as far away it may be.

    Returns:
        The distance as a share of the whole.
    """
    from quantbatch.weights.fused_kernel import multiply

    packed, state = weights(case, device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.m, case.k, generator=generator).to(case.dtype).to(device)
    bias = torch.randn(case.n, generator=generator).to(case.dtype).to(device)
    found = packed_of(packed, state, case.dtype)
    assert found is not None
    tiles = Tiles(case.rows, case.columns, case.splits)
    got = multiply(x, found, bias if case.bias else None, tiles)
    assert got.dtype == case.dtype
    assert got.shape == (case.m, case.n)

    state.dtype = torch.float32
    exact = functional.dequantize_4bit(packed, state).double()
    wanted = torch.nn.functional.linear(x.double(), exact)
    rounded = torch.nn.functional.linear(x.double(), exact.to(case.dtype).double())
    if case.bias:
        wanted, rounded = wanted + bias.double(), rounded + bias.double()
    theirs = _worst(rounded.to(case.dtype).double() - wanted, wanted)
    ours = _worst(got.double() - wanted, wanted)
    print(f"{case}: {ours:.2e}, bitsandbytes {theirs:.2e}")
    assert ours <= most * theirs, (ours, theirs)
    return ours


def _worst(apart: Tensor, wanted: Tensor) -> float:
    """Return the greatest distance of a row, a column and of all, each as a share."""
    norms = [(apart.norm(dim=d), wanted.norm(dim=d)) for d in (0, 1)]
    shares = [(a / w.clamp(min=w.mean())).max() for a, w in norms]
    return float(torch.stack([*shares, apart.norm() / wanted.norm()]).max())
