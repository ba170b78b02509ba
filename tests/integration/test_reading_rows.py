"""Rows that only read: rankings, scores and embeddings of the continuous engine against those of
the plain forward, one row at a time, whatever the limits, the order and the company.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbatch.engine import paged
from quantbatch.engine.continuous import EngineLimits
from quantbatch.engine.paged import PagedStore
from quantbatch.engine.pieces import TREE_TOKENS_AT_ONCE
from quantbatch.engine.reading import numbers
from quantbatch.records import Completion, Embedded, Failure, Ranked, Request, RequestId, Scored
from quantbatch.spec import Sampling
from quantbatch.wants import Embed, Rank, Score, Want, Write
from tests.integration.llama import VOCABULARY, loaded, make_llama, make_model, make_tokenizer
from tests.integration.test_continuous_engine import (
    ARCHITECTURES,
    BIG,
    FIXTURES,
    ROOMY,
    InPages,
    Pair,
    Way,
    asked,
    check_empty,
    engine_of,
    oracle,
    run,
    ways,
    words,
)

if TYPE_CHECKING:
    from pathlib import Path

    from quantbatch.records import Answer

KINDS = {Rank: Ranked, Score: Scored, Embed: Embedded, Write: Completion}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = make_llama(tmp_path_factory.mktemp("llama"), dtype=torch.float32, **BIG)
    return Pair(loaded(folder), loaded(folder))


def wanted(chance: random.Random, prompt: list[int]) -> Want:
    match chance.choice(["rank", "rank", "score", "last", "mean", "write"]):
        case "rank":
            stems = [words(chance, chance.randint(0, 3)) for _ in range(3)]
            count = chance.choice([1, 2, 8, 20])
            found = [
                chance.choice(stems) + words(chance, chance.randint(1, 3)) for _ in range(count)
            ]
            return Rank(tuple(map(tuple, found)))
        case "score" if len(prompt) > 1:
            return Score(chance.randint(1, len(prompt) - 1))
        case "last":
            return Embed("last")
        case "mean":
            return Embed("mean")
        case _:
            return Write()


def mixture(count: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 90 tokens, half of which begin like others, for every kind of want."""
    chance = random.Random(seed)
    beginnings = [words(chance, tokens) for tokens in (16, 37, 70)]
    found = []
    for row in range(count):
        prompt = chance.choice([*beginnings, [], []]) + words(chance, chance.choice([1, 2, 7, 20]))
        sampling = Sampling(max_new_tokens=chance.randint(1, 12))
        want = wanted(chance, prompt)
        found.append(Request(RequestId(0, row), tuple(prompt), sampling, row, want=want))
    return found


def check(found: dict[RequestId, Answer], expected: dict[RequestId, Answer]) -> None:
    assert found.keys() == expected.keys()
    for id, answer in expected.items():
        assert type(found[id]) is type(answer)
        if isinstance(answer, Completion | Failure):
            assert found[id] == answer
        else:
            assert list(numbers(found[id])) == pytest.approx(list(numbers(answer)), abs=2e-4)


@pytest.fixture(scope="module")
def expected(llama: Pair, tokenizer: Any) -> dict[RequestId, Answer]:
    return oracle(llama, tokenizer, mixture(200))


def test_the_mixture_has_every_kind(expected: dict[RequestId, Answer]) -> None:
    for request in mixture(200):
        assert isinstance(expected[request.id], KINDS[type(request.want)])
    assert {type(request.want) for request in mixture(200)} == set(KINDS)


@settings(max_examples=12, deadline=None, suppress_health_check=FIXTURES)
@given(way=ways(), first=st.integers(0, 150))
def test_what_is_read_is_the_oracle_s(
    llama: Pair, tokenizer: Any, expected: dict[RequestId, Answer], way: Way, first: int
) -> None:
    requests = mixture(200)[first : first + 50]
    engine: Any = asked(llama, tokenizer, requests, way)
    check(engine.answers, {request.id: expected[request.id] for request in requests})
    assert not engine._readings._read


@pytest.mark.parametrize("late", [False, True])
def test_all_of_them_at_once(
    llama: Pair, tokenizer: Any, expected: dict[RequestId, Answer], late: bool
) -> None:
    engine = engine_of(llama, tokenizer, replace(ROOMY, rows=32), late=late)
    check(run(engine, mixture(200)), expected)
    assert engine.totals.reused_tokens > 500
    check_empty(engine)


def test_pages_give_the_same(
    llama: Pair, tokenizer: Any, expected: dict[RequestId, Answer]
) -> None:
    llama.packed.set_attn_implementation(llama.plain.config._attn_implementation)
    engine = InPages(llama.packed, tokenizer, EngineLimits(rows=7, kv_tokens=320, step_tokens=48))
    check(run(engine, mixture(200)[:100]), {k: v for k, v in expected.items() if k.row < 100})
    check_empty(engine)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mistral", "gpt2"])
