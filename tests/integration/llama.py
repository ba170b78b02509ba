"""Tiny models, for tests of loading and of engines: random ones, whose answers depend on everything
before them, and a `chain`, whose weights are made by hand so that each token has one successor. And
what engines are asked: every option of sampling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.spec import Model
from quantbatch.weights.loading import load

if TYPE_CHECKING:
    from pathlib import Path

hf: Any = transformers

# On tensors this small, threads only wait for each other, on a busy machine for seconds.
torch.set_num_threads(1)

END, PAD, HIDDEN = "<|end|>", "<|pad|>", "<|hidden|>"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = 320

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


def make_tokenizer() -> Any:
    """One token a byte, and special tokens."""
    vocabulary = {END: 0, PAD: 1, HIDDEN: 2} | {c: i for i, c in enumerate(ALPHABET, start=3)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)
    made.add_special_tokens({"additional_special_tokens": [HIDDEN]})
    return made


def make_chain(folder: Path) -> Path:
    """Save what `chain` writes its weights into."""
    return make_llama(
        folder, dtype=torch.float32, hidden_size=VOCABULARY,
        vocab_size=VOCABULARY, num_hidden_layers=1, intermediate_size=64, eos_token_id=0,
    )  # fmt: skip


def loaded(folder: Path) -> Any:
    model = Model(id=str(folder), bits=32)
    return load(open_checkpoint(model), model, "cpu").model


def chain(folder: Path, tokenizer: Any, text: str) -> Any:
    """A model that goes through the tokens of a text in a circle.

    The residual stream is the token itself, layers add nothing, the head looks up the successor.
    """
    model = loaded(folder)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(set(ids)) == len(ids), "each token has one successor"
    layer = model.model.layers[0]
    with torch.no_grad():
        for weight in (
            layer.self_attn.o_proj.weight,
            layer.mlp.down_proj.weight,
            model.lm_head.weight,
        ):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
        for token, successor in zip(ids, [*ids[1:], ids[0]], strict=True):
            model.lm_head.weight[successor, token] = 1.0
    return model


def random_prompts(count: int = 13) -> list[list[int]]:
    random = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, VOCABULARY, (1 + (7 * i) % 40,), generator=random).tolist()
        for i in range(count)
    ]


A, B = (3 + ALPHABET.index(letter) for letter in "ab")
FAVOURED = {A: 9.0, B: 9.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {A: 3.5, 40: -100.0}},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "presence_penalty": {"presence_penalty": 2.0},
    "presence_reward": {"presence_penalty": -2.0},
    "frequency_penalty": {"frequency_penalty": 0.9},
    "frequency_reward": {"frequency_penalty": -0.9},
    "bad_words": {"logit_bias": FAVOURED, "bad_words": ["aa", "bab", "b\u20ac"]},
    "one bad letter": {"logit_bias": FAVOURED, "bad_words": ["a"]},
    "stop_token_ids": {"logit_bias": {A: 3.0}, "stop_token_ids": [A, 90]},
    "min_new_tokens": {"logit_bias": FAVOURED, "stop_token_ids": [A], "min_new_tokens": 7},
    "minimum before the end": {"logit_bias": {0: 20.0}, "min_new_tokens": 4},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 1.5, "top_k": 5},
    "top_p": {"temperature": 1.5, "top_p": 0.6},
    "min_p": {"temperature": 1.5, "min_p": 0.2},
    "all": {
        "temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1,
        "presence_penalty": 0.9, "frequency_penalty": 0.6, "logit_bias": {A: 7.0, B: 5.0, 50: -9.0},
        "bad_words": ["aa", "ba"], "stop_token_ids": [B, 61], "min_new_tokens": 3,
    },
}  # fmt: skip
SEEDS = [(i * 0x9E3779B97F4A7C15) % 2**63 for i in range(1, 14)]
