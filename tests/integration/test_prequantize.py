"""`quantbatch prequantize` and its Ray job: what they say, and that a load then finds it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from quantbatch.cli import app
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.spec import Model
from quantbatch.weights import pretrained
from quantbatch.weights.loading import load
from tests.integration.llama import make_llama
from tests.integration.test_submit import ray_job

if TYPE_CHECKING:
    from tests.integration.support import Bucket, Head


@pytest.fixture(autouse=True)
def _own_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def write_spec(folder: Path, **model: Any) -> str:
    fields = {
        "name": "ahead",
        "input": {"uri": "nothing yet"},
        "model": {"id": str(make_llama(folder / "model")), "bits": 4, "cache": "cache"} | model,
        "prompt": {"template": "{{ text }}"},
        "output": {"uri": "out"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(fields))
    return str(path)


def asked(*arguments: str) -> tuple[dict[str, Any], str]:
    done = CliRunner().invoke(app, ["prequantize", "--json", *arguments])
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["exit_code"] == done.exit_code
    return document, done.stderr


def only_cached(folder: Path, cache: str, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Load the model, and fail if it is quantized for that."""
    real = pretrained.load_pretrained

    def refuse(*args: Any, **kwargs: Any) -> Any:
        assert "quantization_config" not in kwargs
        return real(*args, **kwargs)

    monkeypatch.setattr(pretrained, "load_pretrained", refuse)
    model = Model(id=str(folder / "model"), bits=4, cache=cache, **fields)
    assert load(open_checkpoint(model), model, "cpu").weight_bytes


def test_filled_found_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_spec(tmp_path)
    first, said = asked(spec)
    assert first["outcome"] == "stored"
    if not torch.cuda.is_available():
        assert "the model is quantized on the CPU, and the entry is for CPUs" in said
        assert first["of"]["device"] == "cpu"
    assert first["uri"] == f"{tmp_path}/cache/{first['key']}"
    assert first["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("cache/*/*/*"))
    again, _ = asked(spec)
    assert again["outcome"] == "already_there"
    assert (again["key"], again["bytes"]) == (first["key"], first["bytes"])
    next(tmp_path.glob("cache/*/*/model.safetensors")).unlink()
    mended, _ = asked(spec)
    assert mended["outcome"] == "stored"
    assert "model.safetensors: No such file" in mended["damage"]
    only_cached(tmp_path, str(tmp_path / "cache"), monkeypatch)


def test_what_a_person_sees(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    for words in ("are in the cache now", "were in the cache already"):
        done = CliRunner().invoke(app, ["prequantize", spec])
        assert done.exit_code == 0
        assert words in done.stdout
        assert "4 bits (nf4, double quantization)" in done.stdout


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("model.cache=null", 2, "the spec names no cache"),
        ("model.bits=16", 2, "loaded without quantizing it"),
        ("model.cache=gopher://x", 2, "no store is known for gopher"),
        ("model.cache=/proc/nowhere", 2, "/proc/nowhere"),
        ("model.cache_storage.region=nowhere", 0, ""),
    ],
)
def test_what_can_t_be_filled_is_one_error(
    tmp_path: Path, change: str, code: int, said: str
) -> None:
    document, _ = asked(write_spec(tmp_path), "--set", change)
    assert document["exit_code"] == code
    assert said in document.get("error", "")


def test_on_s3(tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, storage = f"{bucket.uri}/weights", bucket.storage
    spec = write_spec(tmp_path, cache=uri, cache_storage=storage.model_dump())
    assert asked(spec)[0]["outcome"] == "stored"
    assert asked(spec)[0]["outcome"] == "already_there"
    only_cached(tmp_path, uri, monkeypatch, cache_storage=storage)


@pytest.mark.timeout(240)
def test_as_a_ray_job(tmp_path: Path, ray_head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_spec(tmp_path, cache=str(tmp_path / "cache"))
    done = ray_job(
        ray_head, "submit", "--working-dir=.", "--submission-id=ahead", "--",
        "python", "jobs/prequantize.py", spec, "--set", "cluster.gpus_per_replica=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    documents = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(documents[-1])["outcome"] == "stored"
    only_cached(tmp_path, str(tmp_path / "cache"), monkeypatch)
