"""Rows that kill, hang or raise: found one by one, their neighbours answered."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch import pipeline, rounds, stages, trials
from quantbatch.errors import Stopped
from quantbatch.report import Outcome
from quantbatch.spec import JobSpec, Limits
from quantbatch.suspects import FOLDER, attempts_for_a_row
from quantbatch.verify import verify
from tests.integration import killers
from tests.integration.support import MODEL

if TYPE_CHECKING:
    from pathlib import Path

    from quantbatch.replica import Replica
    from quantbatch.report import RunReport
    from tests.conftest import Count
    from tests.integration.support import Head

ROWS, ROWS_PER_CHUNK = 20, 5


def job(
    folder: Path, head: Head, poison: dict[int, str], *, chunk: int = ROWS_PER_CHUNK, **limits: Any
) -> JobSpec:
    (folder / "in").mkdir()
    texts = [f"row {n} says please {poison[n]}" if n in poison else f"row {n}" for n in range(ROWS)]
    pq.write_table(pa.table({"text": texts}), folder / "in" / "rows.parquet")
    fields = {
        "name": "poison",
        "input": {"uri": str(folder / "in"), "rows_per_chunk": chunk},
        "model": {"id": str(MODEL), "bits": 16},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_new_tokens": 16},
        "engine": {"kind": "echo"},
        "cluster": {"gpus_per_replica": 0, "address": head.address},
        "output": {"uri": str(folder / "out"), "rows_per_part": ROWS},
        "limits": {"max_error_rate": 1.0, **limits},
    }
    return JobSpec.model_validate(fields)


def run(spec: JobSpec, replica: type[Replica]) -> RunReport:
    with patch.object(rounds, "Replica", replica), patch.object(trials, "Replica", replica):
        return pipeline.run(spec)


def attempts(folder: Path) -> dict[int, int]:
    """Return the attempts that each searched chunk took."""
    found = {}
    for path in (folder / "out" / FOLDER).iterdir():
        search = json.loads(path.read_text())
        found[int(path.stem.split("-")[1])] = search["attempts"] if search else 0
    return found


@pytest.mark.timeout(300)
def test_rows_that_kill_become_error_rows(tmp_path: Path, ray_head: Head, count: Count) -> None:
    poison = {1: "segfault", 7: "exit", 8: "raise", 19: "hang"}
    spec = job(tmp_path, ray_head, poison, step_timeout_s=2)
    report = run(spec, killers.KillingReplica)
    assert verify(spec).outcome == "proven"
    answers = pq.read_table(tmp_path / "out" / "part-000000.parquet").to_pylist()
    wrong = {n: row for n, row in enumerate(answers) if row["status"] == "error"}
    kinds = {n: row["error_type"] for n, row in wrong.items()}
    assert kinds == {1: "process_died", 7: "process_died", 8: "model", 19: "step_timeout"}
    assert "Segmentation fault" in wrong[1]["error_message"]
    assert report.counts.ok == ROWS - len(poison)
    tried = attempts(tmp_path)
    count(f"poison rows={len(poison)} attempts={tried}")
    assert max(tried.values()) <= attempts_for_a_row(ROWS_PER_CHUNK)


@pytest.mark.timeout(300)
def test_a_file_that_kills_its_reader_is_named_and_stops_nothing(
    tmp_path: Path, ray_head: Head
) -> None:
    spec = job(tmp_path, ray_head, {}, chunk=ROWS)
    whole = pq.read_table(tmp_path / "in" / "rows.parquet")
    for name, first in (("a", 0), ("deadly", 7), ("z", 14)):
        pq.write_table(whole.slice(first, 7), tmp_path / "in" / f"{name}.parquet")
    (tmp_path / "in" / "rows.parquet").unlink()

    with patch.object(stages, "Reader", killers.KillingReader):
        report = pipeline.run(spec)

    assert (report.outcome, report.exit_code) == (Outcome.INPUT_UNREADABLE, 1)
    assert list(report.unreadable) == ["deadly.parquet"]
    assert "Segmentation fault" in report.unreadable["deadly.parquet"]
    answers = pq.read_table(tmp_path / "out" / "part-000000.parquet").to_pylist()
    wrong = [row["row_id"] for row in answers if row["status"] == "error"]
    assert wrong == [f"deadly.parquet:{n}" for n in range(7)]
    assert {row["error_type"] for row in answers} == {None, "process_died"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("replica", "limits", "said"),
    [
        (killers.DoomedReplica, {"attempts": 1}, r"died \d+ times in a row, whatever their rows"),
        (
            killers.StuckReplica,
            {"attempts": 2, "load_timeout_s": 1},
            "died 2 times while it loaded the model: it took longer than",
        ),
    ],
)
def test_replicas_that_only_die_stop_the_job(
    tmp_path: Path, ray_head: Head, replica: type[Replica], limits: dict[str, Any], said: str
) -> None:
    spec = job(tmp_path, ray_head, {}, chunk=1, **limits)
    with pytest.raises(Stopped, match=said) as caught:
        run(spec, replica)
    assert "the same command continues the job" in caught.value.hint
    # The machine is mended: nothing is lost, and no row is blamed.
    spec = spec.model_copy(update={"limits": Limits(max_error_rate=1.0)})
    report = run(spec, killers.KillingReplica)
    assert (report.counts.ok, report.counts.error) == (ROWS, 0)
    assert verify(spec).outcome == "proven"
