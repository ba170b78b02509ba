"""`ray job submit`: to the end, stopped half-way and submitted again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING

import pytest

from tests.integration.support import REPOSITORY, proven, wait_for, write_spec

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.support import Head


def ray_job(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `ray job ...` as a person would."""
    verb, *rest = arguments
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "job",
            verb,
            f"--address={head.dashboard}",
            *rest,
        ],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=REPOSITORY,
        check=False,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )


def submit(head: Head, spec: Path, *options: str, name: str) -> subprocess.CompletedProcess[str]:
    arguments = [
        "submit", "--working-dir=.", f"--submission-id={name}", *options,
        "--", "python", "jobs/run.py", str(spec),
    ]  # fmt: skip
    deadline = time.monotonic() + 90
    while True:
        done = ray_job(head, *arguments)
        # On a busy machine the head answers before its agent is there.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(2)


def stop(head: Head, name: str) -> None:
    """Do what `ray job stop` does, at once: the command takes seconds to start, in which a job on a
    busy machine may get to its end.
    """
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/{name}/stop", method="POST")
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response) == {"stopped": True}


def ended(head: Head, name: str) -> bool:
    """Tell whether a job has ended, however."""
    with urllib.request.urlopen(f"{head.dashboard}/api/jobs/{name}", timeout=60) as response:
        status: str = json.load(response)["status"]
        return status in ("STOPPED", "FAILED", "SUCCEEDED")


@pytest.mark.timeout(240)
def test_submitted_and_waited_for(tmp_path: Path, ray_head: Head) -> None:
    spec = write_spec(tmp_path, {"uri": str(tmp_path / "out")})
    done = submit(ray_head, spec, name="whole")
    assert done.returncode == 0, done.stdout + done.stderr
    documents = [line for line in done.stdout.splitlines() if line.startswith("{")]
    outcome = json.loads(documents[-1])
    assert (outcome["outcome"], outcome["exit_code"], outcome["rows"]) == ("done", 0, 480)
    proven(spec)


@pytest.mark.timeout(300)
def test_stopped_half_way_and_submitted_again(tmp_path: Path, ray_head: Head) -> None:
    spec = write_spec(tmp_path, {"uri": str(tmp_path / "out")})
    patience = "--runtime-env=jobs/runtime_env.yaml"
    started = submit(ray_head, spec, patience, "--no-wait", name="stopped")
    assert started.returncode == 0, started.stdout + started.stderr
    commits = tmp_path / "out" / "_quantbatch" / "commits"

    def some() -> bool:
        return commits.exists() and sum(1 for _ in commits.iterdir()) >= 4

    wait_for(some, timeout_s=90, what="a few commits")
    stop(ray_head, "stopped")
    wait_for(lambda: ended(ray_head, "stopped"), timeout_s=60, what="the job to end")
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    before = sum(1 for _ in commits.iterdir())
    assert before < 24
    # It had the time to finish what was under way.
    computed = list((tmp_path / "out" / "_quantbatch" / "data").iterdir())
    assert len(computed) == before

    again = submit(ray_head, spec, name="continued")
    assert again.returncode == 0, again.stdout + again.stderr
    proven(spec)


@pytest.mark.timeout(120)
def test_a_mistake_is_told_in_the_outcome(tmp_path: Path, ray_head: Head) -> None:
    spec = write_spec(tmp_path, {"uri": str(tmp_path / "out")})
    spec.write_text(spec.read_text().replace("max_new_tokens", "max_tokens"))
    done = submit(ray_head, spec, name="mistaken")
    assert done.returncode == 1
    outcome = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    assert outcome["exit_code"] == 2
    assert "sampling.max_tokens" in outcome["error"]
