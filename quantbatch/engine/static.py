"""The plain engine: `generate` of transformers over groups of rows of similar length.

It is slow, since a group runs until its longest answer is done, and it is the oracle for any faster
engine: nothing in it is clever, and every field of its generation config is set, so that no file of
a model can change an answer.

Three things are not left to `generate`:

- *Scores.* What changes them is given to it as processors, in the order that `Sampling` promises:
  its own order differs, and it knows neither biases of tokens nor penalties of answers alone.
- *Random numbers.* It draws from one generator for the whole batch, so that a row's sample would
  depend on its neighbours. Here each row's own noise is added to its scores, and `generate` takes
  the greatest (`noise.py`).
- *Stop strings.* The answer must be cut exactly where the string begins, also when it spans tokens.

Shapes: B rows, T tokens (padding, prompt and what is generated so far), N new tokens, V words of
the vocabulary, K likeliest tokens.
"""
# ruff: noqa: N802 - names of tensors end in their shape

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from transformers import LogitsProcessor, StoppingCriteria
from typing_extensions import override

from quantbatch.engine import alone
from quantbatch.engine.ends import Endings
from quantbatch.engine.grammar import Grammars, unfollowed
from quantbatch.engine.limits import ModelLimits
from quantbatch.engine.noise import gumbel_noise
from quantbatch.records import Failure, TokenLogprobs
from quantbatch.wants import Write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quantbatch.records import Answer, Completion, Request
    from quantbatch.spec import Sampling

# Most of what is called of it has no types, or wrong ones (5.23).
hf: Any = transformers


