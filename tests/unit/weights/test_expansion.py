from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes.functional import get_4bit_type

from quantbatch.weights.expansion import expansion
from tests.unit.weights import ptx


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_each_byte_becomes_the_two_numbers_that_its_codes_stand_for(
    kind: str, dtype: torch.dtype
) -> None:
    table = get_4bit_type(kind, device="cpu")
    text, unit = expansion(tuple(table.tolist()), dtype)
    numbers = (table.double() / unit).to(dtype)
    lost = (numbers.double() * unit - table).norm() / table.norm()
    assert lost < (7e-4 if dtype == torch.bfloat16 else 8e-5)
    bits = numbers.view(torch.int16).numpy().view(np.uint16)
    random = np.random.default_rng(0)
    # Each byte in each place of a word, in random company.
    codes = np.concatenate([random.permutation(256).astype(np.uint8) for _ in range(16)])
    high, low = ptx.numbers(text, codes)
    assert (high == bits[codes >> 4]).all()
    assert (low == bits[codes & 15]).all()
