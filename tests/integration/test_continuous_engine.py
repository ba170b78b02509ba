"""The continuous engine against the static one with a batch of one: the same tokens, whatever the
limits, the order and the company.
"""

from __future__ import annotations

import contextlib
import random
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typing_extensions import override

from quantbatch.engine.attention import NAME, UnsupportedModelError
from quantbatch.engine.continuous import ContinuousEngine, EngineLimits
from quantbatch.engine.paged import PagedStore
from quantbatch.engine.probe import Probe
from quantbatch.engine.static import StaticEngine
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.records import Answer, Completion, Failure, FinishReason, Request, RequestId
from quantbatch.runner import Runner
from quantbatch.spec import FourBit, Int8, Model, Sampling
from quantbatch.weights import loading
from tests.integration.llama import (
    END,
    HIDDEN,
    OPTIONS,
    SEEDS,
    VOCABULARY,
    chain,
    loaded,
    make_chain,
    make_llama,
    make_model,
    make_tokenizer,
    random_prompts,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from quantbatch.engine.kvstore import KvStore

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
ROOMY = EngineLimits(rows=8, kv_tokens=4096, step_tokens=128)
BIG: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.2}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"), dtype=torch.float32, **BIG)


@pytest.fixture(scope="session")
def chain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chain(tmp_path_factory.mktemp("chain"))


class Pair(NamedTuple):
    """A model twice, since an engine exchanges its attention."""

    plain: Any
    packed: Any


@pytest.fixture(scope="session")
def llama(folder: Path) -> Pair:
    return Pair(loaded(folder), loaded(folder))


# ---- asking


def run(engine: Any, requests: Iterable[Request] = ()) -> dict[RequestId, Answer]:
    """Have requests answered; each exactly once."""
    engine.add(requests)
    found: dict[RequestId, Answer] = {}
    while engine.has_work():
        for answer in engine.step():
            assert answer.id not in found, "answered twice"
            found[answer.id] = answer
    return found


def oracle(pair: Pair, tokenizer: Any, requests: Iterable[Request]) -> dict[RequestId, Answer]:
    return run(StaticEngine(pair.plain, tokenizer, batch_size=1), requests)


def engine_of(
    pair: Pair, tokenizer: Any, limits: EngineLimits = ROOMY, *, late: bool = False
) -> ContinuousEngine:
    """Make an engine; one that reads tokens `late`, as on a card, launches a step before it has
    read the last one's tokens.
    """
    pair.packed.set_attn_implementation(pair.plain.config._attn_implementation)
    engine = ContinuousEngine(pair.packed, tokenizer, limits)
    engine._overlaps = late
    return engine


def check_empty(engine: ContinuousEngine) -> None:
    assert not engine.has_work()
    assert engine._pool.available == engine._pool.size
    engine._pool.check([])
    assert not engine._scheduler._wanted
    assert not engine._scheduler._coming


def mixed(count: int, seed: int = 0, new_tokens: int = 12) -> list[Request]:
    """Prompts of 1 to 90 tokens, half of which begin like others; some are equal."""
    chance = random.Random(seed)
    beginnings = [words(chance, tokens) for tokens in (16, 37, 70)]
    prompts: list[list[int]] = []
    for _ in range(count):
        begin = chance.choice([*beginnings, [], [], []])
        prompt = begin + words(chance, chance.choice([1, 2, 7, 20]))
        prompts.append(chance.choice(prompts) if prompts and chance.random() < 0.05 else prompt)
    return [
        Request(
            RequestId(0, row), tuple(prompt),
            Sampling(max_new_tokens=chance.randint(1, new_tokens)), seed=row,
        )
        for row, prompt in enumerate(prompts)
    ]  # fmt: skip


def words(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(3, VOCABULARY) for _ in range(count)]


# ---- greedy


@dataclass(frozen=True)
class Way:
    """How requests are put to an engine."""

    limits: EngineLimits
    late: bool
    seed: int
    """Of the order, and of when requests come."""


