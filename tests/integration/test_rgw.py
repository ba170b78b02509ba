"""The promises of a store, and a job, on a real S3 server: Ceph's, by tests/faults/rgw.sh.

Slow: `pytest -m slow tests/integration/test_rgw.py` gets 60 MB of packages by the machine's apt,
once if QUANTBATCH_TEST_RGW names a folder to keep them in.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from quantbatch.errors import StorageError
from quantbatch.spec import Storage
from quantbatch.storage import S3Store, probe, s3
from tests.faults.proxy import QUICK, FaultProxy
from tests.integration.claims import contended
from tests.integration.support import (
    Bucket,
    answers,
    free_port,
    process,
    proven,
    run_to_the_end,
    wait_for,
    write_spec,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Count
    from tests.integration.support import Head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).parents[1] / "faults" / "rgw.sh"


@pytest.fixture(scope="session")
def rgw(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[str]:
    """Address of the server; its credentials are those of the other one."""
    del s3_endpoint
    if not shutil.which("apt-get"):
        pytest.skip("no apt-get: the server comes from Debian's packages")
    folder = Path(os.environ.get("QUANTBATCH_TEST_RGW") or tmp_path_factory.mktemp("rgw"))
    port, log = free_port(), tmp_path_factory.mktemp("rgw-log") / "log"
    command = ["bash", str(SCRIPT), str(folder), str(port), str(free_port())]
    endpoint = f"http://127.0.0.1:{port}"
    with process(command, log, dict(os.environ)) as server:
        wait_for(lambda: answers(endpoint) or server.poll() is not None, timeout_s=180, what="Ceph")
        if server.poll() is not None:
            pytest.skip(f"Ceph did not start: {log.read_text()[-1000:]}")
        yield endpoint


@pytest.fixture
def rgw_proxy(rgw: str) -> Iterator[FaultProxy]:
    with FaultProxy(rgw).serving() as proxy:
        yield proxy


@pytest.fixture
def rgw_bucket(rgw_proxy: FaultProxy) -> Bucket:
    """A fresh bucket, reached through a fault proxy."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    storage = Storage(endpoint_url=rgw_proxy.endpoint)
    S3Store(f"s3://{name}", storage)._fs.mkdir(name)
    return Bucket(f"s3://{name}", storage)


def test_the_promises_of_a_store(rgw_bucket: Bucket, tmp_path: Path) -> None:
    store = rgw_bucket.store("out")
    probe(store)
    store.put("b/2", b"two")
    store.put("a", b"one")
    store.put("b/2", b"zwei")
    assert [(info.key, info.size) for info in store.list()] == [("a", 3), ("b/2", 4)]
    with store.open("b/2") as file:
        file.seek(1)
        assert file.read(2) == b"we"
    store.delete("a")
    store.delete("a")
    with pytest.raises(FileNotFoundError):
        store.read("a")
    with pytest.raises(FileNotFoundError):
        store.info("a")


def test_uploads_in_parts(
    rgw_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    data = os.urandom(12 << 20)
    path = tmp_path / "big"
    path.write_bytes(data)
    store = rgw_bucket.store("out")
    store.put_file("big", path)
    assert store.read("big") == data


def test_one_of_many_claims_wins_whatever_answers_are_lost(
    rgw_bucket: Bucket, rgw_proxy: FaultProxy, count: Count
) -> None:
    count(f"Ceph: {contended(rgw_bucket, rgw_proxy, claims=100, rivals=4)}")


def test_what_is_refused(rgw_bucket: Bucket, rgw_proxy: FaultProxy, rgw: str) -> None:
    rgw_proxy.clear()
    with pytest.raises(StorageError, match="no such bucket"):
        probe(S3Store("s3://no-such-bucket-here/out", rgw_bucket.storage))
    assert rgw_proxy.count() <= 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        rgw_proxy.clear()
        with pytest.raises(StorageError, match="access denied"):
            probe(rgw_bucket.store("out"))
        assert rgw_proxy.count() <= 2


def test_a_job_in_trouble(
    tmp_path: Path, ray_head: Head, rgw_bucket: Bucket, rgw_proxy: FaultProxy, count: Count
) -> None:
    storage = rgw_bucket.storage.model_dump(exclude_defaults=True)
    spec = write_spec(tmp_path, {"uri": f"{rgw_bucket.uri}/out", "storage": storage})
    for kind in QUICK:
        rgw_proxy.fail(kind, probability=0.05)
    assert run_to_the_end(spec, ray_head) == 0, (tmp_path / "log").read_text()[-3000:]
    calls, faults = rgw_proxy.count(), rgw_proxy.faults
    rgw_proxy.clear()
    proven(spec)
    count(f"Ceph: job calls={calls} faults={faults} wrong=0")
