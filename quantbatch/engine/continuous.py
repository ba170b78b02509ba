"""The default engine: a running batch that rows enter and leave at every step.

A step computes the newest token of each running row and pieces of the prompts that are to join
them, all packed into one forward without padding. A row that is done leaves at once, and another
takes its place in the next step, from whatever chunk it comes. The parts:

    scheduler.py   who runs next: admission by KV tokens, pieces, rows put back
    blocks.py      whose blocks of KV cache are whose, and which are shared
    forward.py     the model's own forward over the packed tokens
    attention.py   how its attention comes to our cache: slots.py on CPUs, paged.py on cards
    sampling.py    the next token of each row, by its own settings
    grammar.py     which tokens may be next in an answer that has a form
    reading.py     what rows get that only read: log-likelihoods, hidden states
    backoff.py     smaller steps when memory runs out
    probe.py       whether a model can run like this at all

`step` launches a step and then lands one: reads its tokens, ends rows. On a card the one that it
lands is the step before, so the card never waits for Python: which rows go on is known before their
tokens are, and the rare row that turns out to have ended has computed one token for nothing. On a
CPU there is nothing to overlap.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from quantbatch.engine import attention
from quantbatch.engine.backoff import Backoff
from quantbatch.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from quantbatch.engine.ends import Endings
from quantbatch.engine.forward import Forward
from quantbatch.engine.grammar import NO_TOKEN, Grammars
from quantbatch.engine.graphs import RecordedSteps
from quantbatch.engine.kvstore import send
from quantbatch.engine.limits import ModelLimits
from quantbatch.engine.paged import PagedStore
from quantbatch.engine.pieces import (
    LEAST_SCORES,
    SCORE_BYTES,
    SCORE_ITEM_BYTES,
    Limits,
    ReadLimits,
)
from quantbatch.engine.probe import Probe
from quantbatch.engine.readback import Readback
from quantbatch.engine.reading import Readings, numbers
from quantbatch.engine.sampling import Sampler
from quantbatch.engine.scheduler import Scheduler
from quantbatch.engine.slots import SlotStore
from quantbatch.engine.telemetry import Telemetry
from quantbatch.records import Failure, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quantbatch.engine.kvstore import KvStore
    from quantbatch.engine.pieces import Piece, Row
    from quantbatch.engine.reading import Reading
    from quantbatch.engine.sampling import Chosen
    from quantbatch.engine.telemetry import Totals
    from quantbatch.records import Answer, Request

MOST_COPIES = 512
"""Blocks, 8,192 tokens, that are kept for rows to come on a CPU: many beginnings of prompts, and
256 MiB for a model of 27 million parameters."""
NOT_FINITE = (
    "the model's scores are not finite; float16 overflows beyond 65,504: bfloat16 or float32 may"
    " help (model.dtype, model.quantization.compute_dtype)"
)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much an engine may do at once."""

    rows: int
    """Rows decoded together."""
    kv_tokens: int
    """Tokens that the KV cache has room for."""
    step_tokens: int
    """Tokens computed in one step: what a forward's memory is planned for."""
    block_tokens: int = BLOCK_TOKENS
    refill_share: float = 0.0
    """Share of the batch that leaves before others are admitted; see `Scheduler`."""
    share_prefixes: bool = True
    """Whether the common beginning of prompts is computed once."""
    record_steps: bool = True
    """Whether steps of single tokens are replayed from CUDA graphs, on a card."""


class _Launched(NamedTuple):
    """A step on its way: the rows whose next token it chooses, those tokens, and what other rows
    read.
    """

    rows: list[Row]
    chosen: Chosen
    reading: Reading | None
    readback: Readback


