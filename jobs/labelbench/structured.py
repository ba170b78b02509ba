"""Structured JSON against free text: the same model, prompts and numbers of tokens, batch 32.

The structured answers come first, once; the free ones then have as many tokens, row by row, for the
model never ends an answer by itself. Both are timed in turns, and the structured ones checked: each
that was not cut off is valid.

It favours the free ones a little: their lengths are known beforehand, the longest go first, and so
32 rows take 78 steps instead of 83 (with 150,000 words).
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers

from jobs.enginebench import model as models
from jobs.enginebench.model import SEED, SHAPE, TOKENIZER
from jobs.labelbench import vocabulary
from jobs.labelbench.grammars import SCHEMA
from quantbatch import structured
from quantbatch.engine.continuous import ContinuousEngine, EngineLimits
from quantbatch.prompts.tokens import load_tokenizer
from quantbatch.records import Completion, FinishReason, Request, RequestId
from quantbatch.spec import Sampling
from quantbatch.wants import Grammar, Write

if TYPE_CHECKING:
    from collections.abc import Sequence

hf: Any = transformers

BATCH = 32
PROMPT_TOKENS = 60, 200
NEW_TOKENS = 160
FORM = Grammar("json_schema", json.dumps(SCHEMA))


def measure(words: int, *, rows: int, rounds: int, temperature: float) -> dict[str, Any]:
    """Return tokens/s of both, each the median of the rounds.

    Args:
        words: Size of the vocabulary; 4,096 is that of the quickstart's tokenizer.
        rows: Number of prompts.
        rounds: How often each contender runs.
        temperature: Of both.
    """
    tokenizer = (
        load_tokenizer(TOKENIZER) if words == SHAPE["vocab_size"] else vocabulary.make(words)
    )
    model = models.make(tokenizer, vocab_size=words)
    model.set_attn_implementation("sdpa")
    tokens = BATCH * (PROMPT_TOKENS[1] + NEW_TOKENS)
    # A prompt comes several times, and would be found in the cache.
    limits = EngineLimits(BATCH, tokens, 512, share_prefixes=False)
    engine = ContinuousEngine(model, tokenizer, limits)
    return compare(engine, words, rows=rows, rounds=rounds, temperature=temperature)


def compare(
    engine: ContinuousEngine, words: int, *, rows: int, rounds: int, temperature: float
) -> dict[str, Any]:
    """Return tokens/s of both by an engine, which shares no beginnings; see `measure`."""
    forms = _requests(rows, words, temperature)
    # What an engine does once, such as reading the vocabulary or recording steps, it does here.
    answers = _timed(engine, forms)[1]
    free = [
        Request(r.id, r.prompt_ids, _sampling(len(answers[r.id].token_ids), temperature), r.seed)
        for r in forms
    ]
    _timed(engine, free)
    seconds: dict[str, list[float]] = {"structured": [], "free": []}
    rates: dict[str, list[float]] = {"structured": [], "free": []}
    for _ in range(rounds):
        for name, requests in (("structured", forms), ("free", free)):
            took_s, found = _timed(engine, requests)
            # In 16 bits a structured answer may be another one in another batch, and so longer.
            assert name == "structured" or _tokens(found) == _tokens(answers)
            seconds[name].append(took_s)
            rates[name].append(_tokens(found) / took_s)
    typical = {name: statistics.median(each) for name, each in rates.items()}
    whole = [a for a in answers.values() if a.finish_reason is FinishReason.STOP]
    return {
        "words": words,
        "rows": rows,
        "temperature": temperature,
        "tokens": _tokens(answers),
        "complete": len(whole),
        "valid": sum(structured.fault(FORM, answer.text) is None for answer in whole),
        "structured_tokens_per_s": round(typical["structured"]),
        "free_tokens_per_s": round(typical["free"]),
        "share_of_free": round(typical["structured"] / typical["free"], 3),
        "seconds": {name: [round(each, 2) for each in times] for name, times in seconds.items()},
    }


def _tokens(answers: dict[RequestId, Completion]) -> int:
    return sum(len(answer.token_ids) for answer in answers.values())


def _sampling(tokens: int, temperature: float) -> Sampling:
    # Drawn, a free answer might end before the structured one did.
    least = tokens if temperature else 0
    return Sampling(max_new_tokens=tokens, min_new_tokens=least, temperature=temperature)


def _requests(rows: int, words: int, temperature: float) -> list[Request]:
    draw = np.random.default_rng(SEED)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=temperature)
    return [
        Request(
            RequestId(0, row),
            tuple(draw.integers(300, words - 1, int(draw.integers(*PROMPT_TOKENS))).tolist()),
            sampling,
            row,
            want=Write(grammar=FORM),
        )
        for row in range(rows)
    ]


def _timed(
    engine: ContinuousEngine, requests: Sequence[Request]
) -> tuple[float, dict[RequestId, Completion]]:
    """Answer requests; their tokens have been read when it ends, on a card too."""
    gc.collect()
    began = time.perf_counter()
    found = _answered(engine, requests)
    return time.perf_counter() - began, found


def _answered(engine: ContinuousEngine, requests: Sequence[Request]) -> dict[RequestId, Completion]:
    engine.add(requests)
    found: dict[RequestId, Completion] = {}
    while engine.has_work():
        for answer in engine.step():
            assert isinstance(answer, Completion), answer
            found[answer.id] = answer
    return found
