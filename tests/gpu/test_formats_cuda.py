"""Formats that a card multiplies as they are."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.footprint import weigh
from quantbatch.spec import Model
from quantbatch.weights.dtypes import capability, resolve
from quantbatch.weights.loading import load
from tests.integration.llama import make_llama
from tests.integration.packed import compressed_fp8, dense_twin, write_packed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu
pytest.importorskip("compressed_tensors")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(40, device="cuda").view(2, 20)).logits
    return found.float()


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_fp8_is_multiplied_as_it_is(tmp_path: Path, strategy: str) -> None:
    card = capability("cuda")
    if card is None or card < (8, 9):
        pytest.skip("needs a card of compute capability 8.9")
    make_llama(tmp_path / "original")
    packed = partial(compressed_fp8, strategy=strategy)(tmp_path / "original")
    write_packed(tmp_path / "original", tmp_path / "fp8", packed)
    model = Model(id=str(tmp_path / "fp8"), dtype="bfloat16")
    checkpoint = open_checkpoint(model, card)
    assert not checkpoint.expanded
    found = load(checkpoint, model, "cuda")
    planned = weigh(checkpoint, resolve(checkpoint, model, "cuda")).total_bytes
    first = logits(found.model)
    kept = sum(p.numel() * p.element_size() for p in found.model.parameters())
    assert found.weight_bytes == planned == kept, "nothing is expanded by the first forward"
    dense = Model(id=str(dense_twin(tmp_path / "fp8")))
    exact = logits(load(open_checkpoint(dense), dense, "cuda").model)
    assert (first - exact).norm() / exact.norm() < 0.1  # activations have 8 bits, too
