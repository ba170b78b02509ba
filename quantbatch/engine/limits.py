"""What a model can take: its tokens, and how many of them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbatch.wants import Rank, Score, Write

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
        fields: dict[str, Iterable[int]] = {
            "prompt_ids": request.prompt_ids,
            "sampling.logit_bias": request.sampling.logit_bias,
            "candidates": itertools.chain.from_iterable(_candidates(request)),
        }
        for field, token_ids in fields.items():
            strange = next((t for t in token_ids if not 0 <= t < self.vocabulary), None)
            if strange is not None:
                return f"{field}: the model has no token {strange}, only {self.vocabulary:,} tokens"
        if not isinstance(request.want, Write):
            return self._reading_problem(request)
        if self.new_tokens(request) > 0:
            return ""
        prompt_tokens = len(request.prompt_ids)
        return f"prompt_ids: {prompt_tokens:,} tokens, a context of {self.context_tokens:,} is full"

    def _reading_problem(self, request: Request) -> str:
        prompt_tokens = len(request.prompt_ids)
        match request.want:
            case Score(first=first) if not 0 < first < prompt_tokens:
                return f"first: {first} is no token that others of {prompt_tokens:,} come before"
            case Rank(candidates=candidates) if not candidates or not all(candidates):
                return "candidates: there are none, or one has no tokens"
        longest = prompt_tokens + max(map(len, _candidates(request)), default=0)
        if self.context_tokens is not None and longest > self.context_tokens:
            return f"prompt_ids: {longest:,} tokens do not fit a context of {self.context_tokens:,}"
        return ""

    def new_tokens(self, request: Request) -> int:
        """Return the most tokens that an answer may have: those asked for, if there is room."""
        if not isinstance(request.want, Write):
            return 0
        wanted = request.sampling.max_new_tokens
        if self.context_tokens is None:
            return wanted
        return min(wanted, self.context_tokens - len(request.prompt_ids))


def _candidates(request: Request) -> Sequence[Sequence[int]]:
    return request.want.candidates if isinstance(request.want, Rank) else ()
