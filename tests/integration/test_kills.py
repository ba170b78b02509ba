"""SIGKILL at random moments: of drivers, of replicas, of whole nodes; on local disk and on S3.

Two lanes of small jobs run side by side, half of the jobs on S3, behind a proxy that makes trouble
of its own. Every job is continued by the same command until it is done, and then proven by
`verify`. All the while a watcher reads what readers see of the outputs. Replicas note what they
begin, so that what kills make do again is counted.

    QUANTBATCH_TEST_KILLS=300 QUANTBATCH_TEST_SEED=7 pytest tests/integration/test_kills.py
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from typing_extensions import override

from tests.integration.counted import rows_begun
from tests.integration.nodes import CARDS, worker_nodes
from tests.integration.support import (
    LONGEST_RUN_S,
    ROWS,
    ROWS_PER_CHUNK,
    change,
    proven,
    run_to_the_end,
    start,
    wait_for,
    write_spec,
)
from tests.integration.watching import Folder, Prefix, Watcher

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pyarrow as pa

    from tests.conftest import Count
    from tests.faults.proxy import FaultProxy
    from tests.integration.nodes import Nodes
    from tests.integration.support import Bucket, Head

KILLS = int(os.environ.get("QUANTBATCH_TEST_KILLS", "60"))
SEED = int(os.environ.get("QUANTBATCH_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
SHARES = {"driver": 0.5, "replica": 0.34, "raylet": 0.16}
IN_FLIGHT = 3
"""Chunks that a replica works on at once."""
COMMITTING = 8
"""Chunks that are answered, and being committed, at most (`cluster.COMMITS_AT_ONCE`)."""
MOST_KILLS_OF_A_JOB = 4
"""Of its replicas and nodes: after more deaths a row is held to be poison (see `suspects`)."""
MOST_KILLS_OF_DRIVERS = 12


@dataclass
class Tally:
    """What all jobs of a run came to."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    jobs: collections.Counter[str] = field(default_factory=collections.Counter)
    stops: int = 0
    """Times that a run stopped by itself, for the same command to continue."""
    recomputed: list[tuple[int, int]] = field(default_factory=list)
    """Rows begun beyond those of the job, and kills, of each job."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def left(self, kind: str) -> bool:
        """Tell whether there are kills of a kind to do."""
        return self.kills[kind] < round(SHARES[kind] * KILLS)

    def note(self, kind: str) -> None:
        with self.lock:
            self.kills[kind] += 1

    @override
    def __str__(self) -> str:
        rows = sum(rows for rows, _ in self.recomputed)
        return (
            f"kills={self.kills.total()} ({dict(self.kills)}) jobs={self.jobs.total()} "
            f"({dict(self.jobs)}) wrong=0 stops={self.stops} rows={ROWS * self.jobs.total()} "
            f"recomputed={rows}"
        )


@dataclass
class Lane:
    """Jobs one after another, all disturbed in the same way."""

    name: str
    folder: Path
    head: Head
    bucket: Bucket
    direct: Bucket
    """The same, for those who only look."""
    watcher: Watcher
    tally: Tally
    dice: random.Random
    longest_s: float
    """How long a driver takes that nobody disturbs."""
    nodes: Nodes | None = None
    first: int = 0
    """Number of its first job; odd ones are on S3."""

    def run(self, kinds: Sequence[str]) -> None:
        number = self.first
        while any(self.tally.left(kind) for kind in kinds):
            spec = self._write(number)
            kills = self._drivers(spec) if "driver" in kinds else self._processes(spec, kinds)
            proven(spec)
            again = rows_begun(str(spec.parent / "in")) - ROWS
            with self.tally.lock:
                self.tally.recomputed.append((again, kills))
                self.tally.jobs["s3" if number % 2 else "local"] += 1
            number += 1

    def _write(self, number: int) -> Path:
        folder = self.folder / f"{self.name}-{number}"
        if number % 2:
            storage = self.bucket.storage.model_dump(exclude_defaults=True)
            output: dict[str, Any] = {"uri": f"{self.bucket.uri}/{folder.name}", "storage": storage}
            endpoint = self.direct.storage.endpoint_url or ""
            bucket = self.bucket.uri.removeprefix("s3://")
            self.watcher.views[self.name] = Prefix(endpoint, bucket, folder.name)
        else:
            output = {"uri": str(folder / "out")}
            self.watcher.views[self.name] = Folder(folder / "out")
        spec = write_spec(folder, output)
        cluster: dict[str, Any] = {"chunks_in_flight": IN_FLIGHT}
        if self.nodes:
            # More cards than the head has: it runs on a node that can be killed.
            change(spec, engine={"step_s": 0.4})
            cluster["gpus_per_replica"] = CARDS // 4
        change(spec, cluster=cluster)
        return spec

    def _drivers(self, spec: Path) -> int:
        """Kill drivers until one is done before its time comes."""
        kills = 0
        while True:
            driver = self._start(spec)
            may = self.tally.left("driver") and kills < MOST_KILLS_OF_DRIVERS
            life_s = self.dice.uniform(0.2, self.longest_s) if may else 4 * LONGEST_RUN_S
            try:
                code = driver.wait(life_s)
            except subprocess.TimeoutExpired:
                driver.kill()
                driver.wait()
                assert may, f"a driver takes longer than {life_s} s: {_log(spec)}"
                self.tally.note("driver")
                kills += 1
            else:
                assert code == 0, _log(spec)
                return kills

    def _processes(self, spec: Path, kinds: Sequence[str]) -> int:
        """Kill processes that a driver depends on, while it works."""
        assert self.nodes
        kills = 0
        driver = self._start(spec)
        due = time.monotonic() + self.dice.uniform(0.5, 3)
        while True:
            code = driver.poll()
            if code == 0:
                return kills
            if code is not None:
                assert code == 75, _log(spec)
                self.tally.stops += 1
                assert self.tally.stops < KILLS, _log(spec)
                driver = self._start(spec)
            time.sleep(0.2)
            self.nodes.refill()
            # To look for processes takes a good part of a core: not before it is time.
            if time.monotonic() < due or kills >= MOST_KILLS_OF_A_JOB:
                continue
            raylets, replicas = self.nodes.raylets(), self.nodes.replicas()
            left = [kind for kind in kinds if self.tally.left(kind)]
            if len(raylets) < 2:
                # A driver that finds no node with cards refuses the job.
                left = [kind for kind in left if kind != "raylet"]
            if not replicas or not left:
                continue
            kind = self.dice.choice(left)
            if kind == "raylet":
                self.nodes.kill_one()
            else:
                _kill(replicas[0])
            self.tally.note(kind)
            kills += 1
            due = time.monotonic() + self.dice.uniform(0.5, 3)

    def _start(self, spec: Path) -> subprocess.Popen[bytes]:
        if self.nodes:
            wait_for(self.nodes.any_there, timeout_s=240, what="a worker node")
        return start(spec, self.head, "-m", "tests.integration.counted")


def _log(spec: Path) -> str:
    return (spec.parent / "log").read_text()[-3000:]


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


@pytest.mark.timeout(900 + 20 * KILLS)
def test_processes_killed_at_random_moments(
    tmp_path: Path,
    ray_head: Head,
    bucket: Bucket,
    faulty_bucket: Bucket,
    fault_proxy: FaultProxy,
    count: Count,
) -> None:
    for kind in ("503", "reset_before", "reset_after", "500_after"):
        fault_proxy.fail(kind, probability=0.01)
    watcher, tally = Watcher(), Tally()

    def lane(name: str, seed: int, nodes: Nodes | None = None) -> Lane:
        return Lane(
            name=name,
            folder=tmp_path,
            head=ray_head,
            bucket=faulty_bucket,
            direct=bucket,
            watcher=watcher,
            tally=tally,
            dice=random.Random(seed),
            longest_s=longest_s,
            nodes=nodes,
            first=1 if nodes else 0,
        )

    began = time.monotonic()
    undisturbed = write_spec(tmp_path / "undisturbed", {"uri": str(tmp_path / "undisturbed/out")})
    assert run_to_the_end(undisturbed, ray_head) == 0
    longest_s = time.monotonic() - began
    with (
        worker_nodes(ray_head, tmp_path, 2) as nodes,
        watcher.watching(),
        ThreadPoolExecutor(2) as lanes,
    ):
        futures = [
            lanes.submit(lane("drivers", SEED).run, ["driver"]),
            lanes.submit(lane("processes", SEED + 1, nodes).run, ["replica", "raylet"]),
        ]
        for future in futures:
            future.result()
    count(
        f"{tally} looks={watcher.looks} faults={fault_proxy.faults} seed={SEED} "
        f"in {time.monotonic() - began:.0f} s"
    )
    assert watcher.wrong == []
    assert sum(watcher.looks.values()) >= 5000
    assert watcher.looks["Prefix"] >= 50
    for again, kills in tally.recomputed:
        assert 0 <= again <= kills * (IN_FLIGHT + COMMITTING) * ROWS_PER_CHUNK, tally.recomputed


def _real_job(folder: Path) -> Path:
    """Write a job of the quickstart's model, which answers a chunk in a fraction of a second."""
    spec = write_spec(folder, {"uri": str(folder / "out")})
    fields = yaml.safe_load(spec.read_text())
    fields["engine"] = {"kind": "continuous"}
    fields["cluster"]["chunks_in_flight"] = 2
    spec.write_text(yaml.safe_dump(fields))
    return spec


def _answers(spec: Path) -> pa.Table:
    table = pq.ParquetDataset(spec.parent / "out").read().sort_by("row_id")
    return table.drop_columns([name for name in table.column_names if name.endswith("attempt")])


@pytest.mark.timeout(900)
def test_greedy_answers_after_kills_are_those_of_an_undisturbed_run(
    tmp_path: Path, ray_head: Head
) -> None:
    undisturbed, killed = _real_job(tmp_path / "undisturbed"), _real_job(tmp_path / "killed")
    assert run_to_the_end(undisturbed, ray_head) == 0
    records = tmp_path / "killed" / "out" / "_quantbatch" / "commits"
    kills = 0
    for enough in (3, 12):
        driver = start(killed, ray_head)
        while driver.poll() is None:
            if records.exists() and sum(1 for _ in records.iterdir()) >= enough:
                driver.kill()
                kills += driver.wait() == -signal.SIGKILL
            time.sleep(0.05)
    assert run_to_the_end(killed, ray_head) == 0
    proven(killed)
    assert kills, "the job was done before it was killed"
    assert _answers(killed).num_rows == ROWS
    assert _answers(killed).equals(_answers(undisturbed))