@st.composite
def ways(draw: st.DrawFn) -> Way:
    block_tokens = draw(st.sampled_from([1, 4, 16, 32]))
    limits = EngineLimits(
        rows=draw(st.integers(1, 12)),
        # From just enough for the longest row to plenty.
        kv_tokens=draw(st.sampled_from([128, 128, 200, 512, 2048])),
        step_tokens=draw(st.integers(16, 160)),
        block_tokens=block_tokens,
        refill_share=draw(st.sampled_from([0.0, 0.0, 0.3, 0.6])),
        share_prefixes=draw(st.booleans()),
    )
    return Way(limits, draw(st.booleans()), draw(st.integers(0, 2**32)))


def asked(pair: Pair, tokenizer: Any, requests: Sequence[Request], way: Way) -> ContinuousEngine:
    """Put requests to an engine in some order, some now and some between steps."""
    chance = random.Random(way.seed)
    requests = chance.sample(list(requests), len(requests))
    engine = engine_of(pair, tokenizer, way.limits, late=way.late)
    found: dict[RequestId, Answer] = {}
    while requests or engine.has_work():
        if requests and (chance.random() < 0.2 or not engine.has_work()):
            count = chance.choice([1, 5, 40])
            engine.add(requests[:count])
            requests = requests[count:]
        for answer in engine.step():
            assert answer.id not in found
            found[answer.id] = answer
        tables = [row.blocks for row in engine._scheduler.running]
        engine._pool.check(tables)
    check_empty(engine)
    engine.answers = found  # type: ignore[attr-defined]
    return engine


@pytest.fixture(scope="session")
def llama_answers(llama: Pair, tokenizer: Any) -> dict[RequestId, Answer]:
    return oracle(llama, tokenizer, mixed(300))


FIXTURES = [HealthCheck.function_scoped_fixture]


@settings(max_examples=12, deadline=None, suppress_health_check=FIXTURES)
@given(way=ways(), first=st.integers(0, 240))
def test_greedy_answers_are_the_oracle_s(
    llama: Pair, tokenizer: Any, llama_answers: dict[RequestId, Answer], way: Way, first: int
) -> None:
    requests = mixed(300)[first : first + 60]
    engine: Any = asked(llama, tokenizer, requests, way)
    assert engine.answers == {r.id: llama_answers[r.id] for r in requests}


@pytest.mark.parametrize("late", [False, True])
def test_all_of_them_at_once(
    llama: Pair, tokenizer: Any, llama_answers: dict[RequestId, Answer], late: bool
) -> None:
    engine = engine_of(llama, tokenizer, replace(ROOMY, rows=32), late=late)
    assert run(engine, mixed(300)) == llama_answers
    assert engine.totals.finished == 300
    assert engine.totals.reused_tokens > 1000
    check_empty(engine)


class InPages(ContinuousEngine):
    """Keeps keys and values in pages, as on a card, and gathers them, as where Triton is not."""

    @override
    def _make_store(self) -> KvStore:
        return PagedStore(
            slots=max(2, self._limits.rows),
            blocks=self._pool.size,
            row_blocks=self._pool.size,
            device=self._device,
            block_tokens=self._limits.block_tokens,
        )


@pytest.mark.parametrize("late", [False, True])
def test_pages_give_the_same_answers(
    llama: Pair, tokenizer: Any, llama_answers: dict[RequestId, Answer], late: bool
) -> None:
    llama.packed.set_attn_implementation(llama.plain.config._attn_implementation)
    engine = InPages(llama.packed, tokenizer, EngineLimits(rows=7, kv_tokens=320, step_tokens=48))
    engine._overlaps = late
    found = run(engine, mixed(300)[:120])
    assert found == {key: llama_answers[key] for key in found}
    assert len(found) == 120
    assert engine.totals.reused_tokens > 0
    check_empty(engine)


def surprising(sampling: Sampling) -> list[Request]:
    """Short answers first, so that the long ones after them are expected to be short, too."""
    short, long = mixed(20, seed=1, new_tokens=1), mixed(24, seed=4)
    return [
        *short,
        *(
            replace(r, id=RequestId(1, r.id.row), sampling=sampling)
            for r in long
            if len(r.prompt_ids) < 50
        ),
    ]


TIGHT = EngineLimits(rows=12, kv_tokens=160, step_tokens=64, block_tokens=4)


def run_surprised(engine: ContinuousEngine, requests: Sequence[Request]) -> dict[RequestId, Answer]:
    found = run(engine, [r for r in requests if r.id.chunk == 0])
    found |= run(engine, [r for r in requests if r.id.chunk == 1])
    assert engine.totals.preemptions > 0
    assert engine.totals.wasted_positions > 0
    assert 0 < engine.totals.useful_share < 1
    check_empty(engine)
    return found


