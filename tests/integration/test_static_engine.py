"""The plain engine: the same answers in any company, cut where they end.

Two models: a random one, whose answers depend on everything before them, and a `chain`, which says
"bcdef..." after "a".
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from quantbatch.engine import static
from quantbatch.engine.ends import Cut, Endings, find_stop
from quantbatch.engine.noise import gumbel_noise
from quantbatch.engine.static import StaticEngine
from quantbatch.records import Answer, Completion, Failure, FinishReason, Request, RequestId
from quantbatch.spec import Sampling
from tests.integration.llama import (
    END,
    HIDDEN,
    OPTIONS,
    SEEDS,
    VOCABULARY,
    A,
    chain,
    loaded,
    make_chain,
    make_llama,
    make_model,
    make_tokenizer,
    random_prompts,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

hf: Any = transformers

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    # A wide spread of logits, so that no two are near a tie.
    return make_llama(folder, dtype=torch.float32, vocab_size=VOCABULARY, initializer_range=0.2)


@pytest.fixture(scope="module")
def random_model(random_folder: Path) -> Any:
    return loaded(random_folder)


@pytest.fixture(scope="module")
def chain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chain(tmp_path_factory.mktemp("chain"))


def ask(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int] | str],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    seeds: Sequence[int] | None = None,
) -> list[Completion]:
    """Have prompts answered and return the answers in their order."""
    engine = StaticEngine(model, tokenizer, batch_size=batch_size)
    ids = [tuple(tokenizer.encode(p)) if isinstance(p, str) else tuple(p) for p in prompts]
    engine.add(
        Request(RequestId(0, i), prompt, sampling, seeds[i] if seeds else i)
        for i, prompt in enumerate(ids)
    )
    answers = {answer.id.row: answer for answer in run(engine, [])}
    return [completed(answers[i]) for i in range(len(prompts))]


def completed(answer: Answer) -> Completion:
    assert isinstance(answer, Completion), answer
    return answer


def run(engine: StaticEngine, requests: Sequence[Request]) -> list[Answer]:
    engine.add(requests)
    found: list[Answer] = []
    while engine.has_work():
        found += engine.step()
    return found


# ---- every option against its definition


class Expected(NamedTuple):
    token_ids: tuple[int, ...]
    logprobs: list[float]
    likeliest: list[list[int]]


def by_definition(
    model: Any, tokenizer: Any, prompt: Sequence[int], sampling: Sampling, seed: int
) -> Expected:
    """One row, one whole forward for each token, each rule as it reads."""
    answer: list[int] = []
    logprobs: list[float] = []
    likeliest: list[list[int]] = []
    ends = {0, 1, *sampling.stop_token_ids}
    while len(answer) < sampling.max_new_tokens and not ends & set(answer):
        with torch.no_grad():
            raw = model(torch.tensor([[*prompt, *answer]])).logits[0, -1]
        scores = adjusted(raw.tolist(), prompt, answer, sampling, tokenizer)
        if len(answer) < sampling.min_new_tokens:
            scores = [-torch.inf if i in ends else score for i, score in enumerate(scores)]
        if sampling.temperature:
            noise = gumbel_noise(torch.tensor([seed]), torch.tensor([len(answer)]), len(scores))
            scores = (torch.tensor(narrowed(scores, sampling)) + noise[0]).tolist()
        answer.append(max(range(len(scores)), key=scores.__getitem__))
        logs = raw.log_softmax(-1).tolist()
        logprobs.append(logs[answer[-1]])
        likeliest.append(sorted(range(len(logs)), key=logs.__getitem__, reverse=True))
    return Expected(tuple(answer), logprobs, likeliest)


def adjusted(
    scores: list[float],
    prompt: Sequence[int],
    answer: list[int],
    sampling: Sampling,
    tokenizer: Any,
) -> list[float]:
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    for token in {*prompt, *answer}:
        by = sampling.repetition_penalty
        scores[token] = scores[token] * by if scores[token] < 0 else scores[token] / by
    for token in set(answer):
        scores[token] -= sampling.presence_penalty
        scores[token] -= sampling.frequency_penalty * answer.count(token)
    for word in sampling.bad_words:
        for run in (tokenizer.encode(word), tokenizer.encode(" " + word)):
            if [None, *answer][-len(run) + 1 or len(answer) + 1 :] == run[:-1]:
                scores[run[-1]] = -torch.inf
    return scores


def narrowed(scores: list[float], sampling: Sampling) -> list[float]:
    scores = [score / sampling.temperature for score in scores]
    ranked = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    kept = ranked[: sampling.top_k or None]
    kept = most_of(kept, scores, sampling.top_p)
    kept = [i for i in kept if scores[i] - scores[ranked[0]] >= math.log(sampling.min_p or 1e-300)]
    return [score if i in kept else -torch.inf for i, score in enumerate(scores)]


def most_of(ranked: list[int], scores: list[float], share: float) -> list[int]:
    weights = [math.exp(scores[i] - scores[ranked[0]]) for i in ranked]
    before = [sum(weights[:at]) / sum(weights) for at in range(len(ranked))]
    return [i for i, above in zip(ranked, before, strict=True) if above < share or share == 1]


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_does_what_it_says(random_model: Any, tokenizer: Any, option: str) -> None:
    fields = OPTIONS[option]
    sampling = Sampling.model_validate({"max_new_tokens": 16, "logprobs": 4} | fields)
    prompts = random_prompts()
    answers = ask(random_model, tokenizer, prompts, sampling, seeds=SEEDS)
    for prompt, answer, seed in zip(prompts, answers, SEEDS, strict=True):
        expected = by_definition(random_model, tokenizer, prompt, sampling, seed)
        assert answer.token_ids == expected.token_ids
        assert answer.logprobs is not None
        assert [found.logprob for found in answer.logprobs] == pytest.approx(
            expected.logprobs, abs=1e-4
        )
        for found, ranked in zip(answer.logprobs, expected.likeliest, strict=True):
            assert [token for token, _ in found.top] == ranked[:4]
            values = [value for _, value in found.top]
            assert values == sorted(values, reverse=True)
            assert found.logprob <= values[0]


@pytest.mark.parametrize(
    ("option", "field"), [(option, field) for option, fields in OPTIONS.items() for field in fields]
)
def test_each_field_of_an_option_is_felt(
    random_model: Any, tokenizer: Any, option: str, field: str
) -> None:
    """Else the test above could not fail."""
    fields = OPTIONS[option]
    prompts = random_prompts()
    found = [
        ask(
            random_model, tokenizer, prompts,
            Sampling.model_validate({"max_new_tokens": 16} | chosen), seeds=SEEDS,
        )
        for chosen in (fields, {name: fields[name] for name in fields if name != field})
    ]  # fmt: skip
    assert [answer.token_ids for answer in found[0]] != [answer.token_ids for answer in found[1]]


def test_log_probabilities_cost_no_answer_its_tokens(random_model: Any, tokenizer: Any) -> None:
    plain, bare, most = (
        ask(random_model, tokenizer, random_prompts(5), Sampling(max_new_tokens=9, logprobs=count))
        for count in (None, 0, 20)
    )
    assert (
        [c.token_ids for c in plain] == [c.token_ids for c in bare] == [c.token_ids for c in most]
    )
    assert {c.logprobs for c in plain} == {None}
    for one, other in zip(bare, most, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert [t.top for t in one.logprobs] == [()] * 9
        assert [len(t.top) for t in other.logprobs] == [20] * 9
        assert [t.logprob for t in one.logprobs] == [t.top[0][1] for t in other.logprobs]


def test_log_probabilities_end_with_the_answer(chain_folder: Path, tokenizer: Any) -> None:
    model = chain(chain_folder, tokenizer, f"abc{END}defgh")
    sampling = Sampling(max_new_tokens=6, logprobs=1, stop=["fg"])
    early, late = ask(model, tokenizer, ["a", "d"], sampling)
    assert [len(c.logprobs or ()) for c in (early, late)] == [3, 3]
    assert late.text == "e"
    assert [t.top[0][0] for t in early.logprobs or ()] == [*early.token_ids]


def test_a_bad_word_is_looked_for_in_the_answer_only(chain_folder: Path, tokenizer: Any) -> None:
    """Not across the end of the prompt, whose last token may even be padding's."""
    model = chain(chain_folder, tokenizer, "abcdef")
    (answer,) = ask(model, tokenizer, ["a"], Sampling(max_new_tokens=9, bad_words=["ab"]))
    assert (answer.text, answer.finish_reason) == ("bcdefa", STOP)
    model.generation_config.pad_token_id = A
    sampling = Sampling(max_new_tokens=3, bad_words=["aaab"])
    found = ask(model, tokenizer, ["a", "cdefcdefcdef"], sampling)
    assert [answer.text for answer in found] == ["bcd", "abc"]


