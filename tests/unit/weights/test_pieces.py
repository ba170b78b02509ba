"""Quantizing in pieces: the same bits, in less memory."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from quantbatch.weights import pieces

pieces.register()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 200), (64, 64), (7, 9), (1, 1), (3, 4096)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_pieces_are_the_whole_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights[0, 0] = 0
    whole, state = bnb.quantize_4bit(weights, compress_statistics=True, quant_type=kind)
    monkeypatch.setattr(pieces, "PIECE", 4096)
    found, its_state = bnb.quantize_4bit(weights, compress_statistics=True, quant_type=kind)
    assert torch.equal(found, whole)
    assert found.shape == whole.shape
    assert torch.equal(its_state.absmax, state.absmax)
    assert torch.equal(its_state.offset, state.offset)
    assert torch.equal(its_state.state2.absmax, state.state2.absmax)


def test_turned_matrices_and_other_storage_types(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(128, 192).T
    for storage in (torch.uint8, torch.bfloat16, torch.float32):
        monkeypatch.setattr(pieces, "PIECE", 1 << 20)
        whole, _ = bnb.quantize_4bit(weights, quant_type="nf4", quant_storage=storage)
        monkeypatch.setattr(pieces, "PIECE", 4096)
        found, _ = bnb.quantize_4bit(weights, quant_type="nf4", quant_storage=storage)
        assert found.dtype == storage
        assert torch.equal(found.view(torch.uint8), whole.view(torch.uint8))


@pytest.mark.parametrize("shape", [(96, 200), (1, 5000), (5000, 1), (7, 9)])
def test_rows_at_8_bits_are_the_whole_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    for threshold in (0.0, 2.0):
        monkeypatch.setattr(pieces, "PIECE", 1 << 20)
        whole = bnb.int8_vectorwise_quant(weights.clone(), threshold)
        monkeypatch.setattr(pieces, "PIECE", 400)
        found = bnb.int8_vectorwise_quant(weights.clone(), threshold)
        assert torch.equal(found[0], whole[0])
        assert torch.equal(found[1], whole[1])
        assert (found[2] is None) == (whole[2] is None)


def test_it_is_what_bitsandbytes_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = torch.split

    def split(tensor: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
        seen.append(size)
        return real(tensor, size)

    monkeypatch.setattr(torch, "split", split)
    bnb.quantize_4bit(torch.randn(64, 64))
    bnb.int8_vectorwise_quant(torch.randn(1024, 512).half())
    assert seen == [pieces.PIECE, pieces.PIECE // 512]