@pytest.mark.parametrize("late", [False, True])
def test_rows_are_put_back_and_lose_nothing(llama: Pair, tokenizer: Any, late: bool) -> None:
    requests = surprising(Sampling(max_new_tokens=40))
    expected = oracle(llama, tokenizer, requests)
    assert run_surprised(engine_of(llama, tokenizer, TIGHT, late=late), requests) == expected


@pytest.mark.parametrize("option", ["all", "temperature", "bad_words", "frequency_penalty"])
def test_rows_that_are_put_back_go_on_as_they_were_asked(
    llama: Pair, tokenizer: Any, option: str
) -> None:
    """Their draws go on where they were, and what they said counts."""
    fields = {"max_new_tokens": 40} | OPTIONS[option] | {"logprobs": 2, "stop_token_ids": []}
    requests = surprising(Sampling.model_validate(fields))
    expected = oracle(llama, tokenizer, requests)
    for late in (False, True):
        found = run_surprised(engine_of(llama, tokenizer, TIGHT, late=late), requests)
        for id, answer in expected.items():
            check_same(found[id], answer)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {},  # biases
    "qwen3": {"head_dim": 32},  # norms of queries and keys
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "head_dim": 32, "pad_token_id": 0},  # softcap
    "gemma3_text": {
        "sliding_window": 16, "head_dim": 32, "pad_token_id": 0, "num_hidden_layers": 3,
        "sliding_window_pattern": 3,
    },
    "phi": {},  # partial rotary
    "gpt2": {"bos_token_id": 1, "eos_token_id": 1},  # learned positions, Conv1D
    "gpt_neox": {},
    "opt": {"ffn_dim": 192, "word_embed_proj_dim": 128, "pad_token_id": 1},
    "starcoder2": {"sliding_window": 16},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4},
    "cohere": {"pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_greedy_answers_are_the_oracle_s_for_other_architectures(
    tmp_path: Path, tokenizer: Any, model_type: str
) -> None:
    changes = BIG | ARCHITECTURES[model_type]
    made = make_model(tmp_path, model_type, dtype=torch.float32, **changes)
    pair = Pair(loaded(made), loaded(made))
    requests = mixed(30, seed=2, new_tokens=24)
    expected = oracle(pair, tokenizer, requests)
    said = {t for a in expected.values() if isinstance(a, Completion) for t in a.token_ids}
    assert len(said) > 20, "answers that say too little"
    tight = EngineLimits(rows=7, kv_tokens=260, step_tokens=48, block_tokens=8)
    for limits, late in ((ROOMY, False), (tight, False), (tight, True)):
        engine = engine_of(pair, tokenizer, limits, late=late)
        assert run(engine, requests) == expected
        check_empty(engine)


QUANTIZED: dict[str, Model] = {
    "nf4": Model(id="x", dtype="float32", quantization=FourBit(compute_dtype="float32")),
    "int8": Model(id="x", dtype="float32", quantization=Int8(threshold=0)),
}
TIE = {"nf4": 1e-3, "int8": 0.02}
"""Distance of two scores that the order of additions may turn around; scores spread over some 20.
int8 rounds activations to 127 steps, so a difference in the last bit can move one by a step."""


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_models_answer_alike_but_for_ties(
    folder: Path, tokenizer: Any, kind: str
) -> None:
    model = QUANTIZED[kind].model_copy(update={"id": str(folder)})
    pair = Pair(*(loading.load(open_checkpoint(model), model, "cpu").model for _ in range(2)))
    requests = mixed(40, seed=3)
    expected = oracle(pair, tokenizer, requests)
    found = run(engine_of(pair, tokenizer, replace(ROOMY, kv_tokens=400, step_tokens=64)), requests)
    ties = [r for r in requests if found[r.id] != expected[r.id]]
    for request in ties:
        check_tie(pair.plain, request, found[request.id], expected[request.id], TIE[kind])
    assert len(ties) <= 4, "too many to be ties"


