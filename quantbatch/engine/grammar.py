"""Which tokens may come next: the grammars of rows, as masks of bits over the vocabulary.

llguidance parses the answer so far and tells, for each token, whether any answer of the form begins
so. It was chosen over xgrammar (0.2.8; `jobs/bench.py grammar`, 2 cores, a schema of 6 fields, a
vocabulary of 150,000 tokens): a schema is ready in 0.5 ms instead of 160, so that each row may have
its own; the slowest 32 masks took 28 ms instead of 200, for 0.5 instead of 0.2 in the median, which
hides behind a forward; four compilations and 64 answers took 3 MiB instead of 33; and it needs
neither torch nor anything else, so that a job's grammar is tried before a card is asked for. Both
leave Python's lock alone: other threads ran at full speed.

Masks are computed in threads of the library, without Python's lock, while the forward runs:
`fill` starts that, `Masks.wait` ends it. A token is accepted when it has been read, so a row with a
grammar can't be a step ahead of its tokens. End tokens are allowed where the form is complete, and
only there.

Shapes: R rows with a grammar, W words of 32 bits, V tokens of the vocabulary.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantbatch import structured
from quantbatch.wants import Write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llguidance import LLExecutor, LLMatcher, LLTokenizer
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from quantbatch.engine.ends import Endings
    from quantbatch.records import Request
    from quantbatch.wants import Grammar

REMEMBERED = 256
"""Compiled grammars that are kept; compiling takes 0.5 ms, and each takes about 1 MiB."""
NO_TOKEN = (
    "task.response: bad_words and the form of the answer leave no token to go on with, or the"
    " model's scores are not finite"
)
_PENALTIES = torch.where((torch.arange(256)[:, None] >> torch.arange(8)) & 1 > 0, 0.0, -torch.inf)
"""What is added to the scores of eight tokens, by the byte of their mask. Looked up and added,
masks take 4.4 ms of a CPU for 32 rows of 150,000 words, unpacked and filled in 7 to 21."""
MOST_THREADS = 4
"""Threads that fill masks: 32 masks take half a millisecond of one."""


class Matcher:
    """The answer of one row, as far as it goes.

    Args:
        inner: What llguidance knows of it.
        end_ids: Tokens that end the row's answer.
        own_end_ids: Those of them that end any answer of the model.
    """

    def __init__(
        self, inner: LLMatcher, end_ids: frozenset[int], own_end_ids: frozenset[int]
    ) -> None:
        self.inner = inner
        self.end_ids = end_ids
        self._own_end_ids = own_end_ids

    def accept(self, token: int) -> str:
        """Take the next token; an end token changes nothing.

        A token that is only a row's own end may also be one that the form allows on the way.

        Returns:
            What is wrong with it; empty if it fits.
        """
        if token not in self.end_ids:
            self.inner.consume_token(token)
        elif token in self._own_end_ids and not self.inner.is_accepting():
            return NO_TOKEN
        wrong = structured.matcher_problem(self.inner)
        return f"task.response: {wrong}" if wrong else ""


class Grammars:
    """Compiles the grammars of an engine's rows.

    Args:
        tokenizer: The model's.
        endings: The end tokens.
        vocabulary: Scores that the model gives; there may be more than the tokenizer has tokens.
        device: Where scores are.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        endings: Endings,
        *,
        vocabulary: int,
        device: torch.device,
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._endings = endings
        self._vocabulary = vocabulary
        self._device = device
        self._words = (max(vocabulary, len(tokenizer)) + 31) // 32
        self._library: LLTokenizer | None = None
        self._executor: LLExecutor | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def problem(self, request: Request) -> str:
        """Say why a request's grammar can't be followed; else, or if it has none, nothing."""
        grammar = _grammar(request)
        if grammar is None:
            return ""
        if request.sampling.min_new_tokens:
            return "sampling.min_new_tokens: an answer that has a form ends where that ends"
        if not self._endings.end_ids(request.sampling):
            return "task.response: the model has no token that ends an answer"
        try:
            return structured.matcher_problem(self._compile(grammar))
        except ValueError as error:
            return f"task.response: {error}"

    def matcher(self, request: Request) -> Matcher | None:
        """Return what follows a request's answer from its beginning; None if that is free."""
        grammar = _grammar(request)
        if grammar is None:
            return None
        return Matcher(
            self._compile(grammar).deep_copy(),
            self._endings.end_ids(request.sampling),
            self._endings.model_end_ids,
        )

    def fill(self, matchers: Sequence[Matcher | None]) -> Masks | None:
        """Begin to compute the masks of a step's rows; None if none of them needs one."""
        places = [place for place, matcher in enumerate(matchers) if matcher is not None]
        if not places:
            return None
        found = [matcher for matcher in matchers if matcher is not None]
        bits_RW = torch.empty(
            len(found), self._words, dtype=torch.int32, pin_memory=self._device.type == "cuda"
        )
        filled = self._threads.submit(self._fill, found, bits_RW)
        return Masks(places, bits_RW, filled, self._vocabulary, self._device)

    def _fill(self, matchers: Sequence[Matcher], bits_RW: Tensor) -> None:
        assert self._executor is not None, "a matcher was made before"
        inner = [(matcher.inner, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(
            inner, bits_RW.data_ptr(), 4 * self._words, len(matchers)
        )
        own = self._endings.model_end_ids
        for row, matcher in enumerate(matchers):
            others = matcher.end_ids - own
            if others and matcher.inner.is_accepting():
                bits_W = bits_RW[row].numpy().view(np.uint32)
                for token in others:
                    bits_W[token // 32] |= np.uint32(1 << token % 32)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar]
        from llguidance import LLMatcher

        made = LLMatcher(self._loaded(), structured.compiled(grammar), log_level=0)
        self._compiled[grammar] = made
        if len(self._compiled) > REMEMBERED:
            self._compiled.popitem(last=False)
        return made

    def _loaded(self) -> LLTokenizer:
        """Return the vocabulary as llguidance knows it: made at the first grammar, in a second."""
        if self._library is None:
            from llguidance import LLExecutor
            from llguidance.hf import from_tokenizer

            ends = sorted(self._endings.model_end_ids)
            self._library = from_tokenizer(
                self._tokenizer,
                n_vocab=max(self._vocabulary, len(self._tokenizer)),
                eos_token=ends or None,
            )
            threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
            self._executor = LLExecutor(threads)
        return self._library


class Masks:
    """The masks of a step, on their way.

    Args:
        places: Which rows of the step have one.
        bits_RW: Where they are computed.
        filled: Done when they are.
        vocabulary: Scores of a row.
        device: Where scores are.
    """

    def __init__(
        self,
        places: list[int],
        bits_RW: Tensor,
        filled: Future[None],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        self._places = places
        self._bits_RW = bits_RW
        self._filled = filled
        self._vocabulary = vocabulary
        self._device = device

    def apply(self, scores_BV: Tensor) -> Tensor:
        """Return scores in which no token has a chance that is not allowed; waits for the masks."""
        self._filled.result()
        if len(self._places) == len(scores_BV):
            return self._masked(scores_BV)
        places_R = torch.tensor(self._places, device=scores_BV.device)
        return scores_BV.index_copy(0, places_R, self._masked(scores_BV[places_R]))

    def _masked(self, scores_RV: Tensor) -> Tensor:
        if self._device.type == "cpu":
            table_8 = _PENALTIES.to(scores_RV.dtype)
            bytes_RW = self._bits_RW.view(torch.uint8).int()
            penalties_RV = torch.nn.functional.embedding(bytes_RW, table_8).flatten(1)
            return scores_RV + penalties_RV[:, : self._vocabulary]
        bits_RW = self._bits_RW.to(self._device, non_blocking=True)
        places_32 = torch.arange(32, dtype=torch.int32, device=self._device)
        refused_RV = ((bits_RW[:, :, None] >> places_32) & 1).logical_not().flatten(1)
        return scores_RV.masked_fill(refused_RV[:, : self._vocabulary], -torch.inf)


def _grammar(request: Request) -> Grammar | None:
    return request.want.grammar if isinstance(request.want, Write) else None


def unfollowed(grammars: Grammars, request: Request, token_ids: Sequence[int]) -> str:
    """Say what is wrong with the tokens of an answer; empty if they follow its grammar."""
    matcher = grammars.matcher(request)
    wrong = (matcher.accept(token) for token in token_ids) if matcher else ()
    return next(filter(None, wrong), "")
