"""Disks that are full, or read-only: of the output, of scratch files, of the log."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch.errors import StorageError
from quantbatch.spec import Storage
from quantbatch.storage import open_store, scratch_file
from tests.integration.support import COMMAND, ROWS_PER_PART, proven, write_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Count
    from tests.integration.support import Head

FULL = Path("/dev/full")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 kB."""
    if not FULL.exists():
        pytest.skip("no /dev/full: not Linux")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"no mount: {error}")
    if mounted.returncode:
        pytest.skip(f"mount is not permitted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def run(spec: Path, head: Head) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "run", str(spec)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | {"RAY_ADDRESS": head.address},
    )


def run_without_log(spec: Path, head: Head) -> int:
    """Run a job whose output and log go to a disk that is full."""
    with FULL.open("w") as full:
        ran = subprocess.run(
            [COMMAND, "run", str(spec), "--json"],
            stdout=full,
            stderr=full,
            check=False,
            timeout=240,
            env=os.environ | {"RAY_ADDRESS": head.address},
        )
    (spec.parent / "log").touch()
    return ran.returncode


@pytest.mark.timeout(600)
def test_a_job_whose_disk_is_full_is_continued_when_there_is_room(
    small_disk: Path, tmp_path: Path, ray_head: Head, count: Count
) -> None:
    out = small_disk / "out"
    spec = write_spec(tmp_path, {"uri": str(out)})
    remount(small_disk, "ro")
    refused = run(spec, ray_head)
    assert refused.returncode == 2, refused.stderr
    assert "Read-only file system" in refused.stderr
    assert "choose another output" in refused.stderr

    remount(small_disk, "rw")
    stopped = run(spec, ray_head)
    assert stopped.returncode == 75, stopped.stderr
    assert "No space left" in stopped.stderr
    assert "make room" in stopped.stderr
    for ran in (refused, stopped):
        assert "Traceback" not in ran.stderr
        assert ran.stderr.count("error: ") == 1
    committed = list((out / "_quantbatch" / "commits").iterdir())
    for record in committed:
        assert record.stat().st_size > 100, "no short record counts"
    for part in out.glob("*.parquet"):
        assert pq.read_metadata(part).num_rows == ROWS_PER_PART

    remount(small_disk, "size=8m")
    count(f"full disk: chunks committed before={len(committed)} wrong=0")
    assert run_without_log(spec, ray_head) == 0
    proven(spec)


def test_no_room_for_scratch_is_one_clear_error(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    store = open_store(str(tmp_path / "out"), Storage())
    table = pa.table({"x": [os.urandom(1000) for _ in range(1000)]})
    with pytest.raises(StorageError, match="disk: No space left on device") as caught:
        _publish_through_scratch(table, store)
    assert "TMPDIR" in caught.value.hint
    assert list(store.list()) == []
    assert list(small_disk.iterdir()) == []


def _publish_through_scratch(table: pa.Table, store: object) -> None:
    with scratch_file() as path:
        with pq.ParquetWriter(path, table.schema) as writer:
            writer.write_table(table)
        store.put_file("part.parquet", path)  # type: ignore[attr-defined]


def test_a_result_that_is_lost_is_said() -> None:
    if not FULL.exists():
        pytest.skip("no /dev/full: not Linux")
    with FULL.open("w") as full:
        ran = subprocess.run(
            [COMMAND, "schema"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ran.returncode == 2
    assert ran.stderr == "error: stdout: No space left on device: the result is lost\n"


def test_a_pipe_that_is_closed_early_is_no_fault() -> None:
    """`quantbatch schema | head -1`."""
    ran = subprocess.Popen([COMMAND, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ran.stdout is not None
    assert ran.stderr is not None
    ran.stdout.close()
    with contextlib.closing(ran.stderr):
        assert b"Traceback" not in ran.stderr.read()
    ran.wait(60)