def check_tie(
    model: Any, request: Request, found: Answer, expected: Answer, tolerance: float
) -> None:
    """Prove that two answers part where the two likeliest tokens are as good as equal."""
    assert isinstance(found, Completion)
    assert isinstance(expected, Completion)
    pairs = zip(found.token_ids, expected.token_ids, strict=False)
    place, chosen = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    with torch.inference_mode():
        ids = [*request.prompt_ids, *expected.token_ids[:place]]
        scores = model(torch.tensor([ids])).logits[0, -1]
    top = scores.topk(2)
    assert set(chosen) == set(top.indices.tolist())
    assert float(top.values[0] - top.values[1]) < tolerance


# ---- sampling


def sampled(new_tokens: int = 12) -> list[Request]:
    """Every option for each of some prompts, all mixed."""
    prompts = random_prompts(5)
    made: list[Request] = []
    for name, fields in OPTIONS.items():
        for asks in (fields, fields | {"logprobs": 3}):
            sampling = Sampling.model_validate({"max_new_tokens": new_tokens} | asks)
            for prompt, seed in zip(prompts[: 3 - ("logprobs" in asks)], SEEDS, strict=False):
                row = len(made)
                made.append(Request(RequestId(0, row), tuple(prompt), sampling, seed + len(name)))
    return made


@pytest.fixture(scope="session")
def sampled_answers(llama: Pair, tokenizer: Any) -> dict[RequestId, Answer]:
    return oracle(llama, tokenizer, sampled())


