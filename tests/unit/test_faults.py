"""`quantbatch errors`: the rows without a good answer, of files that readers see and of others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from quantbatch import reread
from quantbatch.cli import app
from quantbatch.commits import commit_chunk
from quantbatch.faults import describe_faults
from quantbatch.records import Status
from quantbatch.spec import Storage
from tests.unit.test_again import answers, job_in
from tests.unit.test_ledger import make_spec, opened, target_of

if TYPE_CHECKING:
    from pathlib import Path

ALL = [Status.ERROR, Status.INVALID, Status.TRUNCATED]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a finished job: 2 rows with an error, 2 that are cut."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.chdir(tmp_path)
    job_in(tmp_path)
    return tmp_path


def faults(where: str, *, examples: int = 3) -> dict[str, Any]:
    return describe_faults(where, Storage(), ALL, examples)


def test_rows_are_listed_by_kind_with_examples(folder: Path) -> None:
    found = faults("out", examples=1)
    assert (found["outcome"], found["finished"], found["rows"]) == ("listed", True, 4)
    assert [(kind["status"], kind["error_type"], kind["rows"]) for kind in found["kinds"]] == [
        ("truncated", None, 2),
        ("error", "model", 2),
    ]
    example = {"row_id": "a.parquet:2", "message": "first failed", "prompt": "x"}
    assert found["kinds"][1]["examples"] == [example]
    assert [row["row_id"] for row in faults("out")["kinds"][1]["examples"]] == [
        "a.parquet:2",
        "a.parquet:7",
    ]


def test_what_is_committed_and_not_published_is_listed_too(tmp_path: Path) -> None:
    job_in(tmp_path)
    spec = make_spec(tmp_path, output={"uri": str(tmp_path / "again"), "rows_per_part": 5})
    ledger = opened(spec)
    chunk = next(ledger.undone())
    commit_chunk(ledger.store, chunk.id, answers(chunk, "x", (0, 3)), target_of(ledger))
    found = faults(str(tmp_path / "again"))
    assert (found["finished"], found["rows_done"], found["rows"]) == (False, 4, 2)
    assert [row["row_id"] for row in found["kinds"][0]["examples"]] == [
        "a.parquet:0",
        "a.parquet:3",
    ]


def test_files_without_such_rows_and_other_columns_are_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, tuple[str, ...]]] = []
    real = reread.parquet_batches

    def watched(store: Any, key: str, columns: list[str]) -> Any:
        read.append((key, tuple(columns)))
        return real(store, key, columns)

    monkeypatch.setattr("quantbatch.faults.parquet_batches", watched)
    assert describe_faults("out", Storage(), [Status.INVALID], 3)["rows"] == 0
    assert read == []
    describe_faults("out", Storage(), [Status.ERROR], 3)
    columns = ("row_id", "status", "error_type", "error_message", "text")
    assert read == [("part-000000.parquet", columns), ("part-000001.parquet", columns)]


def test_the_command(folder: Path) -> None:
    shown = CliRunner().invoke(app, ["errors", "out", "--status", "error", "-n", "1"])
    assert shown.exit_code == 0
    assert shown.stdout.splitlines() == [
        "test: 2 of 9 rows: error",
        "error model: 2 rows",
        "  a.parquet:2: first failed",
        "    x",
    ]
    given = ["--status", "truncated,error", "--status", "invalid", "--json"]
    result = CliRunner().invoke(app, ["errors", "out", *given])
    found = json.loads(result.stdout)
    assert found["statuses"] == ["truncated", "error", "invalid"]
    assert found["rows"] == 4


def test_damage_is_told(folder: Path) -> None:
    (folder / "out" / "part-000000.parquet").write_bytes(b"PAR1")
    result = CliRunner().invoke(app, ["errors", "out"])
    assert result.exit_code == 1
    assert "can't be read: part-000000.parquet" in result.stdout
    assert "a.parquet:7: first failed" in result.stdout


@pytest.mark.parametrize("command", ["errors", "retry"])
def test_an_unknown_status_is_one_error(folder: Path, command: str) -> None:
    result = CliRunner().invoke(app, [command, "job.yaml", "--status", "ok"])
    assert result.exit_code == 2
    assert "--status ok: a row's status is one of truncated, invalid, error" in result.stderr


def test_nothing_begun(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["errors", str(tmp_path)])
    assert result.exit_code == 2
    assert "no job has begun here" in result.stderr
