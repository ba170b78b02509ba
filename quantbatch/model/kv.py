"""What the KV cache of a row takes, in bytes, and whether rows can share a batch without padding.

The cache holds a key and a value for each token, layer and key-value head; layers with a sliding
window stop growing, latent attention keeps something smaller, linear attention a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantbatch.model.sizes import first_of, hidden_size, layer_count, query_heads

if TYPE_CHECKING:
    from collections.abc import Mapping

UNPACKABLE_MODELS = frozenset(
    {
        *("bloom", "codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gpt_oss", "gptj", "mpt"),
        *("openai-gpt", "stablelm", "xglm", "biogpt", "cpmant", "blt"),
    }
)
"""Models that do not let their attention be exchanged (`_supports_attention_backend`, 5.23), or ask
for more than scale, window and softcap (gpt_oss: sinks). Those with state of another kind are known
by their layers."""
SLIDING_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}
"""Each how many-th layer sees everything, where an older config.json leaves that to the code."""
ALL_SLIDING = frozenset({"mistral", "mixtral", "phi3", "starcoder2"})
"""Models that, without `layer_types`, use their `sliding_window` in every layer."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What the cache of one row takes, as a function of its tokens."""

    growing_bytes_per_token: int
    """Layers that see everything."""
    sliding_bytes_per_token: int
    """Layers that see a window."""
    window_tokens: int
    fixed_bytes: int
    """State of linear attention, whatever the length."""
    layers: int

    @property
    def bytes_per_token(self) -> int:
        """What one more token takes as long as no window is full."""
        return self.growing_bytes_per_token + self.sliding_bytes_per_token

    def row_bytes(self, tokens: int) -> int:
        """What a row of so many tokens takes while it is decoded."""
        seen = min(tokens, max(0, self.window_tokens - 1))
        growing = tokens * self.growing_bytes_per_token
        return growing + seen * self.sliding_bytes_per_token + self.fixed_bytes

    def prefill_row_bytes(self, tokens: int) -> int:
        """What a row takes right after its prompt was read: layers with a window still hold all of
        it, since transformers keeps a view of the whole until the next step (5.23, measured).
        """
        return tokens * self.bytes_per_token + self.fixed_bytes


def kv_shape(config: Mapping[str, Any], item_bytes: int) -> KvShape:
    """Derive the cache from the configuration of a language model.

    Args:
        config: The text part of config.json.
        item_bytes: Bytes of a cached number: those of the model's type.
    """
    layers = layer_count(config)
    types = _layer_types(config, layers)
    sliding = sum(kind in ("sliding_attention", "chunked_attention") for kind in types)
    # Without these numbers its state is not known, and it counts as attention.
    linear = types.count("linear_attention") if "linear_num_key_heads" in config else 0
    return KvShape(
        growing_bytes_per_token=(layers - sliding - linear) * _full_kv_numel(config) * item_bytes,
        sliding_bytes_per_token=sliding * _kv_numel(config) * item_bytes,
        window_tokens=config.get("sliding_window") or config.get("attention_chunk_size") or 0,
        fixed_bytes=linear * _linear_attention_bytes(config, item_bytes) if linear else 0,
        layers=layers,
    )


def _kv_numel(config: Mapping[str, Any]) -> int:
    """Return the numbers that one layer caches for one token."""
    if config.get("kv_lora_rank"):
        # Multi-head latent attention: transformers 5.23 caches the latent (measured), and where
        # an indexer chooses what is attended to (DeepSeek V3.2), its keys.
        latent = first_of(config, "kv_lora_rank") + first_of(config, "qk_rope_head_dim")
        return latent + int(config.get("index_head_dim") or 0)
    heads = query_heads(config)
    said = config.get("head_dim") is not None
    head_dim = first_of(config, "head_dim") if said else hidden_size(config) // heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 2 * head_dim  # Falcon 7B, StarCoder
    said = config.get("num_key_value_heads") is not None
    return 2 * (first_of(config, "num_key_value_heads") if said else heads) * head_dim


def _full_kv_numel(config: Mapping[str, Any]) -> int:
    """Return the same for a layer that sees everything: those of Gemma 4 have other heads."""
    changes = {}
    if str(config.get("model_type")).startswith("gemma4"):
        # 512 where config.json leaves it out (configuration_gemma4.py, 5.23).
        changes["head_dim"] = config.get("global_head_dim") or 512
        if config.get("attention_k_eq_v") and config.get("num_global_key_value_heads"):
            changes["num_key_value_heads"] = config["num_global_key_value_heads"]
    return _kv_numel({**config, **changes})


def _layer_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """Return what each layer sees. What is not known counts as all: that errs on the safe side."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    model_type = str(config.get("model_type"))
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return ["full_attention"] * layers
    if model_type in ALL_SLIDING:
        return ["sliding_attention"] * layers
    every = config.get("sliding_window_pattern") or SLIDING_PATTERNS.get(model_type, 1)
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]


def _linear_attention_bytes(config: Mapping[str, Any], item_bytes: int) -> int:
    """Return the state of one gated delta layer: a float32 matrix for each head, and the window of
    its convolution (55,296 bytes measured on a small Qwen3-Next, as computed).
    """
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    convolution = channels * config["linear_conv_kernel_dim"] * item_bytes
    return int(value_heads * key_dim * value_dim * 4 + convolution)


def unpackable(config: Mapping[str, Any], max_tokens: int) -> str | None:
    """Return why rows of a model can't be packed into one batch, as far as its configuration tells.

    The continuous engine then leaves it to the static one; what the configuration does not tell is
    found out by trying (`engine/probe.py`).

    Args:
        config: The text part of config.json.
        max_tokens: Prompt and answer of the longest row, in tokens.
    """
    if config.get("model_type") in UNPACKABLE_MODELS:
        return f"{config['model_type']} has an attention of its own"
    if _rope_depends_on_batch(config, max_tokens):
        return "positions whose encoding depends on the longest row of a batch (longrope, dynamic)"
    if config.get("kv_lora_rank"):
        return "multi-head latent attention, whose cache would be unpacked"
    kinds = set(_layer_types(config, layer_count(config)))
    other = sorted(kinds - {"full_attention", "sliding_attention"})
    return f"layers of the kind {', '.join(other)}" if other else None


def _rope_depends_on_batch(config: Mapping[str, Any], max_tokens: int) -> bool:
    """Tell whether rows beyond the original context change how all rows of their batch are encoded
    (transformers 5.23, `modeling_rope_utils.dynamic_rope_update`).
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [found, *(each for each in found.values() if isinstance(each, dict))]
    for rope in kinds:
        if (rope.get("rope_type") or rope.get("type")) in ("longrope", "dynamic"):
            original = rope.get("original_max_position_embeddings")
            original = original or config.get("original_max_position_embeddings")
            if max_tokens > int(original or config.get("max_position_embeddings") or 0):
                return True
    return False
