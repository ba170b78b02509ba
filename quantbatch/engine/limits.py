"""What a model can take: its tokens, and how many of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantbatch.records import Request


class ModelLimits(NamedTuple):
    """What a model can take."""

    vocabulary: int
    """Number of its tokens."""
    context_tokens: int | None
    """Most tokens of prompt and answer together; None if it does not say."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelLimits:
        """Read them from a model's configuration."""
        config: Any = model.config.get_text_config()
        return cls(config.vocab_size, getattr(config, "max_position_embeddings", None))

    def problem(self, request: Request) -> str:
        """Say why the model can't answer a request: its field, its value and the limit; else
        nothing.
        """
        fields = {
            "prompt_ids": request.prompt_ids,
            "sampling.logit_bias": request.sampling.logit_bias,
        }
        for field, token_ids in fields.items():
            strange = next((t for t in token_ids if not 0 <= t < self.vocabulary), None)
            if strange is not None:
                return f"{field}: the model has no token {strange}, only {self.vocabulary:,} tokens"
        if self.new_tokens(request) > 0:
            return ""
        prompt_tokens = len(request.prompt_ids)
        return f"prompt_ids: {prompt_tokens:,} tokens, a context of {self.context_tokens:,} is full"

    def new_tokens(self, request: Request) -> int:
        """Return the most tokens that an answer may have: those asked for, if there is room."""
        wanted = request.sampling.max_new_tokens
        if self.context_tokens is None:
            return wanted
        return min(wanted, self.context_tokens - len(request.prompt_ids))
