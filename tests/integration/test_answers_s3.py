"""A cache of answers, and the list of rows without a good answer, on S3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from quantbatch.answers import cache as caching
from quantbatch.answers import packs
from quantbatch.answers.cache import AnswerCache, Space
from quantbatch.records import Completion, FinishReason, RequestId

if TYPE_CHECKING:
    from quantbatch.records import Answer
    from tests.integration.support import Bucket


def some(first: int, count: int) -> dict[bytes, Answer]:
    numbers = range(first, first + count)
    return {
        n.to_bytes(16, "little"): Completion(RequestId(-1, -1), str(n), (n,), FinishReason.STOP)
        for n in numbers
    }


@pytest.mark.timeout(120)
def test_answers_are_kept_found_and_packed_on_s3(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(caching, "LOOK_SHARE", float("inf"))
    monkeypatch.setattr(packs, "FILES_WORTH_IT", 2)
    space = Space(bucket.store("cache"), {"model": "m"})
    reader, writer = AnswerCache(space), AnswerCache(space)
    assert reader.find(list(some(0, 3))) == {}
    for first in (0, 10, 20):
        writer.keep(some(first, 10))
    everything = some(0, 30)
    assert reader.find([*everything, b"x" * 16]) == everything
    packs.tidy(space)
    assert AnswerCache(space).find(list(everything)) == everything
    names = [info.key for info in space.store.list(space.folder)]
    assert sum(name.endswith(caching.PACK) for name in names) == 1


@pytest.mark.timeout(60)
def test_a_bucket_that_is_not_there_is_a_miss(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    gone = bucket._replace(uri=f"{bucket.uri}-gone")
    cache = AnswerCache(Space(gone.store("cache"), {}))
    assert cache.find(list(some(0, 3))) == {}
    cache.keep(some(0, 3))
    assert "going on without" in caplog.text
