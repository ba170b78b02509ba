"""GGUF files as they are: llama.cpp multiplies by their codes, and we choose the tokens.

transformers expands such a file to 16 bits; llama.cpp does not, so a file of 5 GB takes 5 GB. Of it
this uses the model and its cache only, through the C interface: a batch of rows in which each has a
sequence of its own, prompts in pieces beside rows that are decoded. What comes out are scores, and
the rest is as in the other engines: the same sampler, with the same noise for the same seed, the
same ends of answers.

Shapes: B rows of a step, V words of the vocabulary.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import llama_cpp
import numpy as np
import torch

from quantbatch.engine.ends import Endings
from quantbatch.engine.limits import ModelLimits
from quantbatch.engine.pieces import Row
from quantbatch.engine.sampling import Sampler
from quantbatch.errors import DoesNotFit, ModelError
from quantbatch.records import Failure, TokenLogprobs
from quantbatch.wants import Write

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from quantbatch.engine.sampling import Chosen
    from quantbatch.records import Answer, Request

ALL_LAYERS = 1_000_000
"""To put on a card: llama.cpp takes as many as there are."""
UBATCH_TOKENS = 512
"""Tokens that llama.cpp computes at once; its own default."""


_SAY_NOTHING = llama_cpp.llama_log_callback(lambda *_: None)
"""Keeps llama.cpp's hundred lines for each model out of the logs."""


class Piece(NamedTuple):
    """Tokens of a row that are computed in one step."""

    row: Row
    tokens: Sequence[int]
    samples: bool
    """Whether the row's next token is chosen after them."""


class PackedModel:
    """A GGUF file in memory, with a cache for a number of rows.

    Args:
        path: The file.
        rows: Rows at once.
        row_tokens: Most tokens of a row.
        step_tokens: Most tokens of a step.
        threads: Threads to compute with.
        on_card: Whether its layers go to the card.

    Raises:
        ModelError: llama.cpp can't load the file.
        DoesNotFit: There is no room for the cache.
    """

    def __init__(
        self,
        path: Path,
        *,
        rows: int,
        row_tokens: int,
        step_tokens: int,
        threads: int,
        on_card: bool = False,
    ) -> None:
        llama_cpp.llama_log_set(_SAY_NOTHING, None)
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = ALL_LAYERS if on_card else 0
        self._context: Any = None
        self._batch: Any = None
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise ModelError(
                f"{path} can't be loaded by llama.cpp",
                "a newer llama-cpp-python may know its architecture; else fetch the file again",
            )
        self._context = llama_cpp.llama_init_from_model(
            self._model, _context_options(rows, row_tokens, step_tokens, threads)
        )
        if not self._context:
            raise DoesNotFit(
                f"{path}: there is no room for a cache of {rows} rows of {row_tokens:,} tokens",
                "a smaller engine.batch_size or engine.max_input_tokens takes less",
            )
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.end_ids = [
            token
            for token in range(self.vocabulary)
            if llama_cpp.llama_vocab_is_eog(vocabulary, token)
        ]
        self.weight_bytes: int = llama_cpp.llama_model_size(self._model)
        self.rows, self.row_tokens, self.step_tokens = rows, row_tokens, step_tokens
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(step_tokens, 0, 1)

    def scores(self, pieces: Sequence[Piece]) -> Tensor:
        """Compute pieces of rows; returns the scores after those that sample, as (B, V).

        Raises:
            RuntimeError: llama.cpp could not compute them.
        """
        batch, at, wanted = self._batch, 0, []
        for row, tokens, samples in pieces:
            for offset, token in enumerate(tokens):
                batch.token[at] = token
                batch.pos[at] = row.computed + offset
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = row.slot
                batch.logits[at] = samples and offset == len(tokens) - 1
                at += 1
            if samples:
                wanted.append(at - 1)
        batch.n_tokens = at
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code} for {at} tokens")
        found = np.empty((len(wanted), self.vocabulary), np.float32)
        for place, index in enumerate(wanted):
            scores = llama_cpp.llama_get_logits_ith(self._context, index)
            found[place] = np.ctypeslib.as_array(scores, (self.vocabulary,))
        return torch.from_numpy(found)

    def forget(self, slot: int) -> None:
        """Empty a row's place in the cache."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def close(self) -> None:
        """Give back the memory."""
        if self._batch is not None:
            llama_cpp.llama_batch_free(self._batch)
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._batch = self._context = self._model = None


def _context_options(rows: int, row_tokens: int, step_tokens: int, threads: int) -> Any:  # noqa: ANN401
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = rows * row_tokens
    options.n_seq_max = rows
    options.n_batch = step_tokens
    options.n_ubatch = min(step_tokens, UBATCH_TOKENS)
    options.n_threads = options.n_threads_batch = threads
    options.kv_unified = False  # each row has a cache of its own, and attends to no more than that
    options.no_perf = True
    return options


class _Generation(NamedTuple):
    """What `Endings` asks of a model's generation config."""

    eos_token_id: list[int]
    pad_token_id: int | None = None


