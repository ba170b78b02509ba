"""SIGKILL at random moments: of the driver, of a replica; on local disk and on S3.

Every job is continued by the same command until it is done, and then proven by `verify`. All the
while a watcher reads what readers see of the local outputs: each visible file must be whole, and
never change.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.support import (
    ROWS,
    ROWS_PER_PART,
    proven,
    run_to_the_end,
    start,
    write_spec,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.support import Bucket, Head

KILLS = int(os.environ.get("QUANTBATCH_TEST_KILLS", "60"))
SEED = int(os.environ.get("QUANTBATCH_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


@dataclass
class Watcher:
    """Reads every visible file of some outputs again and again."""

    folders: list[Path] = field(default_factory=list)
    looks: int = 0
    wrong: list[str] = field(default_factory=list)
    seen: dict[Path, bytes] = field(default_factory=dict)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        stop = threading.Event()

        def loop() -> None:
            while not stop.wait(0.02):
                for folder in list(self.folders):
                    for path in folder.glob("*.parquet"):
                        self._look(path)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _look(self, path: Path) -> None:
        self.looks += 1
        data = path.read_bytes()
        if self.seen.get(path) == data:
            return
        try:
            rows = pq.read_table(pa.BufferReader(data)).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            self.wrong.append(f"{path}: {error}")
            return
        last = path.name == f"part-{(ROWS - 1) // ROWS_PER_PART:06d}.parquet"
        whole = ROWS % ROWS_PER_PART if last else ROWS_PER_PART
        if path in self.seen or rows != whole:
            self.wrong.append(f"{path}: {rows} of {whole} rows, seen before: {path in self.seen}")
        self.seen[path] = data


@pytest.mark.timeout(1500)
def test_drivers_killed_at_random_moments(
    tmp_path: Path, ray_head: Head, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    dice = random.Random(SEED)
    watcher = Watcher()
    undisturbed = write_spec(tmp_path / "undisturbed", {"uri": str(tmp_path / "undisturbed/out")})
    began = time.monotonic()
    assert run_to_the_end(undisturbed, ray_head) == 0
    longest_s = time.monotonic() - began

    kills = jobs = 0
    with watcher.watching():
        while kills < KILLS:
            folder = tmp_path / str(jobs)
            if jobs % 2:
                storage = bucket.storage.model_dump(exclude_defaults=True)
                output: dict[str, Any] = {"uri": f"{bucket.uri}/{jobs}", "storage": storage}
            else:
                output = {"uri": str(folder / "out")}
                watcher.folders = [folder / "out"]
            spec = write_spec(folder, output)
            while not _ends_by_itself(start(spec, ray_head), dice.uniform(0.2, longest_s), folder):
                kills += 1
            proven(spec)
            jobs += 1
    with capsys.disabled():
        print(f"\ndriver kills={kills} jobs={jobs} wrong=0 looks={watcher.looks} seed={SEED}")
    assert watcher.wrong == []
    assert watcher.looks > 1000


def _ends_by_itself(driver: subprocess.Popen[bytes], seconds: float, folder: Path) -> bool:
    """Give a driver some seconds; kill it if it is not done, and tell which it was."""
    try:
        code = driver.wait(seconds)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait()
        return False
    assert code == 0, (folder / "log").read_text()[-3000:]
    return True


def replica_processes(head: Head) -> list[psutil.Process]:
    """Return the processes of our own head that hold a replica."""
    del head
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::") and "Replica" in title and _is_ours(process):
            found.append(process)
    return found


def _is_ours(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(parent.pid == os.getpid() for parent in process.parents())
    return False


@pytest.mark.timeout(300)
def test_replicas_killed_at_random_moments(
    tmp_path: Path, ray_head: Head, capsys: pytest.CaptureFixture[str]
) -> None:
    dice = random.Random(SEED)
    spec = write_spec(tmp_path, {"uri": str(tmp_path / "out")})
    driver = start(spec, ray_head)
    kills = 0
    while driver.poll() is None:
        time.sleep(dice.uniform(0.5, 3))
        for process in replica_processes(ray_head)[:1]:
            if kills < 4:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
                    kills += 1
    assert driver.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    proven(spec)
    with capsys.disabled():
        print(f"\nreplica kills={kills} wrong=0 seed={SEED}")
    assert kills >= 2