def test_a_bad_word_is_one_after_a_space_too(random_model: Any) -> None:
    vocabulary = {letter: i for i, letter in enumerate("abc\u0120")} | {"\u0120a": 4, "ab": 5}
    merges = [("\u0120", "a"), ("a", "b")]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    endings = Endings(random_model, hf.PreTrainedTokenizerFast(tokenizer_object=backend))
    assert endings.bad_word_ids(Sampling(bad_words=["a", "abc"])) == ((0,), (4,), (5, 2), (4, 1, 2))
    assert endings.bad_word_ids(Sampling(bad_words=["c"])) == ((2,), (3, 2))
    assert endings.bad_word_ids(Sampling()) == ()


def test_a_stop_token_is_no_part_of_the_text(chain_folder: Path, tokenizer: Any) -> None:
    model = chain(chain_folder, tokenizer, "abcdef")
    sampling = Sampling(max_new_tokens=9, stop_token_ids=tokenizer.encode("d"))
    (answer,) = ask(model, tokenizer, ["a"], sampling)
    assert (answer.text, len(answer.token_ids), answer.finish_reason) == ("bc", 3, STOP)


# ---- the oracle


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=20),
        Sampling(max_new_tokens=20, repetition_penalty=1.4),
        Sampling(max_new_tokens=12, min_new_tokens=5),
        Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.1),
        Sampling(max_new_tokens=12, temperature=1.5),
    ],
    ids=["greedy", "penalty", "minimum", "sampling", "hot"],
)
def test_company_changes_no_answer(
    random_model: Any,
    tokenizer: Any,
    sampling: Sampling,
) -> None:
    prompts = random_prompts()
    together = ask(random_model, tokenizer, prompts, sampling)
    assert ask(random_model, tokenizer, prompts, sampling, batch_size=1) == together
    some = ask(random_model, tokenizer, prompts[5:9], sampling, seeds=[5, 6, 7, 8])
    assert [c.token_ids for c in some] == [c.token_ids for c in together[5:9]]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt2", {"bos_token_id": 1, "eos_token_id": 1}),
        ("mistral", {"sliding_window": 16}),
        ("gemma2", {"sliding_window": 16, "head_dim": 32, "pad_token_id": 0}),
    ],
    ids=["learned positions", "sliding window", "no SDPA"],
)
def test_company_changes_no_answer_whatever_the_attention(
    tmp_path: Path, tokenizer: Any, model_type: str, changes: dict[str, Any]
) -> None:
    changes |= {"vocab_size": VOCABULARY, "initializer_range": 0.2}
    model = loaded(make_model(tmp_path, model_type, dtype=torch.float32, **changes))
    sampling = Sampling(max_new_tokens=20)
    together = ask(model, tokenizer, random_prompts(), sampling)
    assert ask(model, tokenizer, random_prompts(), sampling, batch_size=1) == together
    assert len({token for answer in together for token in answer.token_ids}) > 10


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_answers_are_those_of_plain_generate(
    random_model: Any,
    tokenizer: Any,
    penalty: float,
) -> None:
    prompts = random_prompts(6)
    sampling = Sampling(max_new_tokens=15, repetition_penalty=penalty)
    for prompt, answer in zip(
        prompts, ask(random_model, tokenizer, prompts, sampling), strict=True
    ):
        plain = random_model.generate(
            torch.tensor([prompt]), max_new_tokens=15, do_sample=False, repetition_penalty=penalty,
            eos_token_id=[0, 1], pad_token_id=1,
        )  # fmt: skip
        assert list(answer.token_ids) == plain[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "penalty",
    [
        Sampling(max_new_tokens=10, repetition_penalty=3.0),
        Sampling(max_new_tokens=10, presence_penalty=2.0),
        Sampling(max_new_tokens=10, frequency_penalty=2.0),
    ],
    ids=["repetition", "presence", "frequency"],
)
def test_padding_is_not_repetition(random_model: Any, tokenizer: Any, penalty: Sampling) -> None:
    """Were padding counted, a penalty would keep rows from saying the padding's token."""
    prompts = random_prompts()
    alone = ask(random_model, tokenizer, prompts, penalty, batch_size=1)
    said = alone[0].token_ids[0]
    config = random_model.generation_config
    before, config.pad_token_id = config.pad_token_id, said
    together = ask(random_model, tokenizer, prompts, penalty)
    config.pad_token_id = before
    assert together == alone


