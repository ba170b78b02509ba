"""Equal requests are answered once, and every one of them gets its answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbatch.engine.dedup import ANSWER_OVERHEAD_TOKENS, Deduplicated
from quantbatch.records import (
    Answer,
    Completion,
    Embedded,
    Failure,
    FinishReason,
    Ranked,
    Request,
    RequestId,
    Scored,
    TokenLogprobs,
)
from quantbatch.spec import Sampling
from quantbatch.wants import Embed, Rank, Score

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quantbatch.wants import Want

GREEDY = Sampling(max_new_tokens=4)
POISON = 666
WRONG = 13


class Fake:
    """Answers `batch` requests a step with their own prompts; fails for poison."""

    def __init__(self, batch: int = 3) -> None:
        self.batch = batch
        self.queue: list[Request] = []
        self.running: list[Request] = []
        self.asked: list[RequestId] = []

    def add(self, requests: Iterable[Request]) -> None:
        new = list(requests)
        self.queue += new
        self.asked += [request.id for request in new]

    def has_work(self) -> bool:
        return bool(self.queue)

    def step(self) -> Sequence[Answer]:
        assert self.queue, "asked to work without work"
        self.running, self.queue = self.queue[: self.batch], self.queue[self.batch :]
        if any(POISON in request.prompt_ids for request in self.running):
            raise ValueError("poison")
        return [fake_answer(request) for request in self.running]

    def evict(self) -> Sequence[Request]:
        failed, self.running = self.running, []
        return failed


def fake_answer(request: Request) -> Answer:
    match request.want:
        case Rank(candidates=candidates):
            return Ranked(request.id, tuple((-1.0,) * len(ids) for ids in candidates))
        case Score(first=first):
            return Scored(request.id, (-1.0,) * (len(request.prompt_ids) - first))
        case Embed():
            return Embedded(request.id, tuple(map(float, request.prompt_ids)))
        case _:
            pass
    if WRONG in request.prompt_ids:
        return Failure(request.id, "bad_request", "wrong")
    said = (*request.prompt_ids, request.sampling.max_new_tokens)
    noted = None if request.sampling.logprobs is None else (TokenLogprobs(-1.0),) * len(said)
    return Completion(request.id, str(said), said, FinishReason.STOP, noted)


def request(row: int, *prompt: int, sampling: Sampling = GREEDY, sample: int = 0) -> Request:
    return Request(RequestId(0, row, sample), prompt, sampling, seed=row)


def drained(engine: Deduplicated) -> dict[RequestId, Answer]:
    found: dict[RequestId, Answer] = {}
    while engine.has_work():
        for answer in engine.step():
            assert answer.id not in found
            found[answer.id] = answer
    return found


def test_equal_requests_share_one_answer() -> None:
    fake = Fake()
    engine = Deduplicated(fake)
    requests = [request(0, 1, 2), request(1, 1, 2), request(2, 3), request(3, 1, 2)]
    engine.add(requests)
    found = drained(engine)
    assert fake.asked == [RequestId(0, 0), RequestId(0, 2)]
    assert found == {each.id: fake_answer(each) for each in requests}
    assert engine.copied == 2
    engine.add([request(9, 1, 2)])
    assert engine.has_work(), "there is an answer to fetch"
    assert drained(engine) == {RequestId(0, 9): fake_answer(request(9, 1, 2))}
    assert len(fake.asked) == 2


def test_what_comes_while_the_first_is_being_answered_waits_for_it() -> None:
    fake = Fake(batch=1)
    engine = Deduplicated(fake)
    engine.add([request(0, 5), request(1, 1)])
    assert [answer.id.row for answer in engine.step()] == [0]
    engine.add([request(2, 1)])
    assert sorted(drained(engine)) == [RequestId(0, 1), RequestId(0, 2)]
    assert fake.asked == [RequestId(0, 0), RequestId(0, 1)]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 5},
        {"repetition_penalty": 1.5},
        {"logprobs": 0},
        {"stop": ["x"]},
        {"stop_token_ids": [4]},
        {"logit_bias": {4: 1.0}},
        {"bad_words": ["x"]},
        {"min_new_tokens": 1},
    ],
)
def test_other_settings_are_another_request(changes: dict[str, object]) -> None:
    fake = Fake()
    engine = Deduplicated(fake)
    other = Sampling.model_validate({"max_new_tokens": 4} | changes)
    engine.add([request(0, 1), request(1, 1, sampling=other), request(2, 1)])
    assert len(drained(engine)) == 3
    assert fake.asked == [RequestId(0, 0), RequestId(0, 1)]


def test_a_seed_changes_no_greedy_answer() -> None:
    fake = Fake()
    engine = Deduplicated(fake)
    other = GREEDY.model_copy(update={"seed": 8})
    engine.add([request(0, 1), request(1, 1, sampling=other)])
    assert len(drained(engine)) == 2
    assert fake.asked == [RequestId(0, 0)]


def test_the_split_between_settings_and_prompt_is_not_blurred() -> None:
    fake = Fake()
    engine = Deduplicated(fake)
    engine.add([request(0, 1, 2), request(1, 1), request(2, 2), request(3, 2, 1)])
    assert len(drained(engine)) == len(fake.asked) == 4


def test_samples_are_never_merged() -> None:
    fake = Fake()
    engine = Deduplicated(fake)
    sampling = Sampling(max_new_tokens=4, temperature=0.5, n=3)
    engine.add(request(0, 1, sampling=sampling, sample=sample) for sample in range(3))
    engine.add([request(1, 1, sampling=sampling), request(2, 1)])
    assert len(drained(engine)) == len(fake.asked) == 5
    assert engine.copied == 0


def test_a_failure_is_everyone_s_and_is_not_remembered() -> None:
    fake = Fake()
    engine = Deduplicated(fake)
    engine.add([request(0, WRONG), request(1, WRONG)])
    found = drained(engine)
    assert found == {
        RequestId(0, row): Failure(RequestId(0, row), "bad_request", "wrong") for row in (0, 1)
    }
    engine.add([request(2, WRONG)])
    assert fake.asked == [RequestId(0, 0), RequestId(0, 2)]
    assert len(drained(engine)) == 1


def test_those_that_wait_are_given_back_too() -> None:
    fake = Fake(batch=2)
    engine = Deduplicated(fake)
    requests = [request(0, POISON), request(1, 1), request(2, POISON), request(3, 1), request(4, 9)]
    engine.add(requests)
    with pytest.raises(ValueError, match="poison"):
        engine.step()
    assert sorted(each.id.row for each in engine.evict()) == [0, 1, 2, 3]
    assert engine.evict() == []
    # As the runner does: each again, apart from the others.
    engine.add([requests[1], requests[3]])
    assert sorted(id.row for id in drained(engine)) == [1, 3, 4]
    engine.add([requests[2]])
    with pytest.raises(ValueError, match="poison"):
        engine.step()
    assert engine.evict() == [requests[2]]
    assert not engine.has_work()


def test_what_is_remembered_is_bounded() -> None:
    fake = Fake(batch=100)
    size = ANSWER_OVERHEAD_TOKENS + 2
    engine = Deduplicated(fake, remembered_tokens=10 * size)
    engine.add(request(row, row) for row in range(50))
    drained(engine)
    assert len(engine._answers) == 10
    assert engine._tokens == 10 * size
    engine.add([request(100, 40)])  # the oldest of those that are left, used again
    engine.add([request(101, 200)])
    drained(engine)
    fake.asked.clear()
    engine.add([request(102, 40), request(103, 41), request(104, 3)])
    drained(engine)
    assert [id.row for id in fake.asked] == [103, 104]
    assert not engine._followers
    assert not engine._digest_of


@pytest.mark.parametrize(
    ("want", "numbers"),
    [(Rank(((1, 2), (3,), (4, 5, 6))), 6), (Score(1), 2), (Embed(), 3), (Embed("mean"), 3)],
)
def test_what_was_read_is_remembered_as_long_as_it_has_room(want: Want, numbers: int) -> None:
    def reading(row: int, token: int) -> Request:
        return replace(request(row, token, 8, 9), want=want)

    fake = Fake(batch=100)
    size = ANSWER_OVERHEAD_TOKENS + numbers
    engine = Deduplicated(fake, remembered_tokens=3 * size)
    engine.add(reading(row, token) for row, token in enumerate([1, 2, 3, 4]))
    drained(engine)
    again = [reading(10, 4), reading(11, 2), reading(12, 1)]
    engine.add(again)
    assert drained(engine) == {each.id: fake_answer(each) for each in again}
    assert [id.row for id in fake.asked] == [0, 1, 2, 3, 12], "the oldest is forgotten"
    assert engine._tokens == 3 * size


def test_an_answer_larger_than_all_that_is_remembered() -> None:
    engine = Deduplicated(Fake(), remembered_tokens=5)
    engine.add([request(0, 1), request(1, 1)])
    assert len(drained(engine)) == 2
    assert (len(engine._answers), engine._tokens) == (0, 0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2), st.booleans()), max_size=40),
    st.integers(1, 5), st.sampled_from([40, 120, 10_000]),
)  # fmt: skip
def test_answers_are_those_that_each_would_have_alone(
    rows: list[tuple[int, int, bool]], batch: int, remembered: int
) -> None:
    engine = Deduplicated(Fake(batch), remembered_tokens=remembered)
    found: dict[RequestId, Answer] = {}
    requests = []
    for row, (token, new, step) in enumerate(rows):
        each = request(row, token, sampling=replace_new(new))
        requests.append(each)
        engine.add([each])
        if step:
            found |= {answer.id: answer for answer in engine.step()}
    found |= drained(engine)
    assert found == {each.id: fake_answer(each) for each in requests}
    assert engine.copied + len(engine.engine.asked) == len(requests)  # type: ignore[attr-defined]


def replace_new(new: int) -> Sampling:
    return GREEDY.model_copy(update={"max_new_tokens": new})


def test_a_copy_has_its_own_id_and_all_else() -> None:
    sampling = Sampling(max_new_tokens=4, logprobs=0)
    engine = Deduplicated(Fake())
    engine.add([request(0, 1, sampling=sampling), request(1, 1, sampling=sampling)])
    one, other = drained(engine).values()
    assert isinstance(other, Completion)
    assert other.logprobs is not None
    assert replace(one, id=other.id) == other
