"""Twelve secrets are planted where people have them: none is found in what a job leaves."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from quantbatch import cli, pipeline
from quantbatch.spec import JobSpec
from tests.integration.support import MODEL

if TYPE_CHECKING:
    from tests.conftest import Count
    from tests.integration.support import Head

CANARIES = [f"canary{number:02d}q7Zk" for number in range(12)]
ENVIRONMENT = {
    "HF_TOKEN": f"hf_{CANARIES[0]}",
    "AWS_SESSION_TOKEN": CANARIES[1],
    "OPENAI_API_KEY": f"sk-{CANARIES[2]}",
    "DATABASE_URL": f"postgres://me:{CANARIES[3]}@db/prompts",
    "HTTPS_PROXY": f"http://me:{CANARIES[4]}@127.0.0.1:9",
}
IN_SPECS = {
    "input.uri": f"s3://AKIAEXAMPLE:{CANARIES[5]}/x+y@bucket/in",
    "output.uri": f"https://b.s3.amazonaws.com/out?X-Amz-Expires=9&X-Amz-Signature={CANARIES[6]}",
    "output.storage.endpoint_url": f"http://me:{CANARIES[7]}@127.0.0.1:1",
    "model.id": f"https://me:hf_{CANARIES[8]}@huggingface.co/org/model",
    "answers_cache.uri": f"s3://{CANARIES[9]}@bucket/answers",
    "model.revision": f"{{a: 's3://me:{CANARIES[10]}@bucket'}}",
}
CRASH = f"GET https://me:{CANARIES[11]}@host/a?X-Amz-Credential={CANARIES[11]}&x=1 failed \x1b[31m"


def job(folder: Path, head: Head) -> Path:
    (folder / "in").mkdir()
    texts = ["hello", None, "\x1b[31mred", "x" * 3000, "a <script>alert(1)</script>"]
    pq.write_table(pa.table({"text": texts}), folder / "in" / "a.parquet")
    (folder / "in" / "b\x1b[2J.parquet").write_bytes(b"PAR1 torn")
    fields = {
        "name": "secrets",
        "input": {"uri": str(folder / "in")},
        "model": {"id": str(MODEL), "bits": 16},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_new_tokens": 4},
        "engine": {"kind": "echo", "max_input_tokens": 200},
        "cluster": {"gpus_per_replica": 0, "address": head.address},
        "output": {"uri": str(folder / "out")},
        "answers_cache": {"uri": str(folder / "answers")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


class Said:
    """Runs commands and keeps all that they print."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd
        self.all = ""

    def by(self, *args: str) -> int:
        """Run a command; return its exit code."""
        with pytest.raises(SystemExit) as left:
            cli.main([*args, "--json"])
        printed = "".join(self._capfd.readouterr())
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", printed), args
        self.all += printed
        code = left.value.code
        assert isinstance(code, int)
        return code


def left_in(folder: Path) -> str:
    """Return all texts in files below a folder, also those in Parquet."""
    found = []
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        with contextlib.suppress(FileNotFoundError):  # Ray rotates its logs
            found.append(path.read_bytes().decode("latin-1"))
        if path.suffix == ".parquet" and path.stat().st_size > 100:
            table = pq.read_table(path)
            found.append(f"{table.schema.metadata} {table.to_pylist()}")
    return "".join(found)


@pytest.mark.timeout(400)
def test_no_secret_is_found_anywhere(
    tmp_path: Path,
    ray_head: Head,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    count: Count,
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    said = Said(capfd)
    spec = job(tmp_path, ray_head)

    assert said.by("run", str(spec)) == 1  # one file can't be read, and rows have errors
    for command in ("status", "errors", "plan"):
        assert said.by(command, str(spec)) == 0, command
    for place, value in IN_SPECS.items():
        assert said.by("validate", str(spec), "--set", f"{place}={value}") == 2, place
        fields: Any = yaml.safe_load(spec.read_text())
        *outer, last = place.split(".")
        inner = fields
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
        wrong = tmp_path / "wrong.yaml"
        wrong.write_text(yaml.safe_dump(fields))
        if place != "model.revision":  # a text there is what it says, and in a file a mapping is
            assert said.by("run", str(wrong)) == 2, place
            wrong.unlink()
    assert said.by("plan", str(spec), "--set", "model.id=nobody/nothing-of-that-name") == 2
    assert said.by("status", f"s3://me:{CANARIES[5]}@no-such-bucket-of-ours/out") == 2

    assert said.by("plan", "--model", IN_SPECS["model.id"]) == 2

    def crash(spec: JobSpec, **_: object) -> None:
        raise RuntimeError(CRASH)

    monkeypatch.setattr(pipeline, "run", crash)
    assert said.by("run", str(spec)) == 70
    assert "Traceback" in said.all

    with urllib.request.urlopen(f"{ray_head.dashboard}/api/jobs/", timeout=20) as answer:
        jobs = answer.read().decode()
    (tmp_path / "job.yaml").unlink()
    wrong = tmp_path / "wrong.yaml"
    wrong.unlink(missing_ok=True)
    logs = left_in(Path(ray_head.folder, "session_latest", "logs"))
    looked = {"printed": said.all, "left": left_in(tmp_path), "jobs": jobs, "logs of Ray": logs}
    hits = {where: [c for c in CANARIES if c in text] for where, text in looked.items()}
    sizes = {where: len(text) for where, text in looked.items()}
    count(f"canaries={len(CANARIES)} characters={sizes} hits={hits}")
    assert not any(hits.values()), hits
    assert sizes["left"] > 10_000
    assert json.loads((tmp_path / "out" / "_quantbatch" / "job.json").read_text())["spec"]
