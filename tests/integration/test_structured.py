"""Answers that have a form: always of it under random weights, the same tokens from both engines,
in any company and when put back.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from quantbatch import structured
from quantbatch.engine.continuous import EngineLimits
from quantbatch.engine.grammar import Grammars
from quantbatch.records import Answer, Completion, Failure, FinishReason, Request, RequestId
from quantbatch.spec import Sampling
from quantbatch.wants import Grammar, Write
from tests.integration.llama import ALPHABET, END, loaded, make_llama, make_tokenizer
from tests.integration.test_continuous_engine import (
    BIG,
    ROOMY,
    Pair,
    check_empty,
    engine_of,
    oracle,
    run,
    words,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 8},
        "category": {"enum": ["billing", "shipping", "other"]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "urgent": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["new", "late"]}, "maxItems": 2},
    },
    "required": ["title", "category", "stars", "score", "urgent", "tags"],
    "additionalProperties": False,
}
SIX = Grammar("json_schema", json.dumps(SCHEMA))
REGEX = Grammar("regex", r"[A-Z]{2}-[0-9]{1,4}(é|€)?")
CHOICES = Grammar("choices", json.dumps(["yes", "no", "not yet", "nö"]))
LARK = Grammar("grammar", 'start: item (", " item)?\nitem: /[a-c]{1,3}/ | "(" item ")"\n')
NUMBER = Grammar("json_schema", '{"type": ["integer", "null"], "minimum": -99, "maximum": 99}')


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model of 320 scores; its tokenizer has 259 tokens."""
    changes = BIG | {"max_position_embeddings": 1024}
    folder = make_llama(tmp_path_factory.mktemp("llama"), dtype=torch.float32, **changes)
    return Pair(loaded(folder), loaded(folder))


def asking(
    grammars: Sequence[Grammar | None], count: int, seed: int = 0, **sampling: Any
) -> list[Request]:
    chance = random.Random(seed)
    settings = Sampling.model_validate({"max_new_tokens": 400} | sampling)
    return [
        Request(
            RequestId(0, row), tuple(words(chance, chance.randint(1, 30))), settings, row * 7919,
            want=Write(grammar=grammars[row % len(grammars)]),
        )
        for row in range(count)
    ]  # fmt: skip


def valid(requests: Iterable[Request], answers: dict[RequestId, Answer]) -> int:
    """Count the answers that are complete and of the form that was asked for."""
    found = 0
    for request in requests:
        answer = answers[request.id]
        assert isinstance(answer, Completion), answer
        grammar = request.want.grammar if isinstance(request.want, Write) else None
        if answer.finish_reason is FinishReason.STOP and grammar:
            found += structured.fault(grammar, answer.text) is None
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_thousand_of_a_thousand_answers_are_valid(
    llama: Pair, tokenizer: Any, temperature: float
) -> None:
    requests = asking([SIX], 1000, temperature=temperature)
    engine = engine_of(llama, tokenizer, EngineLimits(rows=64, kv_tokens=40_000, step_tokens=512))
    answers = run(engine, requests)
    assert valid(requests, answers) == 1000
    texts = {answer.text for answer in answers.values() if isinstance(answer, Completion)}
    assert len(texts) > 500, "the answers differ"
    check_empty(engine)


MIXED: list[Grammar | None] = [SIX, None, REGEX, CHOICES, None, LARK, NUMBER]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "narrow": {"temperature": 1.4, "top_k": 4, "top_p": 0.7, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "bias": {"logit_bias": {3 + ALPHABET.index(letter): 6.0 for letter in "ae1"}, "logprobs": 2},
    "bad words": {"bad_words": ["ab", "12"], "temperature": 1.0},
    "stop": {"stop_token_ids": [2, 300], "temperature": 1.0},
}


@pytest.mark.parametrize(
    ("name", "late"), [*((name, False) for name in SAMPLINGS), ("sampled", True), ("bias", True)]
)
def test_both_engines_give_the_same_answers(
    llama: Pair, tokenizer: Any, name: str, late: bool
) -> None:
    requests = asking(MIXED, 28, **{"max_new_tokens": 80} | SAMPLINGS[name])
    expected = oracle(llama, tokenizer, requests)
    engine = engine_of(llama, tokenizer, replace(ROOMY, rows=11), late=late)
    found = run(engine, requests)
    for request in requests:
        one, other = found[request.id], expected[request.id]
        if isinstance(one, Completion) and isinstance(other, Completion):
            assert (one.text, one.token_ids) == (other.text, other.token_ids)
        else:
            assert isinstance(one, Failure)
            assert isinstance(other, Failure)
            assert one.kind == other.kind == "grammar"
    assert sum(isinstance(answer, Completion) for answer in found.values()) > 20
    check_empty(engine)


