"""A finished job that is run again: it writes nothing, loads nothing, and is over at once."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from quantbatch import pipeline
from quantbatch.report import Outcome
from quantbatch.specfile import load_spec
from tests.faults.proxy import Operation
from tests.integration.support import COMMAND, ROWS, change, proven, write_spec

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Count
    from tests.faults.proxy import FaultProxy
    from tests.integration.support import Bucket, Head

READING = {Operation.GET, Operation.HEAD, Operation.LIST}
NOBODY = "127.0.0.1:1"
"""An address of no Ray cluster: whoever asks one for a replica fails."""


@pytest.mark.timeout(400)
def test_a_finished_job_on_s3_is_left_as_it_is(
    tmp_path: Path, ray_head: Head, faulty_bucket: Bucket, fault_proxy: FaultProxy, count: Count
) -> None:
    storage = faulty_bucket.storage.model_dump(exclude_defaults=True)
    spec = write_spec(tmp_path, {"uri": f"{faulty_bucket.uri}/out", "storage": storage})
    store = faulty_bucket.store("in")
    for path in (tmp_path / "in").iterdir():
        store.put(path.name, path.read_bytes())
    change(
        spec,
        input={"uri": f"{faulty_bucket.uri}/in/", "storage": storage},
        cluster={"address": ray_head.address},
        engine={"step_s": 0.0},
    )
    assert pipeline.run(load_spec(spec)).counts.ok == ROWS
    proven(spec)
    there = list(faulty_bucket.store("out").list())

    change(spec, cluster={"address": NOBODY})
    took_s, cpu_s = [], []
    fault_proxy.clear()
    for _ in range(3):
        began, began_cpu = time.monotonic(), time.process_time()
        report = pipeline.run(load_spec(spec))
        took_s.append(time.monotonic() - began)
        cpu_s.append(time.process_time() - began_cpu)
        assert report.outcome is Outcome.NOTHING_TO_DO
        assert (report.exit_code, report.counts.ok, report.run.counts.rows) == (0, ROWS, 0)
    assert {call.operation for call in fault_proxy.calls} <= READING
    calls = len(fault_proxy.calls) // 3
    assert calls < 40
    count(f"reruns=3 writes=0 calls={calls} s={min(took_s):.2f} cpu_s={min(cpu_s):.2f}")
    assert min(cpu_s) < 3  # how long that takes is up to who else is on the machine

    said = subprocess.run([COMMAND, "run", str(spec)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert "nothing to do" in said.stdout
    assert {call.operation for call in fault_proxy.calls} <= READING
    assert list(faulty_bucket.store("out").list()) == there
