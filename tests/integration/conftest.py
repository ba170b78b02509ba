"""What integration tests share, each started once for the whole run: a Ray head, an S3 server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from quantbatch.spec import Storage
from quantbatch.storage import S3Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / "configs" / "quickstart" / "model"


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
def process(command: list[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server for a while; it and what it started end with it."""
    with log.open("wb") as file:
        started = subprocess.Popen(
            command, stdout=file, stderr=file, env=env, start_new_session=True
        )
        try:
            yield started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGTERM)
            try:
                started.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


class Bucket(NamedTuple):
    """A bucket of the test server."""

    uri: str
    storage: Storage

    def store(self, prefix: str) -> S3Store:
        """Return a store at a prefix."""
        return S3Store(f"{self.uri}/{prefix}", self.storage)


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an S3 server on this machine, with credentials for it in the environment."""
    port = free_port()
    log = tmp_path_factory.mktemp("moto") / "log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    credentials = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    endpoint = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch, process(command, log, dict(os.environ)):
        for name, value in credentials.items():
            patch.setenv(name, value)
        wait_for(lambda: answers(endpoint), timeout_s=60, what="moto")
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str) -> Bucket:
    """A fresh bucket."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    storage = Storage(endpoint_url=s3_endpoint)
    S3Store(f"s3://{name}", storage)._fs.mkdir(name)
    return Bucket(f"s3://{name}", storage)


class Head(NamedTuple):
    """A Ray head on this machine."""

    address: str
    dashboard: str


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A Ray head with 4 logical CPUs, as `ray start --head` makes it; drivers join it."""
    port, dashboard = free_port(), free_port()
    # Ray's sockets have paths of at most 107 characters, so its folder can't be pytest's.
    folder = Path(f"/tmp/qb-ray-{uuid.uuid4().hex[:6]}")
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=4",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--temp-dir={folder}", "--disable-usage-stats", f"--object-store-memory={512 << 20}",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("ray") / "log"
    with pytest.MonkeyPatch.context() as patch, process(command, log, env):
        url = f"http://127.0.0.1:{dashboard}"
        wait_for(lambda: answers(f"{url}/api/version"), timeout_s=90, what="the Ray head")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield Head(f"127.0.0.1:{port}", url)