@pytest.mark.parametrize("late", [False, True])
def test_rows_that_are_put_back_keep_to_their_form(llama: Pair, tokenizer: Any, late: bool) -> None:
    first = [
        replace(r, id=RequestId(1, r.id.row)) for r in asking([CHOICES], 20, max_new_tokens=10)
    ]
    requests = asking([SIX, NUMBER, SIX, None], 12, seed=3, max_new_tokens=250)
    expected = oracle(llama, tokenizer, [*first, *requests])
    tight = EngineLimits(rows=12, kv_tokens=300, step_tokens=64, block_tokens=4)
    engine = engine_of(llama, tokenizer, tight, late=late)
    found = run(engine, first) | run(engine, requests)
    assert engine.totals.preemptions > 0
    assert found == expected
    check_empty(engine)


def test_an_answer_ends_only_where_its_form_does(llama: Pair, tokenizer: Any) -> None:
    """Whatever a model would rather do: the end token is its favourite here."""
    bias = {0: 100.0, 1: 100.0}
    requests = asking([REGEX, SIX], 20, logit_bias=bias)
    answers = run(engine_of(llama, tokenizer), requests)
    assert valid(requests, answers) == 20
    for answer in answers.values():
        assert isinstance(answer, Completion)
        assert answer.token_ids[-1] in (0, 1)


def test_an_answer_that_is_cut_off_is_not_made_whole(llama: Pair, tokenizer: Any) -> None:
    requests = asking([SIX], 5, max_new_tokens=20)
    for answer in run(engine_of(llama, tokenizer), requests).values():
        assert isinstance(answer, Completion)
        assert answer.finish_reason is FinishReason.LENGTH
        assert structured.fault(SIX, answer.text) is not None


@pytest.mark.parametrize(
    ("grammar", "sampling", "kind", "message"),
    [
        (Grammar("regex", "a("), {}, "bad_request", "unclosed group"),
        (Grammar("json_schema", '{"type": "strin"}'), {}, "bad_request", "strin"),
        (Grammar("grammar", "start: nothing"), {}, "bad_request", "unknown name"),
        (CHOICES, {"min_new_tokens": 2}, "bad_request", "min_new_tokens"),
        (Grammar("choices", '["a"]'), {"bad_words": ["a"]}, "grammar", "leave no token"),
    ],
)
def test_what_can_not_be_followed_is_that_row_s_failure(
    llama: Pair, tokenizer: Any, grammar: Grammar, sampling: dict[str, Any], kind: str, message: str
) -> None:
    bad = asking([grammar], 1, **sampling)
    good = [replace(r, id=RequestId(1, r.id.row)) for r in asking([CHOICES, None], 6)]
    engine = engine_of(llama, tokenizer)
    found = run(engine, [*bad, *good])
    failure = found[RequestId(0, 0)]
    assert isinstance(failure, Failure)
    assert failure.kind == kind
    assert message in failure.message
    assert sum(isinstance(answer, Completion) for answer in found.values()) == 6
    other = oracle(llama, tokenizer, bad)[RequestId(0, 0)]
    assert isinstance(other, Failure)
    assert other.kind == kind
    check_empty(engine)


def test_sentencepiece_tokens_are_understood(tmp_path: Path) -> None:
    """A vocabulary with spaces as \u2581 and bytes as <0x..>: as Llama 2 and Gemma have them."""
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.normalizers import Prepend, Replace, Sequence
    from transformers import PreTrainedTokenizerFast

    letters = [*'{}[]":,. aeinosty0123456789', "\u2581", "\u2581n", '{"', "no", "yes"]
    names = dict.fromkeys(["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256)), *letters])
    vocabulary = {name: number for number, name in enumerate(names)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = Sequence([Prepend("\u2581"), Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token=END, unk_token="<unk>"
    )
    changes: dict[str, Any] = {
        "vocab_size": len(vocabulary) + 5,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    folder = make_llama(tmp_path, dtype=torch.float32, **changes, max_position_embeddings=1024)
    pair = Pair(loaded(folder), loaded(folder))
    requests = asking([SIX, REGEX, CHOICES], 60, temperature=1.0)
    requests = [replace(r, prompt_ids=(5, 6, r.id.row % 7 + 2)) for r in requests]
    assert valid(requests, run(engine_of(pair, tokenizer), requests)) == 60


def test_a_grammar_is_compiled_once(llama: Pair, tokenizer: Any) -> None:
    engine = engine_of(llama, tokenizer)
    grammars: Grammars = engine._grammars
    run(engine, asking([SIX, CHOICES, None], 30))
    assert len(grammars._compiled) == 2
