"""The plain engine: `generate` of transformers over groups of rows of similar length.

It is slow, since a group runs until its longest answer is done, and it is the oracle for any faster
engine: nothing in it is clever, and every field of its generation config is set, so that no file of
a model can change an answer.

Two things are not left to `generate`:

- *Random numbers.* It draws from one generator for the whole batch, so that a row's sample would
  depend on its neighbours. Here each row has a stream of its own from its seed; the number of a
  step picks the token at that place of the row's cumulated probabilities, and the others are struck
  out before `generate` takes the likeliest. One number a token is enough, and it is the same
  on every device; only a difference of rounding that moves a boundary past it changes a token.
- *Stop strings.* The answer must be cut exactly where the string begins, also when it spans tokens.

Shapes: B rows, T tokens (padding, prompt and what is generated so far), N new tokens, V words of
the vocabulary.
"""
# ruff: noqa: N803, N806 - names of tensors end in their shape

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import LogitsProcessor, StoppingCriteria
from typing_extensions import override

from quantbatch.records import Completion, FinishReason

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quantbatch.records import Request
    from quantbatch.spec import Sampling

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text without special tokens."""

# Most of what is called of it has no types, or wrong ones (5.23).
hf: Any = transformers

SPARE_TOKENS = 8
"""Tokens without text that may stand within a stop string before it is found late."""


class StaticEngine:
    """See `Engine`; a step answers one group of rows from beginning to end.

    Rows of a group have the same sampling settings. The longest prompts come first: a group that is
    too large for the device then fails at the start of the job, not at its end.

    Args:
        model: As `weights.bnb.load` returns it, with a generation config that says only which
            tokens end an answer.
        tokenizer: The model's.
        batch_size: Most rows of a group.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int
    ) -> None:
        assert batch_size >= 1
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._tokens = _special_tokens(model, tokenizer)
        self._context_tokens = getattr(
            model.config.get_text_config(), "max_position_embeddings", None
        )
        self._queues: dict[str, list[Request]] = {}
        self._running: Sequence[Request] = []

    def add(self, requests: Iterable[Request]) -> None:
        """See `Engine`."""
        for request in requests:
            self._check_length(request)
            key = request.sampling.model_dump_json(exclude={"seed"})
            self._queues.setdefault(key, []).append(request)
        for queue in self._queues.values():
            queue.sort(key=_prompt_tokens, reverse=True)

    def _check_length(self, request: Request) -> None:
        tokens = len(request.prompt_ids) + request.sampling.max_new_tokens
        assert self._context_tokens is None or tokens <= self._context_tokens, (
            f"{request.id} may take {tokens} tokens, the context has {self._context_tokens}: the"
            " length policy must not let it pass"
        )

    def has_work(self) -> bool:
        """See `Engine`."""
        return bool(self._queues)

    def step(self) -> Sequence[Completion]:
        """See `Engine`."""
        self._running = self._next_group()
        completions = self._answer(self._running)
        self._running = []
        return completions

    def evict(self) -> Sequence[Request]:
        """See `Engine`."""
        evicted, self._running = self._running, []
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return evicted

    def _next_group(self) -> Sequence[Request]:
        key = max(self._queues, key=lambda key: _prompt_tokens(self._queues[key][0]))
        queue = self._queues[key]
        group, queue[:] = queue[: self._batch_size], queue[self._batch_size :]
        if not queue:
            del self._queues[key]
        return group

    def _answer(self, group: Sequence[Request]) -> list[Completion]:
        sampling = group[0].sampling
        end_ids = self._tokens.end_ids | self._tokens.special_ids(sampling.stop)
        prompts_BT, mask_BT = _left_padded(group, self._tokens.pad_id, self._model.device)
        prompt_tokens = prompts_BT.shape[1]
        health = _Health()
        stop_strings = _StopStrings(self._decode, sampling, prompt_tokens)
        model: Any = self._model
        with torch.inference_mode():
            answers_BT = model.generate(
                input_ids=prompts_BT,
                attention_mask=mask_BT,
                generation_config=_generation_config(sampling, end_ids, self._tokens.pad_id),
                logits_processor=[health, *_choosers(group, prompt_tokens, self._model.device)],
                stopping_criteria=[stop_strings] if sampling.stop else [],
            )
        health.check(group)
        answers = answers_BT[:, prompt_tokens:].tolist()
        return [
            self._completion(request, answer, end_ids)
            for request, answer in zip(group, answers, strict=True)
        ]

    def _completion(
        self, request: Request, generated: list[int], end_ids: Collection[int]
    ) -> Completion:
        """Take an answer out of what `generate` returned for a row, padding included."""
        sampling = request.sampling
        end = next((i + 1 for i, token in enumerate(generated) if token in end_ids), None)
        token_ids = generated[:end]
        cut = find_stop(token_ids, sampling, self._decode) if sampling.stop else None
        token_ids = token_ids[: cut.tokens] if cut else token_ids
        text = self._decode(token_ids)[: cut.characters if cut else None]
        stopped = end is not None or cut is not None
        assert stopped or len(token_ids) == sampling.max_new_tokens
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH
        return Completion(request.id, text, tuple(token_ids), reason)

    def _decode(self, token_ids: Sequence[int]) -> str:
        # Cleaning up would take spaces before punctuation out of the answer: a habit from BERT.
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def _prompt_tokens(request: Request) -> int:
    return len(request.prompt_ids)


