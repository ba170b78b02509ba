"""Runs told to stop at random moments: each ends in its time, with nothing lost that was computed.

QUANTBATCH_TEST_DRAINS=50 QUANTBATCH_TEST_SEED=7 pytest -m slow tests/integration/test_drains.py
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from quantbatch.spec import Limits
from tests.integration.support import (
    LONGEST_RUN_S,
    REPOSITORY,
    proven,
    run_to_the_end,
    start,
    write_spec,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Count
    from tests.integration.support import Head

DRAINS = int(os.environ.get("QUANTBATCH_TEST_DRAINS", "50"))
SEED = int(os.environ.get("QUANTBATCH_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
DONE, STOPPED, BEFORE_IT_BEGAN = 0, 75, 130
GRACE_S = 10.0
"""For what a busy machine takes to end Ray's client and Python."""


def files(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_end_in_their_time(tmp_path: Path, ray_head: Head, count: Count) -> None:
    dice = random.Random(SEED)
    began = time.monotonic()
    undisturbed = write_spec(tmp_path / "undisturbed", {"uri": str(tmp_path / "undisturbed/out")})
    assert run_to_the_end(undisturbed, ray_head) == DONE
    whole_run_s = time.monotonic() - began
    drains = jobs = under_way = 0
    slowest_s = 0.0
    while drains < DRAINS:
        folder = tmp_path / str(jobs)
        spec = write_spec(folder, {"uri": str(folder / "out")})
        code = STOPPED
        while code != DONE:
            driver = start(spec, ray_head)
            time.sleep(dice.uniform(0.5, whole_run_s))
            number = dice.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT])
            driver.send_signal(number)
            told = time.monotonic()
            code = driver.wait(Limits().drain_s + GRACE_S)
            said = (folder / "log").read_text()
            if code == -number and "kills: done" in said:
                code = DONE  # the signal came when Python was ending
            assert code in (DONE, STOPPED, BEFORE_IT_BEGAN), said[-3000:]
            assert "Traceback" not in said
            private = folder / "out" / "_quantbatch"
            assert files(private / "data") == files(private / "commits"), "work was lost"
            if code != DONE:
                drains += 1
                under_way += '"event": "stopping"' in said.rsplit('"event": "planned"', 1)[-1]
                slowest_s = max(slowest_s, time.monotonic() - told)
        proven(spec)
        jobs += 1
    count(
        f"drains={drains} with chunks under way={under_way} jobs={jobs} in time={drains} "
        f"slowest={slowest_s:.1f} s lost=0 wrong=0 seed={SEED}"
    )


@pytest.mark.parametrize("thread", ["reader", "executor"])
def test_threads_of_a_dataset_end_before_ray_does(ray_head: Head, thread: str) -> None:
    """Else a reader's would end the process with code 1, if it frees a reference meanwhile."""
    left = subprocess.run(
        [sys.executable, "-m", "tests.integration.leaving", thread],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"RAY_ADDRESS": ray_head.address},
        timeout=LONGEST_RUN_S,
        check=False,
    )
    assert left.returncode == STOPPED, left.stderr
