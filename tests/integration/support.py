"""What the integration tests use: small jobs, drivers, servers, proofs."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from quantbatch.specfile import load_spec
from quantbatch.storage import S3Store
from quantbatch.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quantbatch.spec import Storage

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / "configs" / "quickstart" / "model"
ROWS, ROWS_PER_PART, ROWS_PER_CHUNK = 480, 100, 20
LONGEST_RUN_S = 120
COMMAND = str(Path(sys.executable).with_name("quantbatch"))
"""The command that a user types."""


def free_port() -> int:
    """Return a port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.1)


def answers(url: str) -> bool:
    """Tell whether a server answers at all."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@contextlib.contextmanager
def process(
    command: list[str], log: Path, env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server for a while; it and what it started end with it."""
    with log.open("wb") as file:
        started = subprocess.Popen(
            command, stdout=file, stderr=file, env=env, start_new_session=True
        )
        try:
            yield started
        finally:
            end(started.pid)
            started.wait()


def end(pid: int) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        for member in psutil.wait_procs(family, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


class Bucket(NamedTuple):
    """A bucket of the test server."""

    uri: str
    storage: Storage

    def store(self, prefix: str) -> S3Store:
        """Return a store at a prefix."""
        return S3Store(f"{self.uri}/{prefix}", self.storage)


class Head(NamedTuple):
    """A Ray head on this machine."""

    address: str
    dashboard: str
    folder: str
    """Where Ray keeps its logs."""


def write_spec(folder: Path, output: dict[str, Any]) -> Path:
    """Write input and spec of a job that answers for a few seconds."""
    (folder / "in").mkdir(parents=True)
    for number in range(4):
        first = number * ROWS // 4
        ids = list(range(first, first + ROWS // 4))
        table = pa.table({"id": ids, "text": [f"row {i} says hello" for i in ids]})
        pq.write_table(table, folder / "in" / f"{number}.parquet")
    fields = {
        "name": "kills",
        "input": {"uri": str(folder / "in"), "rows_per_chunk": ROWS_PER_CHUNK},
        "model": {"id": str(MODEL), "bits": 16},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_new_tokens": 8},
        "engine": {"kind": "echo", "batch_size": 32, "step_s": 0.15},
        "cluster": {"gpus_per_replica": 0},
        "output": {"rows_per_part": ROWS_PER_PART, **output},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def change(path: Path, **sections: dict[str, Any]) -> None:
    """Change fields of a spec file."""
    fields = yaml.safe_load(path.read_text())
    for name, values in sections.items():
        fields.setdefault(name, {}).update(values)
    path.write_text(yaml.safe_dump(fields))


def start(
    spec: Path, head: Head, *python: str, env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a driver that joins the running head.

    Args:
        spec: The job.
        head: The head.
        python: What Python is to run instead of the command of users, such as `-m` and a module.
        env: Further variables of its environment.
    """
    command = [sys.executable, *python] if python else [COMMAND]
    with (spec.parent / "log").open("ab") as log:
        return subprocess.Popen(
            [*command, "run", str(spec)],
            stdout=log,
            stderr=log,
            cwd=REPOSITORY,
            env=os.environ | {"RAY_ADDRESS": head.address, **(env or {})},
        )


def run_to_the_end(spec: Path, head: Head) -> int:
    """Run a driver until it ends by itself; return its exit code."""
    return start(spec, head).wait(LONGEST_RUN_S)


def proven(spec: Path) -> None:
    """Have `verify` prove a finished job, and look ourselves too."""
    found = verify(load_spec(spec))
    assert found.outcome == "proven", (found, (spec.parent / "log").read_text()[-3000:])
