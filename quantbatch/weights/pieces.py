"""Quantizes large matrices piece by piece on a CPU.

bitsandbytes 0.50 has no kernels of its own for it on CPUs. What it does with torch's operations
takes 18 bytes for each element of a matrix at once at 4 bits (26 with fp4), 12 at 8 bits: 12 GB for
the largest matrix of a 70B model. Blocks of 64 elements are independent of each other, and so are
rows at 8 bits. So in pieces the result is the same to the bit, in 2 MB and in less time, because a
piece stays in the processor's cache (2048 x 5632 elements: nf4 0.29 s of CPU against 0.38, fp4 0.31
against 0.48).

Can go when bitsandbytes registers kernels for CPUs, which are then left alone.
"""

from __future__ import annotations

from typing import Any

import torch

FOUR_BIT = "bitsandbytes::quantize_4bit"
EIGHT_BIT = "bitsandbytes::int8_vectorwise_quant"
PIECE = 1 << 16
"""Elements; a multiple of every block size that bitsandbytes has (32 to 4,096)."""


def register() -> None:
    """Make these the kernels for CPUs, once in a process, unless there are some."""
    if not _has_kernel(FOUR_BIT):
        torch.library.register_kernel(FOUR_BIT, "cpu", _four_bit(_kernel(FOUR_BIT)))
    if not _has_kernel(EIGHT_BIT):
        torch.library.register_kernel(EIGHT_BIT, "cpu", _eight_bit(_kernel(EIGHT_BIT)))


def _has_kernel(operation: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation, "CPU")


def _kernel(operation: str) -> Any:  # noqa: ANN401
    """Return what CPUs use of an operation that has no kernel for them."""
    whole: Any = torch.library.get_kernel(operation, "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return lambda *arguments: whole.call_boxed(keys, *arguments)


def _four_bit(whole: Any) -> Any:  # noqa: ANN401
    def quantize(
        A: torch.Tensor,  # noqa: N803 - the operation's own names
        blocksize: int,
        quant_type: str,
        quant_storage: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = [], []
        for piece in torch.split(A.reshape(-1), PIECE):
            found = whole(piece, blocksize, quant_type, quant_storage)
            codes.append(found[0])
            scales.append(found[1])
        return torch.cat(codes), torch.cat(scales)

    return quantize


def _eight_bit(whole: Any) -> Any:  # noqa: ANN401
    def quantize(
        A: torch.Tensor,  # noqa: N803 - the operation's own names
        threshold: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        # Activations: with a threshold, columns count, and without one there are few rows.
        if threshold > 0 or A.numel() <= PIECE or A.dim() != 2:
            found: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] = whole(A, threshold)
            return found
        codes, scales = [], []
        for piece in torch.split(A, max(1, PIECE // A.shape[1])):
            found = whole(piece, 0.0)
            codes.append(found[0])
            scales.append(found[1])
        return torch.cat(codes), torch.cat(scales), None

    return quantize
