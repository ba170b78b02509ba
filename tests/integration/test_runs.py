"""Whole jobs on a live Ray: pretended GPUs, Hive partitions, signals, growth, S3, nothing to do."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from typing_extensions import override

from quantbatch import pipeline
from quantbatch.errors import Refused
from quantbatch.progress import Silent
from quantbatch.report import Outcome
from quantbatch.specfile import load_spec
from tests.integration.support import (
    LONGEST_RUN_S,
    ROWS,
    change,
    proven,
    run_to_the_end,
    start,
    wait_for,
    write_spec,
)

if TYPE_CHECKING:
    from pathlib import Path

    from quantbatch.records import Receipt
    from quantbatch.report import RunFigures
    from tests.integration.support import Bucket, Head


def commits(folder: Path) -> int:
    records = folder / "out" / "_quantbatch" / "commits"
    return sum(1 for _ in records.iterdir()) if records.exists() else 0


@pytest.mark.timeout(180)
def test_two_replicas_share_a_pretended_gpu(tmp_path: Path, ray_head: Head) -> None:
    spec = write_spec(tmp_path, {"uri": str(tmp_path / "out")})
    change(spec, cluster={"gpus_per_replica": 0.5, "replicas": 2, "address": ray_head.address})
    report = pipeline.run(load_spec(spec))
    assert report.outcome is Outcome.DONE
    assert report.run.to_json()["devices"] == ["cuda"]
    assert len(report.run.replicas) == 2
    proven(spec)

    # Again: nothing is done, no cluster is needed, nothing is written.
    change(spec, cluster={"address": "127.0.0.1:1"})
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    started = time.monotonic()
    assert pipeline.run(load_spec(spec)).outcome is Outcome.NOTHING_TO_DO
    assert time.monotonic() - started < 3
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


@pytest.mark.timeout(180)
def test_hive_partitions_are_kept_and_new_files_wait_for_extend(
    tmp_path: Path, ray_head: Head
) -> None:
    spec = write_spec(tmp_path, {"uri": str(tmp_path / "out"), "rows_per_part": 70})
    change(spec, cluster={"address": ray_head.address}, engine={"step_s": 0.0})
    for number in range(4):
        day = tmp_path / "in" / f"day=2026-01-0{number % 2 + 1}"
        day.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.parquet").rename(day / f"{number}.parquet")
    nested = pa.table({"id": [1000], "text": ["new"]})

    first = pipeline.run(load_spec(spec))
    assert first.counts.rows == ROWS
    table = ds.dataset(tmp_path / "out", partitioning="hive").to_table()
    assert table.num_rows == ROWS
    assert {row["day"] for row in table.to_pylist()} == {"2026-01-01", "2026-01-02"}
    assert all(row["row_id"].startswith(f"day={row['day']}/") for row in table.to_pylist())
    proven(spec)

    (tmp_path / "in" / "day=2026-01-03").mkdir()
    pq.write_table(nested, tmp_path / "in" / "day=2026-01-03" / "x.parquet")
    with pytest.raises(Refused, match=r"x\.parquet"):
        pipeline.run(load_spec(spec))
    second = pipeline.run(load_spec(spec), extend=True)
    assert (second.outcome, second.counts.rows, second.run.counts.rows) == ("done", ROWS + 1, 1)
    proven(spec)


@pytest.mark.timeout(180)
def test_work_counts_while_replicas_take_every_core(tmp_path: Path, ray_head: Head) -> None:
    """The head has 4 CPUs, the replicas take 3: readers and the committer must find room."""
    spec = write_spec(tmp_path, {"uri": str(tmp_path / "out")})
    change(spec, cluster={"replicas": 3, "address": ray_head.address}, engine={"step_s": 0.5})
    seen: list[int] = []

    class Watching(Silent):
        @override
        def committed(self, receipt: Receipt, figures: RunFigures) -> None:
            seen.append(commits(tmp_path))

    pipeline.run(load_spec(spec), progress=Watching())
    assert seen[0] < 24, "the first receipt came when everything was committed"
    proven(spec)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_and_the_same_command_continues(
    tmp_path: Path, ray_head: Head, number: signal.Signals
) -> None:
    spec = write_spec(tmp_path, {"uri": str(tmp_path / "out")})
    driver = start(spec, ray_head)
    wait_for(lambda: commits(tmp_path) >= 3, timeout_s=60, what="three commits")
    driver.send_signal(number)
    assert driver.wait(30) == 75, (tmp_path / "log").read_text()[-3000:]
    said = (tmp_path / "log").read_text()
    assert f"stopped by {number.name}" in said
    assert "same command continues" in said
    assert '"event": "stopping"' in said
    assert "Traceback" not in said
    assert 3 <= commits(tmp_path) < 24
    # What was under way was finished: nothing that was computed is lost.
    computed = list((tmp_path / "out" / "_quantbatch" / "data").iterdir())
    assert len(computed) == commits(tmp_path)
    assert run_to_the_end(spec, ray_head) == 0
    proven(spec)


@pytest.mark.timeout(LONGEST_RUN_S)
def test_input_and_output_on_s3(tmp_path: Path, ray_head: Head, bucket: Bucket) -> None:
    storage = bucket.storage.model_dump(exclude_defaults=True)
    spec = write_spec(tmp_path, {"uri": f"{bucket.uri}/out", "storage": storage})
    store = bucket.store("in")
    for path in (tmp_path / "in").iterdir():
        store.put(path.name, path.read_bytes())
    change(
        spec,
        input={"uri": f"{bucket.uri}/in/", "storage": storage},
        cluster={"address": ray_head.address},
        engine={"step_s": 0.0},
    )
    report = pipeline.run(load_spec(spec))
    assert (report.outcome, report.counts.ok) == ("done", ROWS)
    proven(spec)