# ---- tokens with a meaning


class _SpecialTokens(NamedTuple):
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    pad_id: int
    by_text: dict[str, int]
    """Tokens that are not shown in text."""

    def special_ids(self, stops: Iterable[str]) -> frozenset[int]:
        """Return the stop strings that are special tokens: they end an answer as tokens, since the
        text does not show them.
        """
        return frozenset(self.by_text[stop] for stop in stops if stop in self.by_text)


def _special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> _SpecialTokens:
    """Collect what ends an answer: what generation_config.json (else config.json) says, and the
    tokenizer's end token.

    Both are needed: fine-tuned models often end their answers with the tokenizer's <|im_end|> but
    carry the generation config of their base model.
    """
    generation: Any = model.generation_config
    configured = generation.eos_token_id
    end_ids = {configured} if isinstance(configured, int) else set(configured or ())
    end_ids |= {tokenizer.eos_token_id} - {None}
    pad_ids = (generation.pad_token_id, tokenizer.pad_token_id, *sorted(end_ids), 0)
    added = tokenizer.added_tokens_decoder.items()
    return _SpecialTokens(
        end_ids=frozenset(end_ids),
        # What stands in the padding does not matter: it is masked, and cut off answers.
        pad_id=next(token for token in pad_ids if token is not None),
        by_text={token.content: number for number, token in added if token.special},
    )


def _generation_config(sampling: Sampling, end_ids: Collection[int], pad_id: int) -> Any:  # noqa: ANN401
    """Return a config in which everything that changes an answer is set.

    Choosing among tokens is done by `_choosers`, so `do_sample` is off for `generate`, whatever the
    temperature.
    """
    return hf.GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        repetition_penalty=float(sampling.repetition_penalty),
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=pad_id,
        return_dict_in_generate=False,
        disable_compile=True,
    )