@pytest.mark.parametrize("at_once", [1, 200, TREE_TOKENS_AT_ONCE])
def test_rows_with_the_same_candidates_are_read_together_in_pages(
    tmp_path: Path,
    tokenizer: Any,
    model_type: str,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of many lengths, some with a window or squashed scores; what pages held before is no
    number.
    """
    monkeypatch.setattr(paged, "TREE_TOKENS_AT_ONCE", at_once)
    together: list[int] = []
    side_by_side = PagedStore._side_by_side

    def noted(store: PagedStore, spans: Any) -> Any:
        together.append(len(spans))
        return side_by_side(store, spans)

    monkeypatch.setattr(PagedStore, "_side_by_side", noted)
    changes = BIG | ARCHITECTURES.get(model_type, {})
    made = make_model(tmp_path, model_type, dtype=torch.float32, **changes)
    pair = Pair(loaded(made), loaded(made))
    chance = random.Random(3)
    stem = words(chance, 2)
    few = tuple(tuple([*stem[:i], *words(chance, 2)]) for i in (0, 1, 2, 2))
    many = (*few, tuple(words(chance, 5)), (7,))
    requests = [
        Request(
            RequestId(0, row),
            tuple(words(chance, chance.choice([1, 3, 17, 40, 71]))),
            Sampling(),
            row,
            want=Rank(many if row % 9 == 8 else few),
        )
        for row in range(30)
    ]
    limits = EngineLimits(rows=7, kv_tokens=480, step_tokens=160)
    engine = InPages(pair.packed, tokenizer, limits)
    store = engine._forward.store
    assert isinstance(store, PagedStore)
    with torch.inference_mode():
        for pages in store._pages.values():
            for each in pages:
                each.fill_(torch.nan)
    check(run(engine, requests), oracle(pair, tokenizer, requests))
    check_empty(engine)
    assert (max(together) > 2) == (at_once > 1)


def test_a_step_has_no_more_scores_than_it_may(llama: Pair, tokenizer: Any) -> None:
    requests = [r for r in mixture(200) if not isinstance(r.want, Write)]
    expected = oracle(llama, tokenizer, requests)
    engine = engine_of(llama, tokenizer, ROOMY)
    engine._scheduler._read_limits = engine._scheduler._read_limits._replace(
        step_scores=16, most_nodes=8
    )
    seen = []
    forward = engine._forward.run
    engine._forward.run = lambda *step: seen.append(len(step[2])) or forward(*step)  # type: ignore[func-returns-value, method-assign]
    check(run(engine, requests), expected)
    assert max(seen) <= 16
    check_empty(engine)


@pytest.mark.parametrize("model_type", ["gemma2", "mistral", "gpt2", "qwen3", "mixtral"])
def test_other_architectures_read_alike(tmp_path: Path, tokenizer: Any, model_type: str) -> None:
    changes = BIG | ARCHITECTURES[model_type]
    made = make_model(tmp_path, model_type, dtype=torch.float32, **changes)
    pair = Pair(loaded(made), loaded(made))
    requests = mixture(40, seed=2)
    expected = oracle(pair, tokenizer, requests)
    tight = EngineLimits(rows=7, kv_tokens=260, step_tokens=48, block_tokens=8)
    for limits, late in ((ROOMY, False), (tight, True)):
        engine = engine_of(pair, tokenizer, limits, late=late)
        check(run(engine, requests), expected)
        check_empty(engine)


@pytest.mark.parametrize(
    ("want", "said"),
    [
        (Rank(()), "candidates: there are none"),
        (Rank(((5,), ())), "or one has no tokens"),
        (Rank(((5, VOCABULARY),)), f"candidates: the model has no token {VOCABULARY}"),
        (Score(0), "first: 0 is no token"),
        (Score(3), "first: 3 is no token"),
        (Rank((tuple([5] * 254),)), "257 tokens do not fit a context of 256"),
    ],
)
def test_a_bad_request_fails_alone(llama: Pair, tokenizer: Any, want: Want, said: str) -> None:
    good = Request(RequestId(0, 0), (4, 5, 6), Sampling(), 0, want=Score(1))
    bad = replace(good, id=RequestId(0, 1), want=want)
    for engine in (engine_of(llama, tokenizer), None):
        found = run(engine, [good, bad]) if engine else oracle(llama, tokenizer, [good, bad])
        failure = found[bad.id]
        assert isinstance(failure, Failure)
        assert said in failure.message
        assert isinstance(found[good.id], Scored)


def test_a_candidate_may_be_longer_than_a_window(tmp_path: Path, tokenizer: Any) -> None:
    changes = BIG | ARCHITECTURES["mistral"]
    made = make_model(tmp_path, "mistral", dtype=torch.float32, **changes)
    pair = Pair(loaded(made), loaded(made))
    chance = random.Random(1)
    labels = tuple(tuple(words(chance, count)) for count in (30, 19, 2))
    requests = [
        Request(RequestId(0, i), tuple(words(chance, 25)), Sampling(), 0, want=Rank(labels))
        for i in range(3)
    ]
    check(run(engine_of(pair, tokenizer), requests), oracle(pair, tokenizer, requests))
