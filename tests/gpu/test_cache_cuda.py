"""The cache of quantized weights on a card: bit-equal, and apart from what a CPU quantizes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.spec import Model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

KINDS: dict[str, dict[str, Any]] = {
    "nf4 with double quantization": {"bits": 4},
    "nf4": {"quantization": {"kind": "nf4", "double_quant": False}},
    "fp4": {"quantization": {"kind": "fp4"}},
    "int8": {"bits": 8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_quantizing_at_load(
    billion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import torch

    from quantbatch.weights import pretrained
    from quantbatch.weights.loading import load

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    quantizations: list[bool] = []
    real = pretrained.load_pretrained

    def note(*args: Any, **kwargs: Any) -> Any:
        quantizations.append("quantization_config" in kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(pretrained, "load_pretrained", note)

    def scores(device: str, **changes: Any) -> tuple[Any, int]:
        model = Model.model_validate({"id": str(billion)} | KINDS[kind] | changes)
        found = load(open_checkpoint(model), model, device)
        with torch.inference_mode():
            ids = torch.arange(64, device=device).view(2, 32)
            logits = found.model(ids).logits.cpu()
        return logits, found.weight_bytes

    cache = {"cache": str(tmp_path / "cache")}
    expected = scores("cuda")
    for _ in range(2):
        found = scores("cuda", **cache)
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1]
    assert quantizations == [True, True, False]
    if kind == "int8":
        scores("cpu", **cache)
        assert quantizations[3:] == [True], "a CPU does not load what a card quantized"
