"""Records that were written once, by the first version of their format, and are still understood.

`tests/golden/format-2` has two jobs as quantbatch left them in October 2026, at commit 1860186,
before records had digests of published files: one that is half done, and one that is finished, with
a retry that is done and a second one half way. They were made with `make_spec` of `test_ledger` in
a working directory of their own. They are never written again: a change that can't read them is a
new FORMAT, or wrong.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantbatch import again, gc
from quantbatch.documents import describe_status
from quantbatch.errors import Refused
from quantbatch.faults import describe_faults
from quantbatch.job_record import FORMAT
from quantbatch.ledger import Ledger
from quantbatch.records import Counts, Status
from quantbatch.spec import JobSpec, Storage
from quantbatch.verify import verify
from tests.unit import test_again, test_ledger

GOLDEN = Path(__file__).parents[1] / "golden"


def copy_of(name: str, folder: Path, patch: pytest.MonkeyPatch, **output: int) -> JobSpec:
    """Return the spec of a copy of a golden job, as it was given then."""
    shutil.copytree(GOLDEN / f"format-{FORMAT}" / name, folder, dirs_exist_ok=True)
    patch.chdir(folder)
    return test_ledger.make_spec(Path(), output={"uri": "out", **output})


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    return copy_of("unfinished", tmp_path, monkeypatch, rows_per_part=10)


@pytest.fixture
def retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    return copy_of("retried", tmp_path, monkeypatch, rows_per_part=5)


def test_the_present_format_has_golden_records() -> None:
    assert (GOLDEN / f"format-{FORMAT}").is_dir()


def test_a_job_that_is_half_done_is_continued(unfinished: JobSpec) -> None:
    status = describe_status("out", Storage())
    assert status["outcome"] == "unfinished"
    assert (status["rows_done"], status["rows"]) == (14, 21)
    assert (status["chunks_done"], status["files_done"]) == (4, 1)
    verdict = verify(unfinished)
    assert (verdict.outcome, verdict.rows_left, verdict.problems) == ("unfinished", 11, ())
    assert verdict.files_as_committed == 1  # by its rows: there was no digest

    ledger = Ledger.open(unfinished, "digest")
    assert [chunk.id for chunk in ledger.undone()] == [4, 5, 6]
    test_ledger.work(ledger, list(ledger.undone()))
    ledger.succeed()
    assert Ledger.open(unfinished, "digest").succeeded()
    assert verify(unfinished).outcome == "proven"


def test_what_was_left_behind_is_tidied(unfinished: JobSpec) -> None:
    lost = Path("out/_quantbatch/data/00000001-0123456789ab.parquet")
    assert lost.exists()
    done = gc.tidy("out", Storage(), older_than_s=0)
    assert done.removed == {"attempts": [4]}
    assert not lost.exists()
    assert verify(unfinished).problems == ()


def test_a_finished_job_with_retries_is_understood(retried: JobSpec) -> None:
    verdict = verify(retried)
    assert (verdict.outcome, verdict.problems, verdict.files_as_committed) == ("proven", (), 2)
    assert describe_status("out", Storage())["outcome"] == "finished"
    found = describe_faults("out", Storage(), [Status.TRUNCATED], 3)
    assert found["rows"] == 2


def test_an_open_retry_is_finished(retried: JobSpec) -> None:
    ledger = Ledger.open(retried, "digest")
    assert [retry.done for retry in ledger.retries.known] == [True, False]
    asked = {"statuses": ["truncated"], "changes": {}}
    found = again.claimed(ledger, asked, ledger.spec)
    assert found
    assert [chunk.id for chunk in again.undone(ledger, found)] == [2]
    test_again.retry(ledger, "third", asked)
    assert verify(retried).outcome == "proven"
    assert verify(retried).counts == Counts(ok=9, prompt_tokens=18, completion_tokens=9)


def test_a_field_that_came_since_counts_as_its_default(unfinished: JobSpec) -> None:
    """The job goes on under the fingerprint that it began with."""
    path = Path("out/_quantbatch/job.json")
    record = json.loads(path.read_text())
    del record["identity"]["sampling.top_p"], record["spec"]["sampling"]["top_p"]
    path.write_text(json.dumps(record))
    ledger = Ledger.open(unfinished, "digest")
    assert ledger.identity == record["identity"]
    test_ledger.work(ledger, list(ledger.undone()))
    changed = unfinished.sampling.model_copy(update={"top_p": 0.5})
    with pytest.raises(Refused, match=r"sampling\.top_p was 1\.0, now 0\.5"):
        Ledger.open(unfinished.model_copy(update={"sampling": changed}), "digest")


@pytest.mark.parametrize("format", [1, 3, 4711])
def test_another_format_is_refused_with_both_numbers(unfinished: JobSpec, format: int) -> None:
    path = Path("out/_quantbatch/job.json")
    path.write_text(json.dumps({"format": format, "of": "another time"}))
    said = f"written in format {format}, this is format {FORMAT}"
    for look in (
        lambda: Ledger.open(unfinished, "digest"),
        lambda: describe_status("out", Storage()),
        lambda: gc.tidy("out", Storage(), older_than_s=0),
        lambda: verify(unfinished),
    ):
        with pytest.raises(Refused, match=said) as caught:
            look()
        assert caught.value.exit_code == 3
        assert "version of quantbatch" in caught.value.hint
