"""What tests on a card share."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


# As in a replica; read when torch first allocates.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@pytest.fixture(scope="session", autouse=True)
def _card() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA card")


@pytest.fixture(autouse=True)
def _clean_card() -> Iterator[None]:
    import torch

    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 1.1 billion parameters with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("billion")
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=4096,
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder)
    return folder