class StaticEngine:
    """See `Engine`; a step answers one group of rows from beginning to end.

    Rows of a group have the same sampling settings, and room in the model's context for answers of
    the same length. The longest prompts come first: a group that is too large for the device then
    fails at the start of the job, not at its end.

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
        self.alive: Callable[[], None] = _nobody_asks
        """Called at each token of a group, whose answers may take longer than a step may."""
        self._model = model
        self._endings = Endings(model, tokenizer)
        self._batch_size = batch_size
        self._limits = ModelLimits.of(model)
        self._grammars = Grammars(
            tokenizer,
            self._endings,
            vocabulary=self._limits.vocabulary,
            device=model.device,
        )
        self._queues: dict[tuple[int, str], list[Request]] = {}
        self._refused: list[Failure] = []
        self._reading: deque[Request] = deque()
        """Rows that only read, which run one at a time."""
        self._running: Sequence[Request] = []

    def add(self, requests: Iterable[Request]) -> None:
        """See `Engine`."""
        for request in requests:
            if problem := self._limits.problem(request) or self._grammars.problem(request):
                self._refused.append(Failure(request.id, "bad_request", problem))
                continue
            if not isinstance(request.want, Write):
                self._reading.append(request)
                continue
            settings = request.sampling.model_dump_json(exclude={"seed"})
            key = (self._limits.new_tokens(request), settings)
            self._queues.setdefault(key, []).append(request)
        for queue in self._queues.values():
            queue.sort(key=_prompt_tokens, reverse=True)

    def has_work(self) -> bool:
        """See `Engine`."""
        return bool(self._queues or self._refused or self._reading)

    def step(self) -> Sequence[Answer]:
        """See `Engine`."""
        if self._refused:
            refused, self._refused = self._refused, []
            return refused
        if self._reading:
            self._running = [self._reading.popleft()]
            answers: Sequence[Answer] = [alone.read(self._model, *self._running)]
        else:
            self._running = self._next_group()
            answers = self._answer(self._running)
        self._running = []
        return answers

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

    def _answer(self, group: Sequence[Request]) -> list[Answer]:
        sampling = group[0].sampling
        prompts = _left_padded(group, self._endings.pad_id, self._model.device)
        health, logprobs = _Health(), _Logprobs(sampling.logprobs or 0, prompts.tokens)
        watchers = [health] if sampling.logprobs is None else [health, logprobs]
        stop_strings = _StopStrings(self._endings, sampling, prompts.tokens)
        model: Any = self._model
        forms = [_Forms(self._grammars, group, prompts.tokens)] if _have_forms(group) else []
        choosers = _choosers(group, prompts, self._endings)
        with torch.inference_mode():
            answers_BT = model.generate(
                input_ids=prompts.ids_BT,
                attention_mask=prompts.mask_BT,
                generation_config=self._generation_config(group[0]),
                logits_processor=[*watchers, *forms, *choosers],
                stopping_criteria=[_Alive(self.alive), *([stop_strings] if sampling.stop else [])],
            )
        health.check(group)
        answers = answers_BT[:, prompts.tokens :].tolist()
        found = [None] * len(group) if sampling.logprobs is None else logprobs.by_row(answers_BT)
        return [
            self._followed(request, self._endings.completion(request, answer, noted))
            for request, answer, noted in zip(group, answers, found, strict=True)
        ]

    def _followed(self, request: Request, completion: Completion) -> Answer:
        wrong = unfollowed(self._grammars, request, completion.token_ids)
        return Failure(request.id, "grammar", wrong) if wrong else completion

    def _generation_config(self, request: Request) -> Any:  # noqa: ANN401
        """Return a config in which everything that changes an answer is set.

        Choosing among tokens is done by `_choosers`, so `do_sample` is off for `generate`, whatever
        the temperature.
        """
        return hf.GenerationConfig(
            max_new_tokens=self._limits.new_tokens(request),
            min_new_tokens=None,
            repetition_penalty=1.0,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            eos_token_id=sorted(self._endings.end_ids(request.sampling)) or None,
            pad_token_id=self._endings.pad_id,
            return_dict_in_generate=False,
            disable_compile=True,
        )


def _prompt_tokens(request: Request) -> int:
    return len(request.prompt_ids)


# ---- the prompts of a group


class _Prompts(NamedTuple):
    """Prompts with padding on their left."""

    ids_BT: Tensor
    mask_BT: Tensor
    """0 on the padding."""

    @property
    def tokens(self) -> int:
        """Tokens of each row, its padding included."""
        return self.ids_BT.shape[1]

    @property
    def padding_B(self) -> Tensor:
        """Tokens of padding of each row."""
        return (self.mask_BT == 0).sum(-1)


def _left_padded(group: Sequence[Request], pad_id: int, device: torch.device) -> _Prompts:
    lengths = [_prompt_tokens(request) for request in group]
    longest = max(lengths)
    ids = [
        [pad_id] * (longest - length) + list(request.prompt_ids)
        for request, length in zip(group, lengths, strict=True)
    ]
    mask = [[0] * (longest - length) + [1] * length for length in lengths]
    return _Prompts(torch.tensor(ids, device=device), torch.tensor(mask, device=device))


# ---- choosing a token


def _choosers(
    group: Sequence[Request], prompts: _Prompts, endings: Endings
) -> list[LogitsProcessor]:
    """Return what changes the scores before the greatest is taken, in the order of `Sampling`."""
    return [*_adjusters(group[0].sampling, prompts, endings), *_samplers(group, prompts)]


def _adjusters(
    sampling: Sampling, prompts: _Prompts, endings: Endings
) -> Iterable[LogitsProcessor]:
    """Yield what changes the scores at any temperature."""
    if sampling.logit_bias:
        yield _Bias(sampling)
    if sampling.repetition_penalty != 1:
        # Padding must not count as said.
        yield hf.RepetitionPenaltyLogitsProcessor(
            float(sampling.repetition_penalty), prompt_ignore_length=prompts.padding_B
        )
    if sampling.presence_penalty or sampling.frequency_penalty:
        yield _AnswerPenalties(sampling, prompts.tokens)
    if sampling.bad_words:
        yield _BadWords(endings.bad_word_ids(sampling), prompts.tokens)
    end_ids = endings.end_ids(sampling)
    if sampling.min_new_tokens and end_ids:
        yield hf.MinNewTokensLengthLogitsProcessor(
            prompts.tokens, sampling.min_new_tokens, sorted(end_ids), device=prompts.ids_BT.device
        )


def _samplers(group: Sequence[Request], prompts: _Prompts) -> Iterable[LogitsProcessor]:
    """Yield what makes the greatest score a sample, and that of the likelier tokens only."""
    sampling = group[0].sampling
    if sampling.temperature == 0:
        return
    yield hf.TemperatureLogitsWarper(float(sampling.temperature))
    if sampling.top_k:
        yield hf.TopKLogitsWarper(sampling.top_k)
    if sampling.top_p < 1:
        yield hf.TopPLogitsWarper(float(sampling.top_p))
    if sampling.min_p:
        yield hf.MinPLogitsWarper(float(sampling.min_p))
    seeds_B = torch.tensor([request.seed for request in group], device=prompts.ids_BT.device)
    yield _Draw(seeds_B, prompts.tokens)


def _have_forms(group: Sequence[Request]) -> bool:
    return any(isinstance(r.want, Write) and r.want.grammar is not None for r in group)


class _Forms(LogitsProcessor):
    """Strikes out what the grammar of a row does not allow.

    A row whose answer has ended is left alone, and one that left its grammar: that comes out when
    its tokens are looked at again.
    """

    def __init__(self, grammars: Grammars, group: Sequence[Request], prompt_tokens: int) -> None:
        self._grammars = grammars
        self._matchers = [grammars.matcher(request) for request in group]
        self._prompt_tokens = prompt_tokens

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self._prompt_tokens:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                matcher = self._matchers[row]
                if matcher and (token in matcher.end_ids or matcher.accept(token)):
                    self._matchers[row] = None
        masks = self._grammars.fill(self._matchers)
        return masks.apply(scores) if masks else scores


class _Bias(LogitsProcessor):
    """Adds `logit_bias`."""

    def __init__(self, sampling: Sampling) -> None:
        self._token_ids = list(sampling.logit_bias)
        self._values = list(sampling.logit_bias.values())

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self._token_ids] += torch.tensor(self._values, device=scores.device)
        return scores


class _AnswerPenalties(LogitsProcessor):
    """Takes the presence penalty off tokens of the answer once, the frequency penalty as often as
    they are in it.
    """

    def __init__(self, sampling: Sampling, prompt_tokens: int) -> None:
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._prompt_tokens = prompt_tokens

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answers_BN = input_ids[:, self._prompt_tokens :]
        said_BN = torch.ones_like(answers_BN, dtype=scores.dtype)
        counts_BV = torch.zeros_like(scores).scatter_add_(1, answers_BN, said_BN)
        return scores - self._frequency * counts_BV - self._presence * (counts_BV > 0)


class _BadWords(LogitsProcessor):
    """Strikes out the token that would complete a bad word.

    The processor of transformers for this looks at the prompt and its padding too.
    """

    def __init__(self, runs: Iterable[tuple[int, ...]], prompt_tokens: int) -> None:
        self._runs = runs
        self._prompt_tokens = prompt_tokens

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answers_BN = input_ids[:, self._prompt_tokens :]
        scores = scores.clone()
        for *begin, last in self._runs:
            if len(begin) > answers_BN.shape[1] or last >= scores.shape[1]:
                continue
            tail_BN = answers_BN[:, answers_BN.shape[1] - len(begin) :]
            begun_B = (tail_BN == torch.tensor(begin, device=tail_BN.device)).all(-1)
            scores[:, last].masked_fill_(begun_B, -torch.inf)
        return scores


class _Draw(LogitsProcessor):
    """Adds each row's own noise, so that its greatest score is a sample of their softmax."""

    def __init__(self, seeds_B: Tensor, prompt_tokens: int) -> None:
        self._seeds_B = seeds_B
        self._prompt_tokens = prompt_tokens

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        steps_B = torch.full_like(self._seeds_B, input_ids.shape[1] - self._prompt_tokens)
        return scores + gumbel_noise(self._seeds_B, steps_B, scores.shape[1])


