"""The promises of a store, on a local disk; tests/integration has the same for S3."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from typing_extensions import override

from quantbatch.errors import Refused, StorageError
from quantbatch.spec import Storage
from quantbatch.storage import (
    PRIVATE,
    LocalStore,
    S3Store,
    Store,
    local_folder,
    open_store,
    probe,
    redact,
    scratch_folder,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"), Storage())


def test_put_read_list_delete(store: Store) -> None:
    store.put("b/2.json", b"two")
    store.put("a.json", b"one")
    store.put("b/2.json", b"zwei")
    assert store.read("b/2.json") == b"zwei"
    assert [(info.key, info.size) for info in store.list() if PRIVATE not in info.key] == [
        ("a.json", 3),
        ("b/2.json", 4),
    ]
    assert [info.key for info in store.list("b")] == ["b/2.json"]
    store.delete("b/2.json")
    store.delete("b/2.json")
    assert list(store.list("b")) == []
    with pytest.raises(FileNotFoundError):
        store.read("b/2.json")


def test_keys_come_in_order_whatever_folders_they_are_in(store: Store) -> None:
    keys = ["a-b/1", "a/1", "a0/1", "b"]
    for key in keys:
        store.put(key, b"")
    found = [info.key for info in store.list() if PRIVATE not in info.key]
    assert found == sorted(keys)


def test_version_changes_with_the_object(store: Store) -> None:
    store.put("a", b"one")
    before = store.info("a")
    store.put("a", b"other")
    assert store.info("a").etag != before.etag
    assert abs(store.info("a").modified_s - time.time()) < 60


def test_claim_tells_what_is_there(store: Store) -> None:
    assert store.claim("c/1.json", b"mine") == b"mine"
    assert store.claim("c/1.json", b"yours") == b"mine"


def test_a_claim_that_somebody_removes_at_once_is_trouble(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `gc` does with the probe's, of a driver that slept for long in between."""
    real = os.link

    def link(source: str, target: Path) -> None:
        real(source, target)
        target.unlink()

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StorageError, match="written, then not found"):
        store.claim("c/1.json", b"mine")


def test_one_of_many_claims_wins(store: Store) -> None:
    found: list[bytes] = []
    barrier = threading.Barrier(8)

    def contend(name: int) -> None:
        barrier.wait()
        found.append(store.claim("k", str(name).encode()))

    threads = [threading.Thread(target=contend, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_what_is_put_is_on_the_disk_with_its_name(store: Store, quick_disk: list[int]) -> None:
    store.put("a", b"data")
    assert len(quick_disk) == 2, "the file and its folder"
    store.claim("b", b"data")
    assert len(quick_disk) == 4


def test_put_file_leaves_the_source(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "scratch"
    source.write_bytes(b"x" * 10_000_000)
    store.put_file("big", source)
    assert store.info("big").size == 10_000_000
    assert source.exists()


def test_take_file_moves_what_was_built_beside(store: Store, quick_disk: list[int]) -> None:
    with scratch_folder(store, "entry/attempt/scratch") as folder:
        (folder / "f").write_bytes(b"data")
        inode = (folder / "f").stat().st_ino
        store.take_file("entry/attempt/f", folder / "f")
        assert not (folder / "f").exists()
    assert not folder.exists()
    there = local_folder(store, "entry/attempt")
    assert there is not None
    assert (there / "f").stat().st_ino == inode
    assert store.read("entry/attempt/f") == b"data"
    assert len(quick_disk) == 2, "the file and its folder"


def test_scratch_that_cannot_be_made_is_one_clear_error() -> None:
    with (
        pytest.raises(StorageError, match="proc"),
        scratch_folder(open_store("/proc/nowhere", Storage()), "scratch"),
    ):
        pass


def test_a_failed_write_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        store.put("a", b"data")
    assert "make room" in caught.value.hint
    assert list(store.list()) == []


def test_a_stale_file_is_opened_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS, when another machine replaced it; but not for ever, and nothing else is."""
    store.put("a", b"data")
    read, errors = Path.read_bytes, [errno.ESTALE, errno.ESTALE]

    def stale(path: Path) -> bytes:
        if errors:
            number = errors.pop()
            raise OSError(number, os.strerror(number))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    assert store.read("a") == b"data"
    for errors in ([errno.ESTALE] * 9, [errno.EIO] * 9):
        with pytest.raises(StorageError):
            store.read("a")
        assert len(errors) >= 6


def test_no_reader_sees_a_file_that_is_being_written(tmp_path: Path) -> None:
    """A watcher that looks all the while sees each version whole, or none."""
    store = LocalStore(str(tmp_path))
    versions = [bytes([n]) * 200_000 for n in range(40)]
    seen: list[bytes] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for path in tmp_path.glob("*.parquet"):
                seen.append(path.read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for version in versions:
        store.put("part.parquet", version)
    stop.set()
    watcher.join()
    assert seen
    assert all(data in versions for data in seen)


def test_probe_accepts_a_good_store_and_leaves_nothing(store: Store) -> None:
    probe(store)
    assert list(store.list()) == []


class LyingStore(LocalStore):
    """A store that ignores the condition of a conditional put, as some S3 servers do."""

    @override
    def claim(self, key: str, data: bytes) -> bytes:
        self.put(key, data)
        return data


def test_probe_refuses_a_store_that_lies(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="replaced an object"):
        probe(LyingStore(str(tmp_path)))


class DeniedBucket:
    """What s3fs does with credentials that a bucket does not accept."""

    def __init__(self) -> None:
        self.calls = 0

    def pipe_file(self, *_: object, **__: object) -> None:
        self.calls += 1
        raise PermissionError("Access Denied")

    def cat_file(self, *_: object, **__: object) -> bytes:
        self.calls += 1
        raise PermissionError("Access Denied")


def test_wrong_credentials_are_one_error_after_two_calls() -> None:
    store = S3Store("s3://bucket/out", Storage())
    denied = DeniedBucket()
    store.__dict__["_fs"] = denied
    with pytest.raises(StorageError, match="access denied") as caught:
        probe(store)
    assert "credentials" in caught.value.hint
    assert denied.calls == 2


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("a file, not a folder")
    return path / "out"


def test_unwritable_output_is_one_clear_error(unwritable: Path) -> None:
    with pytest.raises(StorageError) as caught:
        probe(open_store(str(unwritable), Storage()))
    assert caught.value.hint


def test_a_folder_that_cannot_be_made_is_one_clear_error() -> None:
    with pytest.raises(StorageError, match="proc"):
        probe(open_store("/proc/nowhere", Storage()))


def test_unknown_scheme() -> None:
    with pytest.raises(StorageError, match="gopher"):
        open_store("gopher://x/y", Storage())


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("s3://AK:se/cr@et@bucket/x y", "s3://bucket/x y"),
        ("a s3://b/c@d http://h:80/e@f", "a s3://b/c@d http://h:80/e@f"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("https://h/a?X-Amz-Signature=abc&x=1 and more", "https://h/a and more"),
        ("plain text? yes", "plain text? yes"),
    ],
)
def test_redact(text: str, redacted: str) -> None:
    assert redact(text) == redacted


@pytest.mark.parametrize("text", ["x" * 300_000, "://" * 30_000, "://a:" * 30_000, "://?" * 30_000])
def test_redacting_takes_linear_time(text: str) -> None:
    began = time.process_time()
    redact(text)
    assert time.process_time() - began < 3
