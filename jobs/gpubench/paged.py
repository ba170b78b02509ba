"""transformers' continuous batching (`generate_batch`, 5.23) on a card.

With `sdpa` it builds a mask of all new tokens against all keys of all rows; its own choice is then
to record nothing. With a flash function it takes the rows' lengths instead, records its steps as
CUDA graphs, and prepares one step while another runs. Its packages for that (flash-attn, or kernels
from the hub) are not on every machine; torch has the same FlashAttention-2 kernel for rows of any
length, and here it is given to transformers. What is left out without the package is a faster path
for steps of single tokens, `flash_attn_with_kvcache`: then all keys and values are gathered for
each layer. `facts` says which it was.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from typing_extensions import override

from jobs.enginebench import paged
from jobs.enginebench.workload import LONGEST_ROW

hf: Any = transformers

TORCH_FLASH = "torch_varlen_flash"
"""Under which transformers knows `attend_varlen`; "flash" in it matters."""
STEP_TOKENS = 2048
PAGE_TOKENS = 64


def attend_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over a packed sequence by torch's own FlashAttention-2; 16 bits and CUDA only."""
    assert attention_mask is None, "a flash-style function must get no mask"
    key, value = others["cache"].update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=others
    )
    mixed = torch.ops.aten._flash_attention_forward(
        *(each[0].transpose(0, 1) for each in (query, key, value)),
        others["cu_seq_lens_q"].to(torch.int32),
        others["cu_seq_lens_k"].to(torch.int32),
        others["max_length_q"],
        others["max_length_k"],
        0.0,
        True,  # causal, aligned to the end of each row
        False,
        scale=scaling,
    )[0]
    return mixed[None], None


@dataclass(frozen=True)
class PagedOnCard(paged.Paged):
    """See `enginebench.paged.Paged`.

    Args:
        graphs: Whether steps are recorded; None leaves it to transformers.
    """

    graphs: bool | None = field(default=None, kw_only=True)

    @property
    @override
    def implementation(self) -> str:
        if not self.flash:
            return "sdpa"
        package = flash_package()
        if self.loaded.model.device.type != "cuda":
            return paged.FLASH
        if package is None:
            hf.AttentionInterface.register(TORCH_FLASH, attend_varlen)
        return package or TORCH_FLASH

    def facts(self) -> dict[str, Any]:
        """Say what it attends with."""
        return {"attention": self.implementation, "flash_with_kvcache": flash_package() is not None}

    @override
    def _config(self) -> Any:
        return hf.ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=self.rows * -(-LONGEST_ROW // PAGE_TOKENS),
            max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=self.rows,
            allow_block_sharing=False,
            auto_switch_to_flash=False,  # it would look on the hub
            use_cuda_graph=self.graphs,
        )


def flash_package() -> str | None:
    """Return what transformers calls the flash package that is installed, if any."""
    for module, name in (
        ("flash_attn_interface", "flash_attention_3"),
        ("flash_attn", "flash_attention_2"),
    ):
        if importlib.util.find_spec(module) is not None:
            return name
    return None
