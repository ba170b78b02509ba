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

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers import LogitsProcessor, StoppingCriteria
from typing_extensions import override

from quantbatch.engine.ends import Endings

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quantbatch.records import Completion, Request
    from quantbatch.spec import Sampling

# Most of what is called of it has no types, or wrong ones (5.23).
hf: Any = transformers


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
        self._endings = Endings(model, tokenizer)
        self._batch_size = batch_size
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
        end_ids, pad_id = self._endings.end_ids(sampling), self._endings.pad_id
        prompts_BT, mask_BT = _left_padded(group, pad_id, self._model.device)
        prompt_tokens = prompts_BT.shape[1]
        health = _Health()
        stop_strings = _StopStrings(self._endings, sampling, prompt_tokens)
        model: Any = self._model
        with torch.inference_mode():
            answers_BT = model.generate(
                input_ids=prompts_BT,
                attention_mask=mask_BT,
                generation_config=_generation_config(sampling, end_ids, pad_id),
                logits_processor=[health, *_choosers(group, prompt_tokens, self._model.device)],
                stopping_criteria=[stop_strings] if sampling.stop else [],
            )
        health.check(group)
        answers = answers_BT[:, prompt_tokens:].tolist()
        return [
            self._endings.completion(request, answer)
            for request, answer in zip(group, answers, strict=True)
        ]


def _prompt_tokens(request: Request) -> int:
    return len(request.prompt_ids)


# ---- the arguments of `generate`


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


class _StopStrings(StoppingCriteria):
    """Ends a row when its text holds a stop string."""

    def __init__(self, endings: Endings, sampling: Sampling, prompt_tokens: int) -> None:
        self._endings = endings
        self._sampling = sampling
        self._prompt_tokens = prompt_tokens
        self._done: dict[int, bool] = {}

    @override
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for row, answer in enumerate(input_ids[:, self._prompt_tokens :].tolist()):
            if not self._done.get(row):
                self._done[row] = self._endings.stopped(answer, self._sampling)
        done = [self._done.get(row, False) for row in range(input_ids.shape[0])]
        return torch.tensor(done, device=input_ids.device)
