"""How much memory of the host a load takes, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.llama import make_llama

if TYPE_CHECKING:
    from collections.abc import Iterator

CODE = """
import json, sys
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.spec import Model
from quantbatch.weights.loading import load
from quantbatch.weights.peak import PeakMemory

for text in sys.argv[1:]:
    model = Model.model_validate_json(text)
    checkpoint = open_checkpoint(model)
    found = None
    peak = PeakMemory("cpu")
    found = load(checkpoint, model, "cpu")
    print(json.dumps([found.weight_bytes, peak.peak_bytes()]))
"""
SHARD_BYTES = 25_000_000
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4},
    "fp4": {"quantization": {"kind": "fp4", "double_quant": False}},
    "int8": {"bits": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of 55 million parameters, in shards."""
    from transformers import AutoModelForCausalLM

    folder = make_llama(
        tmp_path_factory.mktemp("model"), hidden_size=1024, intermediate_size=2816,
        num_hidden_layers=4, vocab_size=2000, num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    yield folder
    for path in folder.glob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_is_near_what_stays_and_one_shard(folder: Path, tmp_path: Path, kind: str) -> None:
    """All that is resident counts, mapped files too."""
    small = {"id": str(make_llama(tmp_path / "small"))} | KINDS[kind]
    plain = {"id": str(folder)} | KINDS[kind]
    cached = plain | {"cache": str(tmp_path / "cache")}
    jobs = [json.dumps(model) for model in (small, plain, cached, cached)]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *jobs], capture_output=True, text=True, check=True
    )
    _, quantized, stored, found = map(json.loads, done.stdout.splitlines())
    weight_bytes = quantized[0]
    limit = 1.3 * weight_bytes + SHARD_BYTES
    mib = [f"{each / 2**20:.1f}" for each in (weight_bytes, quantized[1], stored[1], found[1])]
    print(f"{kind}: {mib[0]} MiB; quantized {mib[1]}, stored {mib[2]}, from the cache {mib[3]}")
    assert 0.7 * weight_bytes < quantized[1] < limit
    assert found[1] < limit
    # A file of the entry is put together in memory; here all of it is one file.
    assert stored[1] < limit + weight_bytes
    assert len(list(folder.glob("*.safetensors"))) >= 4
    assert len(list(tmp_path.glob("cache/*/record-*"))) == 1
