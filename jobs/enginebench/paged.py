"""transformers' own continuous batching (`generate_batch`, 5.23), at its best on a CPU.

It packs the new tokens of all rows into one sequence, as ours does, and keeps keys and values in
pages. What attends decides its speed. With `sdpa` it builds a mask of all new tokens against all
keys of all rows and multiplies the whole of it. Flash kernels, which take the rows' lengths
instead, exist for CUDA only; but an attention function whose name has "flash" in it gets what they
get: no mask, `cu_seq_lens_q` and `cu_seq_lens_k`. `attend_by_row` is one, for any device.

`generate_batch` has one budget for all of its rows, so requests are added to its manager one by
one, in the order in which `generate_batch` adds them: as they come, or sorted by their tokens where
beginnings are shared. The manager's loop is a thread; the one that waits for it sleeps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from jobs.enginebench.contenders import STEP_TOKENS, Answer, Answered, attention, kv_tokens
from jobs.enginebench.model import Loaded
from jobs.enginebench.workload import MAX_BUDGET, Row, Tokens

hf: Any = transformers

FLASH = "by_row_flash"
"""Under which transformers knows `attend_by_row`; "flash" in it matters."""
PAGE_TOKENS = 16
"""With 256, the default, a row of 120 tokens wastes half of its page, and less can be shared."""
PATIENCE_S = 600.0


def install() -> None:
    """Make `attend_by_row` known to transformers."""
    hf.AttentionInterface.register(FLASH, attend_by_row)


def attend_by_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend row by row over a packed sequence, as flash kernels do with the same arguments."""
    assert attention_mask is None, "a flash-style function must get no mask"
    key, value = others["cache"].update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=others
    )
    ends_q, ends_k = others["cu_seq_lens_q"].tolist(), others["cu_seq_lens_k"].tolist()
    mixed = torch.empty_like(query.transpose(1, 2))
    for row in range(len(ends_q) - 1):
        new, seen = slice(*ends_q[row : row + 2]), slice(*ends_k[row : row + 2])
        by_heads = _attend(query[:, :, new], key[:, :, seen], value[:, :, seen], scaling)
        mixed[:, new] = by_heads.transpose(1, 2)
    return mixed, None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    new, seen = query.shape[2], key.shape[2]
    mask = None
    if 1 < new < seen:  # the rest of a prompt: each token sees what was there and those before it
        mask = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=new == seen and new > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@dataclass(frozen=True)
class Paged:
    """transformers' continuous batching.

    Args:
        rows: Most rows of a step.
        flash: Whether to attend by `attend_by_row`; else by SDPA with a mask.
        share: Whether beginnings that rows have in common are computed once.
        patience_s: After so many seconds it is given up.
    """

    loaded: Loaded
    rows: int
    flash: bool
    share: bool = False
    note: str = field(default="", kw_only=True)
    patience_s: float = field(default=PATIENCE_S, kw_only=True)

    @property
    def name(self) -> str:
        """See `Contender`."""
        how = "flash-style" if self.flash else "SDPA"
        return f"continuous batching, {how}, {self.rows} rows{self.note}"

    @property
    def implementation(self) -> str:
        """Under which transformers knows what attends."""
        return FLASH if self.flash else "sdpa"

    @contextlib.contextmanager
    def ready(self) -> Iterator[Answer]:
        """See `Contender`."""
        install()
        model = self.loaded.model
        with attention(model, self.implementation):
            manager = model.init_continuous_batching(
                generation_config=hf.GenerationConfig(
                    max_new_tokens=MAX_BUDGET, do_sample=False, eos_token_id=-1
                ),
                continuous_batching_config=self._config(),
            )
            manager.warmup()  # allocates the cache
            manager.start()
            try:
                yield lambda rows: Answered(self._answer(manager, rows), {})
            finally:
                manager.stop(block=True, hard_stop=True)  # nothing is left, or it went wrong
                manager.destroy()

    def _config(self) -> Any:
        return hf.ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=kv_tokens(self.rows) // PAGE_TOKENS,
            max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=self.rows,
            allow_block_sharing=self.share,
            auto_switch_to_flash=False,
        )

    def _answer(self, manager: Any, rows: Sequence[Row]) -> list[Tokens]:
        order = list(range(len(rows)))
        if self.share:
            order.sort(key=lambda i: rows[i].prompt_ids, reverse=True)
        for i in order:
            row = rows[i]
            manager.add_request(
                list(row.prompt_ids), str(i), max_new_tokens=row.budget, eos_token_id=-1
            )
        found: dict[int, Tokens] = {}
        deadline = time.monotonic() + self.patience_s
        while len(found) < len(rows):
            output = manager.get_result(timeout=1.0)
            if output is None:
                assert manager.is_running(), "continuous batching gave up"
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(found)} of {len(rows)} rows in {self.patience_s:g} s")
            if output is None:
                continue
            assert output.error is None, output.error
            if output.is_finished():
                found[int(output.request_id)] = tuple(output.generated_tokens)
        return [found[i] for i in range(len(rows))]