def test_a_model_s_own_sampling_changes_nothing(
    random_folder: Path,
    random_model: Any,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    said = {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.1, "max_length": 3,
            "repetition_penalty": 9.0, "min_length": 30, "no_repeat_ngram_size": 1, "num_beams": 4,
            "suppress_tokens": list(range(50, 200)), "eos_token_id": 1}  # fmt: skip
    for file in random_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    sampling = Sampling(max_new_tokens=12)
    prompts = random_prompts(5)
    expected = ask(random_model, tokenizer, prompts, sampling)
    assert ask(loaded(tmp_path), tokenizer, prompts, sampling) == expected


DEMO = Path(__file__).parents[2] / "configs/quickstart/model"


@pytest.mark.skipif(not (DEMO / "tokenizer.json").exists(), reason="the demo model is not there")
def test_the_demo_model_answers_the_same_alone_and_together() -> None:
    model, tokenizer = loaded(DEMO), hf.AutoTokenizer.from_pretrained(DEMO)
    prompts = [
        "a",
        "def parse(text):",
        "import os\nimport sys\n" * 3,
        "the quick brown fox",
        "x = 1",
    ]
    sampling = Sampling(max_new_tokens=24)
    together = ask(model, tokenizer, prompts, sampling)
    assert ask(model, tokenizer, prompts, sampling, batch_size=1) == together
    assert all(c.text or c.finish_reason is STOP for c in together)


# ---- where an answer ends


def test_an_answer_is_as_long_as_allowed(chain_folder: Path, tokenizer: Any) -> None:
    model = chain(chain_folder, tokenizer, "abcdefghij")
    first, second = ask(model, tokenizer, ["a", "xyzg"], Sampling(max_new_tokens=4))
    assert (first.text, first.finish_reason, len(first.token_ids)) == ("bcde", LENGTH, 4)
    assert (second.text, second.finish_reason) == ("hija", LENGTH)


def test_an_end_token_ends_it_and_is_counted(chain_folder: Path, tokenizer: Any) -> None:
    model = chain(chain_folder, tokenizer, f"abc{END}defgh")
    early, late = ask(model, tokenizer, ["a", "d"], Sampling(max_new_tokens=6))
    assert (early.text, early.finish_reason) == ("bc", STOP)
    assert early.token_ids[-1] == 0
    assert len(early.token_ids) == 3
    assert (late.text, late.finish_reason) == ("efgha" + "b", LENGTH)


def test_an_end_token_as_the_last_allowed_one_is_an_end(
    chain_folder: Path,
    tokenizer: Any,
) -> None:
    model = chain(chain_folder, tokenizer, f"abc{END}d")
    (answer,) = ask(model, tokenizer, ["a"], Sampling(max_new_tokens=3))
    assert (answer.text, answer.finish_reason) == ("bc", STOP)


def test_the_tokenizer_s_end_token_counts_too(chain_folder: Path, tokenizer: Any) -> None:
    model = chain(chain_folder, tokenizer, f"abc{END}de{HIDDEN}fg")
    model.generation_config.eos_token_id = 2
    first, second = ask(model, tokenizer, ["a", "d"], Sampling(max_new_tokens=9))
    assert (first.text, second.text) == ("bc", "e")
    assert {first.finish_reason, second.finish_reason} == {STOP}
    model.generation_config.eos_token_id = None
    assert ask(model, tokenizer, ["a"], Sampling(max_new_tokens=9))[0].text == "bc"


def test_an_answer_can_t_end_before_its_minimum(chain_folder: Path, tokenizer: Any) -> None:
    model = chain(chain_folder, tokenizer, f"abc{END}de")
    with torch.no_grad():  # a second best after "c"
        c, d = tokenizer.encode("cd")
        model.lm_head.weight[d, c] = 0.5
    (answer,) = ask(model, tokenizer, ["a"], Sampling(max_new_tokens=9, min_new_tokens=4))
    assert (answer.text, answer.finish_reason) == ("bcdeabc", STOP)
    (answer,) = ask(model, tokenizer, ["a"], Sampling(max_new_tokens=9, min_new_tokens=2))
    assert (answer.text, answer.finish_reason) == ("bc", STOP)


@pytest.mark.parametrize(
    ("stop", "text", "tokens", "reason"),
    [
        (["e"], "bcd", 4, STOP),
        (["def"], "bc", 5, STOP),
        (["fgh", "de"], "bc", 4, STOP),
        (["e", "cde"], "b", 4, STOP),
        (["bcdefghi"], "", 8, STOP),
        (["b"], "", 1, STOP),
        (["hij"], "bcdefg", 9, STOP),
        (["jklm"], "bcdefghij", 9, LENGTH),
        (["never"], "bcdefghij", 9, LENGTH),
        (["bd"], "bcdefghij", 9, LENGTH),
    ],
)
def test_a_stop_string_cuts_exactly(
    chain_folder: Path,
    tokenizer: Any,
    stop: list[str],
    text: str,
    tokens: int,
    reason: FinishReason,
) -> None:
    model = chain(chain_folder, tokenizer, "abcdefghijklmnop")
    neighbours = ["m", "xxxxxxxx", "p"]
    sampling = Sampling(max_new_tokens=9, stop=stop)
    answers = ask(model, tokenizer, ["a", *neighbours], sampling)
    assert (answers[0].text, len(answers[0].token_ids)) == (text, tokens)
    assert answers[0].finish_reason is reason
    assert ask(model, tokenizer, ["a", *neighbours], sampling, batch_size=1) == answers


def test_a_stop_string_saves_the_rest_of_the_time(
    chain_folder: Path,
    tokenizer: Any,
) -> None:
    model = chain(chain_folder, tokenizer, "abcdefghijklmnop")
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    ask(model, tokenizer, ["a", "xxxxb", "d"], Sampling(max_new_tokens=200, stop=["efg"]))
    assert len(steps) == len("bcdefg")


def test_a_stop_string_may_be_part_of_a_character_s_bytes_away(
    chain_folder: Path,
    tokenizer: Any,
) -> None:
    model = chain(chain_folder, tokenizer, "ab\u20accd")
    (answer,) = ask(model, tokenizer, ["a"], Sampling(max_new_tokens=8, stop=["\u20ac"]))
    assert (answer.text, len(answer.token_ids), answer.finish_reason) == ("b", 4, STOP)
    (answer,) = ask(model, tokenizer, ["a"], Sampling(max_new_tokens=8, stop=["\u20acc"]))
    assert (answer.text, len(answer.token_ids)) == ("b", 5)


def test_a_special_token_may_be_a_stop_string(chain_folder: Path, tokenizer: Any) -> None:
    model = chain(chain_folder, tokenizer, f"abc{HIDDEN}de")
    (answer,) = ask(model, tokenizer, ["a"], Sampling(max_new_tokens=8, stop=[HIDDEN]))
    assert (answer.text, len(answer.token_ids), answer.finish_reason) == ("bc", 3, STOP)
    (answer,) = ask(model, tokenizer, ["a"], Sampling(max_new_tokens=5))
    assert answer.text == "bcde"


def test_a_stop_string_before_the_minimum_does_not_end(
    chain_folder: Path,
    tokenizer: Any,
) -> None:
    model = chain(chain_folder, tokenizer, "abcde")
    sampling = Sampling(max_new_tokens=12, min_new_tokens=3, stop=["c"])
    (answer,) = ask(model, tokenizer, ["a"], sampling)
    assert (answer.text, len(answer.token_ids)) == ("bcdeab", 7)
    (answer,) = ask(model, tokenizer, ["a"], sampling.model_copy(update={"min_new_tokens": 2}))
    assert (answer.text, len(answer.token_ids)) == ("b", 2)


def test_an_end_token_comes_before_a_later_stop_string(
    chain_folder: Path,
    tokenizer: Any,
) -> None:
    model = chain(chain_folder, tokenizer, f"abc{END}de")
    (answer,) = ask(model, tokenizer, ["a"], Sampling(max_new_tokens=9, stop=["e"]))
    assert (answer.text, len(answer.token_ids)) == ("bc", 3)


def joined(pieces: Sequence[str]) -> str:
    return "".join(pieces)


@settings(deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    minimum=st.integers(0, 12),
)
def test_stops_are_found_as_by_looking_after_each_token(
    pieces: list[str], stops: list[str], minimum: int
) -> None:
    sampling = Sampling(max_new_tokens=99, min_new_tokens=minimum, stop=stops)
    decode: Any = joined
    expected = None
    for count in range(1, len(pieces) + 1):
        before, text = joined(pieces[: max(0, minimum - 1)]), joined(pieces[:count])
        begins = [
            at
            for stop in stops
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > len(before)
        ]
        if begins:
            expected = Cut(count, min(begins))
            break
    found: Any = pieces
    assert find_stop(found, sampling, decode) == expected


# ---- random numbers


def test_a_row_s_numbers_are_its_own() -> None:
    seeds, steps = torch.tensor([3, 2**63 - 1, 5]), torch.tensor([0, 7, 1])
    together = gumbel_noise(seeds, steps, 50)
    assert torch.equal(gumbel_noise(seeds[2:], steps[2:], 50)[0], together[2])
    assert torch.equal(gumbel_noise(seeds[2:], steps[2:], 20)[0], together[2, :20])
    assert not torch.equal(gumbel_noise(seeds[2:], steps[:1], 50)[0], together[2])
    assert not torch.equal(gumbel_noise(seeds[:1] + 2**32, steps[:1], 50)[0], together[0])


def test_other_seeds_give_other_samples(random_model: Any, tokenizer: Any) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=2.0)
    answers = ask(random_model, tokenizer, [[5, 6, 7]] * 6, sampling)
    assert len({answer.token_ids for answer in answers}) == 6
    same = ask(random_model, tokenizer, [[5, 6, 7]] * 6, sampling, seeds=[4] * 6)
    assert {answer.token_ids for answer in same} == {answers[4].token_ids}


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    rows = 20_000
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    draw = static._Draw(torch.arange(rows), 1)
    scores = probabilities.log().expand(rows, -1)
    drawn = [draw(torch.zeros(rows, step), scores).argmax(-1) for step in (1, 2)]
    for tokens in drawn:
        shares = torch.bincount(tokens, minlength=5) / rows
        assert torch.allclose(shares, probabilities, atol=0.01)
        assert shares[1] == shares[4] == 0
    both = ((drawn[0] == 0) & (drawn[1] == 0)).float().mean()
    assert both.item() == pytest.approx(0.25, abs=0.01), "steps are independent"


