"""The instructions of PTX that `expansion.py` uses, in numpy, as NVIDIA's manual has them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    Words: TypeAlias = NDArray[np.uint32]

OUTPUTS, INPUT = ("$0", "$1", "$2", "$3"), "$4"


def run(text: str, words: Words) -> list[Words]:
    """Run instructions for each of some words; an instruction that is not known is an error."""
    registers = {INPUT: words}

    def value(name: str) -> Words:
        if re.fullmatch("0x[0-9a-f]+|[0-9]+", name):
            return np.full_like(words, int(name, 0))
        return registers[name]

    for line in text.strip().strip("{}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        operation, target, *operands = re.split(r"[\s,]+", line.strip())
        registers[target] = _result(operation, [value(operand) for operand in operands])
    return [registers[name] for name in OUTPUTS]


def _result(operation: str, operands: list[Words]) -> Words:
    match operation:
        case "and.b32":
            return operands[0] & operands[1]
        case "or.b32":
            return operands[0] | operands[1]
        case "shr.b32":
            return operands[0] >> operands[1]
        case "prmt.b32":
            return _prmt(*operands)
        case _:
            raise AssertionError(operation)


def _prmt(low: Words, high: Words, selector: Words) -> Words:
    """Pick four of eight bytes; the fourth bit of a digit would repeat a sign."""
    whole = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    found = np.zeros_like(low)
    for place in range(4):
        digit = selector >> np.uint32(4 * place) & np.uint32(0xF)
        assert (digit < 8).all(), "signs are not repeated here"
        byte = (whole >> (digit * np.uint32(8)).astype(np.uint64)).astype(np.uint32)
        found |= (byte & np.uint32(0xFF)) << np.uint32(8 * place)
    return found


def numbers(text: str, codes: NDArray[np.uint8]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return the bits of the numbers that bytes of codes become: of their high and low halves.

    Args:
        text: What `expansion.expansion` returns.
        codes: Of any shape, a multiple of four of them.
    """
    words = np.ascontiguousarray(codes).reshape(-1).view(np.uint32)
    first, second, third, fourth = run(text, words)
    pairs = np.stack([first, second], 1), np.stack([third, fourth], 1)
    high, low = (each.view(np.uint16).reshape(codes.shape) for each in pairs)
    return high, low
