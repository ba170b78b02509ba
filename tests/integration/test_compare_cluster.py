"""`quantbatch compare --cluster`: the models run in a process of a Ray cluster that was there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from quantbatch import cluster
from quantbatch.cli import app
from quantbatch.errors import DoesNotFit, JobError, SpecError
from quantbatch.specfile import load_spec
from tests.integration.support import MODEL

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.support import Head


@pytest.fixture
def job(tmp_path: Path, ray_head: Head, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job on CPUs of the running cluster."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    table = pa.table({"text": [f"Return the number {n} as a string." for n in range(20)]})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    fields = {
        "name": "there",
        "input": {"uri": "in"},
        "model": {"id": str(MODEL), "bits": 4},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_new_tokens": 4},
        "engine": {"batch_size": 8},
        "cluster": {"address": ray_head.address, "gpus_per_replica": 0},
        "output": {"uri": "answers"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path / "job.yaml"


def test_the_report_comes_back(job: Path, tmp_path: Path) -> None:
    command = ["compare", str(job), "--cluster", "--bits", "32,4", "--rows", "6", "--json"]
    result = CliRunner().invoke(app, command)
    found = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, found["outcome"]) == (0, "compared"), result.output
    assert [width["name"] for width in found["widths"]] == ["fp32", "nf4"]
    assert found["widths"][1]["divergence"]["kl_mean"]["value"] > 1e-6
    assert "the models run on the cluster, on cpu" in result.stderr
    assert (tmp_path / "out" / "compare" / "there" / "index.html").exists()


@pytest.mark.parametrize(
    "error", [DoesNotFit("too large", "fewer bits"), SpecError(JobError("a", "b"), JobError("c"))]
)
def test_what_goes_wrong_there_is_said_here(job: Path, error: JobError) -> None:
    def failing() -> None:
        raise error

    spec = load_spec(job)
    with cluster.connected(spec.cluster) as device, pytest.raises(type(error)) as caught:
        cluster.run_once(spec, device, failing)
    assert str(caught.value) == str(error)
    assert caught.value.exit_code == error.exit_code
