"""The only door to a file system.

A `Store` is one folder, local or on S3, and reaches everything under it by keys with forward
slashes. What a store must guarantee, which `probe` checks as far as can be seen from outside (it is
what Delta's log store asks for):

1. `put` is atomic: a reader sees the whole new object or what was there before.
2. Of many conditional puts of one small object one wins, and none replaces what is there: If-None-
   Match on PutObject, or a hard link. (Ceph 16 ignores it where an upload in parts ends, and
   answers 412 to every If-Match: neither is asked for.)
3. What was put is read and listed from then on, by everybody.

No rename, no lock, no clock and no second kind of condition is needed.

What we do when an answer is lost, so that nobody knows what was done: calls that may be done twice
are done again (`patience` tells how long, `requests` which). A claim never says "you won" or "you
lost": boto3, s3fs and obstore all report their own success as "already exists" when they ask again
(measured). It says what the key holds afterwards; callers put an attempt id in what they claim, and
compare. Nothing is ever deleted because a call failed: it may yet take effect.

Nothing is streamed to a store from a `with open(...)` block: s3fs commits the partial object when
an exception passes through (measured). Objects are built in memory or in a local scratch file and
put once; an upload in parts is seen when it is complete, or never.
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
from quantbatch.places import without_credentials
from quantbatch.storage.contract import PRIVATE, FileInfo, Store
from quantbatch.storage.local import LocalStore
from quantbatch.storage.s3 import S3Store
from quantbatch.storage.trouble import NO_ROOM, explained, redact

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


def open_store(uri: str, storage: Storage, *, known: bool = False) -> Store:
    """Return the store at a local path, file:// or s3:// URI; opens no connection.

    Args:
        uri: Where.
        storage: How to reach it, if it is S3.
        known: Whether this job has been answered by it, so that silence is an outage.

    Raises:
        StorageError: It is no place that we know, or holds credentials.
    """
    try:
        without_credentials(uri)
    except ValueError as error:
        raise StorageError(str(error)) from None
    if uri.startswith("s3:"):
        if not re.match(r"s3://[^/]", uri):
            raise StorageError(f"{uri}: names no bucket", "write s3://bucket/prefix")
        return S3Store(uri.rstrip("/"), storage, known)
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

    Six calls on S3; two if it refuses us.

    Raises:
        StorageError: The store can't be written.
        Refused: A second claim of a key replaced the first, or what was claimed is not listed.
    """
    folder = f"{PRIVATE}/probe"
    key = f"{folder}/{uuid.uuid4().hex}"
    first = store.claim(key, b"first")
    second = store.claim(key, b"second")
    listed = {info.key: info.size for info in store.list(folder)}
    store.delete(key)
    if (first, second) != (b"first", b"first"):
        raise Refused(
            f"{redact(store.uri)}: the store replaced an object that a conditional put must keep",
            "an output needs a store that honours If-None-Match, as AWS S3 and local disks do",
        )
    if listed.get(key) != len(first):
        raise Refused(
            f"{redact(store.uri)}: the store does not list what was just put",
            "an output needs a store whose listings are consistent, as AWS S3 and local disks are",
        )


@contextlib.contextmanager
def scratch_file() -> Iterator[Path]:
    """Give the path of a local file to build an object in; it is removed afterwards.

    Raises:
        StorageError: There is no room for it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="quantbatch-") as folder:
            yield Path(folder, "object")
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise StorageError(
            f"{tempfile.gettempdir()}: {os.strerror(error.errno)}, for a file of the output",
            "make room there or set TMPDIR to a folder with room, and run the same command again",
        ) from error


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