def _left_padded(
    group: Sequence[Request], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the prompts with padding on their left, and the mask that is 0 on the padding."""
    lengths = [_prompt_tokens(request) for request in group]
    longest = max(lengths)
    ids = [
        [pad_id] * (longest - length) + list(request.prompt_ids)
        for request, length in zip(group, lengths, strict=True)
    ]
    mask = [[0] * (longest - length) + [1] * length for length in lengths]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# ---- choosing a token


def _choosers(
    group: Sequence[Request], prompt_tokens: int, device: torch.device
) -> list[LogitsProcessor]:
    """Return what narrows the scores down to the tokens to take, in the order of transformers:
    after repetition penalty and min_new_tokens come temperature, top_k and top_p.
    """
    sampling = group[0].sampling
    if sampling.temperature == 0:
        return []
    warpers = [hf.TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        warpers.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(float(sampling.top_p)))
    seeds = [request.seed for request in group]
    uniforms_BN = uniform_numbers(seeds, sampling.max_new_tokens).to(device)
    return [*warpers, _Draw(uniforms_BN, prompt_tokens)]


def uniform_numbers(seeds: Sequence[int], count: int) -> Tensor:
    """Return each row's stream of random numbers in [0, 1) as float64, of shape (rows, count).

    A longer stream begins with a shorter one. NumPy's, since torch's generator on a CPU uses only
    half of the bits of a seed.
    """
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(count) for seed in seeds]))


class _Draw(LogitsProcessor):
    """Draws a token for each row and leaves no other possible."""

    def __init__(self, uniforms_BN: Tensor, prompt_tokens: int) -> None:
        self._uniforms_BN = uniforms_BN
        self._prompt_tokens = prompt_tokens

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._prompt_tokens
        cumulated_BV = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        place_B1 = self._uniforms_BN[:, step : step + 1] * cumulated_BV[:, -1:]
        token_B1 = torch.searchsorted(cumulated_BV, place_B1, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)


class _Health(LogitsProcessor):
    """Watches for scores that are no numbers, without waiting for the device at each step."""

    def __init__(self) -> None:
        self._sound_B: Tensor | None = None

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sound_B = (scores < torch.inf).all(-1)  # false for nan, too
        self._sound_B = sound_B if self._sound_B is None else self._sound_B & sound_B
        return scores

    def check(self, group: Sequence[Request]) -> None:
        """Raise if a row had such scores: its answer would be noise that looks like an answer."""
        assert self._sound_B is not None
        broken = [r.id for r, sound in zip(group, self._sound_B.tolist(), strict=True) if not sound]
        if broken:
            raise FloatingPointError(
                f"the model's scores are not finite for {len(broken)} of {len(group)} rows; float16"
                " overflows beyond 65,504: bfloat16 or float32 may help (model.dtype,"
                " model.quantization.compute_dtype)"
            )


# ---- stop strings


class Cut(NamedTuple):
    """Where a stop string ends an answer."""

    tokens: int
    """Tokens up to the one that completed the stop string."""
    characters: int
    """Characters before the stop string."""


def find_stop(token_ids: Sequence[int], sampling: Sampling, decode: Decode) -> Cut | None:
    """Find the first token that completes a stop string, and where that string begins.

    Of several that the same token completes, the one that begins first counts. One that is complete
    before `min_new_tokens` does not end the answer.
    """
    earlier = (
        len(decode(token_ids[: sampling.min_new_tokens - 1])) if sampling.min_new_tokens else 0
    )

    def begin(count: int) -> int | None:
        text = decode(token_ids[:count])
        begins = [text.find(stop, max(0, earlier - len(stop) + 1)) for stop in sampling.stop]
        return min((at for at in begins if at >= 0), default=None)

    if begin(len(token_ids)) is None:
        return None
    shortest, enough = 0, len(token_ids)
    while enough - shortest > 1:
        middle = (shortest + enough) // 2
        shortest, enough = (middle, enough) if begin(middle) is None else (shortest, middle)
    found = begin(enough)
    assert found is not None
    return Cut(enough, found)


class _StopStrings(StoppingCriteria):
    """Ends a row when its text holds a stop string.

    To be fast it looks at the last tokens of each row only, as many as the longest stop string has
    bytes. `find_stop` decides afterwards: what is missed here costs time, nothing else.
    """

    def __init__(self, decode: Decode, sampling: Sampling, prompt_tokens: int) -> None:
        self._decode = decode
        self._sampling = sampling
        self._prompt_tokens = prompt_tokens
        self._window = SPARE_TOKENS + max((len(s.encode()) for s in sampling.stop), default=0)
        self._done: dict[int, bool] = {}

    @override
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        begin = max(self._prompt_tokens, input_ids.shape[1] - self._window)
        for row, tail in enumerate(input_ids[:, begin:].tolist()):
            if not self._done.get(row) and self._may_stop(tail):
                answer = input_ids[row, self._prompt_tokens :].tolist()
                self._done[row] = find_stop(answer, self._sampling, self._decode) is not None
        done = [self._done.get(row, False) for row in range(input_ids.shape[0])]
        return torch.tensor(done, device=input_ids.device)

    def _may_stop(self, tail: Sequence[int]) -> bool:
        text = self._decode(tail)
        return any(stop in text for stop in self._sampling.stop)
