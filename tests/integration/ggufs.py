"""Tiny GGUF files, made with gguf-py from models of transformers as llama.cpp converts them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}
TYPES: Any = gguf.GGMLQuantizationType


def write_gguf(
    model: Path,
    path: Path,
    kind: str,
    *,
    tokenizer: Path,
    chat_template: str | None = None,
    **values: Any,
) -> dict[str, torch.Tensor]:
    """Write a model as GGUF, its matrices in one type.

    Args:
        model: A folder of transformers.
        path: The file.
        kind: Type of the matrices, such as Q8_0.
        tokenizer: A folder with a byte-level BPE tokenizer.
        chat_template: Its template, if it has one.
        values: More for the header.

    Returns:
        The weights that the file means, by their names in transformers.
    """
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, config["model_type"])
    _write_configuration(writer, config)
    _write_tokenizer(writer, tokenizer, chat_template)
    for key, value in values.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    meant = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        stored = tensor.float()
        if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            stored = _permuted(stored, config[heads])
        matrix = stored.ndim == 2 and kind != "F32"
        how = TYPES[kind] if matrix else TYPES.F32
        data = gguf.quants.quantize(stored.numpy(), how)
        writer.add_tensor(_renamed(name), data, raw_dtype=how)
        values_meant = torch.from_numpy(gguf.quants.dequantize(data, how)).view(stored.shape)
        meant[name] = _restored(values_meant, name, config)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return meant


def _write_configuration(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)


def _write_tokenizer(writer: gguf.GGUFWriter, folder: Path, chat_template: str | None) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    added = {each["id"]: each for each in found["added_tokens"]}
    words = {index: word for word, index in found["model"]["vocab"].items()}
    words |= {index: each["content"] for index, each in added.items()}
    kinds = [
        gguf.TokenType.CONTROL if index in added and added[index]["special"]
        else gguf.TokenType.USER_DEFINED if index in added else gguf.TokenType.NORMAL
        for index in sorted(words)
    ]  # fmt: skip
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words[index] for index in sorted(words)])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in found["model"]["merges"]])
    ids = {word: index for index, word in words.items()}
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_bos_token_id(ids["<|endoftext|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Pair neighbours, as llama.cpp rotates them, instead of halves."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _restored(weight: torch.Tensor, name: str, config: dict[str, Any]) -> torch.Tensor:
    if config["model_type"] != "llama" or not ("q_proj" in name or "k_proj" in name):
        return weight
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
