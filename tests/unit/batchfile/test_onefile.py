"""A batch file answered without a spec: where everything goes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantbatch.batchfile import onefile
from quantbatch.cli import app
from quantbatch.errors import JobError, Refused
from quantbatch.specfile import load_spec
from tests.unit.batchfile.test_outputs import (
    ANSWERED,
    LINES,
    MODEL,
    chat,
    run_here,
)

ECHO = ["engine.kind=echo", "sampling.max_new_tokens=8", "output.rows_per_part=6"]


def requests(folder: Path, lines: list[str] = LINES) -> Path:
    path = folder / "my requests.jsonl"
    if not path.exists():  # written again it would be another version
        path.write_text("\n".join(lines))
    return path


def begin(folder: Path, lines: list[str] = LINES) -> onefile.OneFile:
    return onefile.begin(requests(folder, lines), folder / "out.jsonl", model=str(MODEL), bits=4)


def test_two_files_come_out_in_the_input_s_order(tmp_path: Path) -> None:
    job = begin(tmp_path)
    spec = load_spec(job.spec, ECHO)
    assert (spec.name, spec.model.bits) == ("my-requests", 4)
    run_here(spec)
    onefile.finish(job)
    good = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    bad = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in good] == ANSWERED
    assert len(good) + len(bad) == len(LINES)
    assert len({line["id"] for line in good + bad}) == len(LINES)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "my requests.jsonl",
        "out.errors.jsonl",
        "out.jsonl",
        "out.jsonl.job",
    ]


def test_the_same_command_finds_its_job_again(tmp_path: Path) -> None:
    run_here(load_spec(begin(tmp_path).spec, ECHO), chunks=1)
    job = begin(tmp_path)
    run_here(load_spec(job.spec, ECHO))
    onefile.finish(job)
    first = (tmp_path / "out.jsonl").read_bytes()
    again = begin(tmp_path)  # though the output is there: it is this job's
    onefile.finish(again)
    assert (tmp_path / "out.jsonl").read_bytes() == first


def test_without_failed_requests_there_is_no_file_of_them(tmp_path: Path) -> None:
    job = begin(tmp_path, [chat("a"), chat("b")])
    run_here(load_spec(job.spec, ECHO))
    job.errors.write_text("of an earlier attempt")
    onefile.finish(job)
    assert not job.errors.exists()


def test_files_that_are_there_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out.errors.jsonl").write_text("mine")
    with pytest.raises(Refused, match=r"out\.errors\.jsonl exists"):
        begin(tmp_path)


def test_nor_are_those_that_come_before_the_job_is_done(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(Refused, match=r"out\.jsonl exists"):
        begin(tmp_path)


def test_what_can_t_be(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="there is no such file"):
        onefile.begin(tmp_path / "none.jsonl", tmp_path / "o.jsonl", model="m", bits=4)
    with pytest.raises(JobError, match=r"should end in \.jsonl"):
        onefile.begin(requests(tmp_path), tmp_path / "out.json", model="m", bits=4)
    assert not (tmp_path / "out.json.job").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--openai-batch", "in.jsonl"],
        ["--openai-batch", "in.jsonl", "-o", "out.jsonl"],
        ["job.yaml", "--openai-batch", "in.jsonl", "-o", "out.jsonl", "--model", "m"],
        ["job.yaml", "--model", "m"],
        ["job.yaml", "--bits", "4"],
        ["job.yaml", "-o", "out.jsonl"],
    ],
)
def test_options_that_do_not_go_together(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["run", *arguments, "--json"])
    assert result.exit_code == 2
    assert "--openai-batch" in json.loads(result.stdout.splitlines()[-1])["error"]
