"""What `gc` removes: what no record can ever name, at once; what nobody is at any more, by age."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typing_extensions import override

from quantbatch import gc
from quantbatch.commits import Commit, commit_chunk, commit_key, data_key
from quantbatch.errors import InputError, Refused, SpecError
from quantbatch.storage import LocalStore
from quantbatch.verify import verify
from tests.unit.test_again import answers, begin, commit, job_in, publish, reopened, retry
from tests.unit.test_ledger import target_of

if TYPE_CHECKING:
    from quantbatch.ledger import Ledger
    from quantbatch.spec import JobSpec

DAY_S = 86400.0


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """A job of 9 rows in chunks of 4 and shards of 5; row 2 of each long chunk fails."""
    return job_in(tmp_path)


def tidy(spec: JobSpec, *, dry_run: bool = False) -> gc.Tidied:
    output = spec.output
    return gc.tidy(output.uri, output.storage, older_than_s=DAY_S, dry_run=dry_run)


def left(spec: JobSpec, folder: str = "data") -> list[str]:
    """Return what is in one of the private folders."""
    there = Path(spec.output.uri, "_quantbatch", folder)
    return sorted(path.name for path in there.iterdir()) if there.exists() else []


def lose(ledger: Ledger, chunk: int, attempt: str = "0" * 12) -> str:
    """Leave the data file of an attempt behind, as a driver that is killed before it claims."""
    key = data_key(chunk, attempt)
    ledger.store.put(key, b"rows")
    return Path(key).name


def test_what_lost_goes_and_what_counts_stays(spec: JobSpec) -> None:
    before = left(spec)
    ledger = reopened(spec)
    lost = {lose(ledger, 0), lose(ledger, 1), lose(ledger, 1, "f" * 12)}
    assert set(left(spec)) == {*before, *lost}
    assert tidy(spec, dry_run=True).to_json()["removed"] == {
        "attempts": {"objects": 3, "bytes": 12}
    }
    assert set(left(spec)) == {*before, *lost}
    tidy(spec)
    assert left(spec) == before
    assert verify(spec).outcome == "proven"
    retry(reopened(spec))
    assert verify(spec).outcome == "proven"


def test_a_second_time_there_is_nothing(spec: JobSpec) -> None:
    lose(reopened(spec), 0)
    assert tidy(spec).removed
    assert tidy(spec).to_json() == {
        "outcome": "tidied",
        "exit_code": 0,
        "output": spec.output.uri,
        "dry_run": False,
        "removed": {},
        "undecided": 0,
    }


def test_a_file_whose_record_may_come_stays_however_old(spec: JobSpec) -> None:
    ledger = reopened(spec)
    kept = [lose(ledger, 0), lose(ledger, 77)]  # the plan may grow to that chunk
    ledger.store.delete(commit_key(0))
    for name in kept:
        os.utime(Path(spec.output.uri, "_quantbatch/data", name), (0, 0))
    done = tidy(spec)
    assert (done.removed, done.undecided) == ({}, 3)
    assert set(kept) <= set(left(spec))


def test_an_attempt_of_a_retry_stays_while_its_chunk_is_open(spec: JobSpec) -> None:
    ledger = reopened(spec)
    found = begin(ledger)
    chunk, *_ = found.by_chunk
    of_retry, of_another = lose(ledger, chunk), lose(ledger, chunk + 1)
    assert chunk + 1 not in found.by_chunk
    tidy(spec)
    assert of_retry in left(spec)
    assert of_another not in left(spec)
    retry(ledger)
    tidy(spec)
    assert of_retry not in left(spec)
    assert verify(spec).outcome == "proven"


def test_all_attempts_that_a_retry_builds_on_stay(spec: JobSpec) -> None:
    retry(reopened(spec))
    retry(reopened(spec), "third", {"statuses": ["truncated"], "changes": {}})
    before = left(spec)
    assert len(before) > 3
    assert tidy(spec).removed == {}
    assert left(spec) == before


def test_a_driver_that_slept_through_it_loses_and_leaves_nothing(spec: JobSpec) -> None:
    """The classic race: gc between a rival's data file and its claim."""
    ledger = reopened(spec)
    assert ledger.plan
    before, chunk = left(spec), next(ledger.plan.each_chunk())

    class Sleepy(LocalStore):
        @override
        def claim(self, key: str, data: bytes) -> bytes:
            assert len(left(spec)) == len(before) + 1
            tidy(spec)
            assert left(spec) == before
            return super().claim(key, data)

    receipt = commit_chunk(
        Sleepy(spec.output.uri), chunk.id, answers(chunk, "late"), target_of(ledger)
    )
    assert left(spec) == before
    winner = Commit.from_bytes(ledger.store.read(commit_key(chunk.id)))
    assert receipt.counts == winner.counts
    assert verify(spec).outcome == "proven"


def test_other_files_are_not_ours_to_remove(spec: JobSpec) -> None:
    data = Path(spec.output.uri, "_quantbatch", "data")
    names = ["notes.txt", "00000000-short.parquet", "0-000000000000.parquet"]
    for name in names:
        (data / name).write_text("mine")
    (data / "x").mkdir()
    (data / "x" / "00000000-000000000000.parquet").write_text("mine")
    assert tidy(spec).removed == {}
    assert {*names, "x"} <= set(left(spec))


def test_what_passes_goes_by_the_store_s_clock(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)  # ours is decades off
    ledger = reopened(spec)
    for folder in ("scratch", "probe", "drivers", "leases"):
        for name in ("old", "new"):
            ledger.store.put(f"_quantbatch/{folder}/{name}", b"x")
        path = Path(spec.output.uri, "_quantbatch", folder, "old")
        modified_s = path.stat().st_mtime - DAY_S - 60
        os.utime(path, (modified_s, modified_s))
    assert sorted(tidy(spec).removed) == ["drivers", "leases", "probe", "scratch"]
    for folder in ("scratch", "probe", "drivers", "leases"):
        assert left(spec, folder) == ["new"]


def test_a_damaged_record_stops_it(spec: JobSpec) -> None:
    lost = lose(reopened(spec), 0)
    Path(spec.output.uri, commit_key(0)).write_text("{")
    with pytest.raises(Refused, match="damaged"):
        tidy(spec)
    assert lost in left(spec)


def test_it_keeps_away_from_what_is_no_job_s(tmp_path: Path, spec: JobSpec) -> None:
    folder = tmp_path / "mine"
    (folder / "_quantbatch" / "scratch").mkdir(parents=True)
    (folder / "_quantbatch" / "scratch" / "x").write_text("")
    with pytest.raises(InputError, match="no job has begun"):
        gc.tidy(str(folder), spec.output.storage, older_than_s=0)
    job = Path(spec.output.uri, "_quantbatch", "job.json")
    job.write_text(job.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(Refused, match="written in format 3, this is format 2"):
        tidy(spec)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0s", 0), ("90m", 5400), ("24h", DAY_S), ("7d", 7 * DAY_S)]
)
def test_ages(text: str, seconds: float) -> None:
    assert gc.age_s(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "1.5h", "1w", "24 h", "9999999d"])
def test_what_is_no_age(text: str) -> None:
    with pytest.raises(SpecError, match="--older-than"):
        gc.age_s(text)


def test_publishing_again_needs_nothing_that_went(spec: JobSpec) -> None:
    ledger = reopened(spec)
    assert ledger.plan
    chunk = next(ledger.plan.each_chunk())
    commit(ledger, chunk, "rival")
    tidy(spec)
    publish(reopened(spec), chunk.shard)
    assert verify(spec).outcome == "proven"