def check_same(found: Answer, expected: Answer) -> None:
    """Equal, and log-probabilities within 1e-4."""
    assert isinstance(found, Completion)
    assert isinstance(expected, Completion)
    assert replace(found, logprobs=None) == replace(expected, logprobs=None)
    assert (found.logprobs is None) == (expected.logprobs is None)
    for one, other in zip(found.logprobs or (), expected.logprobs or (), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert [value for _, value in one.top] == pytest.approx(
            [value for _, value in other.top], abs=1e-4
        )


@settings(max_examples=6, deadline=None, suppress_health_check=FIXTURES)
@given(way=ways())
def test_every_option_of_sampling_in_one_batch(
    llama: Pair, tokenizer: Any, sampled_answers: dict[RequestId, Answer], way: Way
) -> None:
    engine: Any = asked(llama, tokenizer, sampled(), way)
    assert engine.answers.keys() == sampled_answers.keys()
    for id, expected in sampled_answers.items():
        check_same(engine.answers[id], expected)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_alone(
    llama: Pair, tokenizer: Any, sampled_answers: dict[RequestId, Answer], option: str
) -> None:
    """No row of the batch asks for anything else."""
    numbers = [n for n, name in enumerate(OPTIONS) if name == option]
    requests = sampled()[5 * numbers[0] : 5 * numbers[0] + 5]
    for id, answer in run(engine_of(llama, tokenizer), requests).items():
        check_same(answer, sampled_answers[id])


@pytest.mark.parametrize("late", [False, True])
def test_several_answers_share_a_prompt(llama: Pair, tokenizer: Any, late: bool) -> None:
    prompts = [[5 + i] * 3 + list(range(10, 60)) for i in range(3)]
    sampling = Sampling(max_new_tokens=10, temperature=1.2, n=6, logprobs=1)
    requests = [
        Request(RequestId(0, row, sample), tuple(prompt), sampling, 100 * row + sample)
        for row, prompt in enumerate(prompts)
        for sample in range(6)
    ]
    expected = oracle(llama, tokenizer, requests)
    engine = engine_of(llama, tokenizer, late=late)
    found = run(engine, requests)
    for id, answer in expected.items():
        check_same(found[id], answer)
    assert len({a.token_ids for a in found.values() if isinstance(a, Completion)}) == 18
    # 53 tokens of prompt are three blocks and a rest; five of six samples find them.
    assert engine.totals.reused_tokens == 3 * 5 * 48
    check_empty(engine)


def test_log_probabilities_beside_none(llama: Pair, tokenizer: Any) -> None:
    """Rows that ask for different numbers of them, and for none."""
    requests = [
        replace(r, sampling=Sampling(max_new_tokens=20, logprobs=count))
        for r, count in zip(mixed(24, seed=5), [None, 0, 1, 20] * 6, strict=True)
    ]
    expected = oracle(llama, tokenizer, requests)
    for late in (False, True):
        found = run(engine_of(llama, tokenizer, late=late), requests)
        for id, answer in expected.items():
            check_same(found[id], answer)


# ---- where an answer ends


def chained(
    folder: Path, tokenizer: Any, text: str, prompts: Sequence[str], *samplings: Sampling
) -> list[Completion]:
    """Answers of a chain, checked against the static engine's, read in time and late."""
    pair = Pair(chain(folder, tokenizer, text), chain(folder, tokenizer, text))
    requests = [
        Request(RequestId(0, row), tuple(tokenizer.encode(prompt)), sampling, row)
        for row, (sampling, prompt) in enumerate((s, p) for s in samplings for p in prompts)
    ]
    expected = oracle(pair, tokenizer, requests)
    for late in (False, True):
        engine = engine_of(pair, tokenizer, replace(ROOMY, rows=3), late=late)
        assert run(engine, requests) == expected
        check_empty(engine)
    return [completed(expected[r.id]) for r in requests]


def completed(answer: Answer) -> Completion:
    assert isinstance(answer, Completion), answer
    return answer


def test_stop_strings_cut_exactly(chain_folder: Path, tokenizer: Any) -> None:
    stops = [["e"], ["def"], ["fgh", "de"], ["e", "cde"], ["bcdefghi"], ["b"], ["hij"], ["never"]]
    answers = chained(
        chain_folder, tokenizer, "abcdefghijklmnop", ["a", "xxxxm", "p"],
        *(Sampling(max_new_tokens=9, stop=stop) for stop in stops),
        Sampling(max_new_tokens=12, min_new_tokens=6, stop=["c"]),
    )  # fmt: skip
    assert [a.text for a in answers[::3]] == [
        "bcd", "bc", "bc", "b", "", "", "bcdefg", "bcdefghij", "bcdefghijklm",
    ]  # fmt: skip


def test_characters_and_stops_may_be_split_across_tokens(
    chain_folder: Path, tokenizer: Any
) -> None:
    answers = chained(
        chain_folder, tokenizer, "ab\u20accd", ["a"],
        *(Sampling(max_new_tokens=8, stop=stop) for stop in (["\u20ac"], ["\u20acc"], [])),
        *(Sampling(max_new_tokens=count) for count in (2, 3, 4)),
    )  # fmt: skip
    assert [a.text for a in answers[:3]] == ["b", "b", "b\u20accdab"]
    assert [len(a.token_ids) for a in answers[:3]] == [4, 5, 8]
    assert answers[5].text == "b\u20ac"


def test_end_tokens_of_every_kind(chain_folder: Path, tokenizer: Any) -> None:
    answers = chained(
        chain_folder, tokenizer, f"abc{END}de{HIDDEN}fg", ["a", "c", "d", "g"],
        Sampling(max_new_tokens=9), Sampling(max_new_tokens=9, stop=[HIDDEN]),
        Sampling(max_new_tokens=9, stop_token_ids=tokenizer.encode("ef")),
        Sampling(max_new_tokens=9, min_new_tokens=5), Sampling(max_new_tokens=3),
    )  # fmt: skip
    first = answers[1]
    assert (first.text, first.token_ids, first.finish_reason) == ("", (0,), STOP)
    assert [a.text for a in answers[:4]] == ["bc", "", "efgabc", "abc"]
    assert [a.text for a in answers[4:8]] == ["bc", "", "e", "abc"]
    assert [a.text for a in answers[8:12]] == ["bc", "", "", "abc"]


def test_a_list_of_end_tokens(chain_folder: Path, tokenizer: Any) -> None:
    models = [chain(chain_folder, tokenizer, f"abc{HIDDEN}de") for _ in range(2)]
    for model in models:
        model.generation_config.eos_token_id = [2, *tokenizer.encode("e")]
    pair = Pair(*models)
    requests = [
        Request(RequestId(0, row), tuple(tokenizer.encode(p)), Sampling(max_new_tokens=9), 0)
        for row, p in enumerate("ad")
    ]
    found = run(engine_of(pair, tokenizer), requests)
    assert found == oracle(pair, tokenizer, requests)
    assert [len(completed(a).token_ids) for a in found.values()] == [1, 3]


def test_an_answer_is_as_long_as_the_context_has_room_for(llama: Pair, tokenizer: Any) -> None:
    requests = [
        Request(RequestId(0, row), (5,) * tokens, Sampling(max_new_tokens=60), 0)
        for row, tokens in enumerate((200, 3, 255, 246))
    ]
    expected = oracle(llama, tokenizer, requests)
    for late in (False, True):
        found = run(engine_of(llama, tokenizer, late=late), requests)
        assert found == expected
    assert [len(completed(expected[r.id]).token_ids) for r in requests] == [56, 60, 1, 10]


# ---- rows that are wrong


@pytest.mark.parametrize(
    ("prompt", "changes", "said"),
    [
        ([5, 320], {}, "320"),
        ([5, -1, 6], {}, "-1"),
        ([5], {"logit_bias": {319: 1.0, 5000: -1.0}}, "5000|5,000"),
        ([5] * 256, {}, "256"),
        ([5] * 300, {}, "300"),
        ([5] * 90, {"max_new_tokens": 60}, "90 tokens and 60 new ones"),
    ],
)
def test_a_bad_request_fails_alone(
    llama: Pair, tokenizer: Any, prompt: list[int], changes: dict[str, Any], said: str
) -> None:
    bad = Sampling.model_validate({"max_new_tokens": 2} | changes)
    requests = mixed(5, seed=6)
    expected = oracle(llama, tokenizer, requests)
    wrong = Request(RequestId(9, 9), tuple(prompt), bad, 0)
    engine = engine_of(llama, tokenizer, replace(ROOMY, kv_tokens=128))
    found = run(engine, [*requests[:2], wrong, *requests[2:]])
    failure = found.pop(wrong.id)
    assert found == expected
    assert isinstance(failure, Failure)
    assert failure.kind == "bad_request"
    assert any(part in failure.message for part in said.split("|")), failure.message
    check_empty(engine)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_fail_their_own_rows(
    folder: Path, llama: Pair, tokenizer: Any, value: float, late: bool
) -> None:
    poison = 7
    broken = loaded(folder)
    with torch.no_grad():
        broken.model.embed_tokens.weight[poison] = value
    requests = [
        replace(r, prompt_ids=tuple(8 if t == poison else t for t in r.prompt_ids))
        for r in mixed(30, seed=7)
    ]
    expected = oracle(llama, tokenizer, requests)
    said = {t for a in expected.values() for t in completed(a).token_ids}
    bad = [replace(r, prompt_ids=(*r.prompt_ids[:-1], poison, 9)) for r in requests[:12:3]]
    bad_ids = {r.id for r in bad} | {
        id for id, a in expected.items() if poison in completed(a).token_ids[:-1]
    }
    assert len(said) > 50
    together = {r.id: r for r in [*requests, *bad]}
    engine = engine_of(Pair(llama.plain, broken), tokenizer, late=late)
    found = run(engine, together.values())
    assert {id for id, a in found.items() if isinstance(a, Failure)} == bad_ids
    for id, answer in found.items():
        if isinstance(answer, Failure):
            assert answer.kind == "model"
            assert "not finite" in answer.message
        else:
            assert answer == expected[id]
    check_empty(engine)


class Breakable:
    """The packed forward, which raises for some steps."""

    def __init__(self, engine: ContinuousEngine, error: Exception, breaks: Any) -> None:
        self._forward = engine._forward
        self._error, self._breaks = error, breaks
        self.steps = self.broken = 0

    def __call__(self, pieces: Any, tokens: Any) -> Any:
        self.steps += 1
        if self._breaks(pieces):
            self.broken += 1
            raise self._error
        return self._forward(pieces, tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)


def tokens_of(pieces: Any) -> int:
    return sum(piece.tokens for piece in pieces)


OOM = torch.OutOfMemoryError("injected")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "breaks",
    [
        lambda pieces: tokens_of(pieces) > 33,
        lambda pieces: len(pieces) > 3,
        lambda pieces: len(pieces) > 1,
        lambda pieces: tokens_of(pieces) > 40 or len(pieces) > 5,
        lambda pieces: tokens_of(pieces) > 16 or len(pieces) > 2,
    ],
    ids=["tokens", "rows", "one row", "tokens or rows", "little"],
)
def test_out_of_memory_makes_smaller_steps(
    llama: Pair, tokenizer: Any, llama_answers: dict[RequestId, Answer], breaks: Any, late: bool
) -> None:
    requests = mixed(300)[:60]
    engine: Any = engine_of(llama, tokenizer, replace(ROOMY, rows=16), late=late)
    engine._forward = forward = Breakable(engine, OOM, breaks)
    assert run(engine, requests) == {r.id: llama_answers[r.id] for r in requests}
    assert engine.totals.out_of_memory == forward.broken > 0
    assert forward.broken < 30
    check_empty(engine)


