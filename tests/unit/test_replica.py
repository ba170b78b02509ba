"""What a replica asks of its engine for each row, and where the answers go."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pyarrow as pa

from quantbatch import replica, rows
from quantbatch.answers import packs
from quantbatch.answers.cache import OF_JOB, Space
from quantbatch.engine.dedup import Deduplicated
from quantbatch.errors import RowError
from quantbatch.prompts.rendering import row_seed, sample_seed
from quantbatch.records import Completion, Counts, Failure, FinishReason, Request, pack, unpack
from quantbatch.replica import LoadedEngine, Replica, ReplicaJob
from quantbatch.spec import JobSpec
from quantbatch.storage import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import pytest

    from quantbatch.records import Answer


class Backwards:
    """An engine that answers the newest request first, and none of the third sample of row 2."""

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self._queue: list[Request] = []

    def add(self, requests: Iterable[Request]) -> None:
        self._queue += requests
        self.seen += self._queue

    def has_work(self) -> bool:
        return bool(self._queue)

    def step(self) -> Sequence[Answer]:
        request = self._queue.pop()
        if (request.id.row, request.id.sample) == (2, 2):
            return [Failure(request.id, "model", "no")]
        text = f"{request.id.row}.{request.id.sample}"
        return [Completion(request.id, text, (1,), FinishReason.STOP)]

    def evict(self) -> Sequence[Request]:
        return []


def answered(
    monkeypatch: pytest.MonkeyPatch,
    samples: int,
    *,
    device: str = "cpu",
    planned_bytes: int = 0,
    peak_bytes: int = 0,
    space: Space | None = None,
    prompts: Sequence[list[int] | None] = ([5], None, [6, 7]),
) -> tuple[pa.Table, list[Request]]:
    """Have a chunk of three rows answered, the second of which has an error already."""
    engine = Backwards()
    loaded = LoadedEngine(Deduplicated(engine), planned_bytes, lambda: peak_bytes)
    monkeypatch.setattr(replica, "load_engine", lambda _: loaded)
    spec = JobSpec.model_validate(
        {
            "name": "t", "input": {"uri": "in"}, "model": {"id": "m"}, "output": {"uri": "out"},
            "prompt": {"template": "x"}, "sampling": {"n": samples, "temperature": 1.0, "seed": 7},
            **({"sampling": {}} if space else {}),
            **({"answers_cache": {"uri": "c"}} if space and not space.is_of_job else {}),
        }
    )  # fmt: skip
    given = pa.array(prompts, pa.list_(pa.int32()))
    ids = pa.array(["a", "b", "c", "d"][: len(prompts)])
    errors = {i: RowError("null_prompt", "null") for i, ids in enumerate(prompts) if ids is None}
    rendered = rows.rendered(pa.table({}), ids, given, errors)
    block = pack(4, rows.with_facts(rendered, rows.ChunkFacts(0, len(prompts))))
    found = asyncio.run(Replica(ReplicaJob(spec, device, 99, ".", space))(block))
    chunk, table = unpack(found)
    assert chunk == 4
    return table, engine.seen


def test_each_sample_is_a_request_with_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _, seen = answered(monkeypatch, 3)
    assert [request.id for request in seen] == [(4, row, k) for row in (0, 2) for k in range(3)]
    assert [request.prompt_ids for request in seen] == [(5,)] * 3 + [(6, 7)] * 3
    assert seen[0].seed == row_seed(7, "a")
    assert seen[5].seed == row_seed(7, "c#2") == sample_seed(7, "c", 2)
    assert len({request.seed for request in seen}) == 6


def test_samples_come_back_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = answered(monkeypatch, 3)
    assert table["completion"].to_pylist() == [["0.0", "0.1", "0.2"], None, None]
    assert table["status"].to_pylist() == ["ok", "error", "error"]
    assert table["error_message"].to_pylist() == [None, "null", "sample 2 of 3: no"]


def test_more_samples_leave_the_first_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    table, alone = answered(monkeypatch, 1)
    assert table["completion"].to_pylist() == ["0.0", None, "2.0"]
    _, several = answered(monkeypatch, 3)
    firsts = [request for request in several if request.id.sample == 0]
    assert [(r.id, r.seed) for r in firsts] == [(r.id, r.seed) for r in alone]


def test_a_card_that_takes_more_than_planned_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        answered(monkeypatch, 1, device="cuda", planned_bytes=4 << 30, peak_bytes=5 << 30)
        answered(monkeypatch, 1, device="cuda", planned_bytes=4 << 30, peak_bytes=3 << 30)
        answered(monkeypatch, 1, device="cpu", planned_bytes=4 << 30, peak_bytes=5 << 30)
    assert [(each.levelname, each.message) for each in caplog.records] == [
        ("WARNING", "memory of the card: 4.00 GiB planned, 5.00 GiB taken (+25.0 %)"),
        ("INFO", "memory of the card: 4.00 GiB planned, 3.00 GiB taken (-25.0 %)"),
    ]


def test_answers_that_are_kept_are_not_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    space = Space(LocalStore(str(tmp_path)), {"model": "m"})
    first, asked = answered(monkeypatch, 1, space=space)
    assert [request.prompt_ids for request in asked] == [(5,), (6, 7)]
    assert first["cached"].to_pylist() == [False, False, False]
    second, asked = answered(monkeypatch, 1, space=space)
    assert asked == []
    assert second["cached"].to_pylist() == [True, False, True], "row b has no prompt"
    assert second.drop_columns("cached") == first.drop_columns("cached")
    other = Space(space.store, {"model": "another"})
    assert len(answered(monkeypatch, 1, space=other)[1]) == 2
    assert rows.counts_of(first) == Counts(ok=2, error=1, prompt_tokens=3, completion_tokens=2)
    assert rows.counts_of(second) == Counts(ok=2, error=1, cached=2)


def test_a_job_s_own_answers_are_kept_where_requests_repeat(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    space = Space(LocalStore(str(tmp_path)), {"model": "m"}, OF_JOB)

    def asked(*prompts: list[int]) -> list[tuple[int, ...]]:
        """Return what a new replica, as after a crash, asks its engine for."""
        table, seen = answered(monkeypatch, 1, space=space, prompts=prompts)
        assert table["status"].to_pylist() == ["ok"] * len(prompts)
        assert "cached" not in table.column_names
        return [request.prompt_ids for request in seen]

    assert asked([1], [2], [3]) == [(1,), (2,), (3,)]
    assert not [*tmp_path.rglob("*.parquet")], "nothing is worth it"
    assert asked([1], [2], [1], [1]) == [(1,), (2,)]
    assert len([*(tmp_path / OF_JOB).rglob("*.parquet")]) == 1
    assert asked([4], [1], [2]) == [(4,)]
    assert asked([4]) == [], "it was kept, since the others were of use"
    packs.tidy(space)
    assert not [*tmp_path.rglob("*.parquet")]
    assert asked([1]) == [(1,)]


def test_the_prompt_of_a_row_that_no_model_reads_is_not_counted() -> None:
    prompts = pa.array([[5], [6, 7], None], pa.list_(pa.int32()))
    errors = {1: RowError("bad_schema", "none"), 2: RowError("null_prompt", "null")}
    rendered = rows.rendered(pa.table({}), pa.array(["a", "b", "c"]), prompts, errors)
    assert rendered["prompt_ids"].to_pylist() == [[5], None, None]


def test_a_cache_that_can_not_be_written_costs_no_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    space = Space(LocalStore(str(tmp_path / "file" / "cache")), {})
    table, _ = answered(monkeypatch, 1, space=space)
    assert table["completion"].to_pylist() == ["0.0", None, "2.0"]
    assert table["cached"].to_pylist() == [False] * 3
