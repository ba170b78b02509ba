"""An engine without a model: for rehearsing a job, and for measuring everything around a model."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from quantbatch.records import Completion, Embedded, FinishReason, Ranked, Request, Scored
from quantbatch.wants import Embed, Rank, Score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from quantbatch.records import Answer

DEFAULT_BATCH_SIZE = 1024


class EchoEngine:
    """Answers each prompt with the beginning of its own tokens; every token is as likely as any
    other, and a vector is the number of the prompt's tokens, again and again. It keeps to no
    grammar: such answers are as invalid as their prompts.

    Args:
        decode: Turns a batch of token id sequences into texts.
        batch_size: Rows answered in one step.
        step_s: Time that a step takes, in seconds.
        hidden_size: Length of a vector.
    """

    def __init__(
        self,
        decode: Callable[[list[Sequence[int]]], list[str]],
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        step_s: float = 0.0,
        hidden_size: int = 1,
    ) -> None:
        self._decode = decode
        self._batch_size = batch_size
        self._step_s = step_s
        self._hidden_size = hidden_size
        self._queue: deque[Request] = deque()

    def add(self, requests: Iterable[Request]) -> None:
        """See `Engine`."""
        self._queue.extend(requests)

    def has_work(self) -> bool:
        """See `Engine`."""
        return bool(self._queue)

    def step(self) -> Sequence[Answer]:
        """See `Engine`; never raises."""
        if self._step_s:
            time.sleep(self._step_s)
        batch = [self._queue.popleft() for _ in range(min(self._batch_size, len(self._queue)))]
        answers = [request.prompt_ids[: request.sampling.max_new_tokens] for request in batch]
        texts = self._decode(list(answers))
        return [
            self._answer(request, Completion(request.id, text, answer, FinishReason.STOP))
            for request, answer, text in zip(batch, answers, texts, strict=True)
        ]

    def evict(self) -> Sequence[Request]:
        """See `Engine`; a step never fails, so there is nothing to give back."""
        return []

    def _answer(self, request: Request, completion: Completion) -> Answer:
        match request.want:
            case Rank(candidates=candidates):
                return Ranked(request.id, tuple((-1.0,) * len(ids) for ids in candidates))
            case Score(first=first):
                return Scored(request.id, (-1.0,) * (len(request.prompt_ids) - first))
            case Embed():
                tokens = float(len(request.prompt_ids))
                return Embedded(request.id, (tokens,) * self._hidden_size)
            case _:
                return completion
