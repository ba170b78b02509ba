"""Whole jobs over batch files, without Ray: the lines that come out, and what verify says."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from quantbatch import preflight, stages
from quantbatch.commits import publish_shard
from quantbatch.errors import InputError
from quantbatch.replica import Replica
from quantbatch.spec import JobSpec
from quantbatch.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = Path(__file__).parents[3] / "configs" / "quickstart" / "model"
CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def request(custom_id: str | None, url: str, **body: Any) -> str:
    line = {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m"} | body}
    return json.dumps(line)


def chat(custom_id: str | None, said: str = "hello", **options: Any) -> str:
    return request(custom_id, CHAT, messages=[{"role": "user", "content": said}], **options)


LINES = [
    chat("a", max_tokens=5),
    chat("b", n=2, logprobs=True, top_logprobs=2),
    "no json",
    request("c", COMPLETION, prompt=["one two", "three"], n=2, max_tokens=3),
    request("d", EMBEDDING, input=["one", "two"]),
    request("e", EMBEDDING, input=[5, 6, 7], encoding_format="base64"),
    request("f", "/v1/images"),
    chat("g", audio={"voice": "x"}),
    chat("h", response_format={"type": "json_object"}),
    chat("i", "x" * 1_000_001),
    chat(None),
    chat("j", n=3, temperature=0),
    request("k", COMPLETION, prompt=[5, 999_999]),
    chat("l", max_tokens=100_000),
    chat("m", "very long " * 500),
    "{}",
    chat("n", "a\u2028b\u0085c"),
]
HIDDEN_SIZE = 192
"""Of the quickstart's model."""
ANSWERED = ["a", "b", "c", "d", "e", "h", "j", "n"]


def spec_of(folder: Path, lines: list[str], **changes: Any) -> JobSpec:
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    fields: dict[str, Any] = {
        "name": "batch",
        "input": {
            "uri": str(folder / "in.jsonl"),
            "format": "openai-batch",
            "rows_per_chunk": 3,
        },
        "model": {"id": str(MODEL), "bits": 32},
        "engine": {"kind": "echo"},
        "sampling": {"max_new_tokens": 8},
        "output": {"uri": str(folder / "out"), "rows_per_part": 10},
    }
    for name, values in changes.items():
        fields[name] = fields.get(name, {}) | values
    return JobSpec.model_validate(fields)


def run_here(spec: JobSpec, *, chunks: int | None = None) -> None:
    """Do what the pipeline does, without Ray; stop after some chunks."""
    job = preflight.prepare(spec)
    if job.new_generation is not None:
        assert job.ledger.freeze(job.new_generation)
    replica = Replica(job.replica_job("cpu"))
    for chunk in list(job.ledger.undone())[:chunks]:
        block = stages.read_and_render(chunk, job=job.read_job)
        block = asyncio.run(replica(block))
        receipt = stages.receipts(stages.commit(block, store=job.ledger.store, target=job.target))[
            0
        ]
        assert receipt.trouble is None
        job.ledger.record(receipt)
    for shard in job.ledger.unpublished():
        published = publish_shard(job.ledger.store, shard, job.plan.chunks_of(shard), job.target)
        job.ledger.record_published(published)
    if job.ledger.finished:
        job.ledger.succeed()