def test_one_likeliest_token_is_greedy(random_model: Any, tokenizer: Any) -> None:
    prompts = random_prompts(5)
    greedy = ask(random_model, tokenizer, prompts, Sampling(max_new_tokens=8))
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}):
        sampling = Sampling.model_validate({"max_new_tokens": 8, "temperature": 1.0} | narrow)
        assert ask(random_model, tokenizer, prompts, sampling) == greedy


# ---- groups and failures


def request(row: int, tokens: int, sampling: Sampling) -> Request:
    return Request(RequestId(0, row), tuple(range(3, 3 + tokens)), sampling, row)


def test_groups_are_of_like_sampling_the_longest_first(
    random_model: Any,
    tokenizer: Any,
) -> None:
    short, long = Sampling(max_new_tokens=2), Sampling(max_new_tokens=3)
    engine = StaticEngine(random_model, tokenizer, batch_size=2)
    engine.add(request(i, tokens, short) for i, tokens in enumerate([4, 9, 2, 7]))
    engine.add([request(9, 8, long)])
    engine.add([request(10, 30, short.model_copy(update={"seed": 3}))])
    groups = []
    while engine.has_work():
        groups.append([completion.id.row for completion in engine.step()])
    assert groups == [[10, 1], [9], [3, 0], [2]]


