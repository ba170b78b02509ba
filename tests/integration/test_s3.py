"""The promises of a store, on S3."""

from __future__ import annotations

import pickle
import threading
import time
from typing import TYPE_CHECKING

import pytest

from quantbatch import gc
from quantbatch.errors import StorageError
from quantbatch.spec import Storage
from quantbatch.storage import S3Store, probe, uploads

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.support import Bucket


def test_put_read_list_delete(bucket: Bucket) -> None:
    store = bucket.store("out")
    store.put("b/2.json", b"two")
    store.put("a.json", b"one")
    assert store.read("b/2.json") == b"two"
    assert [(info.key, info.size) for info in store.list()] == [("a.json", 3), ("b/2.json", 3)]
    assert [info.key for info in store.list("b")] == ["b/2.json"]
    assert store.info("a.json").etag == next(store.list()).etag
    for info in (store.info("a.json"), next(store.list())):
        assert abs(info.modified_s - time.time()) < 60
    with store.open("a.json") as file:
        file.seek(1)
        assert file.read(1) == b"n"
    store.delete("a.json")
    store.delete("a.json")
    with pytest.raises(FileNotFoundError):
        store.read("a.json")


@pytest.mark.parametrize("prefix", ["", "b"])
def test_what_is_put_while_a_store_is_listed_is_no_name_of_its_own(
    bucket: Bucket, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rival's first key in an empty output: s3fs then looks again, and finds a folder."""
    store = bucket.store("out")
    listed = store._fs._lsdir

    async def then_put(*what: object, **how: object) -> object:
        found = await listed(*what, **how)
        await store._fs._pipe_file(store._path("b/2.json"), b"two")
        return found

    monkeypatch.setattr(store._fs, "_lsdir", then_put)
    assert [info.key for info in store.list(prefix)] in ([], ["b/2.json"])
    monkeypatch.undo()
    assert [info.key for info in store.list(prefix)] == ["b/2.json"]


def test_the_marker_of_a_folder_is_no_file(bucket: Bucket) -> None:
    """Consoles make one for a folder that they show."""
    parent = bucket.store("")
    parent._fs.call_s3("put_object", Bucket=bucket.uri.removeprefix("s3://"), Key="out/", Body=b"")
    store = bucket.store("out")
    assert list(store.list()) == []
    store.put("b/2.json", b"two")
    assert [info.key for info in store.list()] == ["b/2.json"]


def test_put_file(bucket: Bucket, tmp_path: Path) -> None:
    path = tmp_path / "scratch"
    path.write_bytes(b"x" * 6_000_000)
    bucket.store("out").put_file("big", path)
    assert bucket.store("out").info("big").size == 6_000_000


def test_claim_tells_what_is_there(bucket: Bucket) -> None:
    store = bucket.store("out")
    assert store.claim("k", b"mine") == b"mine"
    assert store.claim("k", b"yours") == b"mine"


def test_one_of_many_claims_wins(bucket: Bucket) -> None:
    found: list[bytes] = []

    def contend(name: int) -> None:
        found.append(bucket.store("out").claim("k", str(name).encode()))

    threads = [threading.Thread(target=contend, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1


def test_probe_and_pickle(bucket: Bucket) -> None:
    store = bucket.store("out")
    probe(store)
    again = pickle.loads(pickle.dumps(store))
    again.put("a", b"1")
    assert store.read("a") == b"1"
    assert [info.key for info in store.list()] == ["a"]


def test_uploads_that_were_never_completed_are_found_and_aborted(bucket: Bucket) -> None:
    store = bucket.store("out")
    name = bucket.uri.removeprefix("s3://")
    for key in ("out/a", "out/b", "out2/c"):
        store._fs.call_s3("create_multipart_upload", Bucket=name, Key=key)
    found = uploads.unfinished(store)
    assert [upload.path for upload in found] == ["out/a", "out/b"]
    assert all(0 < upload.begun_s < time.time() + 60 for upload in found)  # moto: always in 2010
    uploads.abort(store, found[0])
    assert uploads.unfinished(store) == found[1:]
    assert list(store.list()) == []


def test_gc_on_s3(bucket: Bucket) -> None:
    store = bucket.store("out")
    store.put("_quantbatch/job.json", b'{"format": 2, "identity": {}, "spec": {}}')
    store.put("_quantbatch/leases/000000.json", b"{}")
    name = bucket.uri.removeprefix("s3://")
    store._fs.call_s3("create_multipart_upload", Bucket=name, Key="out/part-000000.parquet")
    assert uploads.unfinished(store)
    done = gc.tidy(store.uri, bucket.storage, older_than_s=600)
    assert done.removed == {"uploads": [0]}  # moto says that all began in 2010
    done = gc.tidy(store.uri, bucket.storage, older_than_s=-600)
    assert done.removed == {"leases": [2]}
    assert [info.key for info in store.list()] == ["_quantbatch/job.json"]
    assert uploads.unfinished(store) == []


def test_a_missing_bucket_is_one_quick_error(s3_endpoint: str) -> None:
    store = S3Store("s3://no-such-bucket-here/out", Storage(endpoint_url=s3_endpoint), known=True)
    started = time.monotonic()
    with pytest.raises(StorageError, match="bucket") as caught:
        probe(store)
    assert caught.value.hint
    assert time.monotonic() - started < 20, "1 s but on a busy machine; trying again takes 150 s"


def test_no_server_is_one_error() -> None:
    store = S3Store("s3://bucket/out", Storage(endpoint_url="http://127.0.0.1:9", anonymous=True))
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        probe(store)
    assert caught.value.hint
    assert time.monotonic() - started < 60, "12 s but on a busy machine"
