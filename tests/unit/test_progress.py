"""What is told of a run while it goes on."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from rich.console import Console

from quantbatch.progress import JsonLines, Live, Silent
from quantbatch.records import Counts, Receipt, ReplicaStats
from quantbatch.report import RunFigures
from quantbatch.spec import Model

if TYPE_CHECKING:
    from quantbatch.preflight import Job
    from quantbatch.progress import Progress


def make_job(*, done: int = 0, replicas: object = 2) -> Job:
    """Return what progress looks at of a job of 100 rows."""
    job = SimpleNamespace(
        spec=SimpleNamespace(
            name="test",
            cluster=SimpleNamespace(replicas=replicas),
            model=Model(id="org/model", bits=4),
        ),
        chosen_for=None,
        plan=SimpleNamespace(rows=100, shards=[None] * 4),
        ledger=SimpleNamespace(
            counts=Counts(ok=done), published={}, store=SimpleNamespace(uri="s3://me@bucket/out")
        ),
    )
    return cast("Job", job)


def commit(progress: Progress, figures: RunFigures, rows: int, errors: int = 0) -> None:
    counts = Counts(ok=rows - errors, error=errors, completion_tokens=10 * rows)
    receipt = Receipt(0, 0, counts, replica=ReplicaStats(replica="a"))
    figures.record(receipt)
    progress.committed(receipt, figures)


def be_interrupted(progress: Progress) -> None:
    progress.planned(make_job())
    raise KeyboardInterrupt


def lines(file: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.getvalue().splitlines()]


def test_json_lines_tell_the_steps_of_a_run() -> None:
    file = io.StringIO()
    figures = RunFigures()
    with JsonLines(file) as progress:
        progress.planned(make_job(done=20))
        progress.started("cpu")
        for _ in range(4):
            commit(progress, figures, 10, errors=1)
    found = lines(file)
    assert [line["event"] for line in found] == ["planned", "started", "first_commit", "ended"]
    assert found[0]["output"] == "s3://bucket/out"
    assert found[1]["device"] == "cpu"
    assert [line["rows_done"] for line in found] == [20, 20, 30, 60]
    assert [line["errors"] for line in found] == [0, 0, 1, 4]
    last = found[-1]
    assert (last["rows"], last["shards"], last["replicas"]) == (100, 4, 1)
    assert last["replicas_wanted"] == "2"
    assert isinstance(last["eta_s"], float)


def test_json_lines_are_not_written_for_each_chunk() -> None:
    file = io.StringIO()
    figures = RunFigures()
    with JsonLines(file, every_s=0.0) as progress:
        progress.planned(make_job())
        for _ in range(3):
            commit(progress, figures, 10)
    events = [line["event"] for line in lines(file)]
    assert events == ["planned", "first_commit", "progress", "progress", "ended"]


def test_json_lines_name_the_exception_that_ends_a_run() -> None:
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt), JsonLines(file) as progress:
        be_interrupted(progress)
    assert lines(file)[-1]["exception"] == "KeyboardInterrupt"


def test_json_lines_say_nothing_of_a_run_that_was_not_planned() -> None:
    file = io.StringIO()
    with pytest.raises(ValueError, match="no"), JsonLines(file):
        raise ValueError("no")
    assert file.getvalue() == ""


def test_rates_are_those_since_the_first_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    file = io.StringIO()
    figures = RunFigures()
    with JsonLines(file, every_s=1.0) as progress:
        progress.planned(make_job())
        now += 60  # loading
        commit(progress, figures, 10)
        now += 2
        commit(progress, figures, 20)
    last = lines(file)[-1]
    assert (last["rows_per_s"], last["tokens_per_s"], last["eta_s"]) == (10.0, 100.0, 7.0)


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=100, color_system=None), file


def test_live_draws_what_is_being_done() -> None:
    console, file = terminal()
    figures = RunFigures()
    with Live(console) as progress:
        progress.planned(make_job(replicas=SimpleNamespace(min=1, max=8)))
        progress.started("cuda")
        console.print(progress._drawn())
        commit(progress, figures, 10)
        commit(progress, figures, 15, errors=1)
        console.print(progress._drawn())
    shown = file.getvalue()
    assert "planning" in shown
    assert "starting Ray" in shown
    assert "loading the model (cuda)" in shown
    assert "25 of 100 rows  25%" in shown
    assert "0 of 4 files · 1 error · " in shown
    assert "1 of 1..8 replicas" in shown


def test_live_says_which_bits_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantbatch.progress.describe_choice", lambda _: "bits auto is 4 \x1b[2J")
    console, file = terminal()
    with Live(console) as progress:
        progress.planned(make_job())
    assert r"bits auto is 4 \x1b[2J" in file.getvalue()


def test_live_puts_the_terminal_in_order_when_a_run_fails() -> None:
    console, file = terminal()
    with pytest.raises(KeyboardInterrupt), Live(console) as progress:
        be_interrupted(progress)
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


def test_silent_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Silent()
    progress.planned(make_job())
    progress.started("cpu")
    commit(progress, RunFigures(), 1)
    assert capsys.readouterr() == ("", "")
