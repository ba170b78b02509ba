"""The fused product in Triton's interpreter, against bitsandbytes on the CPU.

Triton is not installed with torch for CPUs, and is not asked for. To run these:

    pip install --no-deps --target DIR triton
    PYTHONPATH=DIR TRITON_INTERPRET=1 python -m pytest tests/unit/weights/test_fused_kernel.py

The interpreter (3.9; that of 3.6 does not run with numpy 2) knows no inline assembly and multiplies
bfloat16 as integers: both are mended here, the first with `ptx.py`. On a card, the same products
are `tests/gpu/test_fused_cuda.py`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.weights import ptx
from tests.unit.weights.products import CASES, Case, check

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1", allow_module_level=True)
pytest.importorskip("triton", reason="Triton comes with torch for cards only")


@pytest.fixture(autouse=True)
def _mended(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    class Results:
        def __init__(self, results: list[Any]) -> None:
            self._results = results

        def get_result(self, number: int) -> Any:
            return self._results[number]

    def create_inline_asm(_: Any, text: str, __: str, values: Any, types: Any, *___: Any) -> Any:
        (codes,) = values
        found = ptx.numbers(text, codes.data.view(np.uint8))
        kinds = [kind.scalar for kind in types]
        return Results(
            [
                interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(kind)), kind)
                for bits, kind in zip(found, kinds, strict=True)
            ]
        )

    def create_dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        def numbers(handle: Any) -> Any:
            if handle.dtype.scalar == tl.bfloat16:
                return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            return handle.data.astype(np.float32)

        return interpreter.TensorHandle(numbers(a) @ numbers(b) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_s_output_has_the_shape_and_type_of_its_own() -> None:
    from bitsandbytes import nn

    from quantbatch.weights import fused
    from quantbatch.weights.four_bit import Tiles, packed_of

    torch.manual_seed(0)
    module = nn.Linear4bit(128, 96, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    module.support_avx512bf16_for_cpu = False
    packed = packed_of(module.weight, module.weight.quant_state, torch.bfloat16)
    assert packed is not None
    layer = fused.Layer(module, module.forward, packed)
    whole = torch.randn(2, 6, 128)
    with torch.inference_mode():
        for x in (whole, whole[:, ::2], whole[:, -1], whole.half()):
            got, wanted = fused.product(layer, x, Tiles(16, 64, 2)), module(x)
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
            assert fused.close(got, wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_those_of_bitsandbytes(case: Case) -> None:
    # The interpreter cuts the last bits off where a card rounds to bfloat16.
    check(case, torch.device("cpu"), most=1.1 if case.dtype == torch.float16 else 2.2)
