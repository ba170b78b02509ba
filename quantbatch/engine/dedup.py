"""Equal requests are answered once.

A greedy request is a function of its prompt and settings, so one that equals another needs no model
of its own: while the first is being answered the others wait for it, and for a while afterwards its
answer is remembered. It works around any engine, across the chunks of a replica. Requests are
compared by a digest of 128 bits of everything that decides the answer.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

from quantbatch.records import WRITE, Completion, Ranked
from quantbatch.wants import Write

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quantbatch.engine import Engine
    from quantbatch.records import Answer, Request, RequestId
    from quantbatch.spec import Sampling

REMEMBERED_TOKENS = 1_000_000
"""Tokens of answers that are remembered: some 50 MB of Python objects."""
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
        self._answers: OrderedDict[bytes, Completion | Ranked] = OrderedDict()
        self._digest_of: dict[RequestId, bytes] = {}
        """Of the requests that the engine has and that others may wait for."""
        self._followers: dict[bytes, list[Request]] = {}
        self._ready: list[Answer] = []
        self._settings: tuple[Sampling, bytes] | None = None

    def add(self, requests: Iterable[Request]) -> None:
        """See `Engine`."""
        new = []
        for request in requests:
            if isinstance(request.want, Write) and request.sampling.temperature > 0:
                new.append(request)
                continue
            digest = self._digest(request)
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

    def _digest(self, request: Request) -> bytes:
        if self._settings is None or self._settings[0] is not request.sampling:
            written = request.sampling.model_dump_json(exclude={"seed", "n"})
            self._settings = request.sampling, written.encode()
        prompt = array("i", request.prompt_ids).tobytes()
        digest = hashlib.blake2b(prompt, digest_size=16, key=_key(self._settings[1]))
        if request.want != WRITE:
            digest.update(repr(request.want).encode())
        return digest.digest()

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
        if not isinstance(answer, Completion | Ranked):
            return
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


def _key(settings: bytes) -> bytes:
    return hashlib.blake2b(settings, digest_size=32).digest()


def _size(answer: Completion | Ranked) -> int:
    if isinstance(answer, Ranked):
        return ANSWER_OVERHEAD_TOKENS + sum(map(len, answer.logprobs))
    logprobs = sum(1 + len(each.top) for each in answer.logprobs or ())
    return ANSWER_OVERHEAD_TOKENS + len(answer.token_ids) + 4 * logprobs
