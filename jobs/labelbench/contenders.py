"""Ways to label, score and embed rows of tokens.

Each returns numbers for each row that the race compares: the log-likelihoods of labels, the
log-likelihood of a text, a vector; those that write return tokens, which are not compared. Models
are those of `enginebench` and `gpubench`, which never end an answer by themselves.

All of them return numbers, not tensors: on a card, when they return, the card is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

from jobs.enginebench.contenders import STEP_TOKENS, attention
from jobs.enginebench.model import Loaded
from jobs.enginebench.workload import MAX_PROMPT, Row, Tokens
from quantbatch.engine.continuous import ContinuousEngine, EngineLimits
from quantbatch.engine.reading import numbers
from quantbatch.records import Answer, Completion, Request, RequestId
from quantbatch.spec import Sampling
from quantbatch.wants import Embed, Rank, Score, Want, Write

hf: Any = transformers

ANSWER_TOKENS = 5
"""Tokens that are generated for a label, by those that generate."""
ROWS_AT_ONCE = 32
Numbers = list[float]


@dataclass(frozen=True)
class Contender:
    """A way to answer rows."""

    name: str
    answer: Callable[[Sequence[Row]], list[Numbers]]
    attention: str = "sdpa"
    compared: bool = True
    """Whether its numbers have to be those of the first."""


def classifying(loaded: Loaded, labels: Sequence[Tokens]) -> list[Contender]:
    """Return ways to label rows."""
    return [
        Contender("classify", lambda rows: _ours(loaded, rows, Rank(tuple(labels)))),
        Contender("generate", lambda rows: _ours(loaded, rows, Write()), compared=False),
        Contender("pipeline, batch 8", lambda rows: pipeline(loaded, rows), compared=False),
    ]


def scoring(loaded: Loaded) -> list[Contender]:
    """Return ways to score all tokens of rows but the first."""
    return [
        Contender("score", lambda rows: _ours(loaded, rows, Score(1), summed=True)),
        *(
            Contender(f"padded, batch {size}", partial(padded_scores, loaded, size=size))
            for size in (8, 32)
        ),
    ]


def embedding(loaded: Loaded) -> list[Contender]:
    """Return ways to pool the hidden states of rows to their mean."""
    return [
        Contender("embed", lambda rows: _ours(loaded, rows, Embed("mean"))),
        *(
            Contender(f"padded, batch {size}", partial(padded_vectors, loaded, size=size))
            for size in (8, 32)
        ),
    ]


def _ours(
    loaded: Loaded, rows: Sequence[Row], want: Want, *, summed: bool = False
) -> list[Numbers]:
    limits = EngineLimits(
        rows=ROWS_AT_ONCE,
        kv_tokens=ROWS_AT_ONCE * (MAX_PROMPT + 64),
        step_tokens=STEP_TOKENS,
    )
    found = by_engine(ContinuousEngine(loaded.model, loaded.tokenizer, limits), rows, want)
    return [[sum(each)] for each in found] if summed else found


def by_engine(engine: ContinuousEngine, rows: Sequence[Row], want: Want) -> list[Numbers]:
    """Return what rows want of an engine; the tokens of an answer are numbers, too."""
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
    engine.add(
        Request(RequestId(0, i), row.prompt_ids, sampling, 0, want=want)
        for i, row in enumerate(rows)
    )
    answers: dict[int, Answer] = {}
    while engine.has_work():
        answers |= {answer.id.row: answer for answer in engine.step()}
    return [_numbers(answers[i]) for i in range(len(rows))]


def _numbers(answer: Answer) -> Numbers:
    if isinstance(answer, Completion):
        assert len(answer.token_ids) == ANSWER_TOKENS
        return [*map(float, answer.token_ids)]
    found = [*numbers(answer)]
    assert found, answer
    return found


def pipeline(loaded: Loaded, rows: Sequence[Row]) -> list[Numbers]:
    """Do what the first page of the manual says: rows as they come, eight at a time."""
    model, tokenizer = loaded
    pipe = hf.pipeline("text-generation", model=model, tokenizer=tokenizer)
    config = hf.GenerationConfig(max_new_tokens=ANSWER_TOKENS, do_sample=False)
    found = pipe(
        [row.text for row in rows], batch_size=8, return_tensors=True, generation_config=config
    )
    return [answer["generated_token_ids"][-ANSWER_TOKENS:] for [answer] in found]


def _padded(loaded: Loaded, rows: Sequence[Row], size: int) -> Iterator[tuple[Any, Any]]:
    """Yield the ids and the mask of batches, in the order of the rows, padded on the right."""
    device = loaded.model.device
    for begin in range(0, len(rows), size):
        batch = [list(row.prompt_ids) for row in rows[begin : begin + size]]
        longest = max(map(len, batch))
        ids = torch.tensor([each + [0] * (longest - len(each)) for each in batch], device=device)
        mask = torch.tensor(
            [[1] * len(each) + [0] * (longest - len(each)) for each in batch], device=device
        )
        yield ids, mask


@torch.inference_mode()
def padded_scores(loaded: Loaded, rows: Sequence[Row], size: int) -> list[Numbers]:
    """Return the log-likelihood of all tokens of rows but the first, batch by batch."""
    found: list[Numbers] = []
    for ids, mask in _padded(loaded, rows, size):
        scores = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        # In float32, as ours are: the sum of hundreds of 16-bit ones would say little.
        logprobs_32 = scores[:, :-1].log_softmax(-1, dtype=torch.float32)
        logprobs = logprobs_32.gather(2, ids[:, 1:, None])[..., 0]
        found += [[total] for total in (logprobs * mask[:, 1:]).sum(1).tolist()]
    return found


@torch.inference_mode()
def padded_vectors(loaded: Loaded, rows: Sequence[Row], size: int) -> list[Numbers]:
    """Return the mean hidden state of rows, batch by batch."""
    found: list[Numbers] = []
    for ids, mask in _padded(loaded, rows, size):
        base = loaded.model.base_model
        states = base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        weights = mask[..., None]
        found += ((states.float() * weights).sum(1) / weights.sum(1)).tolist()
    return found


def ready(loaded: Loaded, contender: Contender) -> Any:
    """Return a context in which the model attends as a contender wants it."""
    return attention(loaded.model, contender.attention)
