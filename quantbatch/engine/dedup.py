"""Equal requests are answered once.

A greedy request is a function of its prompt and settings, so one that equals another needs no model
of its own: while the first is being answered the others wait for it, and for a while afterwards its
answer is remembered. It works around any engine, across the chunks of a replica. Requests are
compared by their keys (`answers.keys`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

from quantbatch.answers.keys import Keys
from quantbatch.records import Completion, Embedded, Failure, Ranked, Scored

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quantbatch.engine import Engine
    from quantbatch.records import Answer, Request, RequestId

REMEMBERED_TOKENS = 1_000_000
"""Tokens of answers that are remembered, or numbers that were read: some 50 MB of Python
objects. Of vectors of 4,096 numbers that is 240."""
ANSWER_OVERHEAD_TOKENS = 32
"""What an answer takes beside its tokens, counted in tokens."""


class Deduplicated:
    """See `Engine`; asks another engine only what it has not been asked yet.

    Args:
        engine: Answers what is new.
    """

    def __init__(self, engine: Engine, remembered_tokens: int = REMEMBERED_TOKENS) -> None:
        self.engine = engine
        self.copied = 0
        """Requests answered with another's answer."""
        self._most_tokens = remembered_tokens
        self._tokens = 0
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()
        self._digest_of: dict[RequestId, bytes] = {}
        """Of the requests that the engine has and that others may wait for."""
        self._followers: dict[bytes, list[Request]] = {}
        self._ready: list[Answer] = []
        self._keys = Keys()

    def add(self, requests: Iterable[Request]) -> None:
        """See `Engine`."""
        new = []
        for request in requests:
            digest = self._keys.of(request)
            if digest is None:
                new.append(request)
                continue
            known = self._answers.get(digest)
            if known is not None:
                self._answers.move_to_end(digest)
                self._copy(known, [request])
            elif digest in self._followers:
                self._followers[digest].append(request)
            else:
                self._followers[digest] = []
                self._digest_of[request.id] = digest
                new.append(request)
        self.engine.add(new)

    def has_work(self) -> bool:
        """See `Engine`."""
        return bool(self._ready) or self.engine.has_work()

    def step(self) -> Sequence[Answer]:
        """See `Engine`."""
        finished = list(self.engine.step()) if self.engine.has_work() else []
        for answer in finished:
            digest = self._digest_of.pop(answer.id, None)
            if digest is not None:
                self._copy(answer, self._followers.pop(digest))
                self._remember(digest, answer)
        finished += self._ready
        self._ready = []
        return finished

    def _copy(self, answer: Answer, requests: Iterable[Request]) -> None:
        copies = [replace(answer, id=request.id) for request in requests]
        self.copied += len(copies)
        self._ready += copies

    def _remember(self, digest: bytes, answer: Answer) -> None:
        if isinstance(answer, Failure):
            return  # it may be of its time, such as a lack of memory
        self._answers[digest] = answer
        self._tokens += _size(answer)
        while self._tokens > self._most_tokens:
            _, forgotten = self._answers.popitem(last=False)
            self._tokens -= _size(forgotten)

    def evict(self) -> Sequence[Request]:
        """See `Engine`; those that wait for an evicted request are given back with it."""
        evicted = list(self.engine.evict())
        for request in list(evicted):
            digest = self._digest_of.pop(request.id, None)
            if digest is not None:
                evicted += self._followers.pop(digest)
        return evicted


def _size(answer: Answer) -> int:
    return ANSWER_OVERHEAD_TOKENS + _length(answer)


def _length(answer: Answer) -> int:
    match answer:
        case Completion(token_ids=token_ids, logprobs=logprobs):
            return len(token_ids) + 4 * sum(1 + len(each.top) for each in logprobs or ())
        case Ranked(logprobs=candidates):
            return sum(map(len, candidates))
        case Scored(logprobs=numbers) | Embedded(vector=numbers):
            return len(numbers)
        case Failure():
            return 0
