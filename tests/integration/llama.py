"""Tiny random models, for tests of loading and of engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from pathlib import Path

hf: Any = transformers

# On tensors this small, threads only wait for each other, on a busy machine for seconds.
torch.set_num_threads(1)

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GPT2_SIZES = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 300}


def make_llama(
    folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Save a random Llama."""
    return make_model(folder, "llama", dtype=dtype, tie_word_embeddings=tied, **changes)


def make_model(
    folder: Path, model_type: str, *, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Save a random causal language model of any type."""
    torch.manual_seed(0)
    sizes = GPT2_SIZES if model_type == "gpt2" else SIZES
    config = hf.AutoConfig.for_model(model_type, **sizes | changes)
    hf.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder
