"""The only door to a file system.

A `Store` is one folder, local or on S3, and reaches everything under it by keys with forward
slashes. It promises three things, which the ledger needs and `probe` checks (they are those of
Delta's log store):

1. `put` is atomic: a reader sees the whole new object or what was there before.
2. `claim` writes a key only if it does not exist, and says what the key holds afterwards. It never
   says "you won" or "you lost": when the answer to a conditional put gets lost, boto3, s3fs and
   obstore all report their own success as "already exists" (measured). Callers put an attempt id in
   what they claim and compare it with what is there.
3. `list` shows what was put before.

Nothing is streamed to a store from a `with open(...)` block: s3fs commits the partial object when
an exception passes through (measured). Objects are built in memory or in a local scratch file and
put once.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from quantbatch.errors import Refused, StorageError
from quantbatch.storage.contract import PRIVATE, FileInfo, Store
from quantbatch.storage.local import LocalStore
from quantbatch.storage.s3 import S3Store
from quantbatch.storage.trouble import explained, redact

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantbatch.spec import Storage

__all__ = [
    "PRIVATE",
    "FileInfo",
    "LocalStore",
    "S3Store",
    "Store",
    "local_folder",
    "open_store",
    "probe",
    "redact",
    "scratch_file",
    "scratch_folder",
]


def open_store(uri: str, storage: Storage) -> Store:
    """Return the store at a local path, file:// or s3:// URI; opens no connection."""
    if uri.startswith("s3:"):
        if not re.match(r"s3://[^/]", uri):
            raise StorageError(f"{uri}: names no bucket", "write s3://bucket/prefix")
        return S3Store(uri.rstrip("/"), storage)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme and scheme[1] != "file":
        raise StorageError(
            f"{redact(uri)}: no store is known for {scheme[1]}://",
            "use a local path, file:// or s3://",
        )
    try:
        path = Path(uri.removeprefix("file://")).expanduser()
    except RuntimeError as error:
        raise StorageError(f"{uri}: {error}", "write the path out") from None
    return LocalStore(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links


def probe(store: Store) -> None:
    """Refuse a store that can't be written to or that breaks the promises of this module.

    Raises:
        StorageError: The store can't be written.
        Refused: A second claim of a key replaced the first.
    """
    key = f"{PRIVATE}/probe/{uuid.uuid4().hex}"
    first = store.claim(key, b"first")
    second = store.claim(key, b"second")
    store.delete(key)
    if (first, second) != (b"first", b"first"):
        raise Refused(
            f"{redact(store.uri)}: the store replaced an object that a conditional put must keep",
            "an output needs a store that honours If-None-Match, as AWS S3 and local disks do",
        )


@contextlib.contextmanager
def scratch_file() -> Iterator[Path]:
    """Give the path of a local file to build an object in; it is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="quantbatch-") as folder:
        yield Path(folder, "object")


def local_folder(store: Store, key: str) -> Path | None:
    """Return where the objects under a key lie as files; None if they don't, as on S3."""
    return store._path(key) if isinstance(store, LocalStore) else None


@contextlib.contextmanager
def scratch_folder(store: Store, key: str) -> Iterator[Path]:
    """Give a folder to build objects in that `Store.take_file` takes; it is removed afterwards.

    Args:
        store: Where the objects go.
        key: Nobody else's. On a local disk the folder is there, so that no file is copied.
    """
    there = local_folder(store, key)
    if there is None:
        with tempfile.TemporaryDirectory(prefix="quantbatch-") as folder:
            yield Path(folder)
        return
    with explained(store.uri, writing=True):
        there.mkdir(parents=True)
    try:
        yield there
    finally:
        shutil.rmtree(there, ignore_errors=True)
