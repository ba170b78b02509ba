"""How a model's own forward comes to our cache: an attention function that transformers calls.

A step is one packed sequence: the new tokens of all rows, one after the other, in a batch of one.
Everything in a transformer but attention works on each token by itself, so nothing is padded, and
prompts and single tokens run in the same pass. Attention is the one place where rows must be kept
apart. transformers hands it over to a function of ours (`AttentionInterface`), which stores the new
keys and values and attends row by row. The `Cache` object that the model gets only says that there
is one: it passes keys and values through.

transformers builds no mask for an attention function that it does not know (5.23,
`masking_utils._preprocess_mask_arguments`), so none is in the way.

What a model may ask for beyond scale, window and softcap is refused (`UnsupportedModelError`), and
`probe.py` compares the result with the model's plain forward before any row is answered.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from typing_extensions import override

from quantbatch.engine.kvstore import AttentionOptions
from quantbatch.model.workspace import QUERY_BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from quantbatch.engine.kvstore import KvStore

# Most of what is called of it has no types, or wrong ones (5.23).
hf: Any = transformers

NAME = "quantbatch_packed"
"""Under which transformers knows the attention function."""
PASSED_AND_UNUSED = frozenset(
    {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "cache_position",
     "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings"}
)  # fmt: skip
"""Arguments of attention functions that change nothing in inference over a packed sequence."""

_current = threading.local()


class UnsupportedModelError(Exception):
    """The model can't run over packed sequences: it needs the static engine."""


class PassThroughCache(hf.Cache):  # type: ignore[misc]
    """Tells a model that there is a cache; what is in it is the business of a `KvStore`."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    @override
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any):  # type: ignore[no-untyped-def]  # noqa: ANN201
        return key_states, value_states

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    @override
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def install() -> None:
    """Make the attention function known to transformers."""
    hf.AttentionInterface.register(NAME, attend)


@contextlib.contextmanager
def attending(store: KvStore) -> Iterator[None]:
    """Let attention calls within go to this store."""
    _current.store = store
    try:
        yield
    finally:
        del _current.store


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: object,
) -> tuple[Tensor, None]:
    """The attention function that a model calls; see `transformers.AttentionInterface`."""
    given = {k: v for k, v in arguments.items() if v is not None and k not in PASSED_AND_UNUSED}
    unknown = sorted(given.keys() - {"scaling", "sliding_window", "softcap"})
    if unknown or attention_mask is not None or not getattr(module, "is_causal", True):
        what = ", ".join(unknown) or "attention that is not causal"
        raise UnsupportedModelError(f"{type(module).__name__} asks for {what}")
    layer = layer_of(module)
    if _slides(module, layer) and not given.get("sliding_window"):
        raise UnsupportedModelError(f"{type(module).__name__} does not tell its sliding window")
    options = AttentionOptions(
        given.get("scaling", query.shape[-1] ** -0.5),  # type: ignore[arg-type]
        given.get("sliding_window") or None,  # type: ignore[arg-type]
        given.get("softcap") or None,  # type: ignore[arg-type]
    )
    store: KvStore = _current.store
    return store.attend(layer, query, key, value, options), None


def _slides(module: torch.nn.Module, layer: int) -> bool:
    """Tell whether a layer sees a window only, by its model's configuration."""
    kinds: list[str] = getattr(getattr(module, "config", None), "layer_types", None) or []
    return bool(kinds) and kinds[layer] == "sliding_attention"


def layer_of(module: torch.nn.Module) -> int:
    """Return the number of the layer that an attention module belongs to."""
    number = getattr(module, "layer_idx", None)
    if not isinstance(number, int):
        raise UnsupportedModelError(f"{type(module).__name__} does not know its layer's number")
    return number


def attend_one_row(
    q_1HQD: Tensor, k_1KLD: Tensor, v_1KLD: Tensor, options: AttentionOptions
) -> Tensor:
    """Attend from the last Q of a row's L tokens to all that they see.

    Returns:
        The output, (1, H, Q, D).
    """
    queries, tokens = q_1HQD.shape[2], k_1KLD.shape[2]
    if options.window and tokens > options.window + queries - 1:
        first = tokens - options.window - queries + 1
        k_1KLD, v_1KLD = k_1KLD[:, :, first:], v_1KLD[:, :, first:]
        tokens -= first
    groups = q_1HQD.shape[1] // k_1KLD.shape[1]
    if options.softcap:
        return _softcapped(q_1HQD, k_1KLD, v_1KLD, options)
    if queries == 1 and groups > 1:
        # Heads that share keys become queries of one head: nothing is copied.
        q_1KGD = q_1HQD.view(1, -1, groups, q_1HQD.shape[3])
        out = scaled_dot_product_attention(q_1KGD, k_1KLD, v_1KLD, scale=options.scale)
        return out.reshape(1, -1, 1, out.shape[-1])
    mask = None if queries == 1 else _mask(queries, tokens, options.window, q_1HQD.device)
    return scaled_dot_product_attention(
        q_1HQD, k_1KLD, v_1KLD, scale=options.scale, enable_gqa=groups > 1,
        attn_mask=mask, is_causal=mask is None and queries > 1,
    )  # fmt: skip


