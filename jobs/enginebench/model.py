"""A model that is large enough to be slow and small enough to be made on the spot.

Its weights are random, so two things are seen to. Their range makes rounding matter as little as it
can: the scores of the two likeliest tokens differ by 0.2 in the median, and float32 is wrong about
that difference by 9e-6 of its size, so every right engine gives the same answers, but for a token
in 100,000. (At the usual 0.02 answers soon repeat one token; at 0.2 attention is so sharp
that rounding is 8 times as bad.) And the rows of the output head that stand for the tokenizer's
special tokens are zero: the likeliest of 4,096 scores around zero is never zero itself, so no
answer ends before its budget, whatever an engine thinks of end tokens.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.prompts.tokens import load_tokenizer
from quantbatch.spec import FourBit, Model
from quantbatch.weights import loading

hf: Any = transformers

TOKENIZER = Path(__file__).parents[2] / "configs" / "quickstart" / "model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SEED = 7
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1216,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
}


class Loaded(NamedTuple):
    """A model in memory, with its tokenizer."""

    model: Any
    tokenizer: Any


def make(tokenizer: Any, **changes: Any) -> Any:
    """Return the model in memory, in float32.

    Args:
        tokenizer: Names the special tokens, with which no answer ends.
        changes: Of `SHAPE`.
    """
    config = hf.LlamaConfig(
        **SHAPE | changes,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(SEED)
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.all_special_ids] = 0.0
    return model


def write(folder: Path) -> int:
    """Write the model and its tokenizer into a folder.

    Returns:
        The number of its parameters.
    """
    hf.utils.logging.disable_progress_bar()
    model = make(load_tokenizer(TOKENIZER))
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder / name)
    return sum(parameter.numel() for parameter in model.parameters())


def load(folder: Path, bits: int) -> Loaded:
    """Load the model as a job does; whatever its bits, it multiplies in float32."""
    match bits:
        case 32:
            spec = Model(id=str(folder), bits=32)
        case 4:
            spec = Model(
                id=str(folder),
                quantization=FourBit(kind="nf4", double_quant=True, compute_dtype="float32"),
                dtype="float32",
            )
        case _:
            raise ValueError(f"bits is 32 or 4, not {bits}")
    loaded = loading.load(open_checkpoint(spec), spec, "cpu")
    assert loaded.compute_dtype == "float32"
    # A copy: the engines share the tokenizer with nobody who sets its padding side.
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, padding_side="left")
    return Loaded(loaded.model, tokenizer)
