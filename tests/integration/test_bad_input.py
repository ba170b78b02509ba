"""Bad rows and bad files in one job: each named, nothing lost, nothing else stopped."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch import pipeline
from quantbatch.errors import ClusterError, Refused, Stopped, StorageError
from quantbatch.report import Outcome
from quantbatch.spec import JobSpec
from quantbatch.verify import verify
from tests.integration.support import MODEL

if TYPE_CHECKING:
    from quantbatch.report import RunReport
    from tests.integration.support import Head


def job(folder: Path, head: Head, **changes: Any) -> JobSpec:
    fields = {
        "name": "bad-input",
        "input": {"uri": str(folder / "in")},
        "model": {"id": str(MODEL), "bits": 16},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_new_tokens": 8, "stop": ["never said"]},
        "engine": {"kind": "echo", "max_input_tokens": 400},
        "cluster": {"gpus_per_replica": 0, "address": head.address},
        "output": {"uri": str(folder / "out")},
        "limits": {"max_error_rate": 1.0},
    }
    return JobSpec.model_validate(fields | changes)


def run(spec: JobSpec) -> RunReport:
    return pipeline.run(spec)


def answers(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "out").to_pylist()
    return rows


@pytest.mark.timeout(180)
def test_bad_rows_become_error_rows(tmp_path: Path, ray_head: Head) -> None:
    texts = {
        "good": "hello",
        "null": None,
        "empty": "",
        "blank": " \n",
        "control": "a\u0000b\u0007c\u001b[31m",
        "long": "word " * 3000,
        "huge": "x" * 10_000_000,
        "emoji": "👩‍👩‍👧 שלום",
    }
    lines = [json.dumps({"name": name, "text": text}) for name, text in texts.items()]
    lines.insert(1, '{"name": "torn", "text": "hal')
    lines.insert(3, '{"name": "surrogate", "text": "\\ud800"}')
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rows.jsonl").write_text("\n".join(lines))

    report = run(job(tmp_path, ray_head))

    found = answers(tmp_path)
    assert report.counts.rows == len(found) == len(lines)
    assert [row["row_id"] for row in found] == [f"rows.jsonl:{n}" for n in range(len(lines))]
    by_name = {row["name"]: (row["status"], row["error_type"]) for row in found if row["name"]}
    assert by_name == {
        "good": ("ok", None),
        "null": ("error", "null_prompt"),
        "empty": ("error", "empty_prompt"),
        "blank": ("error", "empty_prompt"),
        "control": ("ok", None),
        "long": ("error", "prompt_too_long"),
        "huge": ("error", "prompt_too_long"),
        "emoji": ("ok", None),
    }
    torn = [row for row in found if row["error_type"] == "bad_json"]
    assert [("line 2" in row["error_message"]) for row in torn] == [True, False]
    assert "line 4" in torn[1]["error_message"]
    assert verify(job(tmp_path, ray_head)).outcome == "proven"


@pytest.mark.timeout(180)
def test_an_unreadable_file_is_named_and_stops_nothing(tmp_path: Path, ray_head: Head) -> None:
    (tmp_path / "in").mkdir()
    good = pa.table({"text": ["a", "b", "c"]})
    pq.write_table(good, tmp_path / "in" / "good.parquet")
    pq.write_table(good.slice(0, 0), tmp_path / "in" / "no-rows.parquet")
    whole = (tmp_path / "in" / "good.parquet").read_bytes()
    (tmp_path / "in" / "torn.parquet").write_bytes(whole[:-30])
    (tmp_path / "in" / "empty.parquet").write_bytes(b"")
    (tmp_path / "in" / "magic.parquet").write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")
    wide = {f"c{number}": number for number in range(10_001)}
    (tmp_path / "in" / "wide.jsonl").write_text(json.dumps(wide))

    report = run(job(tmp_path, ray_head))

    assert report.outcome is Outcome.INPUT_UNREADABLE
    assert report.exit_code == 1
    bad = ["empty.parquet", "magic.parquet", "torn.parquet", "wide.jsonl"]
    assert sorted(report.unreadable) == bad
    assert [row["row_id"] for row in answers(tmp_path)] == [f"good.parquet:{n}" for n in range(3)]
    assert not (tmp_path / "out" / "_SUCCESS").exists()

    # The user mends one file and takes the others away; --extend answers what is new.
    (tmp_path / "in" / "torn.parquet").write_bytes(whole)
    for name in ("empty.parquet", "magic.parquet", "wide.jsonl"):
        (tmp_path / "in" / name).unlink()
    with pytest.raises(Refused, match=r"torn\.parquet"):
        run(job(tmp_path, ray_head))
    report = pipeline.run(job(tmp_path, ray_head), extend=True)
    assert report.outcome is Outcome.DONE
    assert report.counts.rows == 6
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert verify(job(tmp_path, ray_head)).outcome == "proven"


@pytest.mark.timeout(180)
def test_a_file_that_breaks_while_it_is_read(tmp_path: Path, ray_head: Head) -> None:
    """Its footer is sound, so that it is planned; its pages are not."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        table = pa.table({"text": [f"{name} {n}" for n in range(200)]})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet", compression="none")
    path = tmp_path / "in" / "b.parquet"
    data = bytearray(path.read_bytes())
    data[4:60] = os.urandom(56)
    path.write_bytes(data)

    report = run(job(tmp_path, ray_head))

    assert (report.outcome, report.exit_code) == (Outcome.INPUT_UNREADABLE, 1)
    assert list(report.unreadable) == ["b.parquet"]
    found = answers(tmp_path)
    assert [row["row_id"] for row in found] == [
        f"{f}.parquet:{n}" for f in "ab" for n in range(200)
    ]
    assert {(row["row_id"][0], row["error_type"]) for row in found} == {
        ("a", None),
        ("b", "unreadable_file"),
    }
    # It stays so, and is said again.
    assert run(job(tmp_path, ray_head)).exit_code == 1


