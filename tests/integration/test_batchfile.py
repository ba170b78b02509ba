"""A batch file through Ray by the command that needs no spec: a tiny model, and a driver that is
killed on its way.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from quantbatch.specfile import load_spec
from quantbatch.verify import verify
from tests.integration.support import COMMAND, LONGEST_RUN_S, MODEL, wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.support import Head

CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def line(number: int, url: str, **body: Any) -> str:
    request = {"custom_id": f"row-{number}", "method": "POST", "url": url}
    return json.dumps(request | {"body": {"model": "gpt-4o", "seed": 3} | body})


def mixture(count: int) -> list[str]:
    """Requests of all kinds, some of them wrong."""
    found = []
    for number in range(count):
        said = [{"role": "user", "content": f"row {number}: a function that opens a file"}]
        match number % 6:
            case 0:
                found.append(line(number, CHAT, messages=said, max_tokens=2 + number % 5))
            case 1:
                found.append(line(number, CHAT, messages=said, n=2, logprobs=True, top_logprobs=3))
            case 2:
                found.append(line(number, COMPLETION, prompt=["one", "two"], temperature=0))
            case 3:
                found.append(line(number, EMBEDDING, input=[f"text {number}", "b"], seed=None))
            case 4:
                found.append(line(number, CHAT, messages=said, reasoning_effort="high"))
            case _:
                found.append("broken" if number % 4 else line(number, "/v1/audio"))
    return found


def command(folder: Path, *sets: str) -> list[str]:
    options = ("cluster.gpus_per_replica=0", "limits.max_error_rate=1", *sets)
    return [
        *(COMMAND, "run", "--openai-batch", str(folder / "in.jsonl")),
        *("-o", str(folder / "out.jsonl"), "--model", str(MODEL), "--bits", "32", "--json"),
        *(part for option in options for part in ("--set", option)),
    ]


def run(folder: Path, head: Head, *sets: str) -> dict[str, Any]:
    env = os.environ | {"RAY_ADDRESS": head.address}
    done = subprocess.run(
        command(folder, *sets),
        env=env,
        capture_output=True,
        text=True,
        timeout=LONGEST_RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def check(folder: Path, count: int) -> None:
    """See that every request is answered once, in order, as the official client reads it."""
    good, bad = read(folder / "out.jsonl"), read(folder / "out.errors.jsonl")
    wanted = [f"row-{number}" for number in range(count) if number % 6 < 4]
    assert [each["custom_id"] for each in good] == wanted
    assert len(good) + len(bad) == count
    for each in good:
        number, body = int(each["custom_id"][4:]), each["response"]["body"]
        match number % 6:
            case 0 | 1:
                found = ChatCompletion.model_validate(body, strict=True)
                assert len(found.choices) == 1 + number % 6
            case 2:
                texts = Completion.model_validate(body, strict=True)
                assert len(texts.choices) == 2
            case _:
                vectors = CreateEmbeddingResponse.model_validate(body)
                assert sum(x * x for x in vectors.data[1].embedding) == pytest.approx(1, abs=1e-5)
    assert {each["response"]["status_code"] for each in bad if each["response"]} == {400}


@pytest.mark.timeout(240)
def test_a_tiny_model_answers_requests_of_all_kinds(tmp_path: Path, ray_head: Head) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(mixture(24)))
    document = run(tmp_path, ray_head, "sampling.max_new_tokens=6")
    assert (document["outcome"], document["rows"]) == ("done", 24)
    check(tmp_path, 24)
    first = next(each for each in read(tmp_path / "out.jsonl") if each["custom_id"] == "row-0")
    choice = first["response"]["body"]["choices"][0]
    assert choice["finish_reason"] == "length"
    assert first["response"]["body"]["usage"]["completion_tokens"] == 2
    probed = next(each for each in read(tmp_path / "out.jsonl") if each["custom_id"] == "row-1")
    for choice in probed["response"]["body"]["choices"]:
        content = choice["logprobs"]["content"]
        assert content
        assert "".join(token["token"] for token in content) == choice["message"]["content"]
        assert all(len(token["top_logprobs"]) == 3 for token in content)


@pytest.mark.timeout(300)
def test_a_killed_driver_is_continued_by_the_same_command(tmp_path: Path, ray_head: Head) -> None:
    count = 180
    (tmp_path / "in.jsonl").write_text("\n".join(mixture(count)))
    sets = (
        *("engine.kind=echo", "engine.batch_size=8", "engine.step_s=0.2"),
        *("input.rows_per_chunk=6", "output.rows_per_part=60"),
    )
    commits = tmp_path / "out.jsonl.job" / "output" / "_quantbatch" / "commits"
    with (tmp_path / "log").open("wb") as log:
        env = os.environ | {"RAY_ADDRESS": ray_head.address}
        driver = subprocess.Popen(command(tmp_path, *sets), env=env, stdout=log, stderr=log)
        try:
            wait_for(
                lambda: commits.exists() and len(list(commits.iterdir())) >= 5,
                timeout_s=90,
                what="some commits",
            )
        finally:
            driver.kill()
            driver.wait()
    assert not (tmp_path / "out.jsonl").exists()
    assert len(list(commits.iterdir())) < 30
    assert run(tmp_path, ray_head, *sets)["rows"] == count
    check(tmp_path, count)
    assert verify(load_spec(tmp_path / "out.jsonl.job" / "job.yaml", sets)).outcome == "proven"
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(tmp_path, ray_head, *sets)["outcome"] == "nothing_to_do"
    assert (tmp_path / "out.jsonl").read_bytes() == before
