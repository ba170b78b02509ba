"""What decides where the fused kernel is used; the kernel itself needs Triton, see its own test."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from bitsandbytes import functional, nn

from quantbatch.weights import fused
from quantbatch.weights.four_bit import Packed, Tiles, divisions, packed_of
from tests.unit.weights.products import CASES, Case, weights

CPU = torch.device("cpu")


def numbers_of(packed: Packed, kind: str) -> torch.Tensor:
    """Return what a matrix stands for, as the kernel reads it."""
    n, k = packed.shape
    table = functional.get_4bit_type(kind, device="cpu")
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], 1).view(n, k).long()
    scales = packed.absmax.float()
    if packed.nested is not None:
        outer, inner_table, offset = packed.nested
        at = torch.arange(len(packed.absmax))
        scales = inner_table[packed.absmax.long()] * outer[at // 256] + offset
    numbers: torch.Tensor = table[codes] * scales.view(n, k // packed.block).repeat_interleave(
        packed.block, 1
    )
    return numbers


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_matrix_is_read_as_bitsandbytes_writes_it(case: Case) -> None:
    codes, state = weights(case, CPU)
    packed = packed_of(codes, state, case.dtype)
    assert packed is not None
    state.dtype = torch.float32
    wanted = functional.dequantize_4bit(codes, state)
    assert torch.allclose(numbers_of(packed, case.kind), wanted, rtol=1e-5, atol=1e-7)


def test_codes_may_be_stored_in_any_type() -> None:
    full = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    as_bytes, state = functional.quantize_4bit(full, quant_type="nf4", blocksize=64)
    as_numbers, other = functional.quantize_4bit(
        full, quant_type="nf4", blocksize=64, quant_storage=torch.bfloat16
    )
    one = packed_of(as_bytes, state, torch.bfloat16)
    two = packed_of(as_numbers, other, torch.bfloat16)
    assert one is not None
    assert two is not None
    assert torch.equal(one.codes, two.codes)


@pytest.mark.parametrize(
    ("shape", "block", "dtype"),
    [
        ((4, 96), 64, torch.bfloat16),  # blocks go on in the next row
        ((4, 256), 256, torch.bfloat16),
        ((4, 64), 64, torch.float32),
    ],
)
def test_what_the_kernel_does_not_take(
    shape: tuple[int, int], block: int, dtype: torch.dtype
) -> None:
    codes, state = functional.quantize_4bit(torch.ones(shape), quant_type="nf4", blocksize=block)
    assert packed_of(codes, state, dtype) is None


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 4096), (14336, 4096), (64, 64)])
def test_sums_of_divided_products_take_no_more_than_the_matrix_in_16_bits(n: int, k: int) -> None:
    for rows in (16, 32, 64, 128, 256):
        found = divisions(n, k, 64, rows, processors=132)
        assert 1 <= len(found) <= 8
        assert {each.rows for each in found} == {min(rows, 128)}
        assert all(each.splits == 1 or 4 * each.splits * rows * n <= 2 * n * k for each in found)
        assert all(each.splits <= k // 64 for each in found)


def test_the_kernel_has_to_be_faster_at_both_ends_of_a_range() -> None:
    tiles = {rows: Tiles(min(rows, 128), 64, 1) for rows in (16, 32, 64, 128, 256)}
    plain = {2: 1.0, 4: 9.0, 5: 9.0, 8: 9.0, 9: 9.0, 16: 9.0, 17: 9.0, 32: 9.0, 33: 9.0, 64: 3.0}
    plain |= {65: 3.1, 128: 3.1, 129: 4.0, 256: 4.0}
    asked: list[int] = []

    def ours(rows: int) -> tuple[float, Tiles]:
        asked.append(rows)
        return 3.0, tiles[rows]

    found = fused.decide(ours, plain.__getitem__)
    assert asked == [16, 32, 64, 128, 256]
    assert found[:5] == [None] * 5  # 2 rows are faster as they were
    assert found[5:17] == [tiles[16]] * 12
    assert found[17:33] == [tiles[32]] * 16
    assert found[33:129] == [None] * 96  # as fast, and faster by less than noise
    assert found[129:] == [tiles[256]] * 128


class Doubles:
    """A layer that doubles."""

    compute_dtype = torch.bfloat16
    bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def fake_layer() -> fused.Layer:
    codes, state = weights(CASES[0], CPU)
    packed = packed_of(codes, state, torch.bfloat16)
    assert packed is not None
    module = Doubles()
    return fused.Layer(module, module.forward, packed)


def test_a_forward_takes_the_kernel_for_the_rows_that_were_decided() -> None:
    calls: list[tuple[int, Tiles]] = []

    def product(_: fused.Layer, x: torch.Tensor, tiles: Tiles) -> torch.Tensor:
        calls.append((x[..., 0].numel(), tiles))
        return x * 2

    tiles = Tiles(16, 64, 1)
    forward = fused.FusedForward(fake_layer(), [None, None, tiles, tiles], product)
    for shape in ((1, 1, 8), (1, 2, 8), (3, 8), (4, 8), (2, 50, 8), (0, 8)):
        x = torch.ones(shape)
        assert torch.equal(forward(x), x * 2)
    forward(torch.ones(2, 8, requires_grad=True))
    assert calls == [(2, tiles), (3, tiles)]


def model() -> torch.nn.Module:
    return torch.nn.Sequential(*(nn.Linear4bit(64, 64, quant_type="nf4") for _ in range(2)))


def test_a_model_on_a_cpu_is_left_as_it_is() -> None:
    built = model()
    assert fused.use_where_faster(built) == {}
    assert not any("forward" in vars(layer) for layer in built.children())


def test_a_failure_leaves_all_layers_as_they_were(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shapes = [fused.Shape(64, k, 64, True, "nf4", torch.bfloat16, bias=False) for k in (64, 128)]
    layers = {shape: [fake_layer()] for shape in shapes}

    def measured(_: Any, shape: fused.Shape) -> list[Tiles | None]:
        if shape.k == 128:
            raise ArithmeticError("first line\n64 x 128 by 16 rows differs")
        return [Tiles(16, 64, 1)] * 3

    monkeypatch.setattr(fused, "_layers", lambda _: layers)
    monkeypatch.setattr(fused, "_measured", measured)
    with caplog.at_level(logging.INFO):
        assert fused.use_where_faster(torch.nn.Module()) == {}
    assert not any("forward" in vars(each.module) for group in layers.values() for each in group)
    (line,) = caplog.messages
    assert "ArithmeticError: 64 x 128 by 16 rows differs" in line

    layers.pop(shapes[1])
    assert fused.use_where_faster(torch.nn.Module()) == {shapes[0]: [0, 1, 2]}
    assert isinstance(vars(layers[shapes[0]][0].module)["forward"], fused.FusedForward)


def test_products_are_compared_line_by_line() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(16, 1024, generator=random), torch.randn(256, 1024, generator=random)
    wanted = x @ weight.T
    assert fused.close(wanted.bfloat16(), wanted)
    assert not fused.close(wanted * 1.02, wanted)
    weight[7, 64:128] = 0  # a block whose scale is lost: 0.016 of the whole, and of a column 0.25
    assert not fused.close(x @ weight.T, wanted)
    wanted[3, 3] = float("nan")
    assert not fused.close(wanted, wanted)
