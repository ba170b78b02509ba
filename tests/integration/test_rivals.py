"""Several drivers on one output, on machines whose clocks are two hours apart.

Each row is answered once, and little is computed twice: leases go by the store's clock.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quantbatch.leases import DRIVERS
from quantbatch.storage import LocalStore
from tests.integration.counted import rows_begun
from tests.integration.support import (
    LONGEST_RUN_S,
    REPOSITORY,
    ROWS,
    ROWS_PER_CHUNK,
    ROWS_PER_PART,
    change,
    proven,
    start,
    write_spec,
)
from tests.integration.watching import Folder, Prefix, Watcher

if TYPE_CHECKING:
    from quantbatch.storage import Store
    from tests.conftest import Count
    from tests.faults.proxy import FaultProxy
    from tests.integration.support import Bucket, Head

AHEAD = Path(__file__).with_name("two_hours_ahead")
COUNTED = ("-m", "tests.integration.counted")
LONG_S = 4 * LONGEST_RUN_S
"""Five drivers on two busy cores."""


def commits(store: Store) -> int:
    return sum(1 for _ in store.list("_quantbatch/commits"))


def write(folder: Path, output: dict[str, Any]) -> Path:
    spec = write_spec(folder, output)
    change(spec, cluster={"chunks_in_flight": 2, "cpus_per_replica": 0.5})
    return spec


def two_hours_ahead() -> dict[str, str]:
    """Return what makes the clock of a driver wrong."""
    return {"PYTHONPATH": os.pathsep.join([str(AHEAD), str(REPOSITORY)])}


def clock_of(env: dict[str, str]) -> str:
    command = [sys.executable, "-c", "import time; print(time.time())"]
    return subprocess.check_output(command, env=os.environ | env, text=True)


@pytest.mark.timeout(2 * LONG_S)
@pytest.mark.parametrize(("drivers", "kind"), [(2, "local"), (5, "s3")])
def test_rivals_share_the_work(
    tmp_path: Path,
    ray_head: Head,
    bucket: Bucket,
    faulty_bucket: Bucket,
    fault_proxy: FaultProxy,
    drivers: int,
    kind: str,
    count: Count,
) -> None:
    for trouble in ("503", "reset_after", "500_after"):
        fault_proxy.fail(trouble, probability=0.01)
    if kind == "s3":
        storage = faulty_bucket.storage.model_dump(exclude_defaults=True)
        spec = write(tmp_path, {"uri": f"{faulty_bucket.uri}/out", "storage": storage})
        store: Store = bucket.store("out")
        endpoint = bucket.storage.endpoint_url or ""
        view: Folder | Prefix = Prefix(endpoint, bucket.uri.removeprefix("s3://"), "out")
    else:
        spec = write(tmp_path, {"uri": str(tmp_path / "out")})
        store, view = LocalStore(str(tmp_path / "out")), Folder(tmp_path / "out")
    watcher = Watcher({"rivals": view})
    assert float(clock_of(two_hours_ahead())) > time.time() + 7000
    with watcher.watching():
        running = [
            start(spec, ray_head, *COUNTED, env=two_hours_ahead() if number else None)
            for number in range(drivers)
        ]
        codes = [driver.wait(LONG_S) for driver in running]
    assert codes == [0] * drivers, (tmp_path / "log").read_text()[-3000:]
    proven(spec)
    assert commits(store) == ROWS / ROWS_PER_CHUNK
    assert list(store.list(DRIVERS)) == []
    wasted = rows_begun(str(tmp_path / "in")) - ROWS
    count(f"{drivers} drivers, {kind}: wrong=0 rows={ROWS} wasted={wasted} {watcher.looks}")
    assert watcher.wrong == []
    assert 0 <= wasted <= ROWS_PER_PART * (drivers - 1)
