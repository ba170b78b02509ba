"""What a forward pass needs for a moment, in bytes, from shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantbatch.engine.pieces import (
    LEAST_SCORES,
    PLACES_ALONE,
    PLACES_AT_ONCE,
    SCORE_BYTES,
    SCORE_ITEM_BYTES,
    TREE_TOKENS_AT_ONCE,
)
from quantbatch.model.footprint import ITEM_BYTES
from quantbatch.model.sizes import first_of, hidden_size, query_heads
from quantbatch.spec import FourBit, Int8, Unquantized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantbatch.model.footprint import Weights
    from quantbatch.model.kv import KvShape
    from quantbatch.spec import Quantization

ACTIVATIONS_OF_HIDDEN, ACTIVATIONS_OF_INNER = 6, 3
"""Most activations alive at once in a prefill, in multiples of the hidden and the intermediate size
for each token: residual, norm, queries, keys, values, output; gate, up and their product. Read from
transformers' Llama; not measured on a card."""
LOGIT_BYTES = 2 + 4 + 30
"""For each row and word of the vocabulary: 16-bit logits, the float32 copy that `generate` makes of
them, and what choosing a token takes, most of all sorting for top_p: the warped scores, sorted
scores and their places, probabilities and their sums (4 + 4 + 8 + 4 + 4), masks and the result
(2 + 4). Counted in transformers/generation/logits_process.py, 5.23."""
GREEDY_LOGIT_BYTES = 2 + 4
"""The same for a row that takes the likeliest token and nothing else."""
COUNT_BYTES = 2 * (1 + 4)
"""For each row and word of the vocabulary, in the continuous engine with penalties: whether it is
in the prompt and how often in the answer, kept for each place of a batch and taken out for a
step."""
QUERY_BLOCK = 256
"""Tokens of a prompt whose attention scores are there at once in the continuous engine, for models
that compute them as a whole."""
INT8_OUTPUT_BYTES = 4 + 2
"""int8 products are accumulated in 32 bits and then scaled to 16 (bitsandbytes 0.50)."""
EAGER_MODELS = frozenset(
    {
        *("bloom", "codegen", "gemma2", "gpt_neo", "gpt_oss", "gptj", "granite_swa", "mpt"),
        *("granitemoe_swa", "mimo_v2_flash", "openai-gpt", "vaultgemma", "xglm"),
    }
)
"""Models without SDPA, whose attention scores are there as a whole (`_supports_sdpa`, 5.23)."""


def dequantized_bytes(weights: Weights, quantization: Quantization, tokens: int) -> int:
    """Return what multiplying by the largest quantized matrix takes.

    A 4-bit matrix is expanded to the compute type whenever many tokens meet it; int8 quantizes the
    activations instead, and accumulates in 32 bits.
    """
    out_features, in_features = weights.largest_linear
    match quantization:
        case Unquantized():
            return 0
        case Int8():
            return tokens * (in_features + out_features * INT8_OUTPUT_BYTES)
        case FourBit(compute_dtype=dtype):
            return out_features * in_features * ITEM_BYTES.get(dtype, 2)


def activation_bytes(config: Mapping[str, Any], tokens: int, item_bytes: int) -> int:
    """Return the activations of a prefill of so many tokens, over all rows."""
    hidden = hidden_size(config)
    usual = {"none said": 4 * hidden}
    inner = first_of(usual | dict(config), "intermediate_size", "n_inner", "ffn_dim", *usual)
    of_inner = ACTIVATIONS_OF_INNER * inner
    return tokens * (ACTIVATIONS_OF_HIDDEN * hidden + of_inner) * item_bytes


def mask_bytes(rows: int, tokens: int, item_bytes: int) -> int:
    """Return the attention mask of a padded batch: boolean, and as numbers for the kernel.

    A single row has no padding, and so no mask.
    """
    if rows == 1:
        return 0
    return rows * tokens * tokens * (1 + item_bytes)


def score_bytes(config: Mapping[str, Any], rows: int, tokens: int, item_bytes: int) -> int:
    """Return the attention scores of one layer, for models that compute them as a whole: raw, with
    the mask, and as float32 and rounded probabilities.
    """
    if config.get("model_type") not in EAGER_MODELS:
        return 0
    return rows * query_heads(config) * tokens * tokens * (3 * item_bytes + 4)


def expanded_latent_bytes(
    config: Mapping[str, Any], rows: int, tokens: int, item_bytes: int
) -> int:
    """Return keys and values of one layer with multi-head latent attention: they are expanded from
    the cached latent at each step, for all tokens (`expand_kv` of DeepSeek V3 in transformers 5.23:
    one tensor of both, and the keys once more with their rotary part).
    """
    if not config.get("kv_lora_rank"):
        return 0
    nope, rope = int(config["qk_nope_head_dim"]), int(config["qk_rope_head_dim"])
    numbers = 2 * nope + rope + int(config["v_head_dim"])
    return rows * tokens * query_heads(config) * numbers * item_bytes


def packed_score_bytes(config: Mapping[str, Any], tokens: int, item_bytes: int) -> int:
    """Return the attention scores of one row's piece of a prompt in the continuous engine."""
    if config.get("model_type") not in EAGER_MODELS:
        return 0
    return query_heads(config) * QUERY_BLOCK * tokens * (3 * item_bytes + 4)


def logit_bytes(config: Mapping[str, Any], rows: int, *, greedy: bool = False) -> int:
    """Return what choosing the next token of each row takes."""
    return rows * first_of(config, "vocab_size") * (GREEDY_LOGIT_BYTES if greedy else LOGIT_BYTES)


def reading_bytes(config: Mapping[str, Any], device: str = "cpu") -> int:
    """Return what scores take that rows want which only read, in the continuous engine: those of a
    step, and some of them in float32 twice, for their logsumexp.

    Args:
        config: Of the language model.
        device: `cpu` or `cuda`.

    Measured on a CPU as what torch allocates (a Llama of hidden size 256 with 150,000 words, steps
    of 512 tokens): scored texts of 2,000 tokens 122 MiB in float32 and 116 in bfloat16, 45 labels
    80 to 99, of 201 that this plans; vectors 8, which are planned as activations.
    """
    words = first_of(config, "vocab_size")
    scores = max(SCORE_BYTES[device], LEAST_SCORES * SCORE_ITEM_BYTES * words)
    return scores + PLACES_AT_ONCE * words * 2 * ITEM_BYTES["float32"]


def tree_bytes(shape: KvShape) -> int:
    """Return the copies of one layer's keys and values that candidates' tokens are attended from on
    a card: with and without their own.
    """
    return cache_growth_bytes(shape, 2, TREE_TOKENS_AT_ONCE)


def alone_bytes(config: Mapping[str, Any]) -> int:
    """Return what scores take that rows want which only read, in the static engine: a row at a
    time, some places as the model gives them, as float64 and their log-softmax.
    """
    return PLACES_ALONE * first_of(config, "vocab_size") * (4 + 8 + 8)


def scores_kept_bytes(config: Mapping[str, Any], rows: int, item_bytes: int) -> int:
    """Return the scores of a recorded step, which stay where they are."""
    return rows * first_of(config, "vocab_size") * item_bytes


def count_bytes(config: Mapping[str, Any], rows: int) -> int:
    """Return what it takes to count the tokens that each row has said, and to look that up."""
    return rows * first_of(config, "vocab_size") * COUNT_BYTES


def cache_growth_bytes(shape: KvShape, rows: int, tokens: int) -> int:
    """Return the copy of one layer that a growing cache makes at each step."""
    return rows * tokens * shape.bytes_per_token // max(1, shape.layers)