def through_runner(engine: Any, requests: Sequence[Request]) -> dict[RequestId, Answer]:
    """Have requests answered as a replica does; the engine's thread is idle afterwards."""
    left: list[int] = []
    done = threading.Event()

    def leave(code: int, reason: str) -> None:
        left.append(code)
        done.set()

    runner = Runner(engine, leave=leave)
    middle = len(requests) // 2
    futures = [runner.submit(requests[:middle]), runner.submit(requests[middle:])]
    answers = {id: a for future in futures for id, a in future.result(timeout=60).items()}
    assert not left, "the engine's thread failed"
    return answers


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [OOM, ValueError("poison")], ids=["memory", "any"])
def test_a_row_that_always_fails_fails_alone(
    llama: Pair,
    tokenizer: Any,
    llama_answers: dict[RequestId, Answer],
    error: Exception,
    late: bool,
) -> None:
    """Among rows that begin as it does, and wait for its blocks."""
    requests = mixed(300)[:80]
    by_length = sorted(requests, key=lambda r: len(r.prompt_ids))
    poison = {by_length[3].id, by_length[40].id, by_length[-1].id}

    def breaks(pieces: Any) -> bool:
        return any(piece.row.request.id in poison for piece in pieces)

    engine: Any = engine_of(llama, tokenizer, replace(ROOMY, rows=16), late=late)
    engine._forward = Breakable(engine, error, breaks)
    found = through_runner(engine, requests)
    assert {id for id, a in found.items() if isinstance(a, Failure)} == poison
    assert {id: a for id, a in found.items() if id not in poison} == {
        r.id: llama_answers[r.id] for r in requests if r.id not in poison
    }
    check_empty(engine)
    if error is OOM:
        assert engine.totals.out_of_memory > 0