class ContinuousEngine:
    """See `Engine`.

    Args:
        model: As `weights.bnb.load` returns it; its attention is exchanged for ours.
        tokenizer: The model's.
        limits: How much it may do at once.

    Raises:
        UnsupportedModelError: The model can't run like this; it is as it was.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: EngineLimits,
    ) -> None:
        self._device = model.device
        self._own_attention = model.config._attn_implementation
        self._endings = Endings(model, tokenizer)
        self._model_limits = ModelLimits.of(model)
        self._limits = limits
        # On a CPU kept blocks are copies, and take memory of their own.
        self._pool = BlockPool(
            blocks_for(limits.kv_tokens, limits.block_tokens),
            most_idle=MOST_COPIES if self._device.type == "cpu" else None,
        )
        self._scheduler = Scheduler(
            self._pool,
            slots=limits.rows,
            refill_share=limits.refill_share,
            share_prefixes=limits.share_prefixes,
            block_tokens=limits.block_tokens,
            read_limits=self._read_limits(),
        )
        self._readings = Readings()
        self._forward = self._make_forward(model)
        self._overlaps = self._device.type == "cuda"
        self._last_tokens_S = torch.zeros(
            max(2, limits.rows) + 1, dtype=torch.long, device=self._device
        )
        """The newest token of each place, for steps that are launched before it is read."""
        self._recorded = self._make_recorded()
        self._sampler = Sampler(slots=limits.rows, endings=self._endings, device=self._device)
        self._grammars = Grammars(
            tokenizer,
            self._endings,
            vocabulary=self._model_limits.vocabulary,
            device=self._device,
        )
        self._backoff = Backoff(Limits(limits.rows, limits.step_tokens))
        self.telemetry = Telemetry(time.perf_counter())
        self._ready: list[Answer] = []
        """Answers that `step` has yet to return."""
        self._failed: list[Row] = []
        self._flying: _Launched | None = None

    def _read_limits(self) -> ReadLimits:
        words = self._model_limits.vocabulary
        scores = max(LEAST_SCORES, SCORE_BYTES[self._device.type] // (SCORE_ITEM_BYTES * words))
        return ReadLimits(scores, max(1, min(scores, self._limits.step_tokens) // 2))

    def _make_forward(self, model: PreTrainedModel) -> Forward:
        probe = Probe(model)
        try:
            forward = Forward(model, self._make_store())
            probe.check(forward, self._pool, self._limits.block_tokens)
        except attention.UnsupportedModelError:
            model.set_attn_implementation(self._own_attention)
            raise
        return forward

    def _make_store(self) -> KvStore:
        slots = max(2, self._limits.rows)  # the probe has two rows
        blocks, page = self._pool.size, self._limits.block_tokens
        if self._device.type == "cpu":
            return SlotStore(slots=slots, block_tokens=page)
        longest = blocks_for(self._model_limits.context_tokens or blocks * page, page)
        return PagedStore(
            slots=slots,
            blocks=blocks,
            row_blocks=min(blocks, longest),
            device=self._device,
            block_tokens=page,
        )

    def _make_recorded(self) -> RecordedSteps | None:
        store, limits = self._forward.store, self._limits
        if not isinstance(store, PagedStore) or not store.has_triton or not limits.record_steps:
            return None
        if len({each.device for each in self._forward.model.parameters()}) > 1:
            return None  # a graph belongs to one card
        return RecordedSteps(self._forward, store, self._last_tokens_S, limits.rows)

    @property
    def totals(self) -> Totals:
        """What it did since it was made."""
        return self.telemetry.totals

    # ---- requests come in

    def add(self, requests: Iterable[Request]) -> None:
        """See `Engine`."""
        sound = []
        for request in requests:
            wrong = self._problem(request)
            if wrong:
                self._ready.append(Failure(request.id, "bad_request", wrong))
            else:
                sound.append(request)
        self._scheduler.add(sound, self._model_limits.context_tokens)

    def _problem(self, request: Request) -> str:
        """Say why a request can't be run; else nothing."""
        problem = self._model_limits.problem(request) or self._grammars.problem(request)
        if problem:
            return problem
        prompt, new = len(request.prompt_ids), self._model_limits.new_tokens(request)
        if self._scheduler.fits_alone(prompt + new):
            return ""
        return (
            f"prompt_ids: {prompt:,} tokens and {new:,} new ones are more than the"
            f" {self._limits.kv_tokens:,} that the KV cache has room for"
        )

    def has_work(self) -> bool:
        """See `Engine`."""
        return bool(self._scheduler.has_rows or self._ready or self._flying)

    # ---- a step

    def step(self) -> Sequence[Answer]:
        """See `Engine`."""
        began = time.perf_counter()
        totals = self.telemetry.totals
        launched = self._launch()
        self._land_flying()  # the step before; none, if memory ran out and it has landed already
        self._flying = launched
        if not self._may_fly():
            self._land_flying()
        finished, self._ready = self._ready, []
        now = time.perf_counter()
        totals.step_s += now - began
        totals.finished += len(finished)
        totals.preemptions = self._scheduler.preemptions
        totals.reused_tokens = self._scheduler.reused_tokens
        kv_share = self._pool.in_use / self._pool.size
        self.telemetry.stepped(now, kv_share=kv_share, idle=not self.has_work())
        return finished

    def _may_fly(self) -> bool:
        """Tell whether the next step may be launched before this one's tokens are read."""
        flying = self._flying
        return self._overlaps and not (
            flying and any(r.request.sampling.bad_words or r.matcher for r in flying.rows)
        )

    def _launch(self) -> _Launched | None:
        """Start the next step; None if there is none, or it ran out of memory and was put back."""
        pieces = self._scheduler.next_step(self._backoff.limits)
        if not pieces:
            return None
        launched = None
        try:
            launched = self._run(pieces)
        except torch.OutOfMemoryError:
            pass  # handled below, where the exception no longer holds the step's tensors
        except Exception:
            self._land_flying()
            self._failed = [piece.row for piece in pieces if not piece.row.done]
            if self._failed:
                raise
            return None  # its rows had all ended in the step before, and this one was for nothing
        if launched is None:
            self._out_of_memory(pieces)
            return None
        self._backoff.succeeded()
        self._count(pieces)
        return launched

    def _run(self, pieces: Sequence[Piece]) -> _Launched:
        with torch.inference_mode():
            self._enter(pieces)
            rows = [piece.row for piece in pieces if piece.samples]
            # Computed while the forward runs: the rows' tokens so far have been read.
            masks = self._grammars.fill([row.matcher for row in rows])
            began = time.perf_counter()
            scores_BV, reading = self._compute(pieces)
            self.telemetry.totals.forward_s += time.perf_counter() - began
            while self._pool.forgotten:
                self._forward.store.forget(self._pool.forgotten.pop())
            for row, index in self._scheduler.keepable(pieces):
                self._forward.store.keep(row.slot, index, row.blocks[index])
            # `generated` counts the token that is chosen now.
            counts = [row.generated - 1 for row in rows]
            chosen = self._sampler.choose(scores_BV[: len(rows)], rows, counts, masks)
            if self._overlaps:
                self._last_tokens_S.index_copy_(
                    0, send([row.slot for row in rows], self._device), chosen.tokens_B
                )
            return _Launched(rows, chosen, reading, Readback(chosen, reading))

    def _compute(self, pieces: Sequence[Piece]) -> tuple[Tensor, Reading | None]:
        """Return the scores of a step, and what rows that only read get of it."""
        if self._recorded is not None and self._recorded.can_run(pieces):
            scores_BV = self._recorded.run(pieces)
            if scores_BV is not None:
                return scores_BV, None
        output = self._forward(pieces, self._tokens(pieces))
        return output.scores_BV, self._readings.take(pieces, output)

    def _enter(self, pieces: Sequence[Piece]) -> None:
        """Prepare the places of rows that were just admitted."""
        admitted = self._scheduler.admitted
        starts = {piece.row.slot: piece.start for piece in pieces}
        for row in admitted:
            shared = starts[row.slot] // self._limits.block_tokens
            if shared:
                self._forward.store.use(row.slot, row.blocks[:shared])
            if row.reads:
                self._readings.start(row)
            else:
                self._sampler.start(row, self._model_limits.vocabulary)
                row.matcher = row.matcher or self._grammars.matcher(row.request)
        if admitted and self._overlaps:
            slots = send([row.slot for row in admitted], self._device)
            newest = send([row.tokens[-1] for row in admitted], self._device)
            self._last_tokens_S.index_copy_(0, slots, newest)

    def _tokens(self, pieces: Sequence[Piece]) -> Tensor:
        """Return the token ids of a step; those that are not read yet come from the device."""
        ids: list[int] = []
        unread: list[tuple[int, int]] = []
        for row, start, end, *_ in pieces:
            ids += row.tokens[start:end]
            if end > len(row.tokens):
                unread.append((len(ids), row.slot))
                ids.append(0)
        for piece in pieces:
            ids += piece.group.tokens if piece.group else ()
        tokens_T = send(ids, self._device)
        if unread:
            places, slots = (send(column, self._device) for column in zip(*unread, strict=True))
            tokens_T[places] = self._last_tokens_S[slots]
        return tokens_T

    def _count(self, pieces: Sequence[Piece]) -> None:
        totals, scheduler = self.telemetry.totals, self._scheduler
        totals.rows += len(pieces)
        prompt = sum(max(0, min(p.end, p.row.prompt_tokens) - p.start) for p in pieces)
        totals.prefill_tokens += prompt
        totals.decode_tokens += sum(piece.samples for piece in pieces)
        padding = self._recorded.padding if self._recorded else 0
        totals.positions += sum(piece.tokens for piece in pieces) + padding
        totals.wasted_positions += scheduler.recomputed_tokens + padding
        scheduler.recomputed_tokens = 0
        if self._recorded:
            self._recorded.padding = 0

    # ---- its results

    def _land(self, launched: _Launched) -> None:
        """Read the tokens of a step and end the rows that are done."""
        tokens, sound, *others = launched.readback.wait()
        if launched.chosen.logprobs is not None:
            self._note_logprobs(launched, others[:3])
            del others[:3]
        if launched.reading is not None:
            for row, answer in self._readings.land(launched.reading, others):
                self._end(row, answer)
        for row, token, is_sound in zip(launched.rows, tokens, sound, strict=True):
            if row.done:
                self.telemetry.totals.wasted_positions += 1
                self.telemetry.totals.decode_tokens -= 1
                continue
            row.tokens.append(token)
            ending = self._answer(row, token) if is_sound else _no_choice(row)
            if ending is not None:
                self._end(row, ending)

    def _end(self, row: Row, answer: Answer) -> None:
        if not all(map(math.isfinite, numbers(answer))):
            answer = _failure(row, NOT_FINITE)
        self._readings.forget(row)
        self._scheduler.finish(row)
        self._ready.append(answer)

    def _answer(self, row: Row, token: int) -> Answer | None:
        """Return a row's answer if this token ends it."""
        if row.matcher and (wrong := row.matcher.accept(token)):
            return Failure(row.request.id, "grammar", wrong)
        try:
            if not self._is_done(row, token):
                return None
            logprobs = row.logprobs if row.request.sampling.logprobs is not None else None
            generated = row.tokens[row.prompt_tokens :]
            return self._endings.completion(row.request, generated, logprobs)
        except Exception as error:  # noqa: BLE001 - a tokenizer's Rust part raises plain Exception
            return _failure(row, f"{type(error).__name__}: {error}")

    def _land_flying(self) -> None:
        landing, self._flying = self._flying, None
        if landing is not None:
            self._land(landing)

    def _is_done(self, row: Row, token: int) -> bool:
        sampling = row.request.sampling
        if len(row.tokens) >= row.limit or token in self._endings.end_ids(sampling):
            return True
        answer = row.tokens[row.prompt_tokens :] if sampling.stop else ()
        return bool(answer) and self._endings.stopped(answer, sampling)

    def _note_logprobs(self, launched: _Launched, columns: list[list[Any]]) -> None:
        found = launched.chosen.logprobs
        assert found is not None
        for place, chosen, ids, values in zip(found.rows, *columns, strict=True):
            row = launched.rows[place]
            wanted = row.request.sampling.logprobs
            top = tuple(zip(ids[:wanted], values[:wanted], strict=True))
            row.logprobs.append(TokenLogprobs(chosen, top))

    # ---- trouble

    def _out_of_memory(self, pieces: Sequence[Piece]) -> None:
        """Put the rows of a step back and make steps smaller; give up a row that fails alone."""
        self.telemetry.totals.out_of_memory += 1
        self._land_flying()
        pieces = [piece for piece in pieces if not piece.row.done]
        if not pieces:
            return
        tokens = sum(piece.tokens for piece in pieces)
        if not self._backoff.failed(rows=len(pieces), tokens=tokens):
            self._failed = [piece.row for piece in pieces]
            raise torch.OutOfMemoryError("out of memory with one row and the smallest step")
        self._scheduler.undo(pieces)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def evict(self) -> Sequence[Request]:
        """See `Engine`."""
        failed, self._failed = self._failed, []
        for row in failed:
            self._readings.forget(row)
            self._scheduler.remove(row)
        return [row.request for row in failed]

    def close(self) -> None:
        """Give the model its own attention back."""
        self._forward.model.set_attn_implementation(self._own_attention)


def _no_choice(row: Row) -> Failure:
    """Say why no token could be chosen."""
    if row.matcher is None:
        return _failure(row, NOT_FINITE)
    return Failure(row.request.id, "grammar", NO_TOKEN)


def _failure(row: Row, message: str) -> Failure:
    return Failure(row.request.id, "model", message)
