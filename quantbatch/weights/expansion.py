"""Codes of 4 bits to numbers of 16, as instructions of NVIDIA cards (PTX).

`prmt` picks four bytes out of eight by four numbers of 3 bits, each in a hexadecimal digit: codes
as bitsandbytes packs them are such digits. The 16 numbers of a table are two tables of bytes, the
low ones and the high ones, each two halves of eight entries. So three `prmt` look four codes up in
a table of bytes (one in each half, and one that chooses by the codes' fourth bit), and two more
pair low bytes with high ones. With what cuts the codes out that is 21 instructions for eight codes,
and no memory is asked.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

UNITS = 4096
"""Units between 1 and a half that are tried."""

_HALF = """
    prmt.b32 a, {low[0]}, {low[1]}, s;
    prmt.b32 b, {low[2]}, {low[3]}, s;
    prmt.b32 a, a, b, t;
    prmt.b32 c, {high[0]}, {high[1]}, s;
    prmt.b32 d, {high[2]}, {high[3]}, s;
    prmt.b32 c, c, d, t;
    prmt.b32 {of_high}, a, c, 0x7351;
    prmt.b32 {of_low}, a, c, 0x6240;
"""
"""Looks up the low bytes (a) and high bytes (c) of four 16-bit numbers by four codes: `s` has three
bits of each code, which pick among 8 entries, and `t` picks between the two halves of the table by
the fourth. Then pairs them: those of high halves of bytes, and those of low ones."""
_EXPAND = """{{
    .reg .b32 s, t, a, b, c, d;
    and.b32 s, $4, 0x77777777;
    shr.b32 t, $4, 1;
    and.b32 t, t, 0x44444444;
    or.b32 t, t, 0x32103210;
{first_half}
    shr.b32 s, s, 16;
    shr.b32 t, t, 16;
{second_half}
}}"""


class Expansion(NamedTuple):
    """How codes become numbers."""

    text: str
    """Instructions that make eight numbers of four bytes of two codes each: `$4` are the bytes,
    `$0` and `$1` the numbers of their high halves, `$2` and `$3` of the low ones."""
    unit: float
    """What a number is to be multiplied by."""


@functools.cache
def expansion(table: tuple[float, ...], dtype: torch.dtype) -> Expansion:
    """Return how codes become numbers of 16 bits.

    Args:
        table: What the 16 codes stand for.
        dtype: bfloat16 or float16.
    """
    unit = _best_unit(table, dtype)
    numbers = (torch.tensor(table, dtype=torch.float64) / unit).to(dtype)
    bits = numbers.view(torch.int16).tolist()
    low = _words([number & 0xFF for number in bits])
    high = _words([number >> 8 & 0xFF for number in bits])
    first_half, second_half = (
        _HALF.format(low=low, high=high, of_high=of_high, of_low=of_low)
        for of_high, of_low in (("$0", "$2"), ("$1", "$3"))
    )
    return Expansion(_EXPAND.format(first_half=first_half, second_half=second_half), unit)


def _best_unit(table: tuple[float, ...], dtype: torch.dtype) -> float:
    """Return the unit in which the 16 numbers lose least by rounding.

    In bfloat16 that is 0.06 % of nf4 (0.11 % in units of 1) and nothing of fp4; products of codes
    and scales, which bitsandbytes rounds, lose 0.16 %.
    """
    units = 1 / (1 + torch.arange(UNITS, dtype=torch.float64) / UNITS)
    codes = torch.tensor(table, dtype=torch.float64)
    rounded = (codes / units[:, None]).to(dtype).double() * units[:, None]
    return float(units[(rounded - codes).square().sum(1).argmin()])


def _words(numbers: list[int]) -> list[str]:
    """Return 16 bytes as four words in hex, the first byte the lowest."""
    return [f"0x{int.from_bytes(numbers[i : i + 4], 'little'):08x}" for i in range(0, 16, 4)]
