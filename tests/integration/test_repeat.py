"""Repeated work through a live Ray: rows that are answered again, answers that jobs share."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from quantbatch import pipeline
from quantbatch.answers import packs
from quantbatch.errors import Refused, SpecError
from quantbatch.records import Status
from quantbatch.report import Outcome
from quantbatch.retry import retry
from quantbatch.specfile import load_spec
from tests.integration.support import (
    COMMAND,
    LONGEST_RUN_S,
    ROWS,
    change,
    proven,
    wait_for,
    write_spec,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.support import Head


def output(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.ParquetDataset(folder / "out").read().to_pylist()
    return found


def with_long_rows(folder: Path, head: Head) -> Path:
    """Return the spec of a job in whose input every 20th prompt is longer than the others."""
    spec = write_spec(folder, {"uri": str(folder / "out")})
    for path in (folder / "in").iterdir():
        rows = pq.read_table(path).to_pylist()
        for row in rows[::20]:
            row["text"] += " and goodbye" * 20
        pq.write_table(pa.Table.from_pylist(rows), path)
    change(
        spec,
        cluster={"address": head.address},
        engine={"step_s": 0.0, "max_input_tokens": 60},
        limits={"max_error_rate": 0.1},
    )
    return spec


@pytest.mark.timeout(240)
def test_rows_that_were_too_long_are_answered_by_a_retry_that_was_killed(
    tmp_path: Path, ray_head: Head
) -> None:
    spec = with_long_rows(tmp_path, ray_head)
    report = pipeline.run(load_spec(spec))
    assert (report.counts.error, report.counts.ok) == (ROWS // 20, ROWS - ROWS // 20)
    before = output(tmp_path)
    proven(spec)

    longer = ["--status", "error", "--set", "engine.max_input_tokens=500"]
    slow = [*longer, "--set", "engine.step_s=0.5", "--set", "cluster.chunks_in_flight=1"]
    with (tmp_path / "log").open("ab") as log:
        killed = subprocess.Popen(
            [COMMAND, "retry", str(spec), *slow], stdout=log, stderr=log, env=os.environ
        )
    records = tmp_path / "out" / "_quantbatch" / "again" / "0001"
    wait_for(lambda: records.exists() and any(records.iterdir()), timeout_s=60, what="a commit")
    killed.kill()
    killed.wait()
    done = sum(1 for _ in records.iterdir())
    assert done < 24
    proven(spec)

    with pytest.raises(Refused, match="retry 1 is not finished"):
        retry(load_spec(spec), [Status.ERROR])
    # How fast the echo is changes no answer, so it is the same retry.
    report = retry(load_spec(spec, [longer[-1]]), [Status.ERROR])
    assert report.outcome is Outcome.DONE
    assert 0 < report.run.counts.rows <= 24 - done
    assert report.counts.ok == ROWS
    proven(spec)
    for old, new in zip(before, output(tmp_path), strict=True):
        if old["status"] == "ok":
            assert new == old
        else:
            assert (new["row_id"], new["status"]) == (old["row_id"], "ok")
            assert new["completion"]
    assert retry(load_spec(spec), [Status.ERROR]).outcome is Outcome.NOTHING_TO_DO
    assert pipeline.run(load_spec(spec)).outcome is Outcome.NOTHING_TO_DO


@pytest.mark.timeout(240)
def test_truncated_rows_get_a_larger_limit(tmp_path: Path, ray_head: Head) -> None:
    spec = write_spec(tmp_path, {"uri": str(tmp_path / "out"), "rows_per_part": 60})
    for path in sorted((tmp_path / "in").iterdir())[1:]:
        path.unlink()
    fields = yaml.safe_load(spec.read_text())
    fields |= {"engine": {"kind": "static", "batch_size": 16}, "sampling": {"max_new_tokens": 1}}
    fields["cluster"]["address"] = ray_head.address
    spec.write_text(yaml.safe_dump(fields))
    pipeline.run(load_spec(spec))
    before = output(tmp_path)
    cut = [row["row_id"] for row in before if row["status"] == "truncated"]
    assert len(cut) > 10, before[:3]
    report = retry(load_spec(spec, ["sampling.max_new_tokens=12"]), [Status.TRUNCATED])
    assert report.run.counts.rows == len(cut)
    proven(spec)
    for old, new in zip(before, output(tmp_path), strict=True):
        if old["status"] == "truncated":
            assert new["completion"].startswith(old["completion"])
            assert new["completion_tokens"] > old["completion_tokens"] or new["status"] == "ok"
        else:
            assert new == old


@pytest.mark.timeout(LONGEST_RUN_S)
def test_what_a_retry_may_not_change(tmp_path: Path, ray_head: Head) -> None:
    spec = with_long_rows(tmp_path, ray_head)
    with pytest.raises(Refused, match="no job has begun"):
        retry(load_spec(spec), [Status.ERROR])
    pipeline.run(load_spec(spec))
    with pytest.raises(Refused, match=r"prompt\.template was"):
        retry(load_spec(spec, ["prompt.template='{{ id }}'"]), [Status.ERROR])
    with pytest.raises(Refused, match=r"model\.quantization\.kind"):
        retry(load_spec(spec, ["model.bits=8"]), [Status.ERROR])
    with pytest.raises(Refused, match=r"sampling\.logprobs was null"):
        retry(load_spec(spec, ["sampling.logprobs=1"]), [Status.ERROR])
    with pytest.raises(SpecError, match=r"sampling\.stop_token_ids: no token 999999"):
        retry(load_spec(spec, ["sampling.stop_token_ids=[999999]"]), [Status.ERROR])
    proven(spec)


def kept(cache: Path) -> int:
    """Return how many answers a cache holds."""
    return sum(pq.read_metadata(path).num_rows for path in cache.glob("*/*.parquet"))


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


@pytest.mark.timeout(240)
def test_a_nightly_job_pays_for_new_rows_only(
    tmp_path: Path, ray_head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "FILES_WORTH_IT", 8)
    spec = write_spec(tmp_path, {"uri": str(tmp_path / "out")})
    cluster = {"address": ray_head.address, "replicas": 2}
    change(spec, cluster=cluster, engine={"step_s": 0.0})
    pipeline.run(load_spec(spec))
    plain = output(tmp_path)

    cache = tmp_path / "cache"
    change(spec, answers_cache={"uri": str(cache)}, output={"uri": str(tmp_path / "one")})
    first = pipeline.run(load_spec(spec))
    assert first.run.engine["from_cache"] == 0
    proven(spec)
    assert len(list(cache.glob("*/*.pack.parquet"))) == 1
    for path in cache.glob("*/*Z-????????????.parquet"):
        path.unlink()  # as a job does a day later
    assert kept(cache) == ROWS

    new = pa.table({"id": range(ROWS, ROWS + 50), "text": [f"new {i}" for i in range(50)]})
    pq.write_table(new, tmp_path / "in" / "4.parquet")
    change(spec, output={"uri": str(tmp_path / "out2")})
    second = pipeline.run(load_spec(spec))
    assert second.run.engine["from_cache"] == ROWS
    assert (first.counts.cached, second.counts.cached) == (0, ROWS)
    assert kept(cache) == ROWS + 50, "only new rows were answered"
    found: list[dict[str, Any]] = pq.ParquetDataset(tmp_path / "out2").read().to_pylist()
    assert [row["cached"] for row in found] == [row["id"] < ROWS for row in found]
    assert without(found[:ROWS], "cached", "attempt") == without(plain, "attempt")
    proven(spec)

    # Within a job it is the same command that continues it, with the cache on or off as it was.
    fields = yaml.safe_load(spec.read_text())
    del fields["answers_cache"]
    spec.write_text(yaml.safe_dump(fields))
    with pytest.raises(Refused, match="answers_cache was true, now null"):
        pipeline.run(load_spec(spec))