@pytest.mark.parametrize("error", [OOM, ValueError("poison")], ids=["memory", "any"])
def test_a_step_that_only_a_finished_row_took_may_fail(
    chain_folder: Path, tokenizer: Any, error: Exception
) -> None:
    """Read late, a row takes one step after its end; nobody needs that step."""
    model = chain(chain_folder, tokenizer, f"abc{END}d")
    request = Request(RequestId(0, 0), tuple(tokenizer.encode("a")), Sampling(max_new_tokens=9), 0)
    engine: Any = engine_of(Pair(model, model), tokenizer, late=True)
    engine._forward = Breakable(engine, error, lambda pieces: pieces[0].end == 4)
    try:
        found = run(engine, [request])
    except Exception:  # noqa: BLE001
        assert engine.evict(), "a failed step had rows"
        found = run(engine)
    assert completed(found[request.id]).text == "bc"


@pytest.mark.parametrize("late", [False, True])
def test_a_row_does_not_depend_on_what_its_neighbours_say(
    llama: Pair, tokenizer: Any, late: bool
) -> None:
    chance = random.Random(8)
    lengths = [1, 3, 17, 40, 64]
    watched = [
        Request(RequestId(0, row), tuple(words(chance, n)), Sampling(max_new_tokens=15), 0)
        for row, n in enumerate(lengths)
    ]
    found = []
    for _ in range(3):
        neighbours = [
            Request(
                RequestId(1, row), tuple(words(chance, n)),
                Sampling(max_new_tokens=15, min_new_tokens=15), 0,
            )
            for row, n in enumerate([2, 9, 16, 33, 50, 64])
        ]  # fmt: skip
        engine = engine_of(llama, tokenizer, replace(ROOMY, rows=11), late=late)
        answers = run(engine, [*watched, *neighbours])
        found.append([answers[r.id] for r in watched])
    assert found[0] == found[1] == found[2]
    expected = oracle(llama, tokenizer, watched)
    assert {answer.id: answer for answer in found[0]} == expected


# ---- models that can't


