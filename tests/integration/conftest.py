"""What integration tests share, each started once for the whole run: a Ray head, an S3 server."""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from quantbatch.spec import Storage
from quantbatch.storage import S3Store
from tests.faults.proxy import FaultProxy
from tests.integration.support import (
    Bucket,
    Head,
    answers,
    free_port,
    process,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


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
    # Lists in pages and uploads in parts of a size that tests reach.
    sizes = {"MOTO_S3_DEFAULT_MAX_KEYS": "20", "S3_UPLOAD_PART_MIN_SIZE": "1000"}
    with pytest.MonkeyPatch.context() as patch, process(command, log, os.environ | sizes):
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


@pytest.fixture
def fault_proxy(s3_endpoint: str) -> Iterator[FaultProxy]:
    """A proxy before the S3 server that makes trouble when it is told to."""
    with FaultProxy(s3_endpoint).serving() as proxy:
        yield proxy


@pytest.fixture
def faulty_bucket(bucket: Bucket, fault_proxy: FaultProxy) -> Bucket:
    """The fresh bucket of `bucket`, reached through the fault proxy."""
    return bucket._replace(storage=Storage(endpoint_url=fault_proxy.endpoint))


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[Head]:
    """A Ray head with 4 logical CPUs and 2 pretended GPUs, as `ray start --head` makes it.

    It begins after the S3 server, whose credentials it then has in its environment.
    """
    del s3_endpoint
    port, dashboard = free_port(), free_port()
    # Ray's sockets have paths of at most 107 characters, so its folder can't be pytest's.
    folder = Path(f"/tmp/qb-ray-{uuid.uuid4().hex[:6]}")
    # The head finds `python` of an entrypoint on its own PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_BACKEND_LOG_LEVEL": "fatal", "PATH": path}
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=4", "--num-gpus=2",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        # Jobs are submitted through the agent, whose usual port another head may have.
        f"--dashboard-agent-listen-port={free_port()}",
        f"--temp-dir={folder}", "--disable-usage-stats", f"--object-store-memory={512 << 20}",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("ray") / "log"
    with pytest.MonkeyPatch.context() as patch, process(command, log, env):
        url = f"http://127.0.0.1:{dashboard}"
        wait_for(lambda: answers(f"{url}/api/version"), timeout_s=90, what="the Ray head")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield Head(f"127.0.0.1:{port}", url, str(folder))