def read(folder: Path, ending: str) -> list[dict[str, Any]]:
    paths = sorted(folder.glob(f"part-??????{ending}"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job of two shards."""
    folder = tmp_path_factory.mktemp("finished")
    run_here(spec_of(folder, LINES))
    return folder


def test_each_request_has_one_line_in_the_input_s_order(finished: Path) -> None:
    good, bad = read(finished / "out", ".jsonl"), read(finished / "out", ".errors.jsonl")
    assert [line["custom_id"] for line in good] == ANSWERED
    assert len(good) + len(bad) == len(LINES)
    assert [line["custom_id"] for line in bad] == [None, *"fgi", None, *"klm", None]
    assert sorted(line["id"] for line in good + bad)[10] == "batch_req_000001_000000000"
    assert all(line["response"]["status_code"] == 200 for line in good)


def test_failed_requests_have_the_status_and_the_reason(finished: Path) -> None:
    bad = read(finished / "out", ".errors.jsonl")
    found = {line["custom_id"]: line["response"] for line in bad if line["custom_id"]}
    codes = {name: response["body"]["error"]["code"] for name, response in found.items()}
    assert {response["status_code"] for response in found.values()} == {400}
    assert codes == {
        "f": "bad_request",
        "g": "unsupported_value",
        "i": "bad_request",
        "k": "bad_request",
        "l": "context_length_exceeded",
        "m": "context_length_exceeded",
    }
    error = found["g"]["body"]["error"]
    assert (error["param"], error["type"]) == ("audio", "invalid_request_error")
    assert error["message"] == 'audio: {"voice": "x"}: answers are text'
    assert "100,000 new tokens" in found["l"]["body"]["error"]["message"]
    unread = [line for line in bad if line["custom_id"] is None]
    assert [line["response"] for line in unread] == [None] * 3
    assert [line["error"]["code"] for line in unread] == ["bad_json", "bad_request", "bad_request"]
    assert [line["error"]["row_id"] for line in unread] == [
        "in.jsonl:2",
        "in.jsonl:10",
        "in.jsonl:15",
    ]


def test_the_official_client_reads_the_bodies(finished: Path) -> None:
    bodies = {
        line["custom_id"]: line["response"]["body"] for line in read(finished / "out", ".jsonl")
    }
    created = {body["created"] for body in bodies.values() if "choices" in body}
    job = json.loads((finished / "out/_quantbatch/job.json").read_text())
    assert created == {job["created"]}
    for name in "abhjn":
        ChatCompletion.model_validate(bodies[name], strict=True)
    assert len(bodies["b"]["choices"]) == 2
    assert len(bodies["j"]["choices"]) == 3
    completion = Completion.model_validate(bodies["c"], strict=True)
    assert [choice.text for choice in completion.choices] == ["one two"] * 2 + ["three"] * 2
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (4, 8)
    vectors = [each.embedding for each in CreateEmbeddingResponse.model_validate(bodies["d"]).data]
    assert len(vectors) == 2
    for vector in vectors:
        assert vector == pytest.approx([HIDDEN_SIZE**-0.5] * HIDDEN_SIZE)
    packed = np.frombuffer(base64.b64decode(bodies["e"]["data"][0]["embedding"]), "<f4")
    assert packed.tolist() == pytest.approx([HIDDEN_SIZE**-0.5] * HIDDEN_SIZE)
    assert bodies["e"]["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


def test_an_answer_without_its_form_is_there_with_the_reason(finished: Path) -> None:
    line = next(each for each in read(finished / "out", ".jsonl") if each["custom_id"] == "h")
    assert line["response"]["body"]["choices"][0]["message"]["content"]
    assert line["error"]["code"] == "schema"


def test_a_job_that_stopped_goes_on_to_the_same_lines(finished: Path, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, LINES)
    run_here(spec, chunks=1)
    assert verify(spec).outcome == "unfinished"
    run_here(spec, chunks=3)
    assert [p.name for p in (tmp_path / "out").glob("part*.jsonl")] != []
    run_here(spec)
    assert verify(spec).outcome == "proven"
    for path in (finished / "out").glob("part*"):
        ours = (tmp_path / "out" / path.name).read_text()
        times = [
            json.loads((f / "out/_quantbatch/job.json").read_text())["created"]
            for f in (finished, tmp_path)
        ]
        assert ours.replace(str(times[1]), str(times[0])) == path.read_text()


def test_the_same_as_parquet(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, LINES, output={"format": "parquet"})
    run_here(spec)
    assert verify(spec).outcome == "proven"
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert [row["row_id"] for row in rows if row["response"]] == ANSWERED
    assert rows[0]["custom_id"] == "a"
    assert json.loads(rows[0]["body"])["max_tokens"] == 5
    assert json.loads(rows[0]["response"])["usage"]["completion_tokens"] == 5


def test_lines_tell_what_a_cache_of_answers_had(tmp_path: Path) -> None:
    lines = [chat("a", temperature=0), chat("b", temperature=0), "no json"]
    cache = {"uri": str(tmp_path / "cache")}
    run_here(spec_of(tmp_path, lines, answers_cache=cache))
    assert [each["cached"] for each in read(tmp_path / "out", ".jsonl")] == [False, False]
    again = spec_of(tmp_path, lines, answers_cache=cache, output={"uri": str(tmp_path / "again")})
    run_here(again)
    assert [each["cached"] for each in read(tmp_path / "again", ".jsonl")] == [True, True]
    assert [each["cached"] for each in read(tmp_path / "again", ".errors.jsonl")] == [False]
    assert verify(again).outcome == "proven"


def test_a_custom_id_that_comes_twice_is_refused_before_the_run(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, [*LINES, chat("a")])
    with pytest.raises(InputError, match=r"duplicate key 'a' in column custom_id: in\.jsonl:0"):
        preflight.prepare(spec)


def without_line(folder: Path) -> None:
    path = folder / "part-000000.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def twice(folder: Path) -> None:
    path = folder / "part-000000.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])


def without_errors(folder: Path) -> None:
    (folder / "part-000000.errors.jsonl").unlink()


def cut(folder: Path) -> None:
    path = folder / "part-000001.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def no_answer(folder: Path) -> None:
    path = folder / "part-000000.jsonl"
    path.write_text(path.read_text().replace('"choices": [', '"choices": [], "x": [', 1))


def renamed(folder: Path) -> None:
    path = folder / "part-000000.jsonl"
    path.write_text(path.read_text().replace('"custom_id": "a"', '"custom_id": "z"', 1))


def uncounted(folder: Path) -> None:
    path = folder / "part-000000.jsonl"
    path.write_text(
        path.read_text().replace('"finish_reason": "stop"', '"finish_reason": "length"', 1)
    )


def another_answer(folder: Path) -> None:
    path = folder / "part-000000.jsonl"
    text = path.read_text()
    answer = '"role": "assistant", "content": "'
    assert answer in text
    path.write_text(text.replace(answer, answer + "not ", 1))


def strange(folder: Path) -> None:
    (folder / "part-000000.more.jsonl").write_text("{}\n")


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (without_line, "rows that are missing"),
        (twice, "rows that are there twice"),
        (without_errors, "rows that are missing"),
        (cut, "files that are damaged"),
        (no_answer, "files that are damaged"),
        (renamed, "rows that the input does not have"),
        (uncounted, "counts that are wrong"),
        (another_answer, "files that are not as they were published"),
        (strange, "files that are not the job's"),
    ],
)
def test_verify_notices_damage(
    finished: Path, tmp_path: Path, damage: Callable[[Path], None], kind: str
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    spec = spec_of(tmp_path / "copy", LINES)
    damage(tmp_path / "copy" / "out")
    assert kind in {problem.kind for problem in verify(spec).problems}


def test_verify_proves_what_is_sound(finished: Path) -> None:
    found = verify(spec_of(finished, LINES))
    assert found.outcome == "proven", found.problems
    assert (found.rows_in, found.rows_out, found.counts.error) == (17, 17, 9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": {"template": "{{ body }}"}}, "leave out prompt"),
        ({"input": {"key": "url"}}, "leave it out"),
        ({"input": {"format": "jsonl"}}, "need"),
        ({"task": {"kind": "generate"}}, "is the task openai, not generate"),
        ({"engine": {"too_long": "truncate_left"}}, "are not cut"),
        ({"output": {"keep": "all"}}, "no other column"),
        ({"output": {"prefix": "qb_"}}, "no columns to put it before"),
    ],
)
def test_specs_that_do_not_go_together(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    if changes.get("input", {}).get("format"):
        changes |= {"prompt": {"template": "x"}, "output": {"format": "openai-batch"}}
    with pytest.raises(ValueError, match=said):
        spec_of(tmp_path, LINES, **changes)


def test_a_spec_that_went_through_json_is_the_same(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, LINES, prompt={"chat_template_kwargs": {"think": False}})
    again = JobSpec.model_validate(spec.model_dump(mode="json"))
    assert again == spec
    assert again.fingerprint() == spec.fingerprint()
    assert spec.sampling.temperature == 1