def test_a_model_that_does_not_use_our_attention_is_refused(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(folder)
    before = model.config._attn_implementation
    attention = type(model.model.layers[0].self_attn)
    original = attention.forward

    def own(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        self.config, kept = plain, self.config
        try:
            return original(self, hidden_states, *args, **kwargs)
        finally:
            self.config = kept

    plain = type(model.config)(**model.config.to_dict())
    plain._attn_implementation = "eager"
    monkeypatch.setattr(attention, "forward", own)
    with pytest.raises(UnsupportedModelError, match=r"differ|mask|Error"):
        ContinuousEngine(model, tokenizer, ROOMY)
    assert model.config._attn_implementation == before
    monkeypatch.undo()
    requests = mixed(3)
    pair = Pair(model, loaded(folder))
    assert oracle(pair, tokenizer, requests) == run(engine_of(pair, tokenizer), requests)


def test_a_closed_engine_leaves_the_model_as_it_was(tmp_path: Path, tokenizer: Any) -> None:
    for model_type, changes in (("llama", {}), ("gemma2", ARCHITECTURES["gemma2"])):
        made = make_model(tmp_path / model_type, model_type, dtype=torch.float32, **BIG | changes)
        model = loaded(made)
        before = model.config._attn_implementation
        expected = oracle(Pair(model, model), tokenizer, mixed(4))
        engine = ContinuousEngine(model, tokenizer, ROOMY)
        assert model.config._attn_implementation == NAME
        engine.close()
        assert model.config._attn_implementation == before
        assert oracle(Pair(model, model), tokenizer, mixed(4)) == expected


# ---- many


def many(count: int) -> Iterable[Request]:
    chance = random.Random(9)
    samplings = [Sampling(max_new_tokens=n) for n in range(1, 5)]
    for row in range(count):
        prompt = tuple(words(chance, chance.randint(4, 12)))
        yield Request(RequestId(row // 500, row), prompt, chance.choice(samplings), row)


@pytest.mark.timeout(600)
def test_many_requests_leave_nothing_behind(tmp_path: Path, tokenizer: Any) -> None:
    count = 100_000
    made = make_llama(
        tmp_path, dtype=torch.float32, num_hidden_layers=1, hidden_size=32, intermediate_size=32,
        num_attention_heads=2, num_key_value_heads=1, **BIG,
    )  # fmt: skip
    model = loaded(made)
    limits = EngineLimits(rows=48, kv_tokens=2048, step_tokens=256)
    engine = ContinuousEngine(model, tokenizer, limits)
    seen = bytearray(count)
    coming = iter(many(count))
    halfway_mib = 0.0
    answered = 0
    more = True
    while more or engine.has_work():
        if engine._scheduler.waiting < 500 and more:
            batch = [r for _, r in zip(range(500), coming, strict=False)]
            more = len(batch) == 500
            engine.add(batch)
        for answer in engine.step():
            assert not seen[answer.id.row]
            seen[answer.id.row] = 1
            answered += 1
            assert isinstance(answer, Completion)
        if not halfway_mib and answered > count // 2:
            halfway_mib = resident_mib()
    assert answered == sum(seen) == count
    assert resident_mib() - halfway_mib < 16
    check_empty(engine)
    assert engine.totals.finished == count


def resident_mib() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


@pytest.mark.parametrize(("noise", "distance", "runs"), [(0.0, 0.12, False), (0.08, 0.12, True)])
def test_int8_may_differ_by_no_more_than_it_does_by_itself(
    folder: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    noise: float,
    distance: float,
    runs: bool,
) -> None:
    model = Model(id=str(folder), quantization=Int8())
    int8 = loading.load(open_checkpoint(model), model, "cpu").model
    assert 0 < Probe(int8)._noise < 0.1
    monkeypatch.setattr(Probe, "_own_noise", lambda *_: noise)
    monkeypatch.setattr(Probe, "_distance", lambda *_: distance)
    outcome = contextlib.nullcontext() if runs else pytest.raises(UnsupportedModelError)
    with outcome:
        ContinuousEngine(int8, tokenizer, ROOMY).close()


def test_a_model_whose_rows_do_not_depend_on_company_has_no_noise(llama: Pair) -> None:
    llama.packed.set_attn_implementation(llama.plain.config._attn_implementation)
    assert Probe(llama.packed)._noise == 0