def one_row(folder: Path) -> None:
    (folder / "in").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), folder / "in" / "a.parquet")


@pytest.mark.timeout(120)
def test_a_missing_gpu_is_refused(tmp_path: Path, ray_head: Head) -> None:
    one_row(tmp_path)
    spec = job(tmp_path, ray_head, cluster={"address": ray_head.address, "gpus_per_replica": 8})
    with pytest.raises(ClusterError, match="needs 8 GPU, and the cluster has 2") as caught:
        run(spec)
    assert "cpu_fallback" in caught.value.hint


@pytest.mark.timeout(60)
def test_no_cluster_at_the_address(tmp_path: Path, ray_head: Head) -> None:
    one_row(tmp_path)
    nowhere = ray_head._replace(address="127.0.0.1:1")
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:1"):
        run(job(tmp_path, nowhere))


def test_an_unwritable_output(tmp_path: Path, ray_head: Head) -> None:
    one_row(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError) as caught:
        run(job(tmp_path, ray_head, output={"uri": str(tmp_path / "file" / "out")}))
    assert caught.value.hint


@pytest.mark.timeout(180)
def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path, ray_head: Head) -> None:
    """The output is a tmpfs of 600 kB; with room made, the same job goes on."""
    (tmp_path / "in").mkdir()
    noise = [os.urandom(600).hex() for _ in range(800)]
    pq.write_table(pa.table({"noise": noise, "text": ["hi"] * 800}), tmp_path / "in" / "a.parquet")
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        spec = job(tmp_path, ray_head, output={"uri": str(small / "out")})
        with pytest.raises(Stopped, match="No space left"):
            run(spec)
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        assert run(spec).counts.rows == 800
        assert verify(spec).outcome == "proven"
    finally:
        subprocess.run(["umount", str(small)], check=True)