def test_a_failed_step_gives_back_its_own_requests_only(
    random_model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = Sampling(max_new_tokens=4)
    requests = [request(i, tokens, sampling) for i, tokens in enumerate([4, 9, 2, 7])]
    expected = {c.id: c for c in run(StaticEngine(random_model, tokenizer, batch_size=4), requests)}
    engine = StaticEngine(random_model, tokenizer, batch_size=2)
    engine.add(requests)
    with monkeypatch.context() as patch:
        patch.setattr(random_model, "generate", fail, raising=False)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
    failed = engine.evict()
    assert [each.id.row for each in failed] == [1, 3]
    assert {c.id.row for c in run(engine, [])} == {0, 2}
    assert not engine.has_work()
    assert engine.evict() == []
    assert {c.id: c for c in run(engine, failed)} == {each.id: expected[each.id] for each in failed}


def fail(**_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_fail_the_step(
    random_folder: Path,
    tokenizer: Any,
    value: float,
) -> None:
    model = loaded(random_folder)
    with torch.no_grad():
        model.lm_head.weight[17] = value
    engine = StaticEngine(model, tokenizer, batch_size=2)
    engine.add(
        [request(0, 4, Sampling(max_new_tokens=2)), request(1, 3, Sampling(max_new_tokens=2))]
    )
    with pytest.raises(FloatingPointError, match=r"not finite for . of 2 rows"):
        engine.step()
    assert len(engine.evict()) == 2


def test_an_answer_is_as_long_as_the_context_has_room_for(
    tmp_path: Path, random_model: Any, tokenizer: Any
) -> None:
    """Learned positions have no place beyond the context, not even for a finished row."""
    gpt2 = loaded(
        make_model(tmp_path, "gpt2", dtype=torch.float32, vocab_size=VOCABULARY,
                   bos_token_id=1, eos_token_id=1, initializer_range=0.2)
    )  # fmt: skip
    prompts = [[5] * tokens for tokens in (200, 3, 255, 246, 247)]
    for model in (random_model, gpt2):
        answers = ask(model, tokenizer, prompts, Sampling(max_new_tokens=60, min_new_tokens=60))
        assert [len(c.token_ids) for c in answers] == [56, 60, 1, 10, 9]
        assert {c.finish_reason for c in answers} == {LENGTH}
        alone = [
            ask(model, tokenizer, [p], Sampling(max_new_tokens=room, min_new_tokens=room))[0]
            for p, room in zip(prompts, (56, 60, 1, 10, 9), strict=True)
        ]
        assert [c.token_ids for c in alone] == [c.token_ids for c in answers]


@pytest.mark.parametrize(
    ("prompt", "changes", "said"),
    [
        ([5, 320], {}, "prompt_ids: the model has no token 320, only 320 tokens"),
        ([5, -1, 6], {}, "prompt_ids: the model has no token -1, only 320 tokens"),
        (
            [5],
            {"logit_bias": {319: 1.0, 5000: -1.0}},
            "sampling.logit_bias: the model has no token 5000, only 320 tokens",
        ),
        ([5] * 256, {}, "prompt_ids: 256 tokens, a context of 256 is full"),
        ([5] * 300, {}, "prompt_ids: 300 tokens, a context of 256 is full"),
    ],
)
def test_a_bad_request_fails_alone(
    random_model: Any, tokenizer: Any, prompt: list[int], changes: dict[str, Any], said: str
) -> None:
    bad = Sampling.model_validate({"max_new_tokens": 2} | changes)
    engine = StaticEngine(random_model, tokenizer, batch_size=2)
    good = Sampling(max_new_tokens=2)
    engine.add([request(0, 4, good), Request(RequestId(0, 1), tuple(prompt), bad, 1)])
    answers = {answer.id.row: answer for answer in run(engine, [request(2, 4, good)])}
    assert answers[1] == Failure(RequestId(0, 1), "bad_request", said)
    assert [len(completed(answers[row]).token_ids) for row in (0, 2)] == [2, 2]
    assert not engine.has_work()


def test_the_last_token_of_the_vocabulary_may_be_biased(random_model: Any, tokenizer: Any) -> None:
    sampling = Sampling(max_new_tokens=2, logit_bias={VOCABULARY - 1: 100.0})
    (answer,) = ask(random_model, tokenizer, [[VOCABULARY - 1]], sampling)
    assert answer.token_ids == (VOCABULARY - 1,) * 2


def test_nothing_is_logged(
    random_model: Any,
    tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampling = Sampling.model_validate(OPTIONS["all"] | {"max_new_tokens": 3, "stop": ["x"]})
    with caplog.at_level("WARNING"):
        ask(random_model, tokenizer, random_prompts(3), sampling)
    assert caplog.records == []
