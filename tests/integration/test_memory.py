"""Memory is bounded by the chunks in flight: not by the rows of a job, nor by those of a row group.

What is measured is the most that a process ever had in memory (VmHWM), so no moment is missed.
"""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typing_extensions import override

from quantbatch import pipeline, stages
from quantbatch.progress import Silent
from quantbatch.specfile import load_spec
from tests.integration.support import MODEL, change, proven, start

if TYPE_CHECKING:
    from quantbatch.records import Receipt
    from quantbatch.report import RunFigures
    from tests.conftest import Count
    from tests.integration.support import Head

WORDS = ("the", "batch", "reads", "every", "row", "once", "and", "writes", "one", "answer")


def write_job(folder: Path, *, keep: list[str], template: str = "{{ text }}", **input: Any) -> Path:
    fields = {
        "name": "memory",
        "input": {"uri": str(folder / "in"), **input},
        "model": {"id": str(MODEL), "bits": 16},
        "prompt": {"template": template},
        "sampling": {"max_new_tokens": 8},
        "engine": {"kind": "echo", "batch_size": 256},
        "cluster": {"gpus_per_replica": 0},
        "output": {"uri": str(folder / "out"), "keep": keep},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def write_short_rows(folder: Path, rows: int) -> None:
    folder.mkdir(parents=True)
    for first in range(0, rows, 20_000):
        ids = range(first, min(first + 20_000, rows))
        texts = [f"{i} " + " ".join(WORDS[(i + k) % len(WORDS)] for k in range(8)) for i in ids]
        table = pa.table({"id": pa.array(ids, pa.int64()), "text": texts})
        pq.write_table(table, folder / f"{first:08d}.parquet")


class Peaks(NamedTuple):
    """The most memory that processes of a run had, in MiB."""

    driver: int
    readers: int


def peaks_of(spec: Path, head: Head, *, timeout_s: float = 250) -> Peaks:
    """Run a job to its end and watch its processes."""
    driver = start(spec, head)
    deadline = time.monotonic() + timeout_s
    peaks = Peaks(0, 0)
    while driver.poll() is None:
        assert time.monotonic() < deadline, f"the job takes longer than {timeout_s} s"
        readers = [p.pid for p in psutil.process_iter() if is_reader(p)]
        peaks = Peaks(
            max(peaks.driver, most_mib(driver.pid)),
            max([peaks.readers, *(most_mib(pid) for pid in readers)]),
        )
        time.sleep(0.2)
    assert driver.returncode == 0, (spec.parent / "log").read_text()[-3000:]
    proven(spec)
    return peaks


def is_reader(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name().startswith("ray::") and "Reader" in " ".join(process.cmdline())
    return False


def most_mib(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(s.split()[1]) >> 10 for s in status.splitlines() if s.startswith("VmHWM")), 0)


def short_job(folder: Path, rows: int) -> Path:
    write_short_rows(folder / "in", rows)
    return write_job(folder, keep=["id"])


def long_job(folder: Path) -> Path:
    """Write a job over one row group of 100 MB: 1,000 long texts that no codec makes short."""
    (folder / "in").mkdir(parents=True)
    dice = random.Random(0)
    texts = [dice.randbytes(50_000).hex() for _ in range(1000)]
    path = folder / "in" / "one.parquet"
    table = pa.table({"id": range(len(texts)), "text": texts})
    # Pages of 64 rows, as a writer makes them that looks at their size in time.
    pq.write_table(table, path, use_dictionary=False, write_batch_size=64)
    metadata = pq.read_metadata(path)
    assert metadata.num_row_groups == 1
    assert metadata.row_group(0).total_byte_size > 100_000_000
    return write_job(folder, keep=["id"], template="{{ id }} {{ text[:40] }}")


@pytest.mark.timeout(800)
def test_neither_more_rows_nor_a_larger_row_group_need_more_memory(
    tmp_path: Path, ray_head: Head, count: Count
) -> None:
    few = peaks_of(short_job(tmp_path / "few", 10_000), ray_head)
    many = peaks_of(short_job(tmp_path / "many", 60_000), ray_head)
    long = peaks_of(long_job(tmp_path / "long"), ray_head)
    count(f"10,000 rows: {few}; 60,000 rows: {many}; a row group of 100 MB: {long}")
    assert many.driver - few.driver < 40
    assert many.readers - few.readers < 40
    assert long.driver - few.driver < 20
    assert long.readers - few.readers < 100


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_million_rows_need_no_more_memory_than_a_hundred_thousand(
    tmp_path: Path, ray_head: Head, count: Count
) -> None:
    few = peaks_of(short_job(tmp_path / "few", 100_000), ray_head)
    many = peaks_of(short_job(tmp_path / "many", 1_000_000), ray_head, timeout_s=1200)
    count(f"100,000 rows: {few}; 1,000,000 rows: {many}")
    assert many.driver - few.driver < 60
    assert many.readers - few.readers < 60


class EnoughSeen(Exception):  # noqa: N818 - it is no error
    """Ends a job half-way."""


@pytest.mark.timeout(300)
def test_readers_wait_for_a_slow_engine(tmp_path: Path, ray_head: Head) -> None:
    """Of 400 chunks only a few are rendered before replicas take them."""
    write_short_rows(tmp_path / "in", 2000)
    spec = write_job(tmp_path, keep=["id"], rows_per_chunk=5)
    cluster = {"chunks_in_flight": 4, "address": ray_head.address}
    change(spec, cluster=cluster, engine={"batch_size": 5, "step_s": 0.3})
    rendered = tmp_path / "rendered"
    rendered.mkdir()

    class Noting(stages.Reader):
        @override
        def __call__(self, item: pa.Table) -> pa.Table:
            made = super().__call__(item)
            (rendered / str(made["chunk"][0])).touch()
            return made

    ahead: list[int] = []

    class Counting(Silent):
        @override
        def committed(self, receipt: Receipt, figures: RunFigures) -> None:
            ahead.append(sum(1 for _ in rendered.iterdir()) - len(ahead) - 1)
            if len(ahead) == 20:
                raise EnoughSeen

    with patch.object(stages, "Reader", Noting), pytest.raises(EnoughSeen):
        pipeline.run(load_spec(spec), progress=Counting())
    # 4 in the replica, 5 before it, 2 with the reader; and what comes while we count.
    assert max(ahead) <= 16, ahead