class _Ends(NamedTuple):
    generation_config: _Generation


class LlamaCppEngine:
    """See `Engine`; rows enter and leave a running batch at every step.

    Args:
        model: A GGUF file in memory.
        tokenizer: The model's.
    """

    def __init__(self, model: PackedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        ends: Any = _Ends(_Generation(model.end_ids))
        self._model = model
        self._endings = Endings(ends, tokenizer)
        self._sampler = Sampler(slots=model.rows, endings=self._endings, device=torch.device("cpu"))
        self._limits = ModelLimits(model.vocabulary, model.row_tokens)
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._free = list(range(model.rows))
        self._ready: list[Answer] = []
        self._failed: list[Row] = []

    def add(self, requests: Iterable[Request]) -> None:
        """See `Engine`."""
        for request in requests:
            problem = self._limits.problem(request)
            if not isinstance(request.want, Write):
                problem = "the engine llama_cpp writes answers only; kind: continuous does this"
            if problem:
                self._ready.append(Failure(request.id, "bad_request", problem))
                continue
            prompt = list(request.prompt_ids)
            limit = len(prompt) + self._limits.new_tokens(request)
            self._waiting.append(Row(request, (0, 0, 0), prompt, limit, len(prompt)))

    def has_work(self) -> bool:
        """See `Engine`."""
        return bool(self._ready or self._waiting or self._running)

    def step(self) -> Sequence[Answer]:
        """See `Engine`."""
        self._admit()
        pieces = self._pieces()
        if pieces:
            self._failed = [piece.row for piece in pieces]
            with torch.inference_mode():
                self._advance(pieces)
            self._failed = []
        ready, self._ready = self._ready, []
        return ready

    def evict(self) -> Sequence[Request]:
        """See `Engine`; rows that the failed step left out begin anew."""
        failed, self._failed = self._failed, []
        for row in [*self._running]:
            self._leave(row)
            if row not in failed:
                prompt = list(row.request.prompt_ids)
                fresh = Row(row.request, row.order, prompt, row.limit, len(prompt))
                self._waiting.appendleft(fresh)
        return [row.request for row in failed]

    def close(self) -> None:
        """Give back the memory; the engine is of no use afterwards."""
        self._model.close()

    def _admit(self) -> None:
        while self._waiting and self._free:
            row = self._waiting.popleft()
            row.slot = self._free.pop()
            self._sampler.start(row, self._model.vocabulary)
            self._running.append(row)

    def _pieces(self) -> list[Piece]:
        """Share out a step's tokens: one to each row that is decoded, the rest to prompts."""
        room, pieces = self._model.step_tokens, []
        for row in sorted(self._running, key=lambda row: row.generated == 0):
            tokens = row.tokens[row.computed : row.computed + room]
            if tokens:
                samples = row.computed + len(tokens) == len(row.tokens)
                pieces.append(Piece(row, tokens, samples))
                room -= len(tokens)
        return pieces

    def _advance(self, pieces: Sequence[Piece]) -> None:
        scores_BV = self._model.scores(pieces)
        for piece in pieces:
            piece.row.computed += len(piece.tokens)
        rows = [piece.row for piece in pieces if piece.samples]
        if not rows:
            return
        chosen = self._sampler.choose(scores_BV, rows, [row.generated for row in rows])
        self._note_logprobs(rows, chosen)
        sound = chosen.sound_B.tolist()
        for place, (row, token) in enumerate(zip(rows, chosen.tokens_B.tolist(), strict=True)):
            row.tokens.append(token)
            row.length += 1
            answer = self._answer(row, token) if sound[place] else _unsound(row)
            if answer is not None:
                self._leave(row)
                self._ready.append(answer)

    def _answer(self, row: Row, token: int) -> Answer | None:
        """Return a row's answer if this token ends it."""
        sampling = row.request.sampling
        generated = row.tokens[row.prompt_tokens :]
        ends = len(row.tokens) >= row.limit or token in self._endings.end_ids(sampling)
        if not ends and not self._endings.stopped(generated, sampling):
            return None
        logprobs = row.logprobs if sampling.logprobs is not None else None
        return self._endings.completion(row.request, generated, logprobs)

    def _note_logprobs(self, rows: Sequence[Row], chosen: Chosen) -> None:
        found = chosen.logprobs
        if found is None:
            return
        columns = (found.chosen_R.tolist(), found.top_ids_RK.tolist(), found.top_RK.tolist())
        for place, value, ids, values in zip(found.rows, *columns, strict=True):
            wanted = rows[place].request.sampling.logprobs
            top = tuple(zip(ids[:wanted], values[:wanted], strict=True))
            rows[place].logprobs.append(TokenLogprobs(value, top))

    def _leave(self, row: Row) -> None:
        self._running.remove(row)
        self._model.forget(row.slot)
        self._free.append(row.slot)


def _unsound(row: Row) -> Failure:
    return Failure(row.request.id, "model", "the model's scores are not finite")
