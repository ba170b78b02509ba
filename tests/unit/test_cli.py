"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import quantbatch
from quantbatch.cli import app
from quantbatch.commits import commit_chunk, publish_shard
from quantbatch.console import one_line, plain, size
from quantbatch.documents import describe_choice
from quantbatch.errors import InputError, JobError, Refused, Stopped
from quantbatch.input.listing import list_input
from quantbatch.input.sources import read_slice
from quantbatch.model.cards import Card, find
from quantbatch.preflight import Job, prepare
from quantbatch.records import Completion, Counts, FinishReason, ReplicaStats, RequestId
from quantbatch.report import Outcome, RunFigures, RunReport
from quantbatch.rows import ChunkFacts, answered, rendered, row_ids, with_facts
from quantbatch.spec import FourBit
from quantbatch.specfile import load_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typer.testing import Result

    from quantbatch.spec import JobSpec

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / "configs" / "quickstart" / "model"
SPEC = f"""\
name: test
input: {{uri: in, rows_per_chunk: 4}}
model: {{id: {MODEL}, bits: 4}}
prompt: {{template: "{{{{ text }}}}"}}
sampling: {{max_new_tokens: 8}}
engine: {{kind: echo}}
output: {{uri: out, rows_per_part: 8}}
"""
EVIL = "\x1b]0;owned\x07 \u202etxt \x9b2J"


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with job.yaml and an input of 12 rows; the last two rows are bad."""
    (tmp_path / "in").mkdir()
    texts = [*(f"text {row}" for row in range(10)), None, EVIL]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in" / "a.parquet")
    (tmp_path / "job.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*args: str) -> Result:
    return CliRunner().invoke(app, args)


def document(result: Result) -> dict[str, Any]:
    """Return the JSON document in the last line of stdout."""
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert found["exit_code"] == result.exit_code
    return found


def answer(spec: JobSpec, chunks: slice) -> Job:
    """Answer some chunks of a job as the pipeline would."""
    job = prepare(spec)
    if job.new_generation:
        job.ledger.freeze(job.new_generation)
    for chunk in list(job.ledger.undone())[chunks]:
        (piece,) = chunk.slices
        store = list_input(spec.input).store
        table = read_slice(store, piece, spec.input, job.plan.schema).table
        prompts = pa.array([[1]] * chunk.rows, pa.list_(pa.int32()))
        rows = with_facts(
            rendered(table.select(job.kept), row_ids(chunk), prompts, {}),
            ChunkFacts(chunk.shard, chunk.rows),
        )
        done = [
            [Completion(RequestId(chunk.id, row), "yes", (5, 6), FinishReason.STOP)]
            for row in range(chunk.rows)
        ]
        rows = answered(rows, done, spec)
        receipt = commit_chunk(job.ledger.store, chunk.id, rows, job.target)
        for shard in job.ledger.record(receipt):
            published = publish_shard(
                job.ledger.store, shard, job.plan.chunks_of(shard), job.target
            )
            job.ledger.record_published(published)
    if job.ledger.finished:
        job.ledger.succeed()
    return job


# ---- what is printed


def test_control_characters_never_reach_the_terminal() -> None:
    assert plain(EVIL) == r"\x1b]0;owned\x07 \u202etxt \x9b2J"
    assert plain("tab\tline\nümlaut 漢字 👍") == "tab\tline\nümlaut 漢字 👍"
    assert plain("half \ud800") == "half \\ud800"
    assert one_line("a\nb\t" + "x" * 300, 10) == "a\\nb\\tx..."


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (2048, "2.00 KiB"), (2**20, "1.00 MiB"), (2**40, "1,024.00 GiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_help_names_the_commands_and_exit_codes() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for word in (
        "run",
        "plan",
        "validate",
        "sample",
        "status",
        "verify",
        "formats",
        "schema",
        "init",
        "75",
    ):
        assert word in result.stdout


def test_version() -> None:
    assert call("--version").stdout == f"quantbatch {quantbatch.__version__}\n"


# ---- plan


def test_plan_tells_what_would_be_done_and_writes_nothing(folder: Path) -> None:
    (folder / "in" / "broken.parquet").write_bytes(b"PAR1 no")
    result = call("plan", "job.yaml")
    assert result.exit_code == 0
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert "12 rows in 2 files" in lines["input"]
    assert "broken.parquet: can't be read" in lines["unreadable"]
    assert "3 chunks of up to 4 rows -> 2 files" in lines["work"]
    assert "nothing: the output is new" in lines["done"]
    assert "4 bits (nf4, double quantization)" in lines["model"]
    assert "at most 504 tokens" in lines["prompt"]
    assert "text string, row_id string, status string" in lines["columns"]
    assert not (folder / "out").exists()


def test_plan_gives_a_verdict_on_memory(folder: Path) -> None:
    static = ("--set", "engine.kind=static")
    memory = document(call("plan", "job.yaml", "--json", *static))["memory"]
    assert memory["fits"] is None
    card = ("--set", "cluster.gpu_memory_gib=22")
    memory = document(call("plan", "job.yaml", "--json", *static, *card))["memory"]
    assert memory["fits"] is True
    assert memory["total_bytes"] == sum(
        memory[f"{name}_bytes"] for name in ("weights", "kv", "workspace", "overhead", "reserve")
    )
    assert "fits the 22.00 GiB" in call("plan", "job.yaml", *static, *card).stdout
    result = call("plan", "job.yaml", "--json", *static, "--set", "cluster.gpu_memory_gib=0.1")
    assert document(result)["outcome"] == "does_not_fit"
    assert result.exit_code == 3
    assert "does not fit" in result.stderr


def test_plan_samples_the_prompts(folder: Path) -> None:
    texts = ["word " * (1 + row % 50) for row in range(2000)]
    pq.write_table(pa.table({"text": texts}), folder / "in" / "b.parquet", row_group_size=100)
    sample = document(call("plan", "job.yaml", "--json"))["prompt"]["sample"]
    assert 200 <= sample["rows"] <= 256
    assert 0 < sample["p50_tokens"] < sample["p95_tokens"] <= sample["max_tokens"] < 504
    assert sample["counted_to_tokens"] == 32_768
    assert sample["unseen_at_most"] == pytest.approx(2012 * 3 / sample["rows"], abs=1)
    lines = call("plan", "job.yaml").stdout
    assert f"none of {sample['rows']} sampled, so at most {sample['unseen_at_most']} of" in lines
    limit = ("--set", "engine.max_input_tokens=20")
    sample = document(call("plan", "job.yaml", "--json", *limit))["prompt"]["sample"]
    assert sample["too_long"] > 0
    assert f"about {sample['too_long_expected']:,} rows:" in call("plan", "job.yaml", *limit).stdout
    assert call("plan", "job.yaml").stdout.count("too long") == 1


def test_plan_tells_of_rows_that_will_be_errors(folder: Path) -> None:
    column = ("--set", "prompt={column: text}")
    lines = call("plan", "job.yaml", *column).stdout.splitlines()
    assert any("half of 12 sampled rows have up to" in line for line in lines)
    assert "errors    1 row (null_prompt 1)" in lines
    assert "too long  none" in lines
    pq.write_table(pa.table({"text": ["", None]}), folder / "in" / "a.parquet")
    lines = call("plan", "job.yaml", *column).stdout.splitlines()
    assert any("none of 2 sampled rows has a prompt" in line for line in lines)
    assert "errors    2 rows (empty_prompt 1, null_prompt 1)" in lines


def test_plan_tells_of_prompts_that_are_longer_than_it_counts(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["word " * 60_000]}), folder / "in" / "b.parquet")
    shown = call("plan", "job.yaml").stdout
    assert "the longest more than 32,768;" in shown
    assert "too long  1 row" in shown.splitlines()


def test_plan_shows_every_width_and_what_to_know(folder: Path) -> None:
    card = ("--set", "engine.kind=static", "--card", "L4")
    found = document(call("plan", "job.yaml", "--json", *card))
    assert [width["kind"] for width in found["widths"]] == ["bf16", "int8", "nf4", "nf4+dq"]
    (chosen,) = [width for width in found["widths"] if width["chosen"]]
    assert chosen["weight_bytes"] == found["memory"]["weights_bytes"]
    assert chosen["rows"] == found["memory"]["batch_size"]
    shown = call("plan", "job.yaml", *card).stdout
    assert "fits <-" in shown
    assert "L4: 22.03 GiB; KV cache 1 KiB a token" in shown
    assert all(f"note: {sentence}" in shown for sentence in found["advice"])
    assert any("4 bits save memory, not time" in sentence for sentence in found["advice"])
    assert document(call("plan", "job.yaml", "--json"))["widths"] == []  # no model at all


def test_a_plan_over_several_cards_names_them(folder: Path) -> None:
    two = ("--set", "engine.kind=static", "--set", "cluster.gpus_per_replica=2", "--card", "L4")
    found = document(call("plan", "job.yaml", "--json", *two))
    assert found["card"]["count"] == 2
    assert found["memory"]["device_bytes"] == 2 * found["card"]["memory_bytes"]
    shown = call("plan", "job.yaml", *two).stdout
    assert "fits the 44.06 GiB of 2 x L4" in shown
    layers = found["memory"]["card_layers"]
    assert f"layers on each card: {layers[0]} + {layers[1]}" in shown


def test_a_plan_that_does_not_fit_shows_what_would(folder: Path) -> None:
    wide = ("--set", "model.bits=16")
    result = call("plan", "job.yaml", *sets(FOUR_BITS_FIT), *wide)
    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    assert lines[0] == "test: does not fit"
    assert "memory    does not fit" in lines
    table = lines[lines.index(next(line for line in lines if line.startswith("kind"))) + 1 :]
    assert [line.split()[0] for line in table[:4]] == ["nf4", "nf4+dq", "bf16", "int8"]
    assert [line.split()[9] for line in table[:4]] == ["fits", "fits", "no", "no"]
    assert "no <-" in result.stdout
    assert "does not fit: it needs" in result.stderr
    found = document(call("plan", "job.yaml", "--json", *sets(FOUR_BITS_FIT), *wide))
    assert found["outcome"] == "does_not_fit"
    assert found["widths"][0]["kind"] == "nf4"
    assert found["hint"].startswith("model.bits 4 fits")


def test_plan_of_a_model_alone(folder: Path) -> None:
    model = ("plan", "--model", str(MODEL))
    result = call(*model, "--card", "L4", "--prompt-tokens", "300", "--max-new-tokens", "50")
    assert result.exit_code == 0
    assert "L4: 22.03 GiB; KV cache 1 KiB a token; rows of 350 tokens" in result.stdout
    assert "fits <-" in next(line for line in result.stdout.splitlines() if line.startswith("bf16"))
    found = document(call(*model, "--max-new-tokens", "12", "--json"))
    assert (found["row_tokens"], found["card"]) == (512, None)
    assert [width["verdict"] for width in found["widths"]] == [None] * 4
    assert not any(width["chosen"] for width in found["widths"])
    assert "more than the context" in call(*model, "--prompt-tokens", "600").stderr
    assert "--card 'L5' is no card" in call(*model, "--card", "L5").stderr
    for wrong in (("plan",), ("plan", "job.yaml", "--model", "x")):
        assert "plan takes the path of a SPEC, or --model" in call(*wrong).stderr


def test_plan_does_not_overlook_options(folder: Path) -> None:
    for options in (["--set", "model.bits=8"], ["--extend"]):
        result = call("plan", "--model", str(MODEL), *options)
        assert result.exit_code == 2
        assert f"{options[0]} goes with a SPEC only" in result.stderr
    for name in ("--prompt-tokens", "--max-new-tokens"):
        result = call("plan", "job.yaml", name, "100")
        assert result.exit_code == 2
        assert f"{name} goes with --model only" in result.stderr


def test_plan_of_a_model_that_fits_in_no_width(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [Card("Toy", 1, 0.25, (8, 6))]
    monkeypatch.setattr("quantbatch.model.thiscard.local_cards", lambda: small)
    result = call("plan", "--model", str(MODEL), "--prompt-tokens", "100", "--json")
    assert result.exit_code == 3
    found = document(result)
    assert (found["outcome"], found["card"]["name"]) == ("does_not_fit", "Toy")
    assert {width["verdict"] for width in found["widths"]} == {"no"}
    assert "it takes a larger card, such as one RTX 3060" in found["hint"]


# ---- model.bits: auto


FOUR_BITS_FIT = (
    "engine.kind=static",
    "engine.batch_size=1",
    "engine.max_input_tokens=40",
    "cluster.gpu_memory_gib=0.91480",
)
"""A card with room for one row at 4 bits, and not at 8: 800 MiB of it are the CUDA context."""


def sets(fields: Sequence[str]) -> list[str]:
    return [part for field in fields for part in ("--set", field)]


AUTO = ("--set", "model.bits=auto", "--set", "engine.kind=static")


def test_bits_are_chosen_for_the_card(folder: Path) -> None:
    found = document(call("plan", "job.yaml", "--json", *AUTO, "--card", "L4"))
    assert [width["kind"] for width in found["widths"] if width["chosen"]] == ["bf16"]
    found = document(call("plan", "job.yaml", "--json", *AUTO, *sets(FOUR_BITS_FIT)))
    assert [width["kind"] for width in found["widths"] if width["chosen"]] == ["nf4+dq"]
    result = call("plan", "job.yaml", *AUTO, "--set", "cluster.gpu_memory_gib=0.1")
    assert result.exit_code == 3
    assert "at 4 bits (nf4 with double quantization) does not fit" in result.stderr


def test_bits_can_not_be_chosen_for_a_card_that_is_not_known(folder: Path) -> None:
    for command in ("plan", "validate", "sample"):
        result = call(command, "job.yaml", *AUTO)
        assert result.exit_code == 2
        assert "model.bits: auto goes by the card" in result.stderr
        assert "cluster.card, such as RTX 4090" in result.stderr
    on_cpus = ("--set", "cluster.gpus_per_replica=0")
    assert "in its own type" in call("plan", "job.yaml", *AUTO, *on_cpus).stdout
    assert "in its own type" in call("plan", "job.yaml", "--set", "model.bits=auto").stdout


def test_the_bits_that_a_job_was_begun_with_hold(folder: Path) -> None:
    tight = ("model.bits=auto", *FOUR_BITS_FIT)
    job = prepare(load_spec("job.yaml", tight))
    assert job.chosen_for is not None
    assert job.new_generation is not None
    assert job.ledger.freeze(job.new_generation)
    assert isinstance(job.spec.model.quantization, FourBit)
    said = describe_choice(job)
    assert said is not None
    assert "model.bits auto is" in said
    assert "4 bits (nf4, double quantization)" in said
    # Another card, and no card that is known: what was begun goes on.
    limit = ("--set", "engine.max_input_tokens=40")
    for more in ((*limit, "--card", "H100"), limit):
        found = document(call("plan", "job.yaml", "--json", *AUTO, *more))
        assert "4 bits (nf4" in found["model"]
    assert "kind: nf4" in call("validate", "job.yaml", *AUTO, *limit).stdout
    assert describe_choice(prepare(load_spec("job.yaml", tight))) is None
    assert "4 bits (nf4" in call("status", "job.yaml", *AUTO).stdout
    assert call("verify", "job.yaml", *AUTO).exit_code == 75
    # A person who says otherwise is refused.
    refused = call("plan", "job.yaml", *AUTO, *limit, "--set", "model.bits=16")
    assert refused.exit_code == 3
    assert "belongs to another job: model.quantization" in refused.stderr


def test_records_of_another_version_are_refused_for_what_they_are(folder: Path) -> None:
    record = folder / "out" / "_quantbatch" / "job.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"format": 1, "spec": {"model": 7}}')
    result = call("plan", "job.yaml", *AUTO, "--card", "L4")
    assert result.exit_code == 3
    assert "written in format 1" in result.stderr


def test_plan_for_a_card_by_its_name(folder: Path) -> None:
    static = ("--set", "engine.kind=static")
    found = document(call("plan", "job.yaml", "--json", *static, "--card", "nvidia l4"))
    assert (found["card"]["name"], found["memory"]["fits"]) == ("L4", True)
    assert found["memory"]["device_bytes"] == int(22.03 * 2**30)
    given = ("--set", "cluster.gpu_memory_gib=1", "--card", "L4")
    assert "fits the 22.03 GiB of L4" in call("plan", "job.yaml", *static, *given).stdout
    result = call("plan", "job.yaml", "--card", "RTX 4091")
    assert result.exit_code == 2
    assert "cluster.card: 'RTX 4091' is no card that is known here; did you mean RTX 4090" in (
        result.stderr
    )


def test_plan_for_the_card_of_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [find("A100 80GB"), find("L4")]
    monkeypatch.setattr("quantbatch.model.thiscard.local_cards", lambda: cards)
    static = ("--set", "engine.kind=static")
    assert document(call("plan", "job.yaml", "--json", *static))["card"]["name"] == "L4"
    for elsewhere in ("cluster.address=ray://head:10001", "cluster.gpus_per_replica=0"):
        found = document(call("plan", "job.yaml", "--json", *static, "--set", elsewhere))
        assert found["memory"]["fits"] is None


def test_plan_tells_what_is_done(folder: Path) -> None:
    answer(load_spec("job.yaml"), slice(2))
    found = document(call("plan", "job.yaml", "--json"))
    assert found["outcome"] == "planned"
    assert found["done"] == {"rows": 8, "chunks": 2, "files": 1}
    assert "8 of 12 rows, 1 file published" in call("plan", "job.yaml").stdout
    answer(load_spec("job.yaml"), slice(None))
    assert document(call("plan", "job.yaml", "--json"))["outcome"] == "nothing_to_do"


def test_plan_tells_of_new_files(folder: Path) -> None:
    answer(load_spec("job.yaml"), slice(None))
    pq.write_table(pa.table({"text": ["new"]}), folder / "in" / "b.parquet")
    refused = call("plan", "job.yaml")
    assert refused.exit_code == 3
    assert "--extend" in refused.stderr
    found = document(call("plan", "job.yaml", "--json", "--extend"))
    assert (found["outcome"], found["input"]["new_files"]) == ("planned", 1)


# ---- errors


def test_each_problem_is_an_error_with_its_hint_on_stderr(folder: Path) -> None:
    (folder / "job.yaml").write_text(SPEC.replace("bits: 4", "bit: 4") + "temperature: 0\n")
    result = call("plan", "job.yaml")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: job.yaml:3: there is no field model.bit",
        "  hint: did you mean model.bits?",
        "error: job.yaml:8: there is no field temperature",
        "  hint: did you mean sampling.temperature?",
    ]


@pytest.mark.parametrize("command", ["run", "plan", "validate", "sample", "status", "verify", "gc"])
def test_a_failure_is_a_document_too(folder: Path, command: str) -> None:
    result = call(command, "nothing.yaml", "--json")
    found = document(result)
    assert (found["outcome"], result.exit_code) == ("spec_error", 2)
    assert found["error"] == "nothing.yaml: No such file or directory"
    assert found["problems"] == [{"error": found["error"], "hint": found["hint"]}]


def test_a_name_in_a_message_can_do_no_harm(folder: Path) -> None:
    result = call("status", f"out{EVIL}")
    assert result.exit_code == 2
    assert "\x1b" not in result.stderr
    assert r"\x1b]0;owned" in result.stderr


# ---- run, with another pipeline in place of Ray's


def use_pipeline(monkeypatch: pytest.MonkeyPatch, result: RunReport | BaseException) -> list[Any]:
    """Have `quantbatch.pipeline.run` return or raise something; return what it is called with."""
    calls: list[Any] = []

    def run(spec: JobSpec, *, extend: bool, progress: object) -> RunReport:
        calls.append((spec, extend, progress))
        if isinstance(result, BaseException):
            raise result
        return result

    pipeline = SimpleNamespace(run=run)
    monkeypatch.setitem(sys.modules, "quantbatch.pipeline", pipeline)
    monkeypatch.setattr(quantbatch, "pipeline", pipeline, raising=False)
    return calls


def make_report(
    outcome: Outcome = Outcome.DONE, unreadable: dict[str, str] | None = None
) -> RunReport:
    run = RunFigures(
        counts=Counts(ok=90, error=10, prompt_tokens=5000, completion_tokens=800),
        plan_s=0.5,
        cluster_s=3.5,
        first_commit_s=13.5,
        last_commit_s=23.5,
        total_s=24.0,
        replicas={"a": ReplicaStats("a", "cuda", 8.0, 2**30, 2**29)},
    )
    return RunReport(
        name="test",
        outcome=outcome,
        output="/tmp/out",
        counts=Counts(ok=1090, error=10, prompt_tokens=50000, completion_tokens=8000, cached=70),
        parts=2,
        unreadable=unreadable or {},
        run=run,
    )


def test_run_ends_with_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = use_pipeline(monkeypatch, make_report())
    result = call("run", "job.yaml", "--set", "model.bits=8", "--extend")
    assert result.exit_code == 0
    ((spec, extend, _),) = calls
    assert (spec.model.bits, extend) == (8, True)
    for line in (
        "test: done",
        "  ok         1,090   99.09%",
        "  error         10    0.91%",
        "tokens       50,000 read, 8,000 generated",
        "cached       70 rows, whose tokens are not counted",
        "this run     100 rows in 24.0 s",
        "speed        5.0 rows/s, 40.0 tokens/s",
        "peak memory  1.00 GiB planned, 512.00 MiB measured (1 replica)",
        "first rows   after 13.5 s: plan 0.5, cluster 3.0, model 8.0, first chunk 2.0",
        "output       /tmp/out (2 files)",
        "  quantbatch verify job.yaml --set model.bits=8  prove that each row is answered once",
    ):
        assert line in result.stdout.splitlines()


def test_run_ends_with_one_document(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_pipeline(monkeypatch, make_report())
    result = call("run", "job.yaml", "--json")
    assert document(result) == make_report().to_json()
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("ending", "code", "outcome", "said"),
    [
        (make_report(Outcome.TOO_MANY_ERRORS), 1, "too_many_errors", ""),
        (make_report(Outcome.INPUT_UNREADABLE, unreadable={"a": "why"}), 1, "input_unreadable", ""),
        (InputError("no rows", "add some"), 2, "input_error", "error: no rows\n  hint: add some\n"),
        (Refused("changed", "undo"), 3, "refused", "error: changed\n  hint: undo\n"),
        (Stopped("by SIGTERM", "again"), 75, "stopped", "error: by SIGTERM\n  hint: again\n"),
        (KeyboardInterrupt(), 130, "interrupted", "interrupted; the same command continues"),
        (ZeroDivisionError("ours \x1b"), 70, "crashed", "ZeroDivisionError: ours \\x1b"),
    ],
)
def test_how_a_run_ends(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: RunReport | BaseException,
    code: int,
    outcome: str,
    said: str,
) -> None:
    use_pipeline(monkeypatch, ending)
    result = call("run", "job.yaml", "--json")
    assert result.exit_code == code
    assert document(result)["outcome"] == outcome
    assert said in result.stderr
    assert ("Traceback" in result.stderr) == (outcome == "crashed")
    assert call("run", "job.yaml").exit_code == code


def test_files_that_can_not_be_read_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable = {f"{n}.parquet": "no" for n in range(12)} | {"a.csv": "a.csv: is empty"}
    use_pipeline(monkeypatch, make_report(Outcome.INPUT_UNREADABLE, unreadable=unreadable))
    shown = call("run", "job.yaml").stdout
    assert "0.parquet: no" in shown
    assert "and 3 more" in shown
    assert "quantbatch run job.yaml --extend" in shown


# ---- validate, sample


def test_validate_prints_the_resolved_spec(folder: Path) -> None:
    result = call("validate", "job.yaml")
    assert result.exit_code == 0
    assert "kind: nf4" in result.stdout
    assert result.stdout.splitlines()[-1] == "ok"
    found = document(call("validate", "job.yaml", "--json"))
    assert found["spec"]["model"]["quantization"]["double_quant"] is True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("prompt.template={{ txet }}", "txet"),
        ("prompt.template={{ text", "prompt.template"),
        ("model.id=nowhere/at/all", "nowhere/at/all"),
        ("input.uri=nothing", "nothing: not found"),
        ("input.key=id", "id"),
        ("output.keep=[label]", "label"),
        ("output.uri=in/out", "in/out lies in the input"),
        ("sampling.max_new_tokens=512", "leaves no room"),
        ("sampling.logit_bias={999999: 1}", "no token 999999"),
        ("task={kind: generate, tools: [{type: function}]}", "chat template knows no tools"),
    ],
)
def test_validate_refuses_what_could_not_run(folder: Path, change: str, said: str) -> None:
    result = call("validate", "job.yaml", "--set", change)
    assert result.exit_code in (2, 3)
    assert said in result.stderr


def test_validate_warns_of_answers_that_will_be_cut(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    form = "task={kind: generate, response: {choices: [zq1xwqzx2jzq1xw]}}"
    result = call("validate", "job.yaml", "--set", form, "--set", "sampling.max_new_tokens=2")
    assert result.exit_code == 0
    assert "all will be truncated" in caplog.text + result.stderr


def test_validate_warns_of_rows_that_can_not_be_read(folder: Path) -> None:
    (folder / "in" / "a.parquet").unlink()
    (folder / "in" / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    result = call("validate", "job.yaml")
    assert result.exit_code == 0
    assert "warning: a.jsonl:1 will be an error row: line 2 of a.jsonl" in result.stderr


def test_sample_shows_prompts_and_answers(folder: Path) -> None:
    result = call("sample", "job.yaml", "-n", "12")
    assert result.exit_code == 0
    assert "a.parquet:0: " in result.stdout
    assert "<|user|>text 0<|end|><|assistant|>" in result.stdout
    assert "a.parquet:10: error row" in result.stdout
    assert "null_prompt: " in result.stdout
    assert "-> 8 tokens, stop" in result.stdout
    assert "\x1b" not in result.stdout
    assert r"\x1b]0;owned" in result.stdout
    assert not (folder / "out").exists()


def test_sample_without_answers(folder: Path) -> None:
    found = document(call("sample", "job.yaml", "-n", "3", "--no-run", "--json"))
    assert [row["row_id"] for row in found["rows"]] == [f"a.parquet:{row}" for row in range(3)]
    assert all(row["completion"] is None and row["prompt_tokens"] > 3 for row in found["rows"])


# ---- status, verify


def test_status_of_a_job_by_its_spec_and_by_its_output(folder: Path) -> None:
    assert "no job has begun here" in call("status", "job.yaml").stderr
    answer(load_spec("job.yaml"), slice(2))
    found = document(call("status", "job.yaml", "--json"))
    assert found == document(call("status", "out", "--json"))
    assert found["outcome"] == "unfinished"
    assert (found["rows_done"], found["rows"]) == (8, 12)
    assert (found["chunks_done"], found["chunks"]) == (2, 3)
    assert (found["files_done"], found["files"]) == (1, 2)
    assert found["counts"]["ok"] == 8
    assert found["last_run"] is None
    shown = call("status", "out").stdout
    assert "not finished" in shown
    assert "8 of 12 (66.7%)" in shown


def test_status_needs_neither_model_nor_input(folder: Path) -> None:
    job = answer(load_spec("job.yaml"), slice(None))
    job.ledger.summarize(make_report().to_json())
    (folder / "in" / "a.parquet").unlink()
    (folder / "job.yaml").write_text(SPEC.replace(str(MODEL), "gone"))
    result = call("status", "job.yaml")
    assert result.exit_code == 0
    assert "state      finished" in result.stdout
    assert "last run   done, 100 rows, 5.0 rows/s" in result.stdout


def test_status_of_records_that_another_version_wrote(folder: Path) -> None:
    answer(load_spec("job.yaml"), slice(0))
    path = folder / "out" / "_quantbatch" / "job.json"
    record = json.loads(path.read_text())
    record["spec"]["gone"] = 1
    path.write_text(json.dumps(record))
    result = call("status", "out")
    assert result.exit_code == 3
    assert "written by quantbatch" in result.stderr


def test_gc_by_spec_and_by_output(folder: Path) -> None:
    assert "no job has begun here" in call("gc", "job.yaml").stderr
    answer(load_spec("job.yaml"), slice(2))
    assert call("gc", "out").stdout == "nothing to remove\n"
    data = folder / "out" / "_quantbatch" / "data"
    for chunk in (0, 2):
        (data / f"{chunk:08d}-0123456789ab.parquet").write_text("lost")
    result = call("gc", "job.yaml", "--dry-run")
    assert result.stdout.splitlines() == [
        "would be removed: attempts: 1 object, 4 bytes",
        "kept: 1 data file of chunks that are not answered; quantbatch run decides about them",
    ]
    found = document(call("gc", "out", "--json"))
    assert found["removed"] == {"attempts": {"objects": 1, "bytes": 4}}
    assert found["undecided"] == 1
    result = call("gc", "out", "--older-than", "soon")
    assert result.exit_code == 2
    assert "--older-than soon" in result.stderr


def test_verify(folder: Path) -> None:
    assert call("verify", "job.yaml").exit_code == 2
    spec = load_spec("job.yaml")
    answer(spec, slice(2))
    result = call("verify", "job.yaml")
    assert result.exit_code == 75
    assert "4 rows not published yet" in result.stdout
    answer(spec, slice(None))
    result = call("verify", "job.yaml")
    assert result.exit_code == 0
    assert "proven" in result.stdout
    (folder / "out" / "part-000001.parquet").unlink()
    result = call("verify", "job.yaml")
    assert result.exit_code == 1
    assert "rows that are missing: 4" in result.stdout
    assert document(call("verify", "job.yaml", "--json"))["outcome"] == "problems"


# ---- formats, schema, init


def test_formats_lists_what_can_be_loaded_here() -> None:
    shown = call("formats", "--card", "RTX 3090")
    assert "compute capability 8.9" in shown.stdout
    assert "model.allow_dequantize" in shown.stdout
    described = document(call("formats", "--json", "--card", "RTX 4090"))
    by_name = {row["format"]: row for row in described["formats"]}
    assert by_name["bitsandbytes"]["how"] == "as it is"
    assert by_name["compressed-tensors, FP8 W8A8"]["how"] == "as it is"
    assert by_name["gguf"]["planned"] == "16 bits"
    assert by_name["hqq"]["how"] == "refused"
    assert described["capability"] == "8.9"


def test_formats_wants_a_card_that_is_known() -> None:
    wrong = call("formats", "--card", "RTX 4091")
    assert wrong.exit_code == 2
    assert "did you mean RTX 4090" in wrong.stderr


def test_schema_is_the_kept_file() -> None:
    kept = REPOSITORY / "configs" / "quantbatch.schema.json"
    assert call("schema").stdout == kept.read_text(), "run `make docs`"


def test_init_writes_a_spec_that_is_right_and_never_overwrites(folder: Path) -> None:
    result = call("init", "new.yaml")
    assert result.exit_code == 0
    spec = load_spec("new.yaml")
    assert spec.model.bits == 4
    first = Path("new.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=quantbatch.schema.json"
    assert Path("quantbatch.schema.json").is_file()
    Path("new.yaml").write_text("mine")
    result = call("init", "new.yaml")
    assert result.exit_code == 3
    assert Path("new.yaml").read_text() == "mine"
    assert call("init", "no/such/folder/new.yaml").exit_code == 3


def test_the_starter_names_every_section_and_shows_true_defaults(folder: Path) -> None:
    import yaml

    call("init", "new.yaml")
    text = Path("new.yaml").read_text()
    starter = yaml.safe_load(text)
    assert set(starter) == {
        "name", "input", "model", "prompt", "sampling", "engine", "cluster", "output", "limits"
    }  # fmt: skip
    spec = load_spec("new.yaml")
    for line in ("temperature: 0.0", "max_error_rate: 0.01", "replicas: 1"):
        assert line in text
    defaults = load_spec("job.yaml")
    assert spec.sampling.temperature == defaults.sampling.temperature
    assert spec.limits == defaults.limits
    assert spec.cluster.replicas == defaults.cluster.replicas


# ---- the process


def test_plan_imports_nothing_heavy(folder: Path) -> None:
    script = (
        "import sys\n"
        "from quantbatch.cli import main\n"
        "try:\n"
        "    main(['plan', 'job.yaml', '--set', 'engine.kind=static'])\n"
        "except SystemExit as leaving:\n"
        "    heavy = {'torch', 'ray', 'bitsandbytes', 'accelerate', 's3fs', 'pandas'}\n"
        "    print(leaving.code, sorted(heavy & set(sys.modules)))\n"
    )
    result = run_python("-c", script)
    assert result.stdout.splitlines()[-1] == "0 []", result.stderr


def test_help_is_quick() -> None:
    """It takes 0.3 s; the bound leaves room for a busy machine, not for importing torch."""
    began = time.monotonic()
    result = run_python("-c", "from quantbatch.cli import main; main(['--help'])")
    assert result.returncode == 0
    assert time.monotonic() - began < 5


def test_odd_names_do_not_break_the_output(folder: Path) -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    script = "from quantbatch.cli import main; main(['status', 'ümlaut-\\udcff'])"
    result = run_python("-c", script, env=env)
    assert result.returncode == 2
    assert "\\xfcmlaut-\\udcff: no job has begun here" in result.stderr


def run_python(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


def test_ctrl_c_while_ray_is_imported_leaves_no_traceback(folder: Path) -> None:
    """Half of Ray would print one: its own shutdown at Python's end needs the other half."""
    script = """if True:
        import os, signal, sys

        class InTheMiddleOfRay:
            @staticmethod
            def find_spec(name, *_):
                if name == "ray.client_builder":
                    os.kill(os.getpid(), signal.SIGINT)

        sys.meta_path.insert(0, InTheMiddleOfRay)
        from quantbatch.cli import main

        main(["run", "job.yaml"])
    """
    result = run_python("-c", script)
    assert result.stderr == "interrupted; the same command continues where it was\n"
    assert result.returncode == 130


def test_every_job_error_has_an_exit_code_of_the_help() -> None:
    codes = {error.exit_code for error in JobError.__subclasses__()}
    shown = call("--help").stdout
    assert codes == {2, 3, 75}
    assert all(f"{code} " in shown for code in codes)


def test_a_log_that_nobody_reads_any_more_changes_no_exit_code(tmp_path: Path) -> None:
    """As with `quantbatch run 2>&1 | tee log`, which Ctrl-C ends as a whole."""
    reader, writer = os.pipe()
    os.close(reader)
    script = "import sys; from quantbatch.cli import main; main(['run', sys.argv[1]])"
    command = [sys.executable, "-c", script, str(tmp_path / "none.yaml")]
    ran = subprocess.run(command, stderr=writer, stdout=writer, timeout=60, check=False)
    os.close(writer)
    assert ran.returncode == 2