# ---- watching the model's own scores


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


class _Logprobs(LogitsProcessor):
    """Notes the log-probability of each token that was taken, and the likeliest tokens beside it.

    Which token is taken is known a step later, so the log-probabilities of one step are kept, never
    those of all.
    """

    def __init__(self, likeliest: int, prompt_tokens: int) -> None:
        self._likeliest = likeliest
        self._prompt_tokens = prompt_tokens
        self._newest_BV: Tensor | None = None
        self._taken_B: list[Tensor] = []
        self._top_BK: list[torch.return_types.topk] = []

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._newest_BV is not None:
            self._note_taken(input_ids[:, -1])
        self._newest_BV = scores.log_softmax(-1, dtype=torch.float32)
        self._top_BK.append(self._newest_BV.topk(min(self._likeliest, scores.shape[1])))
        return scores

    def _note_taken(self, tokens_B: Tensor) -> None:
        assert self._newest_BV is not None
        self._taken_B.append(self._newest_BV.gather(1, tokens_B[:, None])[:, 0])

    def by_row(self, answers_BT: Tensor) -> list[list[TokenLogprobs]]:
        """Return what was noted for each row's generated tokens, when generating is done."""
        self._note_taken(answers_BT[:, -1])
        taken = torch.stack(self._taken_B, 1).tolist()
        ids = torch.stack([top.indices for top in self._top_BK], 1).tolist()
        values = torch.stack([top.values for top in self._top_BK], 1).tolist()
        return [
            [
                TokenLogprobs(logprob, tuple(zip(*top, strict=True)))
                for logprob, *top in zip(*row, strict=True)
            ]
            for row in zip(taken, ids, values, strict=True)
        ]


# ---- stop strings


def _nobody_asks() -> None:
    pass


class _Alive(StoppingCriteria):
    """Ends nothing; says at each token that work goes on."""

    def __init__(self, say: Callable[[], None]) -> None:
        self._say = say

    @override
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._say()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


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
