"""Answers that are kept: equal when they come back, found by any number of readers, packed, and
never the reason why a job fails.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbatch.answers import cache as caching
from quantbatch.answers import packs, tables
from quantbatch.answers.cache import OF_JOB, PACK, TIME, AnswerCache, Space
from quantbatch.answers.index import Index
from quantbatch.answers.keys import Keys
from quantbatch.records import (
    Completion,
    Embedded,
    FinishReason,
    Ranked,
    Request,
    RequestId,
    Scored,
    TokenLogprobs,
)
from quantbatch.spec import JobSpec, Sampling
from quantbatch.storage import LocalStore
from quantbatch.wants import Embed, Grammar, Rank, Score, Want, Write
from tests.unit.test_ledger import FailingStore

if TYPE_CHECKING:
    from pathlib import Path

    from quantbatch.records import Answer

ME = tables.NOBODY
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
ALL_KINDS: list[Answer] = [
    Completion(ME, "yes \N{SNOWMAN}", (5, 6), STOP),
    Completion(ME, "", (), LENGTH),
    Completion(ME, "a", (5,), STOP, (TokenLogprobs(-0.1),)),
    Completion(
        ME,
        "ab",
        (5, 7),
        STOP,
        (TokenLogprobs(-0.1, ((5, -0.1), (6, -1 / 3))), TokenLogprobs(-2.0, ((7, -2.0),))),
    ),
    Ranked(ME, ((-0.1, -0.2), (-1 / 3,))),
    Scored(ME, (-0.1, -12.5)),
    Embedded(ME, (0.1, 1e-30, -3.0)),
]


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr(caching, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(caching, "LOOK_SHARE", float("inf"))


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return Space(LocalStore(str(tmp_path)), {"model": "m"})


def key(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def some(first: int, count: int) -> dict[bytes, Answer]:
    return {key(n): Completion(ME, f"answer {n}", (n,), STOP) for n in range(first, first + count)}


def names(space: Space) -> list[str]:
    keys = [info.key.rpartition("/")[2] for info in space.store.list(space.folder)]
    return [name for name in keys if name.endswith(".parquet")]


def test_answers_of_all_kinds_come_back_equal(space: Space) -> None:
    kept = {key(number): answer for number, answer in enumerate(ALL_KINDS)}
    AnswerCache(space).keep(kept)
    assert AnswerCache(space).find(list(kept)) == kept


def test_a_field_that_answers_gain_must_be_kept_too() -> None:
    """Whoever adds one finds this: `tables` would drop it."""
    assert [[f.name for f in dataclasses.fields(kind)] for kind in (Completion, Ranked)] == [
        ["id", "text", "token_ids", "finish_reason", "logprobs"],
        ["id", "logprobs"],
    ]
    assert [[f.name for f in dataclasses.fields(kind)] for kind in (Scored, Embedded)] == [
        ["id", "logprobs"],
        ["id", "vector"],
    ]


def test_readers_find_what_others_keep_meanwhile(space: Space) -> None:
    reader, writer = AnswerCache(space), AnswerCache(space)
    assert reader.find([key(1)]) == {}
    for first in range(0, 5000, 1000):
        writer.keep(some(first, 1000))
    wanted = [key(n) for n in (4999, 3, 2500, 2500, 7777)]
    found = reader.find(wanted)
    assert found == {k: a for k, a in some(0, 5000).items() if k in wanted}
    assert writer.find(wanted) == found, "its own are found without looking"
    assert reader.find([]) == {}


def test_answers_are_of_one_model(space: Space) -> None:
    AnswerCache(space).keep(some(0, 3))
    other = Space(space.store, {"model": "another"})
    assert AnswerCache(other).find([key(1)]) == {}
    about = json.loads(space.store.read(f"{space.folder}/about.json"))
    assert about == {"model": "m"}


def test_the_index_is_bounded(space: Space) -> None:
    AnswerCache(space).keep(some(0, 100))
    bounded = AnswerCache(space, most_keys=40)
    assert len(bounded.find(list(some(0, 100)))) == 40


@pytest.mark.parametrize("damage", [b"", b"PAR1", None])
def test_a_damaged_or_missing_file_is_a_miss(
    space: Space, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    cache = AnswerCache(space)
    cache.keep(some(0, 3))
    cache.keep(some(3, 3))
    broken, whole = (f"{space.folder}/{name}" for name in names(space))
    kept_whole = AnswerCache(Space(space.store, space.about))
    good = set(kept_whole.find(list(some(0, 6))))
    assert len(good) == 6
    fresh, late = AnswerCache(space), AnswerCache(space)
    late._look()
    if damage is None:
        space.store.delete(broken)
    else:
        space.store.put(broken, damage)
    for reader in (fresh, late):
        found = reader.find(list(some(0, 6)))
        assert len(found) == 3
        assert found.items() <= some(0, 6).items()
    assert space.store.read(whole)
    assert "can't be read" in caplog.text


def test_a_flipped_bit_is_noticed(space: Space) -> None:
    cache = AnswerCache(space)
    cache.keep(some(0, 500))
    (name,) = names(space)
    data = bytearray(space.store.read(f"{space.folder}/{name}"))
    expected = some(0, 500)
    for at in range(100, len(data) // 2, 501):
        data[at] ^= 1
        space.store.put(f"{space.folder}/{name}", bytes(data))
        found = AnswerCache(space).find(list(expected))
        assert found.items() <= expected.items()
        data[at] ^= 1


@pytest.mark.parametrize("after", [False, True])
def test_a_store_that_fails_at_any_call_is_no_error(tmp_path: Path, after: bool) -> None:
    fail_at = 0
    while True:
        fail_at += 1
        store = LocalStore(str(tmp_path / str(fail_at)))
        AnswerCache(Space(store, {})).keep(some(0, 5))
        failing = FailingStore(store, fail_at, after=after)
        cache = AnswerCache(Space(failing, {}))
        wanted = list(some(0, 10))
        assert cache.find(wanted).items() <= some(0, 5).items()
        cache.keep(some(5, 5))
        assert cache.find(wanted).items() <= some(0, 10).items()
        packs.tidy(Space(failing, {}))
        calls = failing.calls
        assert AnswerCache(Space(store, {})).find(wanted).items() >= some(0, 5).items()
        if calls < fail_at:
            break
    assert fail_at > 4


def test_a_cache_that_fails_is_left_alone_for_a_while(space: Space) -> None:
    failing = FailingStore(space.store, 1, after=False)
    cache = AnswerCache(Space(failing, {}))
    assert cache.find([key(1)]) == {}
    calls = failing.calls
    cache.find([key(1)])
    cache.keep(some(0, 3))
    assert failing.calls == calls


def test_many_small_files_are_packed(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "FILES_WORTH_IT", 5)
    cache = AnswerCache(space)
    for first in range(0, 60, 10):
        cache.keep(some(first, 10))
    early = AnswerCache(space)
    early._look()
    small = names(space)
    damaged = f"{space.folder}/{small[2]}"
    space.store.put(damaged, b"PAR1")
    packs.tidy(space)
    assert len(names(space)) == 7, "what was packed stays for a day"
    late = AnswerCache(space)
    everything = some(0, 60)
    found = late.find(list(everything))
    assert len(found) == 50
    assert found.items() <= everything.items()
    assert {file.name for file in late._files} == {n for n in names(space) if n.endswith(PACK)}
    packs.tidy(space)
    assert len(names(space)) == 7, "nothing is packed twice"

    (pack,) = (name for name in names(space) if name.endswith(PACK))
    long_ago = (datetime.now(UTC) - timedelta(days=2)).strftime(TIME)
    data = space.store.read(f"{space.folder}/{pack}")
    space.store.put(f"{space.folder}/{long_ago}-x{PACK}", data)
    space.store.delete(f"{space.folder}/{pack}")
    packs.tidy(space)
    assert names(space) == [f"{long_ago}-x{PACK}", small[2]]
    assert len(AnswerCache(space).find(list(everything))) == 50
    assert early.find(list(everything)).items() <= everything.items()


@given(st.lists(st.integers(0, 400), max_size=30), st.lists(st.integers(0, 500), max_size=50))
def test_the_index_finds_what_was_added(sizes: list[int], asked: list[int]) -> None:
    index = Index(10**6)
    places: dict[int, tuple[int, int]] = {}
    done = 0
    for file, size in enumerate(sizes):
        index.add(file, b"".join(key(done + row) for row in range(size)))
        places |= {done + row: (file, row) for row in range(size)}
        done += size
    assert len(index) == done
    assert index.find([key(number) for number in asked]) == [places.get(n) for n in asked]
    assert len(index._runs) < 12


# ---- keys


def request(
    want: Want | None = None, prompt: tuple[int, ...] = (1, 2), **sampling: object
) -> Request:
    settings = Sampling.model_validate(sampling)
    return Request(RequestId(0, 0), prompt, settings, 7, want or Write())


def test_what_differs_in_its_answer_has_another_key() -> None:
    keys = Keys()
    different = [
        request(),
        request(prompt=(1, 3)),
        request(prompt=(1, 2, 2)),
        request(max_new_tokens=9),
        request(stop=["x"]),
        request(logprobs=0),
        request(Write(grammar=Grammar("regex", "a+"))),
        request(Rank(((1,), (2,)))),
        request(Rank(((1, 2),))),
        request(Score(1)),
        request(Embed("last")),
        request(Embed("mean")),
    ]
    found = [keys.of(each) for each in different]
    assert None not in found
    assert len(set(found)) == len(different)


def test_what_does_not_count_changes_no_key() -> None:
    keys = Keys()
    assert keys.of(request(seed=3)) == keys.of(request())
    assert keys.of(request(Score(1), max_new_tokens=9)) == keys.of(request(Score(1)))
    assert keys.of(request(temperature=0.5)) is None
    assert keys.of(request(Embed(), temperature=0.5)) == keys.of(request(Embed()))


def test_keys_are_the_same_in_every_version() -> None:
    """They are on disks: this test may not change without `cache.FORMAT`."""
    found = Keys().of(request(max_new_tokens=9))
    assert found is not None
    assert found.hex() == "b328b4265c97530e4898ad7d02a5783b"


def test_a_job_without_a_cache_has_a_space_beside_its_records(tmp_path: Path) -> None:
    def space_of(**changes: object) -> Space | None:
        fields = {
            "name": "n", "input": {"uri": "i"}, "model": {"id": "m"}, "output": {"uri": "o"},
            "prompt": {"template": "x"},
        }  # fmt: skip
        return Space.of(JobSpec.model_validate(fields | changes), "digest", output)

    output = LocalStore(str(tmp_path / "out"))
    own = space_of()
    assert own is not None
    assert (own.store, own.name) == (output, OF_JOB)
    assert own.folder.startswith("_quantbatch/answers/")
    given = space_of(answers_cache={"uri": str(tmp_path / "cache")})
    assert given is not None
    assert (given.store.uri, given.name) == (str(tmp_path / "cache"), "answers_cache")
    assert own.folder.endswith(given.folder)
    assert space_of(engine={"deduplicate": False}) is None
    assert space_of(engine={"kind": "echo"}) is None