def attend_trees(
    q_RHND: Tensor,
    rows: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    sees_NN: Tensor,
    options: AttentionOptions,
    ends_R: Tensor | None = None,
) -> Tensor:
    """Attend from N candidates' tokens of each of R rows to their row and to each other.

    Args:
        q_RHND: Their queries.
        rows: Keys and values of the rows, (R, K, L, D).
        new: Keys and values of the tokens themselves, (R, K, N, D).
        sees_NN: Which of each other they see, themselves included; the same in all rows.
        options: How.
        ends_R: Tokens of each row, if not all have L; what is beyond them is finite.

    Returns:
        The output, (R, H, N, D).
    """
    k_RKLD, v_RKLD = (torch.cat(pair, dim=2) for pair in zip(rows, new, strict=True))
    before = rows[0].shape[2]
    if ends_R is None:
        ends_R = torch.tensor([before], device=sees_NN.device)
    sees_RNL = _sees_of_trees(sees_NN, ends_R, before, options.window)
    groups = q_RHND.shape[1] // k_RKLD.shape[1]
    if options.softcap:
        k_RHDL = k_RKLD.repeat_interleave(groups, dim=1).transpose(2, 3)
        v_RHLD = v_RKLD.repeat_interleave(groups, dim=1)
        return _softcapped_block(q_RHND, k_RHDL, v_RHLD, sees_RNL[:, None], options)
    # Heads that share keys become queries of one head: nothing is copied for them.
    count, heads, queries, size = q_RHND.shape
    q_RKMD = q_RHND.reshape(count, heads // groups, groups * queries, size)
    sees_R1ML = sees_RNL.repeat(1, groups, 1)[:, None]
    out_RKMD = scaled_dot_product_attention(
        q_RKMD, k_RKLD, v_RKLD, attn_mask=sees_R1ML, scale=options.scale
    )
    return out_RKMD.reshape(count, heads, queries, -1)


def _sees_of_trees(sees_NN: Tensor, ends_R: Tensor, before: int, window: int | None) -> Tensor:
    """Return which of their row's and of each other's tokens candidates' tokens see, (R, N, L)."""
    at_L, ends_R11 = torch.arange(before, device=sees_NN.device), ends_R[:, None, None]
    sees_RNL = (at_L < ends_R11).expand(-1, len(sees_NN), -1)
    if window is not None:
        depths_N1 = sees_NN.sum(1, keepdim=True)  # how many of its own path a token sees
        sees_RNL = sees_RNL & (at_L >= ends_R11 + depths_N1 - window)
        sees_NN = sees_NN & (depths_N1 - depths_N1.T < window)
    return torch.cat([sees_RNL, sees_NN.expand(len(ends_R), -1, -1)], dim=2)


def _mask(queries: int, tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return the mask of `_sees`; None if it is plain causal, which kernels know by themselves."""
    if queries == tokens and (window is None or window >= tokens):
        return None
    return _sees(queries, tokens, window, device)


def _sees(queries: int, tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Return which of its tokens each of the last queries of a row sees, as booleans."""
    seen_QL = torch.ones(queries, tokens, dtype=torch.bool, device=device)
    seen_QL = seen_QL.tril_(tokens - queries)
    return seen_QL if window is None else seen_QL.triu_(tokens - queries - window + 1)


def _softcapped(
    q_1HQD: Tensor, k_1KLD: Tensor, v_1KLD: Tensor, options: AttentionOptions
) -> Tensor:
    """Attend with squashed scores, which no fused kernel knows, as Gemma 2 does; some queries at a
    time, because all scores are there at once.
    """
    queries, tokens = q_1HQD.shape[2], k_1KLD.shape[2]
    groups = q_1HQD.shape[1] // k_1KLD.shape[1]
    k_1HDL = k_1KLD.repeat_interleave(groups, dim=1).transpose(2, 3)
    v_1HLD = v_1KLD.repeat_interleave(groups, dim=1)
    outputs = []
    for first in range(0, queries, QUERY_BLOCK):
        block = q_1HQD[:, :, first : first + QUERY_BLOCK]
        seen = tokens - queries + first + block.shape[2]
        sees = _sees(block.shape[2], seen, options.window, q_1HQD.device)
        outputs.append(
            _softcapped_block(block, k_1HDL[..., :seen], v_1HLD[:, :, :seen], sees, options)
        )
    return torch.cat(outputs, dim=2)


def _softcapped_block(
    q_1HQD: Tensor, k_1HDL: Tensor, v_1HLD: Tensor, sees_QL: Tensor, options: AttentionOptions
) -> Tensor:
    assert options.softcap is not None
    scores = torch.matmul(q_1HQD, k_1HDL) * options.scale
    scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.masked_fill(~sees_QL, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(q_1HQD.dtype)
    return torch.matmul(weights, v_1HLD)
